"""What polling changes: ``python -m tests.rdma.completion_figures`` as root where pods can have rxe devices.

Two pods in processes of their own. For completions by event and by polling: half of a small message there and back, and
one RDMA WRITE of 64 KiB and of 4 MiB that is waited for, in microseconds, the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time

from rdmanet import verbs
from rdmanet.verbs import Options, RemoteRegion
from tests.rdma import lease_lab
from tests.rdma.lease_lab import Lab, PodProcess

PROGRAM = "import asyncio, sys; sys.path[:] = %r; from tests.rdma import completion_figures as c; asyncio.run(c.%s(%r))"
SIZES = {"write 64 KiB": 1 << 16, "write 4 MiB": 4 << 20}
TIMEOUT_S = 120.0


async def listening(polling: bool) -> None:
    """A pod's process: answers every message until the peer closes."""
    options = Options(polling=polling)
    async with await verbs.listen("figures", options=options, timeout_s=TIMEOUT_S) as listener:
        print("listening", flush=True)
        async with await listener.accept() as qp:
            await qp.send(qp.allocate(max(SIZES.values()), remote_write=True).remote.to_bytes())
            while (message := await qp.recv()) != b"end":
                await qp.send(message)


async def connecting(rounds: int) -> None:
    """A pod's process: prints each figure; polls where there are more than 0 rounds, and by events for -rounds."""
    options, rounds = Options(polling=rounds > 0), abs(rounds)
    async with await verbs.connect("train-1:figures", options=options, timeout_s=TIMEOUT_S) as qp:
        remote = RemoteRegion.from_bytes(await qp.recv())
        region = qp.allocate(remote.length)

        async def ping() -> None:
            await qp.send(b"x" * 64)
            await qp.recv()

        for name, length in {"message": 0, **SIZES}.items():
            taken_us = []
            for number in range(rounds):
                began = time.monotonic_ns()
                await (qp.write(region, remote, length=length) if length else ping())
                if number:  # the first makes what is made when it is needed
                    taken_us.append((time.monotonic_ns() - began) / (1000 if length else 2000))
            figure = {"case": name, "polling": options.polling, "p50_us": round(statistics.median(taken_us))}
            print(json.dumps(figure), flush=True)
        await qp.send(b"end")


async def figures(lab: Lab, rounds: int) -> None:
    """Print a line per figure."""
    await lab.start_broker()
    for polling in (False, True, False, True):
        with PodProcess(lab.pods[1], PROGRAM % (sys.path, "listening", polling)) as listener:
            assert await listener.line() == "listening"
            with PodProcess(lab.pods[0], PROGRAM % (sys.path, "connecting", rounds if polling else -rounds)) as peer:
                while line := await peer.line():
                    print(line, flush=True)
    await lab.stop_broker()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    print(json.dumps({"processors": os.cpu_count()}), flush=True)
    with lease_lab.lab() as lab:
        asyncio.run(figures(lab, options.rounds))


if __name__ == "__main__":
    main()
