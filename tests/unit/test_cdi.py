"""CDI files: as the specification has them, written at once, found again by their names."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from rdmanet import cdi
from rdmanet.errors import StateError
from testbed.cdi_spec import CdiViolationError, validate

DEVICE = "rdmanet.io/rdma=slot-3"
NODES = [cdi.Node("/dev/infiniband/uverbs3", 231, 195), cdi.Node("/dev/infiniband/rdma_cm", 10, 60)]
VARIABLES = {"RDMANET_DEVICE": "rxe_rn7", "NCCL_IB_HCA": "=rxe_rn7:1"}


def test_a_file_is_what_the_specification_says() -> None:
    document: Any = cdi.document(DEVICE, NODES, VARIABLES)
    validate(document)
    assert document["kind"] == "rdmanet.io/rdma"
    (device,) = document["devices"]
    assert device["name"] == "slot-3"
    assert device["containerEdits"]["env"] == ["RDMANET_DEVICE=rxe_rn7", "NCCL_IB_HCA==rxe_rn7:1"]
    first = device["containerEdits"]["deviceNodes"][0]
    assert (first["path"], first["type"], first["major"], first["minor"]) == ("/dev/infiniband/uverbs3", "c", 231, 195)


@pytest.mark.parametrize("spoil", ["kind", "devices", "cdiVersion", "more"])
def test_the_validator_can_say_no(spoil: str) -> None:
    document: Any = cdi.document(DEVICE, NODES, VARIABLES)
    if spoil == "more":
        document["devices"][0]["containerEdits"]["deviceNodes"][0]["mode"] = 0o666
    else:
        document[spoil] = "rdma"
    with pytest.raises(CdiViolationError):
        validate(document)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    directory = tmp_path / "cdi"
    path = directory / "rdmanet.io-rdma-slot-3.json"
    ended = threading.Event()
    read: list[str] = []

    def reader() -> None:
        while not ended.is_set():
            for found in directory.glob("*.json"):
                read.append(found.read_text())

    thread = threading.Thread(target=reader)
    thread.start()
    texts = set()
    for number in range(200):
        document = cdi.document(DEVICE, NODES, {"N": str(number) * 1000})
        cdi.write(directory, DEVICE, document)
        texts.add(path.read_text())
    ended.set()
    thread.join()
    assert set(read) <= texts
    assert [file.name for file in directory.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644
    cdi.remove(directory, DEVICE)
    cdi.remove(directory, DEVICE)
    assert not path.exists()


def test_strangers_are_of_the_resource_alone(tmp_path: Path) -> None:
    assert cdi.strangers(tmp_path / "none", "rdmanet.io/rdma", []) == []
    names = [
        "rdmanet.io-rdma-slot-0.json",
        "rdmanet.io-rdma-slot-3.json",
        ".rdmanet.io-rdma-slot-4.json.new",
        "rdmanet.io-rdma-slot-x.json",
        "rdmanetXio-rdma-slot-1.json",
        "nvidia.yaml",
        "rdmanet.io-rdma2-slot-0.json",
    ]
    for name in names:
        (tmp_path / name).touch()
    found = cdi.strangers(tmp_path, "rdmanet.io/rdma", [DEVICE])
    assert [path.name for path in found] == [".rdmanet.io-rdma-slot-4.json.new", "rdmanet.io-rdma-slot-0.json"]


def test_whose_files_say_what(tmp_path: Path) -> None:
    assert cdi.holders(tmp_path / "none", "RDMANET_DEVICE") == {}
    for number, device in enumerate(("rdmanet.io/rdma=slot-3", "example.com/roce=slot-0")):
        cdi.write(tmp_path, device, cdi.document(device, NODES, {"RDMANET_DEVICE": f"rxe_rn{number}"}))
    text = (tmp_path / "rdmanet.io-rdma-slot-3.json").read_text()
    (tmp_path / "copy-slot-3.json").write_text(text.replace("rxe_rn0", "rxe_rn9"))  # by a name that is not its own
    for number, content in enumerate(("", "[]", "{}", '{"kind": 1, "devices": [{}]}', '{"devices": 5}', "\xff")):
        (tmp_path / f"other-slot-{number}.json").write_text(content)
    found = {"rxe_rn0": "rdmanet.io/rdma=slot-3", "rxe_rn1": "example.com/roce=slot-0"}
    assert cdi.holders(tmp_path, "RDMANET_DEVICE") == found
    assert cdi.holders(tmp_path, "RDMANET_ADDRESS") == {}


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "cdi").write_text("a file")
    with pytest.raises(StateError, match=r"cannot be made: .*kubernetes\.cdi_dir"):
        cdi.write(tmp_path / "cdi", DEVICE, json.loads("{}"))
    cdi.remove(tmp_path / "cdi", DEVICE)
    (tmp_path / "full" / "rdmanet.io-rdma-slot-3.json").mkdir(parents=True)
    with pytest.raises(StateError, match="cannot be written"):
        cdi.write(tmp_path / "full", DEVICE, {})
    assert len(list((tmp_path / "full").iterdir())) == 1
    with pytest.raises(StateError, match="cannot be removed"):
        cdi.remove(tmp_path / "full", DEVICE)


def test_slots_by_name() -> None:
    assert [cdi.slot_number(cdi.slot_id(number)) for number in (0, 7, 4095)] == [0, 7, 4095]
    assert [
        cdi.slot_number(text) for text in ("slot-", "slot-01", "slot-1 ", "slot--1", "0000:3b:00.0", "slot-１")
    ] == [None] * 6
