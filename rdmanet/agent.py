"""The composition root: builds every part, starts and stops them. Read top to bottom, it is the wiring diagram.

A stop leaves the host as it is: programs, maps, links and devices stay, and traffic with them. The next agent adopts
them;
``uninstall`` takes them back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.log import server_logger

from rdmanet import adoption, background, memory, node, notify, pending, steps
from rdmanet.addresses import NodeAddresses
from rdmanet.api import Api, NotHttp
from rdmanet.attach import Attachments
from rdmanet.broker.server import BrokerServer
from rdmanet.broker.values import PodView
from rdmanet.calls import Calls
from rdmanet.config import Config, KubernetesConfig
from rdmanet.connections import Connections
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.kept import Kept
from rdmanet.datapath.maps import Datapath
from rdmanet.devices import find_devices
from rdmanet.documents import Documents
from rdmanet.errors import BpfError, RdmanetError, StateError, UnavailableError
from rdmanet.health import Health
from rdmanet.limits import PodLimits, find_hierarchy
from rdmanet.metrics import Metrics
from rdmanet.model import AttachmentState, Device, NetnsId, address_of
from rdmanet.monitor import Monitor
from rdmanet.netlink import namespace
from rdmanet.netlink.batch import BatchSockets
from rdmanet.nodesetup import NodeSetup
from rdmanet.numbers import RdmaNumbers
from rdmanet.objects.keeping import Objects
from rdmanet.pods import Pods
from rdmanet.policy.engine import Policy
from rdmanet.rdma.cgroup import Cgroups
from rdmanet.reconcile import Record
from rdmanet.removal import Removals
from rdmanet.repairs import Repairs
from rdmanet.reserve import Reserve
from rdmanet.routes import FlowsRoute, MonitorRoute, ObjectRoutes, RepairRoute, SlotRoute
from rdmanet.services.disconnect import Sockets
from rdmanet.services.engine import Services
from rdmanet.slots import Kubelet, Slots
from rdmanet.status import About, Status
from rdmanet.store import FILE as STATE
from rdmanet.store import Store, owned
from rdmanet.tracking import Tracking
from rdmanet.watch import Watch

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Threads for what blocks: netlink, bpf(2), SQLite. Two cores are busy with eight ADDs at once.
WORKERS = 8
#: How long a stop waits for links that are being removed.
REMOVAL_STOP_S = 10.0


def run(config: Config) -> int:
    """Runs the agent until SIGTERM or SIGINT."""
    logging.basicConfig(level=config.agent.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    agent = Agent(config)
    try:
        with owned(config.agent.state_dir):
            asyncio.run(agent.serve())
    except RdmanetError as error:
        notify.notify(notify.status(error.sentence if error is agent.failure else f"cannot start: {error.sentence}"))
        raise
    return 0


class Agent:
    """One agent; ``serve`` runs it."""

    def __init__(self, config: Config, fault_point: steps.FaultPoint = steps.no_fault):
        self._config = config
        self._fault_point = fault_point
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="rdmanet")
        self._stop = asyncio.Event()
        self.failure: UnavailableError | None = None  # why it could not go on
        server_logger.addFilter(NotHttp())

    async def serve(self) -> None:
        """Starts, says ``ready``, waits for a signal, stops. Raises UnavailableError where it cannot go on."""
        memory.share_arena()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._unhandled)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        started = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            # What is there now stays: a full collection would walk through all modules again and again, 30 ms in the
            # middle of somebody's ADD.
            gc.collect()
            gc.freeze()
            memory.give_back()
            log.info("ready after %.0f ms", (time.monotonic() - started) * 1000)
            print("ready", flush=True)
            notify.notify(notify.READY, notify.status("ready"))
            watchdog_s = notify.watchdog_s()
            if watchdog_s is not None:
                feeding = background.begin(notify.feed(self._executor, watchdog_s), "watchdog")
                stack.callback(feeding.cancel)
            await self._stop.wait()
            log.info("stopping; pods keep their network")
            notify.notify(notify.STOPPING, notify.status("stopping; pods keep their network"))
        if self.failure is not None:
            raise self.failure

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What nobody has caught is logged; work without which the agent only looks well ends it."""
        loop.default_exception_handler(context)
        failure = background.failure(context)
        if failure is not None and self.failure is None:
            self.failure = failure
            self._stop.set()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        config = self._config
        stack.callback(self._executor.shutdown)

        # Read everything of ours before anything is written to the kernel.
        reserve = Reserve(config.agent.state_dir)
        reserve.give_up_if_full()
        store = await self._blocking(Store, config.agent.state_dir / STATE, reserve)
        stack.callback(store.close)
        self._store = store
        documents = await self._blocking(Documents.beside, config.agent.state_dir)
        stack.callback(documents.close)
        await self._blocking(store.begin, node.boot_id())
        await self._blocking(lambda: adoption.refuse_strangers(store.attachments(), str(store.path)))
        self._devices, devices_missing = await self._blocking(find_devices, config, store)

        # The node: datapath, host link, uplinks.
        setup, network = await self._blocking(self._prepare)
        stack.callback(self._datapath.close)
        record = Record()
        addresses = NodeAddresses(self._datapath.policy, self._executor)
        await addresses.start()
        stack.push_async_callback(addresses.stop)

        # Who may talk to whom, and what stands behind services: before any pod is looked at.
        ready = [one for one in store.attachments() if one.state is AttachmentState.READY]
        self._policy = Policy(self._datapath, changed=lambda: _soon(loop, lambda: self._broker.policy_changed()))
        here = [address for attachment in ready for address in attachment.addresses]
        services = Services(self._datapath.services(), config.services.maglev_size, here, Sockets(self._places))
        objects = Objects(documents, (self._policy, services))

        # Pods and leases.
        self._pods = Pods(self._devices, self._executor)
        hierarchy, hierarchy_missing = await self._blocking(find_hierarchy)
        self._limits = PodLimits(store, self._datapath, config.rdma, hierarchy, hierarchy_missing)
        services_missing = await self._blocking(self._attach_sockets, hierarchy)
        if hierarchy is not None and services_missing is None:
            setup.cgroup = hierarchy.root
        self._broker = BrokerServer(
            directory=self._pods,
            guard=self._datapath,
            queue_pairs=self._pods,
            grace_s=config.rdma.claim_grace_s,
            permits=self._permits,
            observe_granted=lambda seconds: self._metrics.lease_granted(seconds),
            on_first_contact=self._contact,
        )
        self._pods.serve_with(self._broker, loop)
        slots = Slots(
            config.kubernetes,
            store,
            self._pods,
            self._devices,
            devices_missing,
            _kubelet(config.kubernetes),
            self._executor,
        )
        self._pods.tell(slots.changed)
        await self._blocking(slots.prepare)
        host = BatchSockets()
        stack.callback(host.close)
        parts = steps.Parts(
            store,
            network,
            self._datapath,
            self._devices,
            self._pods,
            self._limits,
            slots,
            self._policy,
            services,
            host,
            host_ends=steps.HostEnds(),
            reserve=reserve,
        )
        removals = Removals(parts, self._fault_point)
        numbers = RdmaNumbers(self._devices, self._pods, self._limits, self._datapath)
        tracking = Tracking(
            self._datapath.flows,
            store.attachment_ids,
            self._executor,
            config.tracking.interval_s,
        )

        def tables() -> dict[str, tuple[int, int]]:
            policy = self._policy.sizes()
            flows = (tracking.entries, self._datapath.flows.max_entries)
            return {"flows": flows, "policy": policy["entries"], "prefixes": policy["prefixes"], **services.sizes()}

        self._metrics = Metrics(store, self._datapath, self._broker, removals, self._limits, numbers, tables, record)
        attachments = Attachments(parts, removals, config.rdma, self._fault_point)
        await self._broker.start()
        stack.push_async_callback(self._broker.stop)
        await self._blocking(objects.load)
        await self._blocking(self._policy.recover, ready, objects.snapshot)
        await self._blocking(objects.tell_all)
        await self._blocking(attachments.recover)
        await self._blocking(slots.recover)
        await self._broker.adopt()
        # What somebody breaks is put right, in turn with CNI's calls.
        calls = Calls()
        repairs = Repairs(parts, attachments, setup, record, enabled=config.agent.repair, fault_point=self._fault_point)
        self._watch = Watch(
            repairs, setup, record, store, parts.host_ends, calls, self._executor, lambda number: health.remade(number)
        )
        if self._devices is not None:
            health = Health(
                self._devices,
                self._pods,
                self._broker,
                self._executor,
                self._set_device,
                self._watch.look_at,
                slots.heard,
            )
            await health.start()
            stack.push_async_callback(health.stop)
        await self._watch.start()
        stack.push_async_callback(self._watch.stop)
        tracking.start()
        stack.push_async_callback(tracking.stop)
        removals.start(lambda error: _soon(loop, lambda: background.failed(loop, "removal of what DELs leave", error)))
        stack.push_async_callback(self._blocking, removals.stop, REMOVAL_STOP_S)
        self._status = Status(
            About(
                rdma_mode=self._devices.mode if self._devices else None,
                rdma_backend=self._devices.name if self._devices else None,
                rdma_missing=devices_missing,
                services_missing=services_missing,
                mtu_bytes=network.mtu_bytes,
            ),
            time.monotonic(),
            store,
            self._datapath,
            self._pods,
            self._limits,
            removals,
            numbers,
            objects,
            self._policy,
            services,
            self._broker,
            record,
        )

        await self._blocking(reserve.make)

        # From here on the world may ask.
        pending_dir = config.agent.state_dir / "pending"
        api = Api(
            attachments,
            self._executor,
            status=self.status,
            rdma=self.rdma,
            metrics=self._metrics.text,
            swap=self._swap,
            observer=self._metrics,
            pending_dir=pending_dir,
            settled=removals.settled,
            calls=calls,
            slot=slots.of,
        )
        application = api.application()
        ObjectRoutes(objects, self._executor).add_to(application)
        SlotRoute(slots).add_to(application)
        MonitorRoute(Monitor(self._datapath, self._names, self._executor)).add_to(application)
        FlowsRoute(Connections(lambda: self._datapath.flows, self._names, self._executor)).add_to(application)
        RepairRoute(self._watch.ask).add_to(application)
        await self._listen(stack, application, api.metrics_application())

        async def call(variables: dict[str, str], body: bytes, still_wanted: Callable[[], bool]) -> int:
            return (await api.call(variables, body, still_wanted))[0]

        drained = await pending.drain(pending_dir, call)
        if drained:
            log.info("carried out %d queued DEL(s)", drained)

    def _prepare(self) -> tuple[NodeSetup, node.NodeNetwork]:
        """The datapath, and the node's effects in order."""
        config, store = self._config, self._store
        kept = Kept(config.datapath_dir)
        artifact = kept.choose(Artifact.load(config.datapath.artifact_dir))
        node.prepare_bpffs(config.datapath.bpffs_dir, store)
        self._datapath = Datapath.open(artifact, config.datapath.bpffs_dir, config.map_sizes(), config.datapath_dir)
        setup = NodeSetup(config, store, self._datapath)
        network = setup.prepare()
        store.effects_changed = functools.partial(node.describe_effects, store)
        return setup, network

    def _attach_sockets(self, hierarchy: Cgroups | None) -> str | None:
        """Lets the host's own sockets and those of pods reach services; returns why they cannot, which stops nothing
        else."""
        self._datapath.enter_namespace(namespace.own_cookie(), 0)
        if hierarchy is None:
            missing = (
                "This host has no cgroup2 hierarchy mounted: services work for no socket; mount one with"
                " `mount -t cgroup2 none /sys/fs/cgroup` and start the agent again."
            )
        else:
            try:
                self._datapath.attach_sockets(hierarchy.root)
                return None
            except (UnavailableError, BpfError) as error:
                missing = str(error)
        log.warning("%s", missing)
        return missing

    async def _listen(
        self, stack: contextlib.AsyncExitStack, application: web.Application, metrics_application: web.Application
    ) -> None:
        path = self._config.agent.socket
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, _private_socket(path)).start()
        if self._config.agent.metrics_port:
            metrics = web.AppRunner(metrics_application, access_log=None)
            await metrics.setup()
            stack.push_async_callback(metrics.cleanup)
            await web.TCPSite(metrics, "127.0.0.1", self._config.agent.metrics_port).start()

    async def _blocking(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _set_device(self, attachment_id: int, device: Device) -> None:
        """A device has come back, perhaps with another number."""
        self._store.set_device(attachment_id, device)
        self._limits.changed(attachment_id, device)

    def _contact(self, cookie: int, pid: int) -> None:
        """A process of a pod has spoken to the broker, which tells where the pod's cgroup is."""
        netns = self._pods.netns_of(cookie)
        if netns is not None and self._limits.wants_contact(netns):
            self._executor.submit(self._limits.contact, netns, pid).add_done_callback(_log_failure)

    def _swap(self, previous: bool) -> dict[str, str]:
        """Puts the artifact on disk, or the one that ran before, under the running traffic; answers hook → program."""
        kept = Kept(self._config.datapath_dir)
        offered = Artifact.load(self._config.datapath.artifact_dir)
        self._datapath.swap(kept.previous() if previous else offered)
        kept.pass_over(offered if previous else None)
        return self._datapath.running()

    def _permits(self, connector: PodView, listener: PodView) -> str | None:
        """See ``rdmanet.broker.judging.Permits``: the policies' answer, None where some pair of addresses may."""
        sentence = None
        for own, other in itertools.product(connector.addresses, listener.addresses):
            if address_of(own).version == address_of(other).version:
                sentence = self._policy.refusal(connector.name, own, listener.name, other)
                if sentence is None:
                    return None
        return sentence

    def _names(self) -> dict[int, tuple[str, str]]:
        """Pod and interface of each attachment."""
        return {one.id: (str(one.pod), one.ifname) for one in self._store.attachments()}

    def _places(self) -> list[tuple[str, NetnsId]]:
        """Where pods' network namespaces are."""
        return [(one.netns, one.netns_id) for one in self._store.attachments() if one.state is AttachmentState.READY]

    async def status(self) -> dict[str, object]:
        """What ``GET /v1/status`` answers."""
        await self._watch.glance()
        return await self._blocking(self._status.document, await self._broker.status())

    async def rdma(self) -> dict[str, object]:
        """What ``GET /v1/rdma`` answers."""
        return await self._blocking(self._status.rdma, await self._broker.status())


def _kubelet(config: KubernetesConfig) -> Kubelet | None:
    """Whom to ask for pods' slots. Raises UnavailableError without the packages that it takes."""
    if not config.slots or not config.ask_kubelet:
        return None
    try:
        from rdmanet.kubelet.pod_resources import PodResources
    except ImportError as error:
        raise UnavailableError(
            f"kubernetes.slots needs grpcio and protobuf ({error}): pip install 'rdmanet[agent,kubernetes]'."
        ) from error
    return PodResources(config.pod_resources, config.resource, config.timeout_s)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """From a thread."""
    loop.call_soon_threadsafe(call)


def _log_failure(future: Future[None]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None:
        log.error("A pod's cgroup could not be looked for: %s", error)


def _private_socket(path: Path) -> socket.socket:
    """A listening unix socket that root alone may open; replaces what a dead agent left (the lock says it is dead)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(previous)
        sock.setblocking(False)
    except OSError as error:
        raise StateError(
            f"The agent's socket {path} cannot be made: {error}.", operation="bind", subject=str(path)
        ) from error
    return sock
