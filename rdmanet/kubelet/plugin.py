"""``rdmanet device-plugin``: tells kubelet how many slots there are and which can be used, and gives them out.

Kubelet removes all plugins' sockets when it starts, then makes its own: that is heard by inotify, and the plugin makes
a new socket and registers again. What a container gets is a name only (CDI); the agent says later what it stands for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from rdmanet.config import Config
from rdmanet.errors import ConfigError, NotFoundError, UnavailableError
from rdmanet.inotify import Appeared, Folders, Lost, Vanished
from rdmanet.kubelet import rpc, topology, watching
from rdmanet.kubelet.messages import DEVICE_PLUGIN_VERSION, device_plugin
from rdmanet.kubelet.states import SlotStates

log = logging.getLogger(__name__)

KUBELET_SOCKET = "kubelet.sock"
REGISTER_TIMEOUT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0


def run(config: Config) -> int:
    """Runs the plugin until SIGTERM or SIGINT."""
    logging.basicConfig(level=config.agent.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    if not config.kubernetes.slots:
        raise ConfigError(
            "kubernetes.slots is 0, so there is nothing to tell kubelet of; set how many containers of this host may"
            " have a device at a time.",
            subject="kubernetes.slots",
        )
    asyncio.run(_until_signal(config))
    return 0


async def _until_signal(config: Config) -> None:
    loop, own = asyncio.get_running_loop(), asyncio.current_task()
    assert own is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, own.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await Plugin(config).serve()
    log.info("stopping; kubelet gives out no more slots until the plugin is back")


class Plugin:
    """One plugin; ``serve`` runs it."""

    def __init__(self, config: Config, sysfs: Path = topology.SYSFS):
        self._config = config.kubernetes
        self._agent = config.agent.socket
        self._sysfs = sysfs
        self._states = SlotStates(config.kubernetes)
        self._numbers = itertools.count(1)
        self._endpoint = ""
        self._due = asyncio.Event()

    # Registration

    async def serve(self) -> None:
        """Until it is cancelled. Raises NotFoundError without kubelet's directory."""
        directory = self._config.plugin_dir
        folders = Folders(coming=True)
        if not folders.watch(str(directory)):
            folders.close()
            raise NotFoundError(
                f"There is no {directory}: is kubelet's directory another (kubernetes.plugin_dir), or not mounted"
                " here?",
                operation="inotify",
                subject=str(directory),
            )
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(folders.fileno(), self._heard, folders, ended)
        tasks: list[asyncio.Task[None]] = []
        try:
            for left in directory.glob(f"{self._prefix}*.sock"):  # of a plugin that was killed
                left.unlink(missing_ok=True)
            tasks.append(loop.create_task(watching.watch(self._agent, self._take, self._lose)))
            tasks.append(loop.create_task(self._keep_registered()))
            done, _ = await asyncio.wait((ended, *tasks), return_when=asyncio.FIRST_COMPLETED)
            for first in done:
                first.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            loop.remove_reader(folders.fileno())
            folders.close()

    @property
    def _prefix(self) -> str:
        """Of the names of our sockets: short, as a socket's path has at most 107 bytes; a host may have two plugins."""
        return f"rdmanet-{hashlib.sha256(self._config.resource.encode()).hexdigest()[:8]}-"

    def _heard(self, folders: Folders, ended: asyncio.Future[None]) -> None:
        for happened in folders.read():
            match happened:
                case Vanished(name="") if not ended.done():
                    sentence = (
                        f"{self._config.plugin_dir} was removed or moved; start the plugin again when it is back."
                    )
                    ended.set_exception(UnavailableError(sentence))
                case Vanished(name=name) if name == self._endpoint:
                    self._due.set()
                case Appeared(name=name) if name == KUBELET_SOCKET:
                    self._due.set()
                case Lost():
                    self._due.set()

    async def _keep_registered(self) -> None:
        """Once now, and each time kubelet starts anew; after a refusal again, with growing pauses."""
        pause_s = _FIRST_PAUSE_S
        server, registered_with = None, None
        try:
            while True:
                self._due.clear()
                # One start is heard twice, when our socket goes and when kubelet's comes: what counts is what is there.
                kubelet = self._kubelet()
                if kubelet is not None and kubelet == registered_with and self._own().exists():
                    await self._due.wait()
                    continue
                self._endpoint = ""  # its socket goes now, and that is no news
                if server is not None:
                    await server.stop(grace=None)
                    server = registered_with = None
                refused = ""
                if kubelet is not None:
                    server = await self._listen()
                    refused = await self._register()
                else:
                    log.info("waiting for kubelet: %s has no %s", self._config.plugin_dir, KUBELET_SOCKET)
                if not refused:
                    pause_s, registered_with = _FIRST_PAUSE_S, kubelet
                    await self._due.wait()
                    continue
                log.error("kubelet does not take %s: %s; again in %.1f s", self._config.resource, refused, pause_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._due.wait()
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self._endpoint = ""
            if server is not None:
                await server.stop(grace=None)

    def _kubelet(self) -> tuple[int, int] | None:
        """Which socket of kubelet's is there; a later one is another, also under the same inode number."""
        try:
            found = (self._config.plugin_dir / KUBELET_SOCKET).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_ctime_ns

    def _own(self) -> Path:
        return self._config.plugin_dir / self._endpoint

    async def _listen(self) -> Any:
        # A name of its own each time: a gRPC server that ends removes the socket at its path, perhaps the next one's.
        self._endpoint = f"{self._prefix}{next(self._numbers)}.sock"
        path = self._own()
        server = rpc.server()
        server.add_generic_rpc_handlers((rpc.handlers("v1beta1.DevicePlugin", self._methods()),))
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise UnavailableError(
                f"The plugin's socket {path} cannot be made: {error}. Check kubernetes.plugin_dir, and who may write"
                " there.",
                operation="bind",
                subject=str(path),
            ) from error
        await server.start()
        return server

    async def _register(self) -> str:
        """Why kubelet does not take it; empty where it does. It connects to the plugin before it answers."""
        wish = device_plugin(
            "RegisterRequest",
            version=DEVICE_PLUGIN_VERSION,
            endpoint=self._endpoint,
            resource_name=self._config.resource,
            options=_options(),
        )
        try:
            async with rpc.channel(self._config.plugin_dir / KUBELET_SOCKET) as channel:
                register = rpc.call(channel, "v1beta1.Registration", "Register")
                await register(wish, timeout=REGISTER_TIMEOUT_S, wait_for_ready=True)
        except rpc.Refusal as error:
            return str(error.details() or error.code().name)
        log.info("registered %d slots of %s with kubelet", self._config.slots, self._config.resource)
        return ""

    # The agent

    async def _take(self, document: dict[str, Any]) -> None:
        device = document["device"]
        place = self._states.place
        if device != self._states.device:
            loop = asyncio.get_running_loop()
            where = topology.NOWHERE
            place = (
                where if device is None else await loop.run_in_executor(None, topology.rdma_place, device, self._sysfs)
            )
        if await self._states.take(document, place):
            self._tell()

    async def _lose(self, why: str) -> None:
        if await self._states.lose(why):
            self._tell()

    def _tell(self) -> None:
        problems = self._states.problems()
        log.info("%d of %d slots can be used", self._config.slots - len(problems), self._config.slots)
        for problem in sorted(set(problems.values())):
            log.warning("%d slot(s): %s", list(problems.values()).count(problem), problem)

    # Kubelet's calls

    def _methods(self) -> dict[str, Any]:
        return {
            "GetDevicePluginOptions": self._get_options,
            "ListAndWatch": self._list_and_watch,
            "GetPreferredAllocation": self._get_preferred_allocation,
            "Allocate": self._allocate,
            "PreStartContainer": self._pre_start_container,
        }

    async def _get_options(self, request: Any, context: Any) -> Any:
        return _options()

    async def _list_and_watch(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(self._states.lists()) as lists:
            async for found in lists:
                yield found

    async def _get_preferred_allocation(self, request: Any, context: Any) -> Any:
        gpus = await asyncio.get_running_loop().run_in_executor(None, topology.gpu_places, self._sysfs)
        answer = device_plugin("PreferredAllocationResponse")
        for wanted in request.container_requests:
            available = list(wanted.available_deviceIDs)
            must = list(wanted.must_include_deviceIDs)
            # All slots are of one device, or of none that is there beforehand.
            places = dict.fromkeys((*available, *must), self._states.place)
            ids = topology.preferred(available, must, wanted.allocation_size, places, gpus)
            answer.container_responses.add(deviceIDs=ids)
        return answer

    async def _allocate(self, request: Any, context: Any) -> Any:
        answer = device_plugin("AllocateResponse")
        try:
            for wanted in request.container_requests:
                answer.container_responses.append(self._states.allocation(list(wanted.devices_ids)))
        except NotFoundError as error:
            await context.abort(rpc.Code.NOT_FOUND, error.sentence)
        except UnavailableError as error:
            log.warning("Allocate is refused: %s", error.sentence)
            await context.abort(rpc.Code.FAILED_PRECONDITION, error.sentence)
        return answer

    async def _pre_start_container(self, request: Any, context: Any) -> Any:
        """Not asked for (``pre_start_required``), and answered: a device is ready when its container is made."""
        return device_plugin("PreStartContainerResponse")


def _options() -> Any:
    return device_plugin("DevicePluginOptions", pre_start_required=False, get_preferred_allocation_available=True)
