"""What a person types. Imports what a command needs when it runs: `rdmanet --help` should not wait for pyroute2."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rdmanet import __version__, config
from rdmanet.client import ask
from rdmanet.commands import flows, install, monitor, objects, repair, run
from rdmanet.errors import RdmanetError, UnavailableError

#: From one `rdmanet rdma --watch` to the next.
WATCH_S = 1.0
SWAP_TIMEOUT_S = 120.0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 1 refused with a sentence, 2 wrong usage."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except RdmanetError as error:
        print(f"rdmanet: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rdmanet", description="The network of a host that runs containers, kernel path and RDMA path."
    )
    parser.add_argument("--version", action="version", version=f"rdmanet {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help=f"configuration (default {config.DEFAULT_PATH})"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    agent = commands.add_parser("agent", parents=[common], help="run the agent in the foreground")
    agent.set_defaults(run=_agent)

    plugin = commands.add_parser(
        "device-plugin", parents=[common], help="tell kubelet of this host's RDMA devices, in the foreground"
    )
    plugin.set_defaults(run=_plugin)

    status = commands.add_parser("status", parents=[common], help="show pods, devices and leases")
    status.add_argument("-o", "--output", choices=("table", "json"), default="table")
    status.set_defaults(run=_status)

    rdma = commands.add_parser("rdma", parents=[common], help="show RDMA devices, pods and leases with what they count")
    rdma.add_argument("-o", "--output", choices=("table", "json"), default="table")
    rdma.add_argument("-w", "--watch", action="store_true", help="again each second, until Ctrl-C")
    rdma.set_defaults(run=_rdma)

    doctor = commands.add_parser(
        "doctor", parents=[common], help="say what this host can and cannot do, and what to do about it"
    )
    doctor.add_argument("-o", "--output", choices=("table", "json"), default="table")
    doctor.set_defaults(run=_doctor)

    uninstall = commands.add_parser(
        "uninstall", parents=[common], help="take everything back that rdmanet did to this host"
    )
    uninstall.set_defaults(run=_uninstall)

    install.add_to(commands, common)
    objects.add_to(commands, common)
    monitor.add_to(commands, common)
    flows.add_to(commands, common)
    repair.add_to(commands, common)
    run.add_to(commands, common)

    datapath = commands.add_parser("datapath", help="compile the eBPF artifact, or swap it under traffic")
    actions = datapath.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser(
        "build", parents=[common], help="compile (needs bcc and kernel headers; the agent needs neither)"
    )
    build.add_argument("--output", type=Path, default=None, metavar="DIR", help="default: datapath.artifact_dir")
    build.set_defaults(run=_build)
    swap = actions.add_parser("swap", parents=[common], help="put the artifact on disk under the running traffic")
    swap.add_argument("--previous", action="store_true", help="the one that ran before, which starts then keep")
    swap.set_defaults(run=_swap)
    return parser


def _agent(chosen: argparse.Namespace) -> int:
    from rdmanet import agent

    return agent.run(config.load(chosen.config))


def _plugin(chosen: argparse.Namespace) -> int:
    try:
        from rdmanet.kubelet import plugin
    except ImportError as error:
        raise UnavailableError(
            f"The device plugin needs grpcio, protobuf and aiohttp ({error}): pip install 'rdmanet[kubernetes]'."
        ) from error
    return plugin.run(config.load(chosen.config))


def _status(chosen: argparse.Namespace) -> int:
    from rdmanet import show

    document = ask(config.load(chosen.config).agent.socket, "/v1/status")
    print(json.dumps(document, indent=2) if chosen.output == "json" else show.status(document))
    return 0


def _rdma(chosen: argparse.Namespace) -> int:
    path = config.load(chosen.config).agent.socket
    try:
        _show_rdma(path, table=chosen.output == "table", watch=chosen.watch)
    except KeyboardInterrupt:
        if not chosen.watch:
            raise
    return 0


def _show_rdma(path: Path, *, table: bool, watch: bool) -> None:
    from rdmanet import show

    # Of terminals the screen is cleared; in a file or pipe one is behind the other.
    clear = "\x1b[H\x1b[J" if watch and sys.stdout.isatty() else ""
    before, before_s = None, 0.0
    while True:
        document, now_s = ask(path, "/v1/rdma"), time.monotonic()
        if table:
            print(clear + show.rdma(document, before, now_s - before_s), end="\n\n" if watch else "\n", flush=True)
        else:
            print(json.dumps(document, indent=None if watch else 2), flush=True)
        if not watch:
            return
        before, before_s = document, now_s
        time.sleep(max(0.0, now_s + WATCH_S - time.monotonic()))


def _doctor(chosen: argparse.Namespace) -> int:
    import dataclasses

    from rdmanet import doctor, show

    findings = doctor.examine(config.load(chosen.config))
    if chosen.output == "json":
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print(show.table(("check", "verdict", ""), [(f.check, f.verdict, f.sentence) for f in findings]))
    return 1 if any(f.verdict is doctor.Verdict.MISSING for f in findings) else 0


def _uninstall(chosen: argparse.Namespace) -> int:
    import asyncio

    from rdmanet.run import launch
    from rdmanet.uninstall import uninstall

    known = config.load(chosen.config)
    asyncio.run(launch.cleanup(known))  # their attachments go below in any case
    uninstall(known)
    return 0


def _build(chosen: argparse.Namespace) -> int:
    from rdmanet.datapath import compiler

    return int(compiler.main(["--output", str(chosen.output or config.load(chosen.config).datapath.artifact_dir)]))


def _swap(chosen: argparse.Namespace) -> int:
    url = "/v1/swap?previous=1" if chosen.previous else "/v1/swap"
    # Two verifier runs of all programs, on a busy machine.
    answer = ask(config.load(chosen.config).agent.socket, url, method="POST", timeout_s=SWAP_TIMEOUT_S)
    for hook, program in answer.items():
        print(f"{hook}: {program}")
    return 0
