"""Row `numa`: which slots a container is given, on topologies as machines' sysfs has them.

Each machine is laid out as its sysfs shows it, read as the plugin reads it, and every wish is answered by the very
function that answers kubelet. For comparison: how often the first free ids would have been right.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rdmanet.kubelet.topology import gpu_places, preferred, rdma_place
from testbed.rows import Figure, need
from testbed.topologies import MACHINES, lay_out


def measure() -> Figure:
    """How many wishes were answered as they should be; all must."""
    right = naive = 0
    machines: dict[str, object] = {}
    for machine in MACHINES:
        with tempfile.TemporaryDirectory(prefix="rdmanet-sysfs-") as path:
            lay_out(machine, Path(path))
            numbers = range(len(machine.nics))
            slots = {f"slot-{number}": rdma_place(f"mlx5_{number}", Path(path)) for number in numbers}
            gpus = gpu_places(Path(path))
        need(tuple(slots.values()) == machine.nics, f"{machine.name}: sysfs was read otherwise than it was laid out")
        need(len(gpus) == len(machine.gpus), f"{machine.name}: {len(gpus)} of {len(machine.gpus)} GPUs were found")
        for wish in machine.wishes:
            available = wish.available or list(slots)
            chosen = preferred(available, wish.must, wish.size, slots, gpus)
            need(chosen == wish.chosen, f"{machine.name}: {wish.why}: {chosen}, not {wish.chosen}")
            right += 1
            naive += set(list(dict.fromkeys([*wish.must, *available]))[: wish.size]) == set(wish.chosen)
        machines[machine.name] = {"devices": len(slots), "gpus": len(gpus), "wishes": len(machine.wishes)}
    detail = (
        f"choices on {len(MACHINES)} topologies, each read from its sysfs: fewest NUMA nodes, nearest to a GPU, what"
        f" must be there first; the first free ids would have been right {naive} times"
    )
    return Figure(right, "choices", detail, {"machines": machines, "first free ids": naive})
