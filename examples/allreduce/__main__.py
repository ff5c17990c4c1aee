"""``python -m allreduce --pods train-0,train-1,train-2,train-3``, the same in every pod (README.md)."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rdmanet.errors import RdmanetError

from .ring import Ring, memory_for
from .train import Course, Model, train
from .transport import Place, leased, tcp

TRANSPORTS = {"rdma": leased, "tcp": tcp}


async def train_in_ring(place: Place, transport: str, hidden: int, steps: int) -> tuple[Course, float]:
    """Train with the neighbours; also returns the seconds until the ring was there."""
    model, size = Model(hidden), len(place.pods)
    if size == 1:
        return await train(model, steps), 0.0
    memory = memory_for(model.gradient, size)
    began = time.perf_counter()
    async with TRANSPORTS[transport](place, memory) as neighbours:
        ready_s = time.perf_counter() - began
        ring = Ring(neighbours, memory, place.rank, size)
        return await train(model, steps, all_reduce=ring.all_reduce, rank=place.rank, size=size), ready_s


async def report(place: Place, transport: str, hidden: int, steps: int, compare: bool) -> dict[str, Any]:
    """Train in the ring and, to `compare`, alone as well; what came out, for a line of JSON."""
    course, ready_s = await train_in_ring(place, transport, hidden, steps)
    said = {
        "pod": place.pods[place.rank],
        "transport": transport,
        "hidden": hidden,
        "gradient_bytes": course.parameters.nbytes + 8,
        "ready_s": ready_s,
        "losses": course.losses,
        "step_s": course.step_s,
        "reduce_s": course.reduce_s,
        "parameters_sha256": course.digest,
    }
    if compare:
        alone = await train(Model(hidden), steps)
        said["alone"] = {
            "losses": alone.losses,
            "step_s": alone.step_s,
            "difference": float(np.abs(course.parameters - alone.parameters).max()),
        }
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Train once per transport and size of the hidden layer, a line of JSON each; 1 with a sentence when that fails."""
    parser = argparse.ArgumentParser(prog="python -m allreduce", description=__doc__)
    parser.add_argument("--pods", required=True, help="names of all pods of the job, with commas, in the ring's order")
    parser.add_argument("--name", default=socket.gethostname(), help="this pod's own (default: the host name)")
    parser.add_argument("--transport", default="rdma", help=f"{' or '.join(TRANSPORTS)}; with a comma: both in turn")
    parser.add_argument("--addresses", default="", help="the pods' addresses, in the same order (TCP, or IPv6)")
    parser.add_argument("--hidden", default="64", help="sizes of the hidden layer, with commas: a training for each")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compare", action="store_true", help="train alone as well, and say how far that is away")
    options = parser.parse_args(arguments)
    pods = options.pods.split(",")
    if options.name not in pods:
        parser.error(f"{options.name} is not one of the pods: give this pod's --name")
    transports = options.transport.split(",")
    if not TRANSPORTS.keys() >= set(transports):
        parser.error(f"--transport is {' or '.join(TRANSPORTS)}")
    sizes = [int(size) for size in options.hidden.split(",")]
    place = Place(pods, pods.index(options.name), options.addresses.split(",") if options.addresses else ())
    try:
        for transport, hidden in itertools.product(transports, sizes):
            said = asyncio.run(report(place, transport, hidden, options.steps, options.compare))
            print(json.dumps(said), flush=True)
    except (RdmanetError, OSError) as error:
        print(f"allreduce: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
