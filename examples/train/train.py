"""A training job, unchanged under ``rdmanet run``, torchrun, mpirun and as a Kubernetes Job (README.md).

    rdmanet run --pods 4 --rdma -- python3 examples/train/train.py

All that it knows of its job comes from the environment: RANK (or OMPI_COMM_WORLD_RANK, PMI_RANK, JOB_COMPLETION_INDEX),
WORLD_SIZE (or OMPI_COMM_WORLD_SIZE, PMI_SIZE), MASTER_ADDR and MASTER_PORT. Gradients are all-reduced in a ring
(../allreduce): over leased queue pairs where RDMANET_DEVICE says that this pod has a device, else over TCP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from allreduce.ring import Ring, memory_for
from allreduce.train import Course, Model, train
from allreduce.transport import Place, leased, tcp

from rdmanet.errors import RdmanetError
from rdmanet.verbs.environment import ask

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JOB_COMPLETION_INDEX")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
DEFAULT_PORT = 29500
TRANSPORTS = {"rdma": leased, "tcp": tcp}
#: For all ranks to come: in a cluster pods start minutes apart, and names are known later still.
MEETING_TIMEOUT_S = 600.0
AGAIN_S = 0.2
AGENT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class World:
    """This process's place in its job, and where the job meets."""

    rank: int
    size: int
    master: str
    port: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> World:
        """By the variables above; without any this process is alone. ValueError with what is missing or wrong."""
        rank, size = (next((environment[n] for n in names if environment.get(n)), None) for names in (RANKS, SIZES))
        if size is None:
            if rank is not None:
                raise ValueError(f"there is a rank, {rank}, and no {' or '.join(SIZES)}")
            return cls(0, 1, "", 0)
        if rank is None:
            raise ValueError(f"none of {', '.join(RANKS)} says which of {size} processes this is")
        found = cls(
            int(rank), int(size), environment.get("MASTER_ADDR", ""), int(environment.get("MASTER_PORT", DEFAULT_PORT))
        )
        if not 0 <= found.rank < found.size:
            raise ValueError(f"rank {rank} is not below {size}")
        if found.size > 1 and not found.master:
            raise ValueError("MASTER_ADDR is missing: the name or address of rank 0")
        return found


@dataclass(frozen=True, slots=True)
class Member:
    """What a process tells the others of itself."""

    rank: int
    pod: str  # as rdmanet knows it: leases are asked for by name
    address: str  # by which the others reach it


async def meet(world: World, pod: str, family: int) -> list[Member]:
    """Everybody, by rank: all tell rank 0 who and where they are, and it tells all."""
    async with asyncio.timeout(MEETING_TIMEOUT_S):
        if world.rank == 0:
            joined, _ = await asyncio.gather(_join(world, pod, family), _gather(world))
            return joined
        return await _join(world, pod, family)


async def _gather(world: World) -> None:
    members: dict[int, Member] = {}
    everybody = asyncio.Event()
    answered = asyncio.Semaphore(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line:
            member = Member(**json.loads(line))
            members[member.rank] = member
            if len(members) == world.size:
                everybody.set()
            await everybody.wait()
            writer.write(json.dumps([asdict(members[rank]) for rank in sorted(members)]).encode() + b"\n")
            await writer.drain()
            answered.release()
        writer.close()

    async with await asyncio.start_server(serve, None, world.port):
        for _ in range(world.size):
            await answered.acquire()


async def _join(world: World, pod: str, family: int) -> list[Member]:
    while True:
        try:
            reader, writer = await asyncio.open_connection(world.master, world.port, family=family)
        except OSError:  # rank 0 does not listen yet, or has no name yet
            await asyncio.sleep(AGAIN_S)
            continue
        own = Member(world.rank, pod, writer.get_extra_info("sockname")[0])
        writer.write(json.dumps(asdict(own)).encode() + b"\n")
        line = await reader.readline()
        writer.close()
        return [Member(**one) for one in json.loads(line)]


async def train_together(world: World, transport: str, family: int, hidden: int, steps: int) -> Course:
    """This process's part of the training."""
    model = Model(hidden)
    if world.size == 1:
        return await train(model, steps)
    pod = (await ask(AGENT_TIMEOUT_S)).pod.name if transport == "rdma" else socket.gethostname()
    members = await meet(world, pod, family)
    place = Place([one.pod for one in members], world.rank, [one.address for one in members])
    memory = memory_for(model.gradient, world.size)
    async with TRANSPORTS[transport](place, memory) as neighbours:
        ring = Ring(neighbours, memory, world.rank, world.size)
        return await train(model, steps, all_reduce=ring.all_reduce, rank=world.rank, size=world.size)


def report(world: World, transport: str, course: Course, elapsed_s: float) -> dict[str, Any]:
    """A line of JSON."""
    return {
        "rank": world.rank,
        "size": world.size,
        "transport": transport if world.size > 1 else "none",
        "steps": len(course.losses),
        "gradient_bytes": course.parameters.nbytes + 8,
        "first_loss": course.losses[0],
        "last_loss": course.losses[-1],
        "elapsed_s": elapsed_s,
        "parameters_sha256": course.digest,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints the report; 1 with a sentence when that fails."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    default = "rdma" if os.environ.get("RDMANET_DEVICE") else "tcp"
    parser.add_argument("--transport", choices=tuple(TRANSPORTS), default=default, help=f"here: {default}")
    parser.add_argument("--family", type=int, choices=(4, 6), help="IP version to meet and talk by")
    parser.add_argument("--hidden", type=int, default=200, help="units of the hidden layer")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save", type=Path, metavar="FILE", help="where rank 0 writes the parameters (NumPy's .npy)")
    options = parser.parse_args(arguments)
    family = {None: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}[options.family]
    began_s = time.monotonic()
    try:
        world = World.of(os.environ)
        course = asyncio.run(train_together(world, options.transport, family, options.hidden, options.steps))
        if options.save is not None and world.rank == 0:
            np.save(options.save, course.parameters)
    except (RdmanetError, OSError, ValueError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report(world, options.transport, course, time.monotonic() - began_s)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
