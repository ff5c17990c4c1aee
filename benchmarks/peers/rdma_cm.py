"""rdma_cm between the two pods of a pair: what rdmacm-utils' cmtime takes to make connections."""

from __future__ import annotations

import re

from benchmarks.peers.namespaces import Pair
from rdmanet.errors import UnavailableError
from testbed.container import CommandError

#: From asking to ready to send; what comes later ("disconnect", "destroy") is left out.
COUNTED = ("create id", "bind addr", "resolve addr", "resolve route", "create qp", "connect")
#: Each step needs this for all connections together: "connect      :       21.93      20.27 …".
_ROW = re.compile(r"^(\w[\w ]*?) *: +(\d+\.\d+) ", re.MULTILINE)
TIMEOUT_S = 60.0
ATTEMPTS = 20


def ready_us(pair: Pair, connections: int) -> float:
    """Microseconds per connection, from asking to ready to send, of so many that are made together.

    cmtime takes each step for all connections before the next; the steps' times are added. UnavailableError when the
    server does not listen, CommandError when cmtime fails or prints something else.
    """
    address = pair.server.addresses[4]
    count = ["-c", str(connections)]
    with pair.server.pod.popen(["cmtime", "-b", address, *count]) as server:
        for _ in range(ATTEMPTS):
            done = pair.client.pod.exec(["cmtime", "-s", address, *count], timeout_s=TIMEOUT_S, check=False)
            # It does not say when it listens.
            early = done.returncode != 0 and "REJECTED" in done.stdout + done.stderr
            if not early or server.poll() is not None:
                break
        else:
            raise UnavailableError(f"cmtime's server does not listen on {address}", subject="cmtime")
    steps = {name: float(total_ms) for name, total_ms in _ROW.findall(done.stdout)}
    if done.returncode != 0 or "connect" not in steps:
        raise CommandError(
            f"printed no figures, status {done.returncode}: {(done.stdout + done.stderr)[-300:]!r}", done
        )
    return sum(steps.get(name, 0.0) for name in COUNTED) * 1000 / connections
