"""The Python tables of map keys and values against the C structs, as the compiler laid them out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rdmanet.datapath import tables
from rdmanet.datapath.artifact import Layout
from rdmanet.datapath.maps import Datapath
from rdmanet.errors import StateError
from testbed.bpf import lab


@pytest.mark.parametrize("name", tables.MAPS)
def test_tables_match_the_compilers_offsets(name: str) -> None:
    artifact = lab.artifact()
    key, value = tables.MAPS[name]
    compiled, definition = artifact.layouts[name], artifact.maps[name]
    assert key.places() == compiled.key
    assert value.places() == compiled.value
    assert (key.size, value.size) == (definition.key_size, definition.value_size)


def test_every_map_of_the_artifact_has_tables() -> None:
    ring_buffers = {"events"}  # they hold no entries
    assert set(tables.MAPS) | ring_buffers == set(lab.artifact().maps)


def test_an_artifact_with_another_order_of_fields_is_refused() -> None:
    artifact = lab.artifact()
    compiled = artifact.layouts["endpoints"]
    places = {**compiled.value, "ifindex": compiled.value["attachment"], "attachment": compiled.value["ifindex"]}
    swapped = replace(artifact, layouts={**artifact.layouts, "endpoints": Layout(compiled.key, places)})
    with lab.private_bpffs() as pins, pytest.raises(StateError, match="endpoints does not fit"):
        Datapath.open(swapped, pins / "rdmanet")
