"""What the kernel enforces of pods' limits, on their cgroups: their own RDMA devices alone, and so many verbs objects.

A pod's cgroup is known at ADD where the runtime names it, else when a process of the pod first speaks to the agent
(docs/design/rdma.md, "The pod's cgroup"). It is in the attachments' rows before anything is done to it. What cannot be
limited is a sentence in ``rdmanet status``, never a failed ADD: the runtime's own device rules hold all the same.

Synchronous, called from worker threads; thread-safe.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rdmanet.config import RdmaConfig
from rdmanet.datapath.devices import Number
from rdmanet.datapath.maps import Datapath
from rdmanet.errors import KernelError, NotFoundError, RdmanetError, UnavailableError
from rdmanet.model import Attachment, Device, NetnsId, PodCgroup
from rdmanet.netlink import namespace
from rdmanet.rdma import cgroup as cgroups
from rdmanet.rdma import quota
from rdmanet.rdma.cgroup import Cgroups
from rdmanet.rdma.quota import Quota
from rdmanet.store import Store

log = logging.getLogger(__name__)

DEVICES = Path("/proc/devices")
#: Of the effect that the RDMA controller is enabled below a cgroup.
CONTROLLER_EFFECT = "rdma-controller:"
#: A pod whose cgroup was refused is looked at again when it speaks, but no more often than this.
RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What an attachment's device has in its pod's cgroup, by resource (``hca_handle``, ``hca_object``)."""

    used: dict[str, int]
    limits: dict[str, int | None]  # None: not limited
    refused: dict[str, int]  # since the cgroup was made; empty where the kernel does not count (before Linux 7.1)


@dataclass(eq=False)
class _Pod:
    attachments: dict[int, Attachment] = field(default_factory=dict)  # those with a device, by id
    cgroup: PodCgroup | None = None
    why: str = ""  # not limited, or not in all, though the cgroup is known or was looked for
    looked_s: float = -RETRY_S


class PodLimits:
    """``rdmanet.steps.Limits``. ``find_hierarchy`` gives ``hierarchy`` and why it is missing."""

    def __init__(
        self,
        store: Store,
        datapath: Datapath,
        config: RdmaConfig,
        hierarchy: Cgroups | None,
        missing: str,
    ):
        self._store = store
        self._datapath = datapath
        self._hierarchy = hierarchy
        self._missing = missing
        self._quota = Quota(config.max_handles, config.max_objects)
        self._controller = config.cgroup_controller
        self._lock = threading.RLock()
        self._pods: dict[NetnsId, _Pod] = {}
        self._host = namespace.own()
        self._majors: set[int] = set()

    # Steps of ADD and DEL

    def add(self, attachment: Attachment, cgroup_path: str | None) -> Attachment:
        """Limits a new attachment with a device, where its pod's cgroup is known: from another attachment of the pod,
        from ``cgroup_path`` as the runtime gave it, or from the pod's uid. Returns it with its cgroup."""
        if attachment.device is None:
            return attachment
        with self._lock:
            pod = self._pods.setdefault(attachment.netns_id, _Pod())
            pod.attachments[attachment.id] = attachment
            if self._hierarchy is None:
                pod.why = self._missing
                return attachment
            if pod.cgroup is not None:
                self._guarded(pod, pod.cgroup)
            else:
                path = self._named(cgroup_path, attachment.pod_uid)
                if path is not None:
                    self._find(pod, path, named=True)
            return pod.attachments[attachment.id]

    def _named(self, cgroup_path: str | None, pod_uid: str | None) -> str | None:
        assert self._hierarchy is not None
        if cgroup_path:
            path = cgroups.expanded(cgroup_path)
            if self._hierarchy.directory(path).is_dir():
                return path
        return self._hierarchy.of_pod_uid(pod_uid) if pod_uid else None

    def remove(self, attachment: Attachment) -> None:
        """Takes an attachment's limits back, whatever of them was made. Idempotent."""
        with self._lock:
            pod = self._pods.get(attachment.netns_id)
            if pod is not None:
                attachment = pod.attachments.pop(attachment.id, attachment)
                if not pod.attachments:
                    del self._pods[attachment.netns_id]
            found = attachment.cgroup
            if found is None or self._hierarchy is None:
                return
            directory = self._hierarchy.directory(found.path)
            if self._hierarchy.exists(found):
                if pod is not None and pod.attachments and pod.cgroup == dataclasses.replace(found, before={}):
                    self._datapath.restrict_devices(directory, self._numbers(pod))
                    _unlimit(directory, attachment)
                else:
                    release(self._hierarchy, attachment)
            self._store.set_cgroup(attachment.id, None)

    # A pod speaks

    def wants_contact(self, netns: NetnsId) -> bool:
        """Whether ``contact`` has something to do; quick, for the event loop."""
        pod = self._pods.get(netns)
        due = pod is not None and pod.cgroup is None and pod.looked_s + RETRY_S <= time.monotonic()
        return due and self._hierarchy is not None

    def contact(self, netns: NetnsId, pid: int) -> None:
        """A process in a pod has spoken: finds the pod's cgroup by it, once."""
        with self._lock:
            pod = self._pods.get(netns)
            if pod is None or self._hierarchy is None or not self.wants_contact(netns):
                return
            pod.looked_s = time.monotonic()
            one = next(iter(pod.attachments.values()))
            try:
                path, named = self._hierarchy.of_process(pid, netns, one.container_id, one.pod_uid)
            except UnavailableError as error:
                pod.why = error.sentence
                return
            self._find(pod, path, named=named)

    def changed(self, attachment_id: int, device: Device) -> None:
        """An attachment's device has come back, perhaps with another number."""
        with self._lock:
            for pod in self._pods.values():
                one = pod.attachments.get(attachment_id)
                if one is not None:
                    pod.attachments[attachment_id] = dataclasses.replace(one, device=device)
                    if pod.cgroup is not None:
                        self._guarded(pod, pod.cgroup)

    # A start

    def adopt(self, attachments: Iterable[Attachment]) -> None:
        """Knows the attachments that an earlier agent made, and puts right what differs: a cgroup that is gone, other
        limits in the configuration, a newer program."""
        with self._lock:
            for attachment in attachments:
                if attachment.device is None:
                    continue
                pod = self._pods.setdefault(attachment.netns_id, _Pod())
                found = attachment.cgroup
                if found is not None and (self._hierarchy is None or not self._hierarchy.exists(found)):
                    self._store.set_cgroup(attachment.id, None)
                    attachment = dataclasses.replace(attachment, cgroup=None)
                    found = None
                if found is not None:
                    pod.cgroup = dataclasses.replace(found, before={})
                elif self._hierarchy is None:
                    pod.why = self._missing
                pod.attachments[attachment.id] = attachment
            for pod in self._pods.values():
                if pod.cgroup is not None:
                    self._guarded(pod, pod.cgroup)

    # What others ask

    def status(self) -> dict[int, tuple[str | None, str]]:
        """Attachment id → (path of its cgroup, why it is not limited or not in all). Without either the cgroup is not
        known before a process of the pod speaks to the agent."""
        with self._lock:
            return {
                number: (None if pod.cgroup is None else pod.cgroup.path, pod.why)
                for pod in self._pods.values()
                for number in pod.attachments
            }

    def usage(self) -> dict[int, Usage]:
        """Attachment id → what its device has now, where the RDMA controller tells; reads a few files for each."""
        with self._lock:
            known = [(pod.cgroup, one) for pod in self._pods.values() if pod.cgroup for one in pod.attachments.values()]
        hierarchy = self._hierarchy
        if hierarchy is None:
            return {}
        return {
            one.id: found
            for cgroup, one in known
            if (found := _usage(hierarchy.directory(cgroup.path), one)) is not None
        }

    # The work

    def _find(self, pod: _Pod, path: str, *, named: bool) -> None:
        """The pod is in the cgroup at ``path``; where its name does not say so, nobody else may be in it."""
        assert self._hierarchy is not None
        own = next(iter(pod.attachments.values())).netns_id

        def foreign(netns: NetnsId) -> bool:
            if netns == own:
                return False
            # A process of the pod may make a network namespace of its own; that must not set the pod free.
            return not named or netns == self._host or netns in self._pods

        try:
            found = self._hierarchy.checked(path, foreign)
        except RdmanetError as error:
            self._not_limited(pod, error)
            return
        pod.cgroup = found
        self._guarded(pod, found)

    def _guarded(self, pod: _Pod, found: PodCgroup) -> None:
        """Limits the pod; if that fails it says why."""
        assert self._hierarchy is not None
        directory = self._hierarchy.directory(found.path)
        try:
            self._record(pod, found, directory)
            self._know_majors()
            self._datapath.restrict_devices(directory, self._numbers(pod))
        except (KernelError, NotFoundError, UnavailableError) as error:
            self._give_up(pod)
            self._not_limited(pod, error)
            return
        try:
            self._limit(pod, found.path, directory)
            pod.why = ""
        except (KernelError, UnavailableError) as error:
            self._not_limited(pod, error)

    def _record(self, pod: _Pod, found: PodCgroup, directory: Path) -> None:
        for number, one in pod.attachments.items():
            if one.cgroup is None or one.cgroup.id != found.id:
                assert one.device is not None
                mine = dataclasses.replace(found, before=quota.limits_of(directory, one.device.name))
                self._store.set_cgroup(number, mine)
                pod.attachments[number] = dataclasses.replace(one, cgroup=mine)

    def _limit(self, pod: _Pod, path: str, directory: Path) -> None:
        if not self._quota:
            for one in pod.attachments.values():  # an earlier configuration may have had limits
                _unlimit(directory, one)
            return
        assert self._hierarchy is not None
        if self._controller:
            quota.enable(self._hierarchy.root, path, self._record_controller)
        for one in pod.attachments.values():
            assert one.device is not None
            assert one.cgroup is not None
            quota.write_limits(directory, self._quota.line(one.device.name, one.cgroup.before))

    def _record_controller(self, path: str) -> None:
        self._store.record_effect(CONTROLLER_EFFECT + path)

    def _know_majors(self) -> None:
        """Modules may have come since: every new pod is a reason to look."""
        majors = cgroups.character_majors(DEVICES.read_text(encoding="ascii"))
        if majors != self._majors:
            self._datapath.set_rdma_majors(majors)
            self._majors = majors

    def _give_up(self, pod: _Pod) -> None:
        """Whatever was made goes again."""
        pod.cgroup = None
        for number, one in pod.attachments.items():
            if one.cgroup is None:
                continue
            try:
                if self._hierarchy is not None and self._hierarchy.exists(one.cgroup):
                    release(self._hierarchy, one)
            except KernelError as error:
                log.warning("%s: its cgroup keeps limits of ours: %s", one.pod, error)
                continue
            self._store.set_cgroup(number, None)
            pod.attachments[number] = dataclasses.replace(one, cgroup=None)

    def _not_limited(self, pod: _Pod, error: RdmanetError) -> None:
        pod.why = error.sentence
        log.warning("%s: %s", next(iter(pod.attachments.values())).pod, error)

    @staticmethod
    def _numbers(pod: _Pod) -> list[Number]:
        return [(one.device.major, one.device.minor) for one in pod.attachments.values() if one.device is not None]


def _usage(directory: Path, one: Attachment) -> Usage | None:
    current = quota.read(directory, "rdma.current")
    if current is None or one.device is None:
        return None
    name = one.device.name
    limits = quota.limits_of(directory, name)
    counted = quota.refused(quota.read(directory, "rdma.events") or "")
    used = quota.parse(current).get(name, {})
    return Usage(
        used={resource: int(used.get(resource, "0")) for resource in quota.RESOURCES},
        limits={
            resource: None if limits.get(resource, quota.UNLIMITED) == quota.UNLIMITED else int(limits[resource])
            for resource in quota.RESOURCES
        },
        refused={resource: times for (device, resource), times in counted.items() if device == name},
    )


def _unlimit(directory: Path, attachment: Attachment) -> None:
    if attachment.device is not None and attachment.cgroup is not None:
        quota.restore_limits(directory, attachment.device.name, attachment.cgroup.before)


def find_hierarchy() -> tuple[Cgroups | None, str]:
    """The cgroup2 hierarchy of this host, or None and why there is none."""
    try:
        return Cgroups.here(), ""
    except UnavailableError as error:
        return None, error.sentence


def release(hierarchy: Cgroups, attachment: Attachment) -> None:
    """Takes the device program and the limits away from an attachment's cgroup, with no agent running or at its last
    attachment. Idempotent; nothing is done to a later cgroup of that name."""
    found = attachment.cgroup
    if found is None or not hierarchy.exists(found):
        return
    directory = hierarchy.directory(found.path)
    Datapath.release_devices(directory)
    _unlimit(directory, attachment)


def undo_controller(store: Store, hierarchy: Cgroups) -> None:
    """Takes the RDMA controller back from where agents have enabled it, the lowest cgroup first. Idempotent."""
    for path in reversed(list(_enabled(store))):
        if not quota.disable(hierarchy.root, path):
            log.warning("The RDMA controller stays enabled below %s: somebody else uses it.", path)
        store.forget_effect(CONTROLLER_EFFECT + path)


def _enabled(store: Store) -> Iterator[str]:
    yield from sorted(
        effect.removeprefix(CONTROLLER_EFFECT) for effect in store.effects() if effect.startswith(CONTROLLER_EFFECT)
    )
