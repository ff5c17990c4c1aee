"""An MPI job as people write it, for mpirun and mpi4py: all-reduce sums that each rank checks. Nothing of rdmanet.

``mpi_job.py COUNT ROUNDS``: rank 0 prints {"ranks", "hosts", "elements"}; a wrong sum ends the job with an error.
"""

import array
import json
import sys

from mpi4py import MPI


def main() -> None:
    count, rounds = int(sys.argv[1]), int(sys.argv[2])
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    checked = 0
    for turn in range(rounds):
        # Small whole numbers: their sums are exact, whatever the order.
        mine = array.array("d", (float((index + turn) % 1000 * (rank + 1)) for index in range(count)))
        total = array.array("d", bytes(8 * count))
        world.Allreduce([mine, MPI.DOUBLE], [total, MPI.DOUBLE], MPI.SUM)
        factor = size * (size + 1) // 2
        wrong = sum(value != (index + turn) % 1000 * factor for index, value in enumerate(total))
        if wrong:
            print(f"rank {rank}: {wrong} of {count} sums are wrong in round {turn}", file=sys.stderr, flush=True)
            world.Abort(1)
        checked += count
    hosts = world.gather(MPI.Get_processor_name(), root=0)
    elements = world.reduce(checked, op=MPI.SUM, root=0)
    if rank == 0:
        print(json.dumps({"ranks": size, "hosts": hosts, "elements": elements}), flush=True)


if __name__ == "__main__":
    main()
