"""Maps that are made anew under programs, with contents; a crash is tried between all effects.

The artifacts are small ones made by hand, whose programs use every map and let everything pass: opening one takes
milliseconds where the datapath's own takes the verifier a second.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from rdmanet.datapath import bpf, layout, loader, migration, programs
from rdmanet.datapath.artifact import (
    DEVICE_MAP,
    DEVICE_PROGRAM,
    HOOKS,
    INSTRUCTION_BYTES,
    Artifact,
    Layout,
    MapDefinition,
    Program,
    Relocation,
)
from rdmanet.datapath.kept import NEXT, PREVIOUS, RUNNING, Kept
from rdmanet.errors import NotFoundError, StateError, VerifierError
from testbed.bpf import lab

LOAD_MAP = struct.pack("=BBhi", 0x18, 0x11, 0, 0) + bytes(INSTRUCTION_BYTES)
LET_PASS = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
EXIT_WITHOUT_RESULT = struct.pack("=BBhi", 0x95, 0, 0, 0)
PERCPU_HASH = 5

PLACE = {"value": (0, 4)}
#: Version 1 and what a later one made of it: a field gone, one new, one moved, one wider.
OLD = Layout(PLACE, {"mac": (0, 6), "gone": (6, 2), "port": (8, 2), "count": (12, 4)})
NEW = Layout(PLACE, {"port": (0, 2), "added": (4, 4), "mac": (8, 6), "count": (16, 8)})
ENTRIES = {struct.pack("=I", n): struct.pack("=6sHHxxI", bytes([n] * 6), 9, n, n) for n in range(1, 8)}


def carried(entries: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Entries of version 1 as the later version has them."""
    found = {}
    for key, raw in entries.items():
        mac, _, port, count = struct.unpack("=6sHHxxI", raw)
        found[key] = struct.pack("=HxxI6sxxQ", port, 0, mac, count)
    return found


def artifact(number: int, entries: int = 16, laid_out: Layout = OLD, **programs: bytes) -> Artifact:
    size = 16 if laid_out is OLD else 24
    maps = {
        "programs": MapDefinition("programs", bpf.MAP_TYPE_PROG_ARRAY, 4, 4, 8, 0),
        "things": MapDefinition("things", bpf.MAP_TYPE_HASH, 4, size, entries, 0),
        "drops": MapDefinition("drops", PERCPU_HASH, 4, 8, 2 * entries, 0),
        DEVICE_MAP: MapDefinition(DEVICE_MAP, bpf.MAP_TYPE_HASH, 8, 4, 4, 0),
    }
    used = [name for name in maps if name != DEVICE_MAP]
    code = LOAD_MAP * len(used) + LET_PASS
    relocations = tuple(Relocation(2 * place, name) for place, name in enumerate(used))
    names = [*HOOKS, *(f"dispatch_{hook}" for hook in HOOKS), DEVICE_PROGRAM]
    return Artifact(
        hash=f"{number:08x}" * 8,
        compiler="by hand",
        license="GPL",
        drop_reasons=("malformed",),
        maps=maps,
        layouts={
            name: laid_out if name == "things" else Layout(PLACE, {"value": (0, definition.value_size)})
            for name, definition in maps.items()
        },
        programs={name: Program(name, code, relocations) for name in names}
        | {name: Program(name, content, ()) for name, content in programs.items()},
    )


FIRST, GROWN, OTHER = artifact(1), artifact(2, entries=64), artifact(3, entries=64, laid_out=NEW)


@pytest.fixture
def pins() -> Iterator[Path]:
    lab.require_root()
    with lab.private_bpffs() as directory:
        yield directory / "rdmanet"


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "datapath")


def contents(pinned: loader.Pinned, name: str = "things") -> dict[bytes, bytes]:
    definition = pinned.artifact.maps[name]
    size = bpf.buffer_bytes(definition.type, definition.value_size)
    return dict(bpf.items(pinned.maps[name], definition.key_size, size))


def start(pins: Path, kept: Kept) -> loader.Pinned:
    """Version 1 with its entries."""
    pinned = loader.open_pins(FIRST, pins, kept)
    for key, raw in ENTRIES.items():
        bpf.update(pinned.maps["things"], key, raw)
    bpf.update(pinned.maps["drops"], b"\1\0\0\0", layout.U64.pack(5) * bpf.possible_cpus())
    return pinned


def runs(pinned: loader.Pinned, wanted: Artifact) -> bool:
    return set(loader.running(pinned).values()) == {f"{hook}_{wanted.hash[:8]}" for hook in HOOKS}


def is_whole(pinned: loader.Pinned) -> bool:
    """What runs uses what is pinned, and nothing else is."""
    names = {path.name for path in pinned.directory.iterdir()}
    wanted = pinned.artifact.maps.keys() - {DEVICE_MAP} | {f"dispatch_{hook}" for hook in HOOKS}
    ids = {bpf.map_info(descriptor).id for descriptor in pinned.maps.values()}
    return names == wanted and programs.maps_in_use(pinned.directory) == ids


def test_a_map_grows_with_its_contents_and_keeps_its_descriptor(pins: Path, kept: Kept) -> None:
    with closing(start(pins, kept)) as pinned:
        number, before = pinned.maps["things"], bpf.map_info(pinned.maps["things"]).id
        loader.swap(pinned, GROWN)
        assert pinned.maps["things"] == number
        assert bpf.map_info(number).id != before
        assert bpf.map_info(number).max_entries == 64
        assert contents(pinned) == ENTRIES
        assert contents(pinned, "drops") == {b"\1\0\0\0": layout.U64.pack(5) * bpf.possible_cpus()}
        assert runs(pinned, GROWN)
        assert is_whole(pinned)


def test_fields_are_carried_over_by_name(pins: Path, kept: Kept) -> None:
    with closing(start(pins, kept)) as pinned:
        loader.swap(pinned, OTHER)
        assert contents(pinned) == carried(ENTRIES)
    with closing(loader.open_pins(FIRST, pins, kept)) as pinned:  # and back
        assert contents(pinned) == {key: raw[:6] + bytes(2) + raw[8:] for key, raw in ENTRIES.items()}


def test_without_what_was_kept_another_layout_is_refused(pins: Path, kept: Kept) -> None:
    start(pins, kept).close()
    with pytest.raises(StateError, match=r"value_size 16 instead of 24.*cannot be carried over"):
        loader.open_pins(OTHER, pins)
    with closing(loader.open_pins(FIRST, pins)) as pinned:
        assert contents(pinned) == ENTRIES
        assert is_whole(pinned)


@pytest.mark.parametrize("size", [6, 1])
def test_what_does_not_fit_is_refused_and_nothing_changes(pins: Path, kept: Kept, size: int) -> None:
    with closing(start(pins, kept)) as pinned:
        with pytest.raises(StateError, match=rf"map things holds .* its new size is {size}"):
            loader.swap(pinned, artifact(4).sized({"things": size}))
        assert contents(pinned) == ENTRIES
        assert runs(pinned, FIRST)
        assert is_whole(pinned)
        loader.swap(pinned, artifact(4).sized({"things": 7}))
        assert contents(pinned) == ENTRIES


def test_an_array_shrinks_to_what_it_holds(pins: Path, kept: Kept) -> None:
    def with_array(number: int, entries: int) -> Artifact:
        made = artifact(number)
        places = Layout(PLACE, {"value": (0, 8)})
        definition = MapDefinition("places", bpf.MAP_TYPE_ARRAY, 4, 8, entries, 0)
        return replace(made, maps={**made.maps, "places": definition}, layouts={**made.layouts, "places": places})

    with closing(loader.open_pins(with_array(1, 100), pins, kept)) as pinned:
        bpf.update(pinned.maps["places"], layout.U32.pack(40), layout.U64.pack(7))
        with pytest.raises(StateError, match="map places holds 41 entries"):
            loader.swap(pinned, with_array(2, 40))
        loader.swap(pinned, with_array(2, 41))
        assert contents(pinned, "places")[layout.U32.pack(40)] == layout.U64.pack(7)


def test_a_program_that_the_verifier_refuses_leaves_all_as_it_was(pins: Path, kept: Kept, tmp_path: Path) -> None:
    with closing(start(pins, kept)) as pinned:
        with pytest.raises(VerifierError, match="verifier refused program uplink_00000005") as caught:
            loader.swap(pinned, artifact(5, entries=64, uplink=EXIT_WITHOUT_RESULT))
        log = tmp_path / "datapath" / "verifier.log"
        assert f"Nothing was changed; all that it said is in {log}." in str(caught.value)
        assert log.read_text(encoding="utf-8").startswith("uplink_00000005\n")
        assert "R0 !read_ok" in log.read_text(encoding="utf-8")
        assert contents(pinned) == ENTRIES
        assert runs(pinned, FIRST)
        assert is_whole(pinned)
        assert (kept.load(RUNNING), kept.load(NEXT), kept.load(PREVIOUS)) == (FIRST, None, None)


def test_what_old_programs_write_in_the_middle_is_carried_over(
    pins: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written to the old maps when the new programs are in their places already, and to the new ones before that."""
    key = {n: layout.U32.pack(n) for n in range(10)}
    value = {n: struct.pack("=6sHHxxI", bytes([n] * 6), 9, n, 100 + n) for n in range(10)}
    cpus = bpf.possible_cpus()
    with closing(start(pins, kept)) as pinned:
        wait = migration.wait_for_programs

        def late() -> None:
            wait()
            with ExitStack() as stack:
                old, new, old_drops, new_drops = (
                    _pinned(pins / name, stack) for name in ("things", "things~new", "drops", "drops~new")
                )
                bpf.update(old, key[1], value[1])  # changed in the old one alone
                bpf.delete(old, key[2])  # gone
                bpf.update(old, key[9], value[9])  # entered
                bpf.update(old, key[3], value[3])  # changed in both: the new one's stays
                bpf.update(new, key[3], value[8])
                bpf.update(old_drops, key[1], layout.U64.pack(8) * cpus)  # counted in both
                bpf.update(new_drops, key[1], layout.U64.pack(6) * cpus)

        monkeypatch.setattr(migration, "wait_for_programs", late)
        loader.swap(pinned, GROWN)
        wanted = ENTRIES | {key[1]: value[1], key[9]: value[9], key[3]: value[8]}
        del wanted[key[2]]
        assert contents(pinned) == wanted
        assert contents(pinned, "drops") == {key[1]: layout.U64.pack(9) * cpus}


def _pinned(path: Path, stack: ExitStack) -> int:
    descriptor = bpf.get(path)
    assert descriptor is not None
    stack.callback(os.close, descriptor)
    return descriptor


class Crash(BaseException):
    """The agent is killed here."""


EFFECTS: tuple[tuple[object, str], ...] = (
    (bpf, "create_map"),
    (bpf, "load_program"),
    (bpf, "pin"),
    (bpf, "update"),
    (bpf, "update_batch"),
    (Path, "rename"),
    (Path, "replace"),
)


class Crashes:
    """Kills at an effect, counted from ``left``; 0: at none."""

    def __init__(self, moment: str, monkeypatch: pytest.MonkeyPatch):
        self.left = 0
        self._moment = moment
        for owner, name in EFFECTS:
            monkeypatch.setattr(owner, name, self._crashing(getattr(owner, name), name))

    def _crashing(self, real: Callable[..., object], name: str) -> Callable[..., object]:
        def effect(*arguments: object) -> object:
            self.left -= 1
            if self.left == 0 and self._moment == "before":
                raise Crash
            result = real(*arguments)
            if self.left == 0:
                if name in ("create_map", "load_program"):
                    os.close(result)  # type: ignore[arg-type]  # as the end of the process does
                raise Crash
            return result

        return effect


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_between_any_two_effects_of_a_first_start_is_finished_by_the_next_one(
    pins: Path, kept: Kept, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = Crashes(moment, monkeypatch)
    crashes = 0
    while True:
        crashes += 1
        kill.left = crashes
        try:
            loader.open_pins(FIRST, pins, kept).close()
        except Crash:
            kill.left = 0
            with closing(loader.open_pins(FIRST, pins, kept)) as pinned:
                assert runs(pinned, FIRST)
                assert is_whole(pinned)
            assert kept.load(RUNNING) == FIRST
            loader.remove(pins)
            kept.remove()
        else:
            break
    # Three maps made and pinned, six programs loaded, dispatchers pinned, slots filled, two kept files put in place.
    assert crashes - 1 == 2 * 3 + 6 + 3 + 3 + 2


@pytest.mark.parametrize("following", [FIRST, OTHER, GROWN], ids=["the old one", "the new one", "another one"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_between_any_two_effects_of_a_migration_is_finished_by_the_next_start(
    pins: Path, kept: Kept, moment: str, following: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = Crashes(moment, monkeypatch)
    wanted = ENTRIES if following is not OTHER else carried(ENTRIES)
    crashes = 0
    while True:
        crashes += 1
        kill.left = 0
        pinned = start(pins, kept)
        kill.left = crashes
        try:
            loader.swap(pinned, OTHER)
        except Crash:
            pass
        else:
            pinned.close()
            break
        finally:
            kill.left = 0
        pinned.close()
        with closing(loader.open_pins(following, pins, kept)) as pinned:
            found = contents(pinned)
            # What went to the later version and back has lost one field.
            assert found == wanted or found == {key: raw[:6] + bytes(2) + raw[8:] for key, raw in wanted.items()}
            assert contents(pinned, "drops") == {b"\1\0\0\0": layout.U64.pack(5) * bpf.possible_cpus()}
            assert runs(pinned, following)
            assert is_whole(pinned)
        running = kept.load(RUNNING)
        assert running == following
        assert kept.load(NEXT) is None
        loader.remove(pins)
        kept.remove()
    # Two maps made, filled and pinned twice, three programs loaded and put, the kept files.
    assert crashes > 15


def test_what_is_kept(pins: Path, kept: Kept) -> None:
    with closing(start(pins, kept)) as pinned:
        with pytest.raises(NotFoundError, match="none has been replaced yet"):
            kept.previous()
        loader.swap(pinned, OTHER)
        assert (kept.load(RUNNING), kept.previous()) == (OTHER, FIRST)
        loader.swap(pinned, kept.previous())
        assert (kept.load(RUNNING), kept.previous()) == (FIRST, OTHER)
        loader.swap(pinned, FIRST)
        assert (kept.load(RUNNING), kept.previous()) == (FIRST, OTHER)
    # Whoever puts the previous one back does not get the other one with the next start.
    assert kept.choose(OTHER) == OTHER
    kept.pass_over(OTHER)
    assert kept.choose(OTHER) == FIRST
    assert kept.choose(GROWN) == GROWN
    kept.pass_over(None)
    assert kept.choose(OTHER) == OTHER
    kept.remove()
    kept.remove()


def test_a_damaged_file_is_named(kept: Kept, tmp_path: Path) -> None:
    kept.begin(FIRST)
    path = tmp_path / "datapath" / "next.json.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StateError, match=r"next\.json\.gz is damaged"):
        kept.load(NEXT)
