"""A kubelet (``testbed.kubelet``), the plugin, and the agent's half of slots: one event loop, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import web

from rdmanet.config import AgentConfig, Config, KubernetesConfig
from rdmanet.errors import UnavailableError
from rdmanet.kubelet.plugin import Plugin
from rdmanet.kubelet.pod_resources import PodResources
from rdmanet.model import Attachment, Backend, Device, RdmaMode
from rdmanet.pods import Pods
from rdmanet.rdma.backend import Condition
from rdmanet.routes import SlotRoute
from rdmanet.slots import Slots
from rdmanet.store import Store
from testbed.kubelet import Kubelet

RESOURCE = "rdmanet.io/rdma"
SLOTS = 4
HOST_DEVICE = Device(
    name="mlx5_0", backend=Backend.SHARED, mode=RdmaMode.SHARED, index=3, uverbs="uverbs0", major=231, minor=192
)


class Devices:
    """A back end as far as slots see it: none that is there beforehand, or the host's, which may go."""

    def __init__(self) -> None:
        self.host: Condition | None = None
        self.gone = ""

    def host_device(self) -> Condition | None:
        if self.gone:
            raise UnavailableError(self.gone)
        return self.host

    def is_there(self, *, active: bool = True) -> None:
        self.host = Condition(HOST_DEVICE, None, active)


class World:
    """Below a directory whose path is short, as sockets' are; ``start_agent`` and ``start_plugin`` what is wanted."""

    def __init__(self, root: Path, executor: ThreadPoolExecutor, **changes: object):
        self.kubelet = Kubelet(root / "kubelet")
        kubernetes = KubernetesConfig(
            slots=SLOTS,
            plugin_dir=self.kubelet.plugins,
            pod_resources=self.kubelet.pod_resources,
            cdi_dir=root / "cdi",
            timeout_s=20.0,
        )
        self.config = Config(
            agent=AgentConfig(socket=root / "agent.sock", state_dir=root / "state"),
            kubernetes=dataclasses.replace(kubernetes, **changes),  # type: ignore[arg-type]
        )
        self.sysfs = root / "sys"
        self.devices: Devices | None = Devices()
        self.store = Store(root / "state/state.db")
        self.pods = Pods(None, executor)
        self._executor = executor
        self._agent: web.AppRunner | None = None
        self._plugins: list[asyncio.Task[None]] = []
        self.slots = self._slots()

    def _slots(self) -> Slots:
        asked = self.config.kubernetes
        kubelet = PodResources(asked.pod_resources, asked.resource, asked.timeout_s) if asked.ask_kubelet else None
        missing = "no device for a test"
        devices = self.devices
        slots = Slots(asked, self.store, self.pods, devices, missing, kubelet, self._executor)  # type: ignore[arg-type]
        self.pods.tell(slots.changed)
        return slots

    async def start_agent(self) -> None:
        """Its API, as far as slots go."""
        self.slots = self._slots()
        application = web.Application()
        SlotRoute(self.slots).add_to(application)
        self._agent = web.AppRunner(application, shutdown_timeout=0.1)
        await self._agent.setup()
        await web.UnixSite(self._agent, str(self.config.agent.socket)).start()

    async def stop_agent(self) -> None:
        if self._agent is not None:
            await self._agent.cleanup()
            self._agent = None

    def start_plugin(self) -> asyncio.Task[None]:
        task = asyncio.create_task(Plugin(self.config, self.sysfs).serve())
        self._plugins.append(task)
        return task

    async def healthy(self, *ids: str) -> None:
        """Waits until kubelet believes exactly these to be healthy."""
        wanted = sorted(ids)
        await self.kubelet.until(lambda: sorted(self.kubelet.healthy(RESOURCE)) == wanted, f"{ids} to be healthy")

    async def registered(self, times: int) -> None:
        await self.kubelet.until(lambda: len(self.kubelet.registrations) >= times, f"{times} registrations")

    def hold(self, attachment: Attachment) -> Attachment:
        """A row that is ready, and whose device is known to the broker's side."""
        made = self.store.reserve(attachment)
        return dataclasses.replace(made, device=attachment.device)

    async def stop(self) -> None:
        for task in self._plugins:
            task.cancel()
        await asyncio.gather(*self._plugins, return_exceptions=True)
        await self.stop_agent()
        await self.kubelet.stop()
        self.store.close()


ALL = tuple(f"slot-{number}" for number in range(SLOTS))


@contextlib.asynccontextmanager
async def world(root: Path, **changes: object) -> AsyncIterator[World]:
    """A kubelet that runs, and an agent; no plugin yet. ``changes`` are of ``[kubernetes]``."""
    with ThreadPoolExecutor(4) as executor:
        made = World(root, executor, **changes)
        await made.kubelet.start()
        await made.start_agent()
        try:
            yield made
        finally:
            await made.stop()
