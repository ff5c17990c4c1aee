"""Hears what happens to what the agent has made, and has it looked at and put right (``rdmanet.repairs``).

rtnetlink tells of links, addresses, routes, neighbours and filters, here and in pods' namespaces; inotify of pins and
of namespaces' paths; a process descriptor of namespaces that go with their process; ``rdmanet.health`` of RDMA devices.
Announcements only say where to look, and the agent's own changes lead to looks that find nothing wrong.

A pod can cause as many announcements as it likes. So many are read at a time, a place is looked at once a second at
most, and one place at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rdmanet import background, inotify
from rdmanet.calls import Calls
from rdmanet.errors import NotFoundError, RdmanetError
from rdmanet.model import Attachment, AttachmentState
from rdmanet.netlink import changes
from rdmanet.nodesetup import NodeSetup
from rdmanet.reconcile import NODE, Record
from rdmanet.repairs import NODE_NAME, Repairs, Result
from rdmanet.steps import HostEnds
from rdmanet.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Announcements that are read at a time, and from one time to the next.
AT_ONCE = 128
READ_EVERY_S = 0.05
#: From an announcement to the look: what belongs together comes together.
SETTLE_S = 0.1
#: From one look at a place to the next.
LOOK_EVERY_S = 1.0
#: From one look at everything to the next, where announcements were lost.
EVERYTHING_EVERY_S = 10.0
#: What could not be repaired is tried again after a second, then after twice as long each time, up to this.
LONGEST_PAUSE_S = 30.0
#: New attachments are met together.
MEET_S = 0.2

_HOST_END = re.compile(r"rn-([0-9]{1,18})")
_OF_PROCESS = re.compile(r"/proc/([0-9]{1,9})/")


@dataclass
class _Known:
    """Where an attachment's namespace is, and our number for that."""

    container_id: str = ""
    netns: str = ""
    namespace: int | None = None


@dataclass
class _Process:
    descriptor: int
    attachments: set[int] = field(default_factory=set)


class Watch:
    """Runs on the event loop; what blocks runs in ``executor``. ``start``, then ``stop``. ``device_made`` is told of
    attachments that have got another device of the same name."""

    def __init__(
        self,
        repairs: Repairs,
        setup: NodeSetup,
        record: Record,
        store: Store,
        host_ends: HostEnds,
        calls: Calls,
        executor: Executor,
        device_made: Callable[[int], None],
    ):
        self._device_made = device_made
        self._repairs = repairs
        self._setup = setup
        self._record = record
        self._store = store
        self._host_ends = host_ends
        self._calls = calls
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._sources: list[changes.Changes] = []
        self._folders: inotify.Folders | None = None
        self._known: dict[int, _Known] = {}
        self._namespaces: dict[int, set[int]] = {}  # our number → attachment ids
        self._paths: dict[str, set[int]] = {}
        self._processes: dict[int, _Process] = {}
        self._new: set[int] = set()
        self._timers: dict[object, asyncio.TimerHandle] = {}
        self._due: dict[int, asyncio.TimerHandle] = {}
        self._looked: dict[int, float] = {}
        self._tries: dict[int, int] = {}
        self._asked: dict[int, list[asyncio.Future[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._everything_at_s = 0.0

    async def start(self) -> None:
        """Listens first and looks at everything then, so that nothing is missed in between. Raises KernelError."""
        self._sources = list(await self._blocking(lambda: (changes.host_changes(), changes.pod_changes())))
        self._folders = inotify.Folders()
        for source in self._sources:
            self._loop.add_reader(source.fileno(), self._heard, source)
        self._loop.add_reader(self._folders.fileno(), self._vanished)
        self._look_at_everything()

    async def stop(self) -> None:
        """Ends what ``start`` began, and waits for a repair that is under way. Idempotent."""
        for source in self._sources:
            self._loop.remove_reader(source.fileno())
            source.close()
        self._sources = []
        if self._folders is not None:
            self._loop.remove_reader(self._folders.fileno())
            self._folders.close()
            self._folders = None
        for pid in list(self._processes):
            self._leave_process(pid)
        for timer in (*self._timers.values(), *self._due.values()):
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What is asked

    def look_at(self, attachment_id: int) -> None:
        """Something may be wrong with an attachment."""
        self._make_due(attachment_id)

    async def glance(self) -> None:
        """Looks for what nobody announces: entries of the datapath."""
        for number in await self._blocking(self._repairs.glance):
            self._make_due(number)

    async def ask(self, pod: str | None) -> list[dict[str, object]]:
        """Asks again for what was given up: of a pod (namespace/name), of the node, or of all. Returns what is given
        up or broken afterwards. Raises NotFoundError where there is no such pod."""
        places = {place for place, _ in self._record.given_up()}
        if pod == NODE_NAME.split()[-1]:
            places = {NODE}
        elif pod is not None:
            found = await self._blocking(self._store.attachments)
            places = {one.id for one in found if str(one.pod) == pod and one.state is AttachmentState.READY}
            if not places:
                raise NotFoundError(f"There is no pod {pod} here; `rdmanet status` lists them.", subject=pod)
        waiting = []
        for place in places:
            self._record.forget(place)
            self._tries.pop(place, None)
            self._looked.pop(place, None)
            waiting.append(self._loop.create_future())
            self._asked.setdefault(place, []).append(waiting[-1])
            self._make_due(place, again=True)
        await asyncio.gather(*waiting)
        return self._record.left(places)

    # What is heard

    def _heard(self, source: changes.Changes) -> None:
        self._loop.remove_reader(source.fileno())
        try:
            happened = source.read(AT_ONCE)
        except RdmanetError as error:
            log.error("What happens to links is no longer heard, and not repaired: %s", error)
            return
        for one in happened:
            if isinstance(one, changes.Lost):
                self._look_at_everything()
            else:
                self._about(one)
        self._later(source, READ_EVERY_S, lambda: self._loop.add_reader(source.fileno(), self._heard, source))

    def _about(self, change: changes.Change) -> None:
        if change.namespace is not None:
            for number in self._namespaces.get(change.namespace, ()):
                self._make_due(number)
        elif change.name is not None:
            host_end = _HOST_END.fullmatch(change.name)
            if host_end is None:
                if change.name in self._setup.links:
                    self._make_due(NODE)
            elif change.new:
                self._meet(int(host_end[1]), change.peer_namespace)
            else:
                self._make_due(int(host_end[1]))
        elif change.default or change.index in self._setup.indexes:
            self._make_due(NODE)
        elif change.filters and (owner := self._host_ends.owner(change.index)) is not None:
            self._make_due(owner)

    def _vanished(self) -> None:
        if self._folders is None:
            return
        for one in self._folders.read():
            if isinstance(one, inotify.Lost):
                self._look_at_everything()
            elif one.folder == str(self._setup.pins):
                self._make_due(NODE)
            elif one.name:
                for number in self._paths.get(f"{one.folder}/{one.name}", ()):
                    self._make_due(number)
            else:
                for path, numbers in self._paths.items():
                    if _folder(path) == one.folder:
                        for number in numbers:
                            self._make_due(number)

    # Which attachments there are, and where

    def _meet(self, number: int, peer_namespace: int | None) -> None:
        """A host's end has been made: soon there is a row that says where the pod is."""
        self._number(number, peer_namespace)
        self._new.add(number)
        self._later(self._meet, MEET_S, lambda: self._begin(self._meet_new()))

    async def _meet_new(self) -> None:
        new, self._new = self._new, set()
        try:
            found = await self._blocking(lambda: {number: self._store.get(number) for number in new})
        except RdmanetError as error:
            log.error("New pods cannot be read of: %s", error)
            self._look_at_everything()
            return
        known = [attachment for attachment in found.values() if attachment is not None]
        for attachment in known:
            self._know(attachment)
        for number in new - {attachment.id for attachment in known}:
            self._forget(number)
        # What vanished before its folder was watched is not announced.
        for number in await self._blocking(lambda: [one.id for one in known if not Path(one.netns).exists()]):
            self._make_due(number)

    def _know(self, attachment: Attachment) -> None:
        known = self._known.setdefault(attachment.id, _Known())
        if known.netns == attachment.netns:
            return
        known.container_id, known.netns = attachment.container_id, attachment.netns
        self._paths.setdefault(attachment.netns, set()).add(attachment.id)
        process = _OF_PROCESS.match(attachment.netns)
        if process is not None:
            self._watch_process(int(process[1]), attachment.id)
            return
        self._watch_folder(_folder(attachment.netns))

    def _watch_folder(self, folder: str) -> None:
        if self._folders is None:
            return
        try:
            self._folders.watch(folder)
        except RdmanetError as error:
            log.error("What vanishes from %s is not noticed: %s", folder, error)

    def _watch_process(self, pid: int, number: int) -> None:
        if pid not in self._processes:
            try:
                descriptor = os.pidfd_open(pid)
            except OSError:  # it has ended
                self._make_due(number)
                return
            self._processes[pid] = _Process(descriptor)
            self._loop.add_reader(descriptor, self._ended, pid)
        self._processes[pid].attachments.add(number)

    def _ended(self, pid: int) -> None:
        for number in self._processes[pid].attachments:
            self._make_due(number)
        self._leave_process(pid)

    def _leave_process(self, pid: int) -> None:
        descriptor = self._processes.pop(pid).descriptor
        self._loop.remove_reader(descriptor)
        os.close(descriptor)

    def _number(self, number: int, namespace: int | None) -> None:
        """Our number for the pod's namespace, which it keeps as long as it lives."""
        known = self._known.setdefault(number, _Known())
        if namespace is None or namespace == known.namespace:
            return
        if known.namespace is not None:
            self._namespaces[known.namespace].discard(number)
        known.namespace = namespace
        self._namespaces.setdefault(namespace, set()).add(number)

    def _forget(self, number: int) -> None:
        self._record.forget(number)
        for table in (self._looked, self._tries):
            table.pop(number, None)
        known = self._known.pop(number, None)
        if known is None:
            return
        _take_out(self._namespaces, known.namespace, number)
        _take_out(self._paths, known.netns, number)
        for pid, process in list(self._processes.items()):
            process.attachments.discard(number)
            if not process.attachments:
                self._leave_process(pid)
        folder = _folder(known.netns)
        if self._folders is not None and not any(_folder(path) == folder for path in self._paths):
            self._folders.forget(folder)

    # Looking

    def _look_at_everything(self) -> None:
        pause_s = max(0.0, self._everything_at_s + EVERYTHING_EVERY_S - self._loop.time())
        self._later(self._look_at_everything, pause_s, lambda: self._begin(self._everything()))

    async def _everything(self) -> None:
        self._everything_at_s = self._loop.time()
        self._make_due(NODE)
        try:
            found = await self._blocking(self._store.attachments)
        except RdmanetError as error:
            log.error("Pods cannot be read of: %s", error)
            self._look_at_everything()
            return
        for attachment in found:
            self._know(attachment)  # also what a start could not take back
            self._make_due(attachment.id)

    def _make_due(self, place: int, pause_s: float = SETTLE_S, *, again: bool = False) -> None:
        if place in self._due:
            if not again:
                return
            self._due.pop(place).cancel()
        now = self._loop.time()
        when = max(now + pause_s, self._looked.get(place, 0.0) + LOOK_EVERY_S)
        self._due[place] = self._loop.call_at(when, self._begin_look, place)

    def _begin_look(self, place: int) -> None:
        del self._due[place]
        self._begin(self._look(place))

    async def _look(self, place: int) -> None:
        try:
            async with self._turn:
                self._looked[place] = self._loop.time()
                result = await (self._look_at_node() if place == NODE else self._look_at_pod(place))
        except RdmanetError as error:
            log.error("%s cannot be looked at: %s", NODE_NAME if place == NODE else f"rn-{place}", error)
            result = Result(again=True)
        if result is None:
            # A call of its container is under way, which may take long and changes what there is.
            async with self._calls.of(self._known[place].container_id):
                pass
            self._looked.pop(place, None)
            self._make_due(place)
            return
        self._concluded(place, result)

    def _concluded(self, place: int, result: Result) -> None:
        self._looked[place] = self._loop.time()
        if result.gone:
            self._forget(place)
        elif result.again:
            tries = self._tries[place] = self._tries.get(place, 0) + 1
            self._make_due(place, min(2.0 ** (tries - 1), LONGEST_PAUSE_S))
        else:
            self._tries.pop(place, None)
        for future in self._asked.pop(place, ()):
            if not future.done():
                future.set_result(None)

    async def _look_at_node(self) -> Result:
        result = await self._blocking(self._repairs.node)
        self._watch_folder(str(self._setup.pins))
        return result

    async def _look_at_pod(self, number: int) -> Result | None:
        """None where a call of its container is under way."""
        attachment = await self._blocking(self._store.get, number)
        if attachment is None:
            return Result(gone=True)
        self._know(attachment)
        if self._calls.busy(attachment.container_id):
            return None
        async with self._calls.of(attachment.container_id):
            result = await self._blocking(self._repairs.pod, number)
        self._number(number, result.peer_namespace)
        if result.device_made:
            self._device_made(number)
        return result

    # The event loop

    def _later(self, key: object, pause_s: float, call: Callable[[], None]) -> None:
        """Once, however often it is asked for meanwhile."""
        if key not in self._timers:

            def due() -> None:
                del self._timers[key]
                call()

            self._timers[key] = self._loop.call_later(pause_s, due)

    def _begin(self, work: Coroutine[object, object, None]) -> None:
        task = background.begin(work, "repair of what breaks")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _blocking(self, function: Callable[..., T], *arguments: object) -> T:
        return await self._loop.run_in_executor(self._executor, function, *arguments)


def _folder(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _take_out(table: dict[T, set[int]], key: T | None, number: int) -> None:
    if key is not None and key in table:
        table[key].discard(number)
        if not table[key]:
            del table[key]
