"""What two containers of a real runtime do with RDMA; how a command gets into them is the runtime's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from testbed.paths import REPOSITORY

#: Commands of a container: (container, words) → output; raises with what was said where they fail.
Run = Callable[[str, tuple[str, ...]], str]

NAMES = ("train-0", "train-1")
#: Until the other end listens: each attempt is a process start.
ATTEMPTS = 60
ENV = f'cd {REPOSITORY} && eval "$({sys.executable} -m rdmanet.verbs env --family FAMILY)" && '
PERFTEST = 'exec ib_send_bw -d "$RDMANET_DEVICE" -x "$RDMANET_GID_INDEX" -F -s 4096 -n 100'
SERVER = """
from rdmanet.verbs import sync
with sync.listen("counter") as listener, listener.accept() as qp:
    counter = qp.allocate(8, remote_atomic=True)
    qp.send(counter.remote.to_bytes())
    qp.recv()
    print("from", qp.peer)
"""
CLIENT = """
from rdmanet.verbs import RemoteRegion, sync
with sync.connect("PEER:counter") as qp:
    counter = RemoteRegion.from_bytes(qp.recv())
    print(qp.fetch_add(counter, 5), qp.fetch_add(counter, 1))
    qp.send(b"done")
"""


def both(run: Run, server: tuple[str, ...], client: tuple[str, ...]) -> tuple[str, str]:
    """A server in train-1, and a client in train-0 that asks until it listens: what each has printed."""
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(run, "train-1", server)
        for attempt in range(ATTEMPTS):
            try:
                said = run("train-0", client)
                break
            except Exception:
                if serving.done() or attempt + 1 == ATTEMPTS:
                    raise
        return serving.result(), said


def perftest(run: Run, addresses: Mapping[int, str], family: int) -> None:
    """An unmodified program, told by the environment which device and GID are its own. What the ends tell each other
    beside it goes by IPv4."""
    line = ENV.replace("FAMILY", str(family)) + PERFTEST
    _, said = both(run, ("sh", "-c", line), ("sh", "-c", f"{line} {addresses[4]}"))
    assert " 4096 " in said


def leases(run: Run, peer: str = "train-1") -> None:
    """The library: atomics on memory that the other container offers; `peer` is its pod's name."""
    texts = (SERVER, CLIENT.replace("PEER", peer))
    words = [("sh", "-c", f'cd {REPOSITORY} && exec {sys.executable} -c "$0"', text) for text in texts]
    served, said = both(run, words[0], words[1])
    assert said == "0 5\n"
    assert served.startswith("from ")


def own_device_alone(run: Run) -> None:
    """Nothing of the other's is in /dev."""
    listed = [run(name, ("ls", "/dev/infiniband")).split() for name in NAMES]
    assert [len(nodes) for nodes in listed] == [1, 1]
    assert listed[0] != listed[1]
