"""rdma_cm between the two pods of a pair: what rdmacm-utils' cmtime takes to make connections."""

from __future__ import annotations

import re

from benchmarks.peers.namespaces import Pair
from rdmanet.errors import UnavailableError
from testbed.container import CommandError

#: From asking to ready to send; what comes later ("disconnect", "destroy") is left out. Since rdma-core 56 "init qp" is
#: a step of its own, and "cm connect" holds those to RTR and RTS.
COUNTED = (
    "create id",
    "bind addr",
    "resolve addr",
    "resolve route",
    "create qp",
    "init qp",
    "connect",
    "cm connect",
)
#: Each step needs this for all connections together. In rdma-core 44 "connect      :       21.93      20.27 …", in
#: milliseconds; in 56 "cm connect           742      47546 …", where microseconds are the second figure.
_ROW_MS = re.compile(r"^(\w[\w ]*?) *: +(\d+\.\d+) ", re.MULTILINE)
_ROW_US = re.compile(r"^(\w[\w ]*?)  +\d+ +(\d+) +\d+ ", re.MULTILINE)
#: 56 has a second table, of connections without queue pairs.
_WITHOUT_QUEUE_PAIRS = "cm_conn "
TIMEOUT_S = 60.0
ATTEMPTS = 20


def ready_us(pair: Pair, connections: int) -> float:
    """Microseconds per connection, from asking to ready to send, of so many that are made together.

    cmtime takes each step for all connections before the next; the steps' times are added. Since 56 it makes and ends
    one connection before those that it times: its first is then as warm as the others. UnavailableError when the
    server does not listen, CommandError when cmtime fails or prints something else.
    """
    address = pair.server.addresses[4]
    count = ["-c", str(connections)]
    with pair.server.pod.popen(["cmtime", "-b", address, *count]) as server:
        for _ in range(ATTEMPTS):
            done = pair.client.pod.exec(["cmtime", "-s", address, *count], timeout_s=TIMEOUT_S, check=False)
            # It does not say when it listens.
            printed = done.stdout + done.stderr
            early = done.returncode != 0 and ("REJECTED" in printed or not printed.strip())  # since 56 without a word
            if not early or server.poll() is not None:
                break
        else:
            raise UnavailableError(f"cmtime's server does not listen on {address}", subject="cmtime")
    total_us = connected_us(done.stdout)
    if done.returncode != 0 or total_us is None:
        raise CommandError(
            f"printed no figures, status {done.returncode}: {(done.stdout + done.stderr)[-300:]!r}", done
        )
    return total_us / connections


def connected_us(printed: str) -> float | None:
    """Microseconds of the steps from asking to ready to send, of all connections, in what cmtime of rdma-core 44 or 56
    has printed; None where its table is not there."""
    printed = printed.partition(_WITHOUT_QUEUE_PAIRS)[0]
    steps = {name: float(total_ms) * 1000 for name, total_ms in _ROW_MS.findall(printed)}
    steps |= {name: float(total_us) for name, total_us in _ROW_US.findall(printed)}
    if "connect" not in steps and "cm connect" not in steps:
        return None
    return sum(steps.get(name, 0.0) for name in COUNTED)
