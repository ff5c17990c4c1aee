"""Slots: which pod has which, what its container gets, and whether each can be used.

A slot is the right of one container to one RDMA device, as kubelet counts it (docs/design/ml-jobs.md). Its attachment
has it in its row. What the container gets is in the slot's CDI file, which is there as long as the device is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol

from rdmanet import cdi
from rdmanet.cni import CniCode, CniError, Request
from rdmanet.config import KubernetesConfig
from rdmanet.environment import Environment, connection_manager, gid_indexes, is_soft_roce
from rdmanet.errors import KernelError, NotFoundError, RdmanetError, RequestError, UnavailableError
from rdmanet.model import Attachment, AttachmentState, Device, PodName, RdmaMode
from rdmanet.netlink import namespace
from rdmanet.pods import Pods
from rdmanet.rdma.backend import DeviceBackend
from rdmanet.store import Store

log = logging.getLogger(__name__)

#: The effect on the host that stands for the directory of CDI files.
DIRECTORY = "cdi-directory"
#: Whoever watches slots is told something at least this often, so that an agent that hangs is noticed.
HEARTBEAT_S = 5.0
#: After an announcement.
SECOND_LOOKS_S = (0.1, 1.0)


class Kubelet(Protocol):
    """``rdmanet.kubelet.pod_resources.PodResources``."""

    async def slots_of(self, pod: PodName) -> tuple[str, ...] | None:
        """Ids of the slots that kubelet gave to a pod's containers; None where it has no such pod.

        Raises UnavailableError where it does not answer in time.
        """


class Slots:
    """``rdmanet.steps.Slots``, and what is asked on the event loop. ``kubelet`` is None where none is asked,
    ``missing`` says why there are no devices."""

    def __init__(
        self,
        config: KubernetesConfig,
        store: Store,
        pods: Pods,
        devices: DeviceBackend | None,
        missing: str | None,
        kubelet: Kubelet | None,
        executor: Executor,
    ):
        self._config = config
        self._store = store
        self._pods = pods
        self._devices = devices
        self._missing = missing
        self._kubelet = kubelet
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._watchers: set[asyncio.Event] = set()
        self._ended = False

    # Which slot a pod has

    async def of(self, request: Request) -> str | None:
        """The CDI device of the slot that an ADD's pod has, None where it has none.

        Raises CniError (11) where kubelet does not say, RequestError for a deviceID that is no slot and for
        several slots, UnavailableError for a pod of kubelet's that would get a device without a slot.
        """
        if not self._config.slots:
            return None
        given = request.config.runtime_config.device_id or request.config.device_id
        if given is not None:
            return self._device(given, f"deviceID is {given}, which is")
        name = request.args.pod_name
        if self._kubelet is None or name is None:
            return None
        try:
            found = await self._kubelet.slots_of(request.pod)
        except UnavailableError as error:
            raise CniError(
                f"{error.sentence} Without its answer {request.pod} gets no network.", CniCode.TRY_AGAIN
            ) from error
        if found is None:
            return None  # not kubelet's: podman and others name their pods as well
        if not found and request.wants_rdma:
            raise UnavailableError(
                f"{request.pod} asks for an RDMA device, and kubelet has given it no slot: let one of its containers"
                f' ask for {self._config.resource} (resources.limits), or leave "rdma" away.',
                operation="ADD",
                subject=str(request.pod),
            )
        if len(found) > 1:
            raise RequestError(
                f"{request.pod} has {len(found)} slots of {self._config.resource} ({', '.join(found)}), and an"
                " interface has one device: let one container ask for one, or give each its own interface by Multus"
                " (kubernetes.ask_kubelet = false).",
                operation="ADD",
                subject=str(request.pod),
            )
        return self._device(found[0], f"Kubelet says that {request.pod} has {found[0]}, which is") if found else None

    def _device(self, identity: str, says: str) -> str:
        number = cdi.slot_number(identity)
        if number is None or number >= self._config.slots:
            raise RequestError(
                f"{says} no slot of {self._config.resource}: those are {cdi.slot_id(0)} to"
                f" {cdi.slot_id(self._config.slots - 1)} (kubernetes.slots).",
                operation="ADD",
                subject=identity,
            )
        return cdi.qualified(self._config.resource, identity)

    # rdmanet.steps.Slots, from worker threads

    def give(self, attachment: Attachment, descriptor: int) -> None:
        """See ``rdmanet.steps.Slots``."""
        assert attachment.slot is not None
        if self._config.cdi:
            content = cdi.document(attachment.slot, self._nodes(attachment), self._variables(attachment, descriptor))
            cdi.write(self._config.cdi_dir, attachment.slot, content)
        self.changed()

    def problem(self, attachment: Attachment) -> str | None:
        """See ``rdmanet.steps.Slots``."""
        if attachment.slot is None or not self._config.cdi:
            return None
        path = self._config.cdi_dir / cdi.file_name(attachment.slot)
        return None if path.exists() else f"the CDI file {path} is missing"

    def withdraw(self, attachment: Attachment) -> None:
        """See ``rdmanet.steps.Slots``."""
        if attachment.slot is not None:
            cdi.remove(self._config.cdi_dir, attachment.slot)

    def free(self, attachment: Attachment) -> None:
        """See ``rdmanet.steps.Slots``."""
        self._store.free_slot(attachment.id)
        self.changed()

    def recover(self) -> None:
        """Puts the CDI files right: one for each slot that is held, none else. At a start, when devices are known."""
        ready = [one for one in self._store.attachments() if one.state is AttachmentState.READY]
        held = [one for one in ready if one.slot is not None and one.device is not None]
        for path in cdi.strangers(self._config.cdi_dir, self._config.resource, [str(one.slot) for one in held]):
            log.warning("%s is of no pod that is known and is removed", path)
            path.unlink(missing_ok=True)
        for attachment in held:
            if (problem := self.problem(attachment)) is not None:
                log.warning("%s: %s and is written again", attachment.pod, problem)
                try:
                    with namespace.opened(attachment.netns) as descriptor:
                        self.give(attachment, descriptor)
                except RdmanetError as error:
                    log.error("%s gets nothing by its slot %s: %s", attachment.pod, attachment.slot, error)

    def prepare(self) -> None:
        """Makes the directory of CDI files where there is none; recorded before."""
        if self._config.slots and self._config.cdi and not self._config.cdi_dir.exists():
            self._store.record_effect(DIRECTORY, str(self._config.cdi_dir))
            cdi.make(self._config.cdi_dir)

    def _nodes(self, attachment: Attachment) -> list[cdi.Node]:
        assert attachment.device is not None
        device = attachment.device
        return [
            cdi.Node(f"/dev/infiniband/{device.uverbs}", device.major, device.minor),
            *(cdi.Node(*one) for one in connection_manager()),
        ]

    def _variables(self, attachment: Attachment, descriptor: int) -> dict[str, str]:
        """Where the device is seen: sysfs shows a device of exclusive mode in its own namespace alone."""
        device = attachment.device
        assert device is not None
        if device.mode is RdmaMode.EXCLUSIVE:
            return namespace.run_with_sysfs(descriptor, lambda: _variables(attachment))
        return _variables(attachment)

    # Who watches

    def changed(self) -> None:
        """Something may be otherwise; from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def stop(self) -> None:
        """Ends all who watch."""
        self._ended = True
        self._wake()

    async def document(self) -> dict[str, object]:
        """What ``GET /v1/slots`` answers."""
        return await self._loop.run_in_executor(self._executor, self._document)

    async def watch(self) -> AsyncGenerator[dict[str, object], None]:
        """The document, and again after each change and each ``HEARTBEAT_S``: who is slow gets the newest only."""
        watcher = asyncio.Event()
        self._watchers.add(watcher)
        try:
            last: dict[str, object] = {}
            while not self._ended:
                watcher.clear()
                found = await self.document()
                if found != last:
                    last = found
                    yield found
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        await watcher.wait()
                except TimeoutError:
                    last = {}
        finally:
            self._watchers.discard(watcher)

    def heard(self) -> None:
        """The kernel has announced something of a device or a link; a port follows its link some time later."""
        self._wake()
        for pause_s in SECOND_LOOKS_S:
            self._loop.call_later(pause_s, self._wake)

    def _document(self) -> dict[str, object]:
        held = {one.slot: one for one in self._store.attachments() if one.slot is not None}
        unhealthy = self._pods.unhealthy()
        device, everywhere = self._host_device()
        slots = []
        for number in range(self._config.slots):
            identity = cdi.slot_id(number)
            attachment = held.get(cdi.qualified(self._config.resource, identity))
            problem = everywhere if attachment is None else unhealthy.get(attachment.id, everywhere)
            slots.append({"id": identity, "problem": problem, "pod": str(attachment.pod) if attachment else None})
        nodes = (
            []
            if device is None
            else [f"/dev/infiniband/{device.uverbs}", *(path for path, _, _ in connection_manager())]
        )
        return {
            "resource": self._config.resource,
            "device": None if device is None else device.name,
            "nodes": nodes,
            "slots": slots,
        }

    def _host_device(self) -> tuple[Device | None, str | None]:
        """The device that all get, if there is such a one, and why no further pod would get any."""
        if self._devices is None:
            return None, f"this host has no RDMA devices for pods: {self._missing}".removesuffix(".")
        try:
            found = self._devices.host_device()
        except (UnavailableError, KernelError, NotFoundError) as error:
            return None, error.sentence.removesuffix(".")
        if found is None:
            return None, None
        down = None if found.port_active else f"the port of the RDMA device {found.device.name} is not active"
        return found.device, found.problem or down


def undo(store: Store, config: KubernetesConfig) -> None:
    """Takes back all CDI files, and the directory where it was not there before and is empty. Idempotent."""
    for path in cdi.strangers(config.cdi_dir, config.resource, ()):
        path.unlink(missing_ok=True)
    made = store.effects().get(DIRECTORY)
    if made is not None:
        with contextlib.suppress(OSError):  # somebody else's files are in it by now, or it is gone
            Path(made).rmdir()
        store.forget_effect(DIRECTORY)


def _variables(attachment: Attachment) -> dict[str, str]:
    assert attachment.device is not None
    name = attachment.device.name
    found = Environment(
        pod=str(attachment.pod),
        device=name,
        gid_indexes=gid_indexes(name, attachment.addresses),
        soft_roce=is_soft_roce(name),
        traffic_class=attachment.traffic_class,
        service_level=attachment.service_level,
    )
    return found.variables()
