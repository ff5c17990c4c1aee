"""rdmanet.datapath.artifact: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rdmanet.datapath import artifact as artifacts
from rdmanet.datapath.artifact import DEVICE_PROGRAM, HOOKS, Artifact, Layout, MapDefinition, Program, Relocation
from rdmanet.errors import NotFoundError, StateError

MAPS = {
    "programs": MapDefinition("programs", 3, 4, 4, 8, 0),
    "endpoints": MapDefinition("endpoints", 1, 16, 20, 16384, 0),
}
NUMBER = {"value": (0, 4)}
ARTIFACT = Artifact(
    hash="ab" * 32,
    compiler="bcc 0",
    license="GPL",
    drop_reasons=("malformed", "spoofed_mac"),
    maps=MAPS,
    layouts={name: Layout(NUMBER, {"ifindex": (0, 4), "mac": (12, 6)}) for name in MAPS},
    programs={
        name: Program(name, bytes(range(32)), (Relocation(0, "programs"), Relocation(2, "endpoints")))
        for name in (*HOOKS, *(f"dispatch_{hook}" for hook in HOOKS), DEVICE_PROGRAM)
    },
)


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "datapath.json"
    artifacts.save(ARTIFACT, path)
    assert Artifact.load(path) == ARTIFACT
    assert Artifact.load(path.parent) == ARTIFACT
    assert [entry.name for entry in path.parent.iterdir()] == ["datapath.json"]


def test_saving_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "datapath.json"
    artifacts.save(ARTIFACT, path)
    with path.open() as reader:
        artifacts.save(replace(ARTIFACT, compiler="bcc 1"), path)
        assert artifacts.decode(reader.read()).compiler == "bcc 0"
    assert Artifact.load(path).compiler == "bcc 1"


@pytest.mark.parametrize("name", ["datapath.json", ""])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFoundError, match=r"rdmanet\.datapath\.compiler"):
        Artifact.load(tmp_path / name)


def test_every_flipped_character_is_found() -> None:
    text = artifacts.encode(ARTIFACT)
    for place in range(0, len(text) - 1, 7):
        damaged = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        with pytest.raises(StateError):
            artifacts.decode(damaged)


@pytest.mark.parametrize("size", [0, 1, 100, 1000])
def test_cut_short(size: int) -> None:
    with pytest.raises(StateError, match="make it anew"):
        artifacts.decode(artifacts.encode(ARTIFACT)[:size])


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "datapath.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StateError, match="cannot be read"):
        Artifact.load(path)


def _signed(change: Callable[[dict[str, Any]], None]) -> str:
    """A changed file whose hash is right: what another version might have written."""
    body = json.loads(artifacts.encode(ARTIFACT))
    del body["integrity"]
    change(body)
    return json.dumps({**body, "integrity": artifacts._integrity(body)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.update(format=0), "format 1"),
        (lambda body: body.pop("license"), "field is missing"),
        (lambda body: body.update(maps=[]), "wrong type"),
        (lambda body: body["maps"]["endpoints"].update(colour=1), "wrong type"),
        (lambda body: body["maps"].pop("programs"), "lacks the map programs"),
        (lambda body: body["programs"].pop("dispatch_host"), "lacks dispatch_host"),
        (lambda body: body["programs"].pop("device"), "lacks device"),
        (lambda body: body["layouts"].pop("endpoints"), "layouts are not those"),
        (lambda body: body["programs"]["pod"].update(instructions="AAAA"), "whole instructions"),
        (lambda body: body["programs"]["pod"].update(instructions=""), "whole instructions"),
        (lambda body: body["programs"]["pod"].update(instructions="?"), "wrong type"),
        (lambda body: body["programs"]["pod"].update(relocations=[[4, "programs"]]), "leads nowhere"),
        (lambda body: body["programs"]["pod"].update(relocations=[[0, "unknown"]]), "leads nowhere"),
    ],
)
def test_contradictions(change: Callable[[dict[str, Any]], None], words: str) -> None:
    assert artifacts.decode(_signed(lambda body: None)) == ARTIFACT
    with pytest.raises(StateError, match=words):
        artifacts.decode(_signed(change))


def test_something_else_in_json() -> None:
    for text in ("[]", "null", '{"format": 2}', "7"):
        with pytest.raises(StateError, match="format 1"):
            artifacts.decode(text)
