"""The search for inputs: it finds what is planted, saves it, and the same seed searches the same way."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rdmanet.cni import CniError, parse_document
from testbed.fuzzing import live, parsers
from testbed.fuzzing import search as module
from testbed.fuzzing.mutation import Mutator
from testbed.fuzzing.search import Failure, Places, Target, search, traced

BUDGET_S = 60.0


@pytest.fixture(autouse=True)
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "FOUND", tmp_path)
    monkeypatch.setattr(module, "MOST_FAILURES", 1)
    return tmp_path


def test_it_finds_what_lies_behind_several_steps(found: Path) -> None:
    """Each step is new code, which is kept and changed further; by chance alone none would come so far."""

    def run(data: bytes) -> Places:
        places: Places = {0}
        for number, byte in enumerate(b"HTTP"):
            if data[number : number + 1] != bytes((byte,)):
                return places
            places.add(number + 1)
        raise Failure("found")

    done = search(Target("steps", [b"abcdefgh"], run), BUDGET_S, 1)
    assert [failure.rpartition(": ")[2] for failure in done.failures] == ["found"]
    (saved,) = found.iterdir()
    assert saved.read_bytes().startswith(b"HTTP")
    assert done.kept >= len("HTT")


def test_it_changes_json_by_its_parts() -> None:
    def run(data: bytes) -> Places:
        try:
            document = json.loads(data)
        except ValueError:
            return set()
        if isinstance(document, dict) and isinstance(document.get("inner"), dict) and document["inner"].get("a") == []:
            raise KeyError("inner")
        return set()

    done = search(Target("json", [b'{"inner": {"a": 1}}'], run), BUDGET_S, 1)
    assert "KeyError" in done.failures[0]


def test_the_same_seed_gives_the_same_inputs() -> None:
    def inputs(seed: int) -> list[bytes]:
        mutator = Mutator(random.Random(seed), [b"word"])
        return [mutator.change(b'{"a": [1, "b"]}', b"other") for _ in range(200)]

    assert inputs(1) == inputs(1)
    assert inputs(1) != inputs(2)


def test_lines_of_ours_are_seen() -> None:
    def refused() -> None:
        with pytest.raises(CniError):
            parse_document(b"[]")

    assert traced(lambda: parse_document(b"{}")) != traced(refused) != set()
    assert traced(lambda: json.loads("{}")) == set()


@pytest.mark.parametrize("target", parsers.targets(), ids=lambda target: target.name)
def test_seeds_are_understood(target: Target) -> None:
    """Each reaches the parser, and together they reach much of it."""
    places: Places = set()
    for seed in target.seeds:
        places |= target.run(seed)
    assert len(places) > len(target.run(b""))


def test_an_answer_may_follow_the_leave_to_continue() -> None:
    """At once, or when the request has ended."""
    final = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with ThreadPoolExecutor(1) as thread:
        for at_once in (True, False):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                theirs.sendall(live.CONTINUE + (final if at_once else b""))
                answer = thread.submit(live._answer, ours)
                if not at_once:
                    assert theirs.recv(1) == b""
                    theirs.sendall(final)
                assert answer.result() == final
