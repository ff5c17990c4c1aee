"""``python -m testbed.vm run [options] -- COMMAND…``."""

from __future__ import annotations

import argparse
import subprocess
import sys

from rdmanet.errors import RdmanetError
from rdmanet.model import RdmaMode
from testbed.kernel import prepare_distribution, why_not_here
from testbed.progress import say
from testbed.vm.runner import GuestFailure, run


def main(arguments: list[str] | None = None) -> int:
    """Exit status: the command's own; 124 after a time-out, 125 when the virtual machine failed."""
    parser = argparse.ArgumentParser(prog="python -m testbed.vm", description=__doc__)
    runs = parser.add_subparsers(dest="action", required=True).add_parser("run", help="run a command in a new VM")
    runs.add_argument("--rdma-mode", type=RdmaMode, choices=list(RdmaMode), default=RdmaMode.SHARED)
    runs.add_argument(
        "--if-needed", action="store_true", help="run it right here where the running kernel can do it in this mode"
    )
    runs.add_argument("--smp", type=int, default=2, help="virtual CPUs (2)")
    runs.add_argument("--memory-mb", type=int, default=4096, help="MiB of memory (4096)")
    runs.add_argument("--icount", action="store_true", help="virtual time counts instructions; one CPU")
    runs.add_argument("--timeout-s", type=float, help="end the VM after so many seconds")
    runs.add_argument("--no-kvm", action="store_true", help="do not try hardware virtualisation")
    runs.add_argument(
        "--kernel",
        choices=("newest", "distribution"),
        default="newest",
        help="Debian's newest kernel, or that of this machine's own Debian release",
    )
    runs.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("name the command after --")
    try:
        if options.if_needed and not why_not_here(options.rdma_mode):
            return subprocess.run(command, check=False).returncode
        return run(
            command,
            rdma_mode=options.rdma_mode,
            smp=options.smp,
            memory_mb=options.memory_mb,
            icount=options.icount,
            timeout_s=options.timeout_s,
            hardware=False if options.no_kvm else None,
            kernel=prepare_distribution() if options.kernel == "distribution" else None,
        )
    except GuestFailure as error:
        say(str(error))
        return 124 if error.operation == "time-out" else 125
    except RdmanetError as error:
        say(str(error))
        return 125
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
