"""Which slots a container is given, on topologies of real machines as sysfs shows them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet.kubelet.topology import NOWHERE, Place, gpu_places, nearness, place_of, preferred, rdma_place, shared
from testbed.topologies import MACHINES, Machine, lay_out


def slots_of(machine: Machine) -> dict[str, Place]:
    """A slot per RDMA device."""
    return {f"slot-{number}": place for number, place in enumerate(machine.nics)}


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_recorded_choices(machine: Machine) -> None:
    slots = slots_of(machine)
    for wish in machine.wishes:
        found = preferred(wish.available or list(slots), wish.must, wish.size, slots, machine.gpus)
        assert found == wish.chosen, wish.why


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_sysfs_is_read_as_it_was_recorded(machine: Machine, tmp_path: Path) -> None:
    lay_out(machine, tmp_path)
    assert [rdma_place(f"mlx5_{number}", tmp_path) for number in range(len(machine.nics))] == list(machine.nics)
    assert sorted(gpu_places(tmp_path), key=lambda place: place.pci) == sorted(machine.gpus, key=lambda one: one.pci)


def test_what_two_devices_have_in_common() -> None:
    root, port, switch = "pci0000:3a", "0000:3a:00.0", "0000:3b:00.0"
    gpu = Place(0, (root, port, switch, "0000:3c:04.0", "0000:3d:00.0"))
    assert shared(gpu, Place(0, (root, port, switch, "0000:3c:08.0", "0000:3e:00.0"))) == 3
    assert shared(gpu, Place(0, (root, "0000:3a:02.0", "0000:41:00.0"))) == 1
    assert shared(gpu, Place(1, ("pci0000:ae", "0000:ae:00.0", "0000:af:00.0"))) == 0
    assert shared(gpu, NOWHERE) == nearness(NOWHERE, [gpu]) == nearness(gpu, []) == 0


def test_a_software_device_is_nowhere(tmp_path: Path) -> None:
    entry = tmp_path / "devices/virtual/infiniband/rxe0"
    entry.mkdir(parents=True)
    (tmp_path / "class").mkdir()
    (tmp_path / "class/infiniband").symlink_to(entry.parent)
    assert rdma_place("rxe0", tmp_path) == place_of(tmp_path / "missing") == NOWHERE
    assert gpu_places(tmp_path) == []


NODES = st.sampled_from([None, 0, 1])


@given(
    st.lists(NODES, min_size=1, max_size=12),
    st.integers(min_value=0, max_value=14),
    st.integers(min_value=0, max_value=3),
)
def test_a_choice_is_a_choice(nodes: list[int | None], size: int, musts: int) -> None:
    places = {f"slot-{number}": Place(node) for number, node in enumerate(nodes)}
    available = list(places)
    must = available[:musts][:size]
    found = preferred(available, must, size, places)
    assert len(found) == len(set(found)) == min(size, len(available))
    assert found[: len(must)] == must
    assert set(found) <= set(available)
    # No fewer NUMA nodes would do: compared with every choice of as many.
    if not must and len(available) <= 8:
        best = min(
            len({places[one].numa_node for one in some}) for some in itertools.combinations(available, len(found))
        )
        assert len({places[one].numa_node for one in found}) == best
