"""What does a service cost a connection, of 1 or of 50,000 on the node, beside kube-proxy's rules and IPVS?

Each contender has pods and services on a host of its own: ours, and the reference plugin ptp's with what kube-proxy
writes. TCP connect-request-response (benchmarks/netload.c), through a ClusterIP whose one backend is on the node
(`through`), and to that backend itself (`direct`). `added` is what services add to a connection: through the ClusterIP
less direct to the pod. Peers' direct is that of ptp without services there, as with iptables a connection to no service
meets all rules too. Instructions of the whole machine, with all that both sockets do from connect to close.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from benchmarks.peers import paths
from benchmarks.peers.kube_proxy import CALLED, PORT, TARGET_PORT, listed, load_iptables, load_ipvs, prepare_ipvs
from benchmarks.peers.paths import Way
from benchmarks.question import OURS, Effort, Goal, Place, Question, Run
from rdmanet.config import Config
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.maps import Datapath
from rdmanet.errors import RdmanetError, UnavailableError
from rdmanet.objects.changes import Changes
from rdmanet.objects.values import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Kind,
    Object,
    ObjectKey,
    Protocol,
    Service,
    ServicePort,
)
from rdmanet.services.engine import Services
from testbed.host import ARTIFACT

FAMILIES = ("ipv4", "ipv6")
IPTABLES, IPVS, BARE = "iptables", "ipvs", "ptp without services"
#: The same pods with no service but the one that is called.
ALONE = f"{OURS} with 1 service"
UNIT = "ns"
WARMUP = (50, 30, 2)
COUNT = (270, 135, 9)
#: Closed connections stay in the agent's table for a minute (RFC 5382 REQ-5) and up to 15 s more; those of the size
#: before are then taken out together, which would fall into this one's. Time is virtual: idle seconds pass at once.
SETTLE_S = 80.0
MAPS = "/sys/fs/bpf/rdmanet"
NAMESPACE = "default"


@dataclass
class Contender:
    """A way to a pod, and how services come there."""

    way: Way
    fill: Callable[[int], None]  # until there are so many

    def direct(self, family: str, warmup: int, count: int) -> float:
        """Nanoseconds of a connection to the pod."""
        return self.way.load("tcp-crr", family, warmup, count)

    def through(self, family: str, warmup: int, count: int) -> float:
        """Nanoseconds of a connection to the service."""
        service = (CALLED[family], PORT)
        return self.way.load("tcp-crr", family, warmup, count, port=TARGET_PORT, service=service)


@dataclass
class Ours:
    """Services in the maps of a host's agent, through the engine that the agent has: to read so many documents would
    take the emulated machine an hour."""

    services: Services
    server: Mapping[str, str]
    objects: dict[ObjectKey, Object] = field(default_factory=dict)

    def fill(self, count: int) -> None:
        """Dual-stack services, each with one backend of either family; those that are there stay."""
        new: dict[ObjectKey, Object] = {}
        wanted = [listed(count, family, self.server[family]) for family in FAMILIES]
        for pair in zip(*wanted, strict=True):
            name = pair[0].name
            key = ObjectKey(Kind.SERVICE, NAMESPACE, name)
            if key in self.objects:
                continue
            addresses = tuple(one.address for one in pair)
            new[key] = Service(NAMESPACE, name, addresses, (ServicePort("http", Protocol.TCP, PORT),))
            for family, one in zip(FAMILIES, pair, strict=True):
                key = ObjectKey(Kind.ENDPOINT_SLICE, NAMESPACE, f"{name}-{family}")
                ports = (EndpointPort("http", Protocol.TCP, TARGET_PORT),)
                endpoints = (Endpoint(one.backend),)
                new[key] = EndpointSlice(NAMESPACE, key.name, name, ports, endpoints)
        self.objects |= new
        self.services.objects_changed(Changes(new, {}, self.objects))
        if self.services.status()["addresses"] != count * len(FAMILIES):
            raise UnavailableError(f"{count} services were applied, and there are {self.services.status()}")


@contextlib.contextmanager
def ours() -> Iterator[Contender]:
    """Two pods of a real agent."""
    config = Config()
    with paths.rdmanet() as attacher:
        way = attacher.way()
        with Datapath.open(Artifact.load(ARTIFACT), attacher.host.path(MAPS), config.map_sizes()) as datapath:
            services = Services(datapath.services(), config.services.maglev_size, [], lambda gone: None)
            yield Contender(way, Ours(services, way.addresses).fill)


@contextlib.contextmanager
def iptables() -> Iterator[Contender]:
    """ptp's pods, and the rules of kube-proxy's mode iptables."""
    with paths.reference(IPTABLES, "ptp") as attacher:
        way = attacher.way()

        def fill(count: int) -> None:
            for family in FAMILIES:
                load_iptables(way.host, listed(count, family, way.addresses[family]), family)

        yield Contender(way, fill)


@contextlib.contextmanager
def ipvs() -> Iterator[Contender]:
    """ptp's pods, and the virtual servers of kube-proxy's mode ipvs."""
    with paths.reference(IPVS, "ptp") as attacher:
        way = attacher.way()
        prepare_ipvs(way.host)
        there: set[tuple[str, str]] = set()

        def fill(count: int) -> None:
            for family in FAMILIES:
                more = [one for one in listed(count, family, way.addresses[family]) if (family, one.name) not in there]
                load_ipvs(way.host, more, family)
                there.update((family, one.name) for one in more)

        yield Contender(way, fill)


PEERS: Mapping[str, Callable[[], AbstractContextManager[Contender]]] = {IPTABLES: iptables, IPVS: ipvs}
#: To bring them more services would take the emulated machine half an hour.
MOST_OF_PEERS = 10_000


def measure(run: Run) -> None:
    """Ever more services; at each number all contenders in turn."""
    paths.make_netload()
    sizes = run.pick(full=(1, 1000, 10_000, 50_000), quick=(1, 1000), smoke=(1, 20))
    with contextlib.ExitStack() as stack:
        contenders = {OURS: stack.enter_context(ours())}
        bare = stack.enter_context(paths.ptp())
        for name, open_contender in PEERS.items():
            try:
                contenders[name] = stack.enter_context(open_contender())
            except RdmanetError as error:
                if run.effort is Effort.SMOKE and name == IPVS:
                    run.tell(f"left out: {error}")  # the running kernel's matter
                else:
                    run.failed(f"through/*/{sizes[0]}", name, str(error))
        for size in sizes:
            if size > MOST_OF_PEERS:
                contenders = {OURS: contenders[OURS]}
            for name, contender in contenders.items():
                begun = time.monotonic()
                contender.fill(size)
                run.tell(f"{name}: {size} services after {time.monotonic() - begun:.1f} s")
            if run.place is Place.ICOUNT:
                time.sleep(SETTLE_S)
            later = sizes[1:] if size == sizes[0] else ()
            for _ in run.rounds(full=3, quick=1):
                for family in FAMILIES:
                    sample(run, contenders, bare, family, size, later)


def sample(
    run: Run, contenders: Mapping[str, Contender], bare: Way, family: str, size: int, later: Sequence[int]
) -> None:
    """Everybody in one round. What ours costs is kept for the cases of ``later`` as well, to be compared with there."""
    load = (family, run.pick(*WARMUP), run.pick(*COUNT))
    without = bare.load("tcp-crr", *load)
    run.sample(f"direct/{family}/{size}", BARE, without, UNIT)
    for name, contender in run.turns(contenders):
        try:
            direct, through = contender.direct(*load), contender.through(*load)
        except RdmanetError as error:
            run.failed(f"through/{family}/{size}", name, str(error))
            continue
        # Where the clock does not count instructions, a difference may come out as less than nothing.
        added = max(0.0, through - (direct if name == OURS else without))
        for kind, value in (("through", through), ("direct", direct), ("added", added)):
            run.sample(f"{kind}/{family}/{size}", name, value, UNIT)
            for other in later if name == OURS else ():
                run.sample(f"{kind}/{family}/{other}", ALONE, value, UNIT)


QUESTION = Question(
    name="services",
    text=(__doc__ or "").partition("\n")[0],
    places=(Place.ICOUNT,),
    measure=measure,
    goals=(
        Goal("through/*", ALONE, 1.02),
        Goal("direct/*", ALONE, 1.02),
        Goal("added/*/10000", IPTABLES, 0.10),
    ),
    timeout_s=3600.0,
)
