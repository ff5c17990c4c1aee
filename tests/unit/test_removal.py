"""The queue of removals: what it waits for, who waits for it, what a failure leaves. The kernel is stood in for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from rdmanet import removal
from rdmanet.errors import NetlinkError, StateError, UnavailableError
from rdmanet.model import address_key
from rdmanet.netlink.batch import Reply
from rdmanet.netlink.messages import Message
from rdmanet.removal import Removals
from rdmanet.steps import HostEnds
from tests.unit.test_store import wanted

WAIT_S = 10.0
EPERM, ENODEV = 1, 19


class Kernel:
    """Netlink, the datapath and the store, as far as removals see them: says what it was told."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.refusing: dict[str, int] = {}  # by subject
        self.forgotten: list[tuple[int, ...]] = []
        self.deleted_guards: list[int] = []
        self.deleted_datagrams: list[tuple[int, int]] = []
        self.counters: list[int] = []
        self.disk_full = False
        self.errors: list[BaseException] = []  # that have ended the work
        self.gate: threading.Event | None = None
        self.host_ends = HostEnds()
        self.host = self.store = self

    @property
    def datapath(self) -> Datapath:
        return Datapath(self)

    def exchange(self, batch: Sequence[Message]) -> list[Reply]:
        if self.gate is not None and not self.gate.wait(WAIT_S):
            raise AssertionError("never let go")
        self.batches.append([message.operation + " " + message.subject for message in batch])
        return [Reply(self.refusing.get(message.subject, 0)) for message in batch]

    def forget(self, *numbers: int) -> None:
        if self.disk_full:
            raise StateError("The disk is full.")
        self.forgotten.append(numbers)


class Datapath:
    """The maps."""

    def __init__(self, kernel: Kernel):
        self._kernel = kernel

    def guards(self) -> dict[tuple[bytes, int], None]:
        return {(address_key("10.213.0.2"), 17): None, (address_key("10.213.0.3"), 18): None}

    def delete_guards(self, keys: Sequence[tuple[bytes, int]]) -> None:
        self._kernel.deleted_guards += [qpn for _, qpn in keys]

    def datagrams(self) -> dict[tuple[tuple[bytes, int], tuple[bytes, int]], None]:
        one, two, three = ((address_key(f"10.213.0.{number}"), 20 + number) for number in (2, 3, 4))
        return {(one, two): None, (two, one): None, (two, three): None}

    def delete_datagrams(self, keys: Sequence[tuple[tuple[bytes, int], tuple[bytes, int]]]) -> None:
        self._kernel.deleted_datagrams += [(own[1], peer[1]) for own, peer in keys]

    def forget(self, number: int) -> None:
        self._kernel.counters.append(number)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def removals(kernel: Kernel) -> Iterator[Removals]:
    parts: Any = kernel
    found = Removals(parts)
    yield found
    found.stop(WAIT_S)
    assert kernel.errors == []


def settle(removals: Removals) -> None:
    removals.settled().result(WAIT_S)


def test_one_link_goes_by_its_name(kernel: Kernel, removals: Removals) -> None:
    assert removals.remove([wanted(1, id=1)]) == {}
    assert kernel.batches == [["RTM_DELLINK rn-1"]]
    assert (kernel.forgotten, kernel.counters, kernel.deleted_guards) == ([(1,)], [1], [])


def test_several_go_together_by_a_group_that_nobody_knows(kernel: Kernel, removals: Removals) -> None:
    for _ in range(2):
        assert removals.remove([wanted(1, id=1), wanted(2, id=2)]) == {}
    groups = [batch.pop() for batch in kernel.batches]
    assert kernel.batches == 2 * [["RTM_SETLINK rn-1", "RTM_SETLINK rn-2"]]
    assert groups[0].startswith("RTM_DELLINK link group ")
    assert groups[0] != groups[1]
    assert kernel.forgotten == 2 * [(1, 2)]


def test_guard_entries_of_an_address_go_before_it_is_free(kernel: Kernel, removals: Removals) -> None:
    removals.remove([wanted(1, id=1, wants_rdma=True)])
    assert kernel.deleted_guards == [17]
    assert kernel.deleted_datagrams == [(22, 23), (23, 22)]


def test_a_link_that_is_gone_is_no_failure(kernel: Kernel, removals: Removals) -> None:
    kernel.refusing = {"rn-1": ENODEV}
    assert removals.remove([wanted(1, id=1)]) == {}
    assert kernel.forgotten == [(1,)]


def test_one_failure_does_not_hold_up_the_others(kernel: Kernel, removals: Removals) -> None:
    kernel.refusing = {"rn-1": EPERM}
    failures = removals.remove([wanted(1, id=1), wanted(2, id=2)])
    assert set(failures) == {1}
    assert isinstance(failures[1], NetlinkError)
    assert kernel.forgotten == [(2,)]


def test_a_failure_is_shown_and_tried_again(
    kernel: Kernel, removals: Removals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "FIRST_PAUSE_S", 0.001)
    kernel.refusing = {"rn-1": EPERM}
    failed_twice = threading.Event()
    exchange = kernel.exchange

    def counting(batch: Sequence[Message]) -> list[Reply]:
        replies = exchange(batch)
        if sum("RTM_DELLINK rn-1" in sent for sent in kernel.batches) > 2:
            failed_twice.set()
        return replies

    monkeypatch.setattr(kernel, "exchange", counting)
    removals.start(kernel.errors.append)
    removals.put(wanted(1, id=1))
    assert failed_twice.wait(WAIT_S)
    status: Any = removals.status()
    assert status["count"] == 1
    assert "The kernel refused RTM_DELLINK for rn-1" in status["failing"]["rn-1"]
    assert removals.failed >= 2
    kernel.refusing = {}
    settle(removals)
    assert removals.status() == {"count": 0, "failing": {}}
    assert kernel.forgotten == [(1,)]


def test_a_row_that_cannot_be_forgotten_keeps_its_address(kernel: Kernel, removals: Removals) -> None:
    kernel.disk_full = True
    failures = removals.remove([wanted(1, id=1), wanted(2, id=2)])
    assert {number: str(error) for number, error in failures.items()} == dict.fromkeys((1, 2), "The disk is full.")


def test_a_removal_lingers_for_a_quiet_moment_but_not_when_somebody_waits(
    kernel: Kernel, removals: Removals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "LINGER_S", 1000.0)
    monkeypatch.setattr(removal, "LONGEST_LINGER_S", 1000.0)
    removals.start(kernel.errors.append)
    for number in (1, 2, 3):
        removals.put(wanted(number, id=number))
    assert removals.pending(1)
    assert kernel.batches == []
    assert removals.wait_for(lambda old: old.id == 2, WAIT_S)
    assert not removals.pending(2)
    assert len(kernel.batches) == 1, "all together"


def test_enough_of_them_do_not_wait(kernel: Kernel, removals: Removals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "LINGER_S", 1000.0)
    monkeypatch.setattr(removal, "LONGEST_LINGER_S", 1000.0)
    monkeypatch.setattr(removal, "MAX_TOGETHER", 3)
    done = threading.Event()
    monkeypatch.setattr(kernel, "forget", lambda *numbers: done.set())
    removals.start(kernel.errors.append)
    for number in (1, 2, 3):
        removals.put(wanted(number, id=number))
    assert done.wait(WAIT_S)


def test_a_busy_host_puts_it_off_for_so_long_only(
    kernel: Kernel, removals: Removals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "LINGER_S", 1000.0)
    monkeypatch.setattr(removal, "LONGEST_LINGER_S", 0.01)
    done = threading.Event()
    monkeypatch.setattr(kernel, "forget", lambda *numbers: done.set())
    removals.start(kernel.errors.append)
    removals.put(wanted(1, id=1))
    removals.linger()
    assert done.wait(WAIT_S)


def test_waiting_for_nothing_and_for_too_long(kernel: Kernel, removals: Removals) -> None:
    assert removals.wait_for(lambda old: True, 0.0)
    assert not removals.wait_for_one(WAIT_S), "there is nothing that could help"
    removals.put(wanted(1, id=1))  # nobody works yet
    assert not removals.wait_for(lambda old: True, 0.01)
    assert not removals.wait_for_one(0.01)
    assert removals.wait_for(lambda old: old.id == 2, 0.0)


def test_waiting_for_one(kernel: Kernel, removals: Removals) -> None:
    kernel.gate = threading.Event()
    removals.start(kernel.errors.append)
    removals.put(wanted(1, id=1))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(removals.wait_for_one, WAIT_S)
        kernel.gate.set()
        assert waiting.result(WAIT_S)


def test_a_stop_finishes_what_is_due_and_leaves_what_fails(
    kernel: Kernel, removals: Removals, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(removal, "LINGER_S", 1000.0)
    monkeypatch.setattr(removal, "LONGEST_LINGER_S", 1000.0)
    kernel.refusing = {"rn-1": EPERM}
    removals.start(kernel.errors.append)
    for number in (1, 2):
        removals.put(wanted(number, id=number))
    started = time.monotonic()
    removals.stop(WAIT_S)
    assert time.monotonic() - started < WAIT_S
    assert kernel.forgotten == [(2,)]
    assert "1 removal(s) are left to the next start" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_ours_is_told(kernel: Kernel, removals: Removals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would be removed any more: whoever began it has to know, and nobody waits for it."""
    error = RuntimeError("a fault of ours")

    def forget(*numbers: int) -> None:
        raise error

    monkeypatch.setattr(kernel, "forget", forget)
    told: Future[BaseException] = Future()
    removals.start(told.set_result)
    removals.put(wanted(1, id=1))
    with pytest.raises(UnavailableError, match="the agent is ending, and the next one will"):
        settle(removals)
    assert told.result(WAIT_S) is error
    with pytest.raises(UnavailableError, match="Nothing removes any more"):
        settle(removals)
    started = time.monotonic()
    assert not removals.wait_for(lambda old: True, WAIT_S)
    assert not removals.wait_for_one(WAIT_S)
    assert time.monotonic() - started < WAIT_S


def test_host_ends() -> None:
    ends = HostEnds()
    assert ends.get(1) is None
    ends.set(1, 10)
    assert ends.get(1) == 10
    ends.set(2, 10)  # the kernel may use an index again
    assert (ends.get(1), ends.get(2)) == (None, 10)
    ends.forget(1)
    assert ends.get(2) == 10
    ends.forget(2)
    ends.forget(2)
    assert ends.get(2) is None
