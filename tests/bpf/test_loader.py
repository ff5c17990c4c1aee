"""Loading, adopting, swapping and removing, on real pins; for crashes between all effects see test_migration.py."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rdmanet.datapath import bpf, layout, loader
from rdmanet.datapath.artifact import (
    CONTINUATIONS,
    DEVICE_MAP,
    HOOKS,
    Artifact,
    MapDefinition,
    Program,
)
from rdmanet.datapath.maps import AttachmentEntry, Count, Datapath, EndpointEntry, NodeEntry, UplinkEntry
from rdmanet.errors import BpfError, ExhaustedError, InputError, StateError, UnavailableError
from rdmanet.model import GuardEntry, GuardState, address_key
from testbed.bpf import lab, packets
from testbed.bpf.bench import SHOT, UNSPEC

MAC = bytes.fromhex("02726e000107")
FRAME = packets.ethernet(b"\2" * 6, MAC, 0x88CC, bytes(46))


@pytest.fixture
def pins() -> Iterator[Path]:
    """A directory in a private bpffs that is not there yet."""
    lab.require_root()
    with lab.private_bpffs() as directory:
        yield directory / "rdmanet"


@pytest.fixture
def artifact() -> Artifact:
    return lab.artifact()


def another(artifact: Artifact, number: int = 0) -> Artifact:
    """The same programs under another name, as a newer version would come."""
    return replace(artifact, hash=f"{number:064x}")


def with_map(artifact: Artifact, name: str, **changes: int) -> Artifact:
    definition = replace(artifact.maps[name], **changes)  # type: ignore[arg-type]
    return replace(artifact, maps={**artifact.maps, name: definition})


def names(artifact: Artifact) -> dict[str, str]:
    return {hook: f"{hook}_{artifact.hash[:8]}" for hook in HOOKS}


def test_first_start_pins_everything(artifact: Artifact, pins: Path) -> None:
    with Datapath.open(artifact, pins) as datapath:
        assert datapath.running() == names(artifact)
    maps = artifact.maps.keys() - {DEVICE_MAP}
    assert {path.name for path in pins.iterdir()} == {*maps, *(f"dispatch_{hook}" for hook in HOOKS)}


def test_opening_again_adopts_contents_and_programs(artifact: Artifact, pins: Path) -> None:
    key, entry = address_key("10.90.0.7"), EndpointEntry(5, MAC, 7, device=True, enforce=True)
    with Datapath.open(artifact, pins) as first:
        first.set_endpoint(key, entry)
        before = _slots(pins)
        with Datapath.open(artifact, pins) as second:
            assert second.endpoints() == {key: entry}
            assert _slots(pins) == before
            for hook in HOOKS:
                ids = [bpf.program_info(one.dispatcher(hook)).id for one in (first, second)]
                assert ids[0] == ids[1]


def test_a_newer_artifact_is_swapped_in_when_opened(artifact: Artifact, pins: Path) -> None:
    newer = another(artifact)
    Datapath.open(artifact, pins).close()
    with Datapath.open(newer, pins) as datapath:
        assert datapath.running() == names(newer)


def test_swap_replaces_all_programs_and_keeps_contents(artifact: Artifact, pins: Path) -> None:
    newer = another(artifact)
    entry = AttachmentEntry(7, MAC, address_key("10.90.0.7"))
    with Datapath.open(artifact, pins) as datapath:
        datapath.set_attachment(5, entry)
        before = _slots(pins)
        datapath.swap(newer)
        assert datapath.running() == names(newer)
        assert not set(before.values()) & set(_slots(pins).values())
        assert datapath.attachments() == {5: entry}


def test_a_swap_that_the_verifier_refuses_changes_nothing(artifact: Artifact, pins: Path) -> None:
    exit_without_result = struct.pack("=BBhi", 0x95, 0, 0, 0)
    bad = replace(
        another(artifact), programs={**artifact.programs, "uplink": Program("uplink", exit_without_result, ())}
    )
    with Datapath.open(artifact, pins) as datapath:
        before = _slots(pins)
        with pytest.raises(BpfError, match=r"verifier refused program uplink_00000000: .*processed 1 insns") as caught:
            datapath.swap(bad)
        assert caught.value.operation == "BPF_PROG_LOAD"
        assert _slots(pins) == before


def test_a_swap_makes_maps_that_only_the_new_one_has(artifact: Artifact, pins: Path) -> None:
    added = MapDefinition("newcomer", bpf.MAP_TYPE_HASH, 4, 8, 16, 0)
    newer = replace(another(artifact), maps={**artifact.maps, "newcomer": added})
    with Datapath.open(artifact, pins) as datapath:
        datapath.swap(newer)
        assert (pins / "newcomer").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": bpf.MAP_TYPE_LRU_HASH}, "type 1 instead of 9"),
    ],
)
def test_another_layout_is_refused_and_nothing_changes(
    artifact: Artifact, pins: Path, changes: dict[str, int], words: str
) -> None:
    changed = with_map(another(artifact), "endpoints", **changes)
    with Datapath.open(artifact, pins) as datapath:
        before = _slots(pins)
        with pytest.raises(StateError, match=words):
            datapath.swap(changed)
        with pytest.raises(StateError, match=words):
            Datapath.open(changed, pins)
        assert _slots(pins) == before
        assert datapath.running() == names(artifact)


def test_another_value_size_is_refused(artifact: Artifact, pins: Path) -> None:
    """bcc's own pinned tables silently accept it."""
    Datapath.open(artifact, pins).close()
    changed = with_map(artifact, "endpoints", value_size=28)
    with pytest.raises(StateError, match="value_size 36 instead of 28"):
        loader.open_pins(changed, pins)
    with pytest.raises(StateError, match="endpoints does not fit"):
        Datapath.open(changed, pins)


def test_another_map_under_the_name_is_refused(artifact: Artifact, pins: Path) -> None:
    Datapath.open(artifact, pins).close()
    definition = artifact.maps["drops"]
    (pins / "drops").unlink()
    descriptor = bpf.create_map("foreign", *_layout(definition))
    bpf.pin(descriptor, pins / "drops")
    os.close(descriptor)
    with pytest.raises(StateError, match="name foreign instead of drops"):
        Datapath.open(artifact, pins)


def _layout(definition: MapDefinition) -> tuple[int, int, int, int, int]:
    return (
        definition.type,
        definition.key_size,
        definition.value_size,
        definition.max_entries,
        definition.flags,
    )


def test_every_slot_is_filled(artifact: Artifact, pins: Path) -> None:
    """Those of continuations too, which nothing shows when they are empty."""
    with Datapath.open(artifact, pins), contextlib.ExitStack() as stack:
        programs = bpf.get(pins / "programs")
        assert programs is not None
        stack.callback(os.close, programs)
        for hook, slot in (CONTINUATIONS | HOOKS).items():
            number = bpf.lookup(programs, struct.pack("=I", slot), 4)
            assert number is not None, f"the slot of {hook} is empty"
            program = bpf.program_by_id(struct.unpack("=I", number)[0])
            assert program is not None
            stack.callback(os.close, program)
            assert bpf.program_info(program).name == f"{hook}_{artifact.hash[:8]}"[:15]


class Crash(BaseException):
    """The agent is killed here."""


def test_a_crash_in_the_middle_of_a_swap_is_finished_by_the_next_start(
    artifact: Artifact, pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = another(artifact)
    with Datapath.open(artifact, pins) as datapath:
        real, left = bpf.update, len((CONTINUATIONS | HOOKS).keys() & artifact.programs.keys()) - 2

        def update(*arguments: object) -> None:
            nonlocal left
            if not left:
                raise Crash
            left -= 1
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(bpf, "update", update)
        with pytest.raises(Crash):
            datapath.swap(newer)
        monkeypatch.undo()
        # Who lets flows begin comes last, pods and NodePorts: these are still the old ones.
        mixed = names(artifact) | {hook: f"{hook}_{newer.hash[:8]}" for hook in ("uplink", "host")}
        assert datapath.running() == mixed
    with Datapath.open(newer, pins) as datapath:
        assert datapath.running() == names(newer)


def test_two_starts_at_once_agree(artifact: Artifact, pins: Path) -> None:
    opened: list[Datapath] = []
    barrier = threading.Barrier(2)

    def start() -> None:
        barrier.wait()
        opened.append(Datapath.open(artifact, pins))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = opened
    first.set_endpoint(address_key("fd90::7"), EndpointEntry(5, MAC, 7))
    assert second.endpoints() == first.endpoints() != {}
    first.close()
    second.close()


def test_descriptors_are_given_back(artifact: Artifact, pins: Path) -> None:
    before = _descriptors()
    datapath = Datapath.open(artifact, pins)
    datapath.swap(another(artifact))
    datapath.swap(with_map(another(artifact, 1), "endpoints", max_entries=17))
    with pytest.raises(StateError):
        datapath.swap(with_map(another(artifact, 2), "endpoints", type=bpf.MAP_TYPE_LRU_HASH))
    datapath.close()
    datapath.close()
    assert _descriptors() == before


def _descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_remove_leaves_nothing_and_can_be_repeated(artifact: Artifact, pins: Path) -> None:
    Datapath.remove(pins)
    Datapath.open(artifact, pins).close()
    Datapath.remove(pins)
    assert not pins.exists()
    Datapath.remove(pins)


def test_remove_refuses_an_ordinary_directory(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(UnavailableError, match="not in a bpffs"):
        Datapath.remove(tmp_path)
    assert (tmp_path / "precious").exists()


def test_a_directory_outside_a_bpffs_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="mount -t bpf"):
        Datapath.open(artifact, tmp_path / "rdmanet")
    assert not (tmp_path / "rdmanet").exists()
    with pytest.raises(UnavailableError):
        Datapath.open(artifact, tmp_path / "missing" / "rdmanet")


def test_dispatchers_with_empty_slots(artifact: Artifact, pins: Path) -> None:
    """Pods and host get nothing through; the host's own traffic goes on."""
    with Datapath.open(artifact, pins) as datapath:
        programs = bpf.get(pins / "programs")
        assert programs is not None
        for slot in HOOKS.values():
            bpf.delete(programs, layout.U32.pack(slot))
        os.close(programs)
        verdicts = {hook: bpf.run_program(datapath.dispatcher(hook), FRAME).verdict for hook in HOOKS}
        assert datapath.running() == {}
        assert datapath.pins.empty_slots() >= set(HOOKS)
        datapath.pins.fill_slots()
        assert datapath.running() == names(artifact)
        assert datapath.pins.empty_slots() == set()
    assert verdicts == {"pod": SHOT, "host": SHOT, "uplink": UNSPEC}
    with Datapath.open(artifact, pins) as datapath:
        assert datapath.running() == names(artifact)


def test_pins_that_are_gone_are_made_again(artifact: Artifact, pins: Path) -> None:
    """From what is open: entries stay, and filters are those that they were."""
    entry = EndpointEntry(ifindex=7, mac=bytes(6), attachment_id=3, device=False, enforce=False)
    key = address_key("10.213.0.9")
    with Datapath.open(artifact, pins) as datapath:
        assert datapath.pins.missing(None) == set()
        datapath.set_endpoint(key, entry)
        dispatcher = datapath.dispatcher_id("pod")
        (pins / "endpoints").unlink()
        (pins / "dispatch_pod").unlink()
        (pins / "flows").rename(pins / "fragments")
        assert datapath.pins.missing(None) == {"endpoints", "dispatch_pod", "flows", "fragments"}
        datapath.pins.restore(None)
        assert datapath.pins.missing(None) == set()
        for path in pins.iterdir():
            path.unlink()
        pins.rmdir()
        assert datapath.pins.missing(None) == {path for path in artifact.maps if path != DEVICE_MAP} | {
            f"dispatch_{hook}" for hook in HOOKS
        }
        pins.mkdir()
        datapath.pins.restore(None)
        assert datapath.pins.missing(None) == set()
    with Datapath.open(artifact, pins) as datapath:
        assert datapath.endpoint(key) == entry
        assert datapath.dispatcher_id("pod") == dispatcher


def _slots(pins: Path) -> dict[str, int]:
    programs = bpf.get(pins / "programs")
    assert programs is not None
    found = {}
    for hook, slot in HOOKS.items():
        raw = bpf.lookup(programs, layout.U32.pack(slot), 4)
        assert raw is not None
        found[hook] = int(struct.unpack("=I", raw)[0])
    os.close(programs)
    return found


# The entries


def test_entries_come_back_as_they_were_written(artifact: Artifact, pins: Path) -> None:
    ipv4, ipv6 = address_key("10.90.0.7"), address_key("fd90::7")
    node = NodeEntry(MAC, 3, masquerade=False, first_port=50000, last_port=50999)
    attachment = AttachmentEntry(7, MAC, ipv4, ipv6, device=True, enforce=True)
    endpoint = EndpointEntry(5, MAC, 7, device=True)
    uplink = UplinkEntry(ipv6=address_key("2001:db8::1"))
    guard = GuardEntry(2**63 - 1, ipv6, 0xFFFFFF, GuardState.REVOKED, packets=3, bytes=4000)
    with Datapath.open(artifact, pins) as datapath:
        assert datapath.node() is None
        for _ in range(2):
            datapath.configure(node)
            datapath.set_attachment(5, attachment)
            datapath.set_endpoint(ipv4, endpoint)
            datapath.set_endpoint(ipv6, endpoint)
            datapath.set_uplink(2, uplink)
            datapath.set_guard(ipv4, 17, guard)
        assert datapath.node() == node
        assert datapath.attachments() == {5: attachment}
        assert (datapath.attachment(5), datapath.attachment(6)) == (attachment, None)
        assert datapath.endpoints() == {ipv4: endpoint, ipv6: endpoint}
        assert (datapath.endpoint(ipv6), datapath.endpoint(bytes(16))) == (endpoint, None)
        assert datapath.uplinks() == {2: uplink}
        assert datapath.guards() == {(ipv4, 17): guard}
        for _ in range(2):
            datapath.delete_attachment(5)
            datapath.delete_endpoint(ipv4)
            datapath.delete_endpoint(ipv6)
            datapath.delete_uplink(2)
            datapath.delete_guard(ipv4, 17)
        assert not datapath.attachments()
        assert not datapath.endpoints()
        assert not datapath.uplinks()
        assert not datapath.guards()


def test_counts_are_summed_over_cpus_and_forgotten(artifact: Artifact, pins: Path) -> None:
    cpus = bpf.possible_cpus()
    with Datapath.open(artifact, pins) as datapath:
        for attachment in (7, 8):
            datapath.set_attachment(100 + attachment, AttachmentEntry(attachment, bytes(6)))
        for name, key, value in (
            ("counters", layout.U32.pack(0), layout.COUNTER.pack(0, 0, 0, 2, 0, 0, 0, 300)),
            ("counters", layout.U32.pack(1), layout.COUNTER.pack(1, 0, 0, 0, 60, 0, 0, 0)),
            ("drops", layout.DROP_KEY.pack(7, 1, 0), layout.U64.pack(5)),
            # The last name, and one that this version has no name for.
            ("drops", layout.DROP_KEY.pack(9, len(artifact.drop_reasons), 0), layout.U64.pack(1)),
            ("drops", layout.DROP_KEY.pack(9, len(artifact.drop_reasons) + 1, 0), layout.U64.pack(1)),
            ("drops", layout.DROP_KEY.pack(0, 4711, 1), layout.U64.pack(1)),
        ):
            descriptor = bpf.get(pins / name)
            assert descriptor is not None
            bpf.update(descriptor, key, value * cpus)
            os.close(descriptor)
        assert datapath.counters() == {
            (7, "to_pod", "roce"): Count(2 * cpus, 300 * cpus),
            (8, "from_pod", "ip"): Count(cpus, 60 * cpus),
        }
        datapath.forget(9)
        assert datapath.drops() == {(7, "malformed"): 5 * cpus, (0, "reason_4711"): cpus}
        datapath.forget(7)
        assert set(datapath.counters()) == {(8, "from_pod", "ip")}
        assert set(datapath.drops()) == {(0, "reason_4711")}


def test_a_full_map_says_which_and_how_many(artifact: Artifact, pins: Path) -> None:
    with Datapath.open(artifact, pins) as datapath:
        entry = UplinkEntry(ipv4=address_key("198.51.100.2"))
        for index in range(1, artifact.maps["uplinks"].max_entries + 1):
            datapath.set_uplink(index, entry)
        with pytest.raises(ExhaustedError, match="uplinks is full: it holds at most 64 entries"):
            datapath.set_uplink(1000, entry)
        assert len(datapath.uplinks()) == 64


def test_reading_while_entries_come_and_go(artifact: Artifact, pins: Path) -> None:
    stays = {address_key(f"10.90.1.{n}"): EndpointEntry(n, MAC, n) for n in range(1, 100)}
    passing = [address_key(f"10.90.2.{n}") for n in range(1, 100)]
    with Datapath.open(artifact, pins) as datapath:
        for key, entry in stays.items():
            datapath.set_endpoint(key, entry)
        done = threading.Event()

        def churn() -> None:
            while not done.is_set():
                for key in passing:
                    datapath.set_endpoint(key, EndpointEntry(1, MAC, 1))
                for key in passing:
                    datapath.delete_endpoint(key)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(50):
                assert set(datapath.endpoints()) <= {*stays, *passing}
        finally:
            done.set()
            thread.join()
        assert datapath.endpoints() == stays


def test_wrong_values_are_refused_before_they_reach_the_kernel(artifact: Artifact, pins: Path) -> None:
    with Datapath.open(artifact, pins) as datapath:
        with pytest.raises(InputError, match="16 bytes"):
            datapath.set_endpoint(b"\x0a\x5a\0\7", EndpointEntry(5, MAC, 7))
        with pytest.raises(InputError, match="MAC address"):
            datapath.set_attachment(5, AttachmentEntry(7, b"\2"))
        with pytest.raises(InputError, match="24 bits"):
            datapath.set_guard(bytes(16), 1 << 24, GuardEntry(1, bytes(16), 1, GuardState.GRANTED))
        with pytest.raises(InputError, match="no range of ports"):
            datapath.configure(NodeEntry(MAC, 1, first_port=2, last_port=1))
