"""How long leases take: ``python -m tests.rdma.lease_figures`` as root where pods can have rxe devices.

Two pods and a broker on the real guard map, as in the tests, each in a process of its own. In every
round the connecting process asks for leases and says how long it took until it could send; ``--profile`` shows where
that goes. Beside rdma_cm it is measured by ``make bench ONLY=lease``. In the virtual machine with --icount a second is
10**9 instructions.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.rdma import lease_lab
from tests.rdma.lease_lab import Lab, LabPod, PodProcess

PROGRAM = """
import asyncio, json, sys, time
sys.path[:] = %r
from tests.rdma.lease_figures import program
asyncio.run(program(%r, %r))
"""
SERVICE = "figures"


async def program(role: str, profiled: bool) -> None:
    """A pod's process: does what the lines on its standard input say, and answers each with a line."""
    from rdmanet import verbs
    from rdmanet.verbs.queue_pair import QueuePair

    session: verbs.Session | None = None
    listener: verbs.Listener | None = None
    qps: list[QueuePair] = []
    profile = cProfile.Profile()

    def answer(value: object) -> None:
        print(json.dumps(value), flush=True)

    answer("here")
    while line := await asyncio.to_thread(sys.stdin.readline):
        words = line.split()
        match words:
            case ["open"]:
                start = time.monotonic()
                session = verbs.Session()
                await session.open(60)
                if role == "listener":
                    listener = await session.listen(SERVICE)
                answer(time.monotonic() - start)
                if profiled and role == "listener":
                    profile.enable()
            case ["connect", target, count]:
                assert session is not None
                if profiled:
                    profile.enable()
                start = time.monotonic()
                if count == "1":
                    qps = [await session.connect(f"{target}:{SERVICE}", timeout_s=60)]
                else:
                    qps = await session.connect(f"{target}:{SERVICE}", count=int(count), timeout_s=60)
                took = time.monotonic() - start
                profile.disable()
                answer(took)
            case ["accept"]:
                assert listener is not None
                qps = await listener.accept_batch()
                answer(len(qps))
            case ["close"]:
                start = time.monotonic()
                await verbs.close(*qps)
                qps = []
                answer(time.monotonic() - start)
            case ["end"]:
                assert session is not None
                await session.close()
                profile.disable()
                answer("closed")
    if profiled:
        show(profile, role)


def show(profile: cProfile.Profile, name: str) -> None:
    """The profile's most expensive functions, on standard error."""
    print(f"--- {name}", file=sys.stderr)
    stats = pstats.Stats(profile, stream=sys.stderr)
    stats.sort_stats("tottime").print_stats(35)
    stats.sort_stats("cumulative").print_stats(45)


@contextmanager
def process(pod: LabPod, role: str, profiled: bool) -> Iterator[PodProcess]:
    with PodProcess(pod, PROGRAM % (sys.path, role, profiled)) as made:
        yield made
        assert made.child.stdin is not None
        made.child.stdin.close()
        made.child.wait(120)


async def tell(peer: PodProcess, line: str) -> object:
    """Its answer to a line."""
    assert peer.child.stdin is not None
    peer.child.stdin.write(line + "\n")
    peer.child.stdin.flush()
    said = await peer.line()
    assert said, f"a pod's process ended at {line!r}"
    return json.loads(said)


async def leases(lab: Lab, rounds: int, counts: list[int], profiled: bool) -> None:
    """Print one line per figure."""
    lab.directory.max_leases = 1024
    await lab.start_broker()
    with (
        process(lab.pods[1], "listener", profiled) as listener,
        process(lab.pods[0], "connector", profiled) as connector,
    ):
        for peer in (listener, connector):
            assert json.loads(await peer.line()) == "here"
        await tell(listener, "open")
        opened = await tell(connector, "open")
        print(json.dumps({"case": "session", "count": 0, "seconds": opened}), flush=True)
        for count in counts:
            taken: list[float] = []
            broker = cProfile.Profile()
            for number in range(rounds + 1):
                accepting = asyncio.create_task(tell(listener, "accept"))
                if profiled:
                    broker.enable()
                took = await tell(connector, f"connect {lab.pods[1].name.name} {count}")
                broker.disable()
                assert await accepting == count
                assert isinstance(took, float)
                if number or count == counts[0]:  # the very first also opens the device
                    taken.append(took)
                closed = await tell(connector, "close")
                await tell(listener, "close")
            if count == counts[0]:
                print(json.dumps({"case": "first", "count": count, "seconds": taken.pop(0)}), flush=True)
            each = statistics.median(taken) / count
            print(
                json.dumps({"case": "lease", "count": count, "seconds": taken, "each": each, "closed": closed}),
                flush=True,
            )
            if profiled:
                show(broker, f"broker, {count}")
        for peer in (connector, listener):
            await tell(peer, "end")
    await lab.stop_broker()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with lease_lab.lab() as lab:
        asyncio.run(leases(lab, options.rounds, options.counts, options.profile))


if __name__ == "__main__":
    main()
