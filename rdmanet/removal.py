"""The second half of a DEL, in the background: links go, and with them rows and addresses.

The kernel removes a netdev only after waiting for RCU (20 to 40 ms each, net/core/dev.c, netdev_run_todo). A DEL
answers before that, when traffic is cut. The row stays ``releasing`` until its link is gone: neither its addresses nor
its names are given away before.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from rdmanet import steps
from rdmanet.errors import RdmanetError, UnavailableError
from rdmanet.model import Attachment, address_key
from rdmanet.netlink import messages
from rdmanet.netlink.batch import BatchSockets, accepted

log = logging.getLogger(__name__)

#: Links that are removed together. The kernel holds the lock that every ADD needs (RTNL) for 8 ms for one link, and for
#: 23 ms for 32 of them.
MAX_TOGETHER = 32
#: So a removal lingers until no ADD or DEL has been seen for this long, to be done in a quiet moment and with others,
LINGER_S = 0.05
#: but not for longer than this, nor when somebody waits for it.
LONGEST_LINGER_S = 0.5
#: After a failure; doubled after each further one of the same attachment.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0

Failures = dict[int, RdmanetError]


class Removals:
    """What is still to be removed, and the thread that does it. Thread-safe."""

    def __init__(self, parts: steps.Parts, fault_point: steps.FaultPoint = steps.no_fault):
        self._parts = parts
        self._fault_point = fault_point
        self._changed = threading.Condition()
        self._queue: dict[int, Attachment] = {}
        self._failures: dict[int, tuple[int, float, RdmanetError]] = {}  # times, when again, why
        self._failed = 0
        self._last_call_s = 0.0
        self._oldest_s = 0.0  # since when the queue is not empty
        self._waiting = 0
        self._idle: list[Future[None]] = []
        self._stop_by_s: float | None = None
        self._given_up = False
        self._thread: threading.Thread | None = None

    # What others ask for

    def start(self, failed: Callable[[BaseException], None]) -> None:
        """Begins to work in the background; ``failed`` is called there if that ends by an error, which ought not to
        happen."""

        def work() -> None:
            try:
                self._work()
            except BaseException as error:
                self._give_up()
                failed(error)
                raise

        self._thread = threading.Thread(target=work, name="rdmanet-removal", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends what is under way, for so long at most; what is left stays a row ``releasing`` for the next start."""
        with self._changed:
            self._stop_by_s = time.monotonic() + timeout_s
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._queue:
            log.warning("%d removal(s) are left to the next start", len(self._queue))

    def put(self, attachment: Attachment) -> None:
        """Takes over a row that is ``releasing``, with nothing left of it but its link."""
        with self._changed:
            self._last_call_s = time.monotonic()
            if not self._queue:
                self._oldest_s = self._last_call_s
            self._queue[attachment.id] = attachment
            self._changed.notify_all()

    def linger(self) -> None:
        """An ADD begins or ends: it should not have to wait for the kernel's lock."""
        self._last_call_s = time.monotonic()

    def pending(self, attachment_id: int) -> bool:
        """Whether an attachment is to be removed still."""
        with self._changed:
            return attachment_id in self._queue

    def any(self, concerns: Callable[[Attachment], bool]) -> bool:
        """Whether something that concerns the caller is to be removed still."""
        with self._changed:
            return any(map(concerns, self._queue.values()))

    def wait_for(self, concerns: Callable[[Attachment], bool], timeout_s: float) -> bool:
        """Waits until nothing that concerns the caller is to be removed; False when that takes longer."""
        with self._changed:
            return self._wait(lambda: not any(map(concerns, self._queue.values())), timeout_s)

    def wait_for_one(self, timeout_s: float) -> bool:
        """Waits until something has been removed; False when there is nothing to wait for, or it takes longer."""
        with self._changed:
            before = set(self._queue)
            return bool(before) and self._wait(lambda: not before <= self._queue.keys(), timeout_s)

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        if condition():
            return True
        self._waiting += 1
        self._changed.notify_all()
        try:
            self._changed.wait_for(lambda: self._given_up or condition(), timeout_s)
            return condition()
        finally:
            self._waiting -= 1

    def settled(self) -> Future[None]:
        """Done when nothing is left to remove; UnavailableError when nothing removes it any more."""
        future: Future[None] = Future()
        with self._changed:
            if not self._queue:
                future.set_result(None)
            elif self._given_up:
                future.set_exception(_nobody())
            else:
                self._idle.append(future)
                self._changed.notify_all()
        return future

    def _give_up(self) -> None:
        """The work has ended by an error: whoever waits for it would keep the agent from ending."""
        with self._changed:
            self._given_up = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for future in idle:
            if future.set_running_or_notify_cancel():
                future.set_exception(_nobody())

    @property
    def failed(self) -> int:
        """How many tries have failed since the start."""
        return self._failed

    def status(self) -> dict[str, object]:
        """For ``GET /v1/status``: how many are to be removed, and why some of them are not gone yet."""
        with self._changed:
            return {
                "count": len(self._queue),
                "failing": {
                    self._queue[number].host_ifname: str(error)
                    for number, (_, _, error) in self._failures.items()
                    if number in self._queue
                },
            }

    # The work

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (due := self._due()) and not self._stopping():
                    self._changed.wait(self._pause_s())
                if self._stopping() and (not due or time.monotonic() >= (self._stop_by_s or 0.0)):
                    return
            self._take_out(due, self.remove(due))

    def _stopping(self) -> bool:
        return self._stop_by_s is not None

    def _begin_s(self) -> float:
        """When to begin with what has not failed yet."""
        if len(self._queue) >= MAX_TOGETHER or self._waiting or self._idle or self._stopping():
            return 0.0
        return min(self._last_call_s + LINGER_S, self._oldest_s + LONGEST_LINGER_S)

    def _times(self) -> Iterator[tuple[float, Attachment]]:
        begin_s = self._begin_s()
        for attachment in self._queue.values():
            failure = self._failures.get(attachment.id)
            yield begin_s if failure is None else failure[1], attachment

    def _due(self) -> list[Attachment]:
        now = time.monotonic()
        return [attachment for when, attachment in self._times() if when <= now][:MAX_TOGETHER]

    def _pause_s(self) -> float | None:
        """Until the first is due; None: until somebody says something."""
        first = min((when for when, _ in self._times()), default=None)
        return None if first is None else max(0.0, first - time.monotonic())

    def _take_out(self, tried: Sequence[Attachment], failures: Failures) -> None:
        idle: list[Future[None]] = []
        with self._changed:
            for attachment in tried:
                error = failures.get(attachment.id)
                if error is None:
                    self._queue.pop(attachment.id, None)
                    self._failures.pop(attachment.id, None)
                    continue
                self._failed += 1
                times = self._failures.get(attachment.id, (0, 0.0, error))[0] + 1
                pause_s = min(FIRST_PAUSE_S * 2 ** (times - 1), LONGEST_PAUSE_S)
                self._failures[attachment.id] = (times, time.monotonic() + pause_s, error)
                log.warning("%s is not removed yet, tried %d times: %s", attachment.host_ifname, times, error)
            self._oldest_s = time.monotonic()
            if not self._queue:
                idle, self._idle = self._idle, []
            self._changed.notify_all()
        for future in idle:
            # Whoever waited may have given up.
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def remove(self, attachments: Sequence[Attachment]) -> Failures:
        """Removes links and rows, in the calling thread; returns what failed, by attachment id. Idempotent."""
        try:
            self._fault_point("undo link")
            failures = self._remove_links(attachments)
            gone = [attachment for attachment in attachments if attachment.id not in failures]
            if gone:
                self._forget(gone)
        except RdmanetError as error:
            return {attachment.id: error for attachment in attachments}
        for attachment in gone:
            log.info("removed %s of %s", attachment.host_ifname, attachment.pod)
        return failures

    def _remove_links(self, attachments: Sequence[Attachment]) -> Failures:
        # One by one what has failed before, so that no link stands in the way of others.
        together = not any(attachment.id in self._failures for attachment in attachments)
        names = [attachment.host_ifname for attachment in attachments]
        failures = remove_links(self._parts.host, names, together=together)
        return {one.id: failures[one.host_ifname] for one in attachments if one.host_ifname in failures}

    def _forget(self, attachments: Sequence[Attachment]) -> None:
        datapath = self._parts.datapath
        keys = {address_key(address) for one in attachments if one.wants_rdma for address in one.addresses}
        if keys:
            datapath.delete_guards([(address, qpn) for address, qpn in datapath.guards() if address in keys])
            pairs = datapath.datagrams()
            datapath.delete_datagrams([pair for pair in pairs if any(address in keys for address, _ in pair)])
        for attachment in attachments:
            datapath.forget(attachment.id)
        self._fault_point("forget")
        self._parts.store.forget(*(attachment.id for attachment in attachments))
        for attachment in attachments:
            self._parts.host_ends.forget(attachment.id)


def _nobody() -> UnavailableError:
    return UnavailableError(
        "Nothing removes any more what DELs leave; the agent is ending, and the next one will: start it again.",
        operation="removal",
    )


def remove_links(host: BatchSockets, names: Sequence[str], *, together: bool = True) -> dict[str, RdmanetError]:
    """Removes links of the host, if they are there; returns what was refused, by name.

    Together, by way of a link group whose number nobody else can know; raises KernelError where that is refused.
    """
    if together and len(names) > 1:
        group = 0x40000000 | secrets.randbits(30)
        batch = [*(messages.set_group(name, group) for name in names), messages.delete_group(group)]
    else:
        batch = [messages.delete_link(name) for name in names]
    replies = host.exchange(batch)
    accepted(batch[len(names) :], replies[len(names) :])
    failures: dict[str, RdmanetError] = {}
    for name, message, reply in zip(names, batch, replies, strict=False):
        try:
            accepted([message], [reply])
        except RdmanetError as error:
            failures[name] = error
    return failures
