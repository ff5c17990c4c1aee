"""``python -m testbed.demo``: the demo, here where the kernel can do it, else in the virtual machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from rdmanet.errors import RdmanetError
from rdmanet.model import RdmaMode
from testbed import kernel
from testbed.demo import network, rdma
from testbed.demo.rows import STEPS, passed, verdict
from testbed.demo.world import World
from testbed.paths import BUILD
from testbed.progress import heartbeat, say
from testbed.rows import Figure, Row, measure, show, write
from testbed.session import end_session

RESULT = BUILD / "demo.json"
VM_TIMEOUT_S = 900.0

WORK: dict[str, tuple[str, Callable[[World], Figure]]] = {
    "agent": ("starting the agent", network.agent),
    "add": ("adding three pods", network.add),
    "tcp": ("sending TCP on every path", network.tcp),
    "ebpf": ("comparing counters", network.ebpf),
    "lease": ("leasing queue pairs", rdma.lease),
    "perftest": ("running perftest and rping", rdma.perftest),
    "refused": ("trying what must be refused", rdma.refused),
    "restart": ("killing the agent under traffic", rdma.restart),
    "clean": ("taking everything back", rdma.clean),
}


def run() -> int:
    """Carry out all steps on this kernel; the exit status."""
    rows: list[Row] = []
    began = time.monotonic()
    RESULT.unlink(missing_ok=True)
    say("demo: making a host and the world around it")
    try:
        with heartbeat("demo: making a host"):
            world = World.make()
        try:
            for step in STEPS:
                progress, work = WORK[step]
                say(f"{step}: {progress} ({time.monotonic() - began:.0f} s)")
                with heartbeat(step):
                    rows.append(measure(step, lambda work=work: work(world)))  # type: ignore[misc]
                show(rows[-1])
            if not passed(rows) and world.host.agent is not None:
                say("the agent's last words:\n" + "\n".join(world.host.agent.log.splitlines()[-20:]))
        finally:
            world.close()
    finally:
        end_session()
        write(rows, RESULT)
        print(verdict(rows), flush=True)
    return 0 if passed(rows) else 1


def main() -> int:
    """Run here or in the virtual machine."""
    try:
        missing = "" if os.environ.get("RDMANET_IN_VM") == "1" else kernel.why_not_here(RdmaMode.SHARED)
        if not missing:
            return run()
        say(f"demo: {missing}; it runs in a virtual machine")
        from testbed import vm

        return vm.run([sys.executable, "-m", "testbed.demo"], rdma_mode=RdmaMode.SHARED, timeout_s=VM_TIMEOUT_S)
    except RdmanetError as error:
        say(f"demo: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
