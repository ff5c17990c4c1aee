"""``rdmanet repair --database``: damaged databases are moved aside, and rows written anew from the kernel's state.

The kernel has almost everything: each attachment's link says whose it is (``rdmanet.alias``), the pinned maps have its
addresses and what the guard does, the RDMA subsystem its device, rdmanet0 what was done to the host. Pods notice
nothing. Needs no agent, and refuses while one runs.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rdmanet import adoption, alias, cdi, node
from rdmanet.config import Config
from rdmanet.datapath.artifact import Artifact
from rdmanet.datapath.kept import Kept
from rdmanet.datapath.layout import AttachmentEntry
from rdmanet.datapath.maps import Datapath
from rdmanet.devices import find_devices
from rdmanet.documents import FILE as OBJECTS
from rdmanet.documents import Documents
from rdmanet.errors import DamagedError, NotFoundError, RdmanetError, RequestError
from rdmanet.model import (
    DEFAULT_MAX_LEASES,
    UNLIMITED,
    Attachment,
    AttachmentState,
    Bandwidth,
    GuardMode,
    NetnsId,
    PodName,
    address_key,
    address_of,
)
from rdmanet.netlink import messages, namespace, search
from rdmanet.rdma.backend import DeviceBackend
from rdmanet.store import FILE as STATE
from rdmanet.store import Store, owned

#: The file is complete before it gets its name.
_NEW = ".new"
_ASIDE = ".damaged-"
_DEFAULT_NAMESPACE = "default"


def repair(config: Config) -> list[str]:
    """Does it; returns a sentence for each thing that was done or could not be found. Idempotent.

    Raises ConflictError while an agent runs, StateError where a database is of a newer rdmanet or the disk is full.
    """
    state_dir = config.agent.state_dir
    with owned(state_dir):
        said = [*_objects(state_dir / OBJECTS), *_state(config, state_dir / STATE)]
    return said or ["the databases are whole; nothing was done"]


def files_aside(state_dir: Path) -> list[Path]:
    """What repairs have moved aside, and what an interrupted one has left."""
    return [
        path
        for name in (STATE, OBJECTS)
        for mark in (_ASIDE, _NEW)
        for path in sorted(state_dir.glob(f"{name}{mark}*"))
    ]


def _damage(open_and_read: Callable[[], object]) -> str | None:
    """Why a database cannot be used; None where it is whole."""
    try:
        open_and_read()
    except DamagedError as error:
        return error.sentence.partition(" To go on")[0]
    return None


def _read_objects(path: Path) -> None:
    with Documents(path) as documents:
        documents.find()


def _read_state(path: Path) -> None:
    with Store(path) as store:
        store.attachments()


def _move_aside(path: Path) -> Path:
    """With its log, so that SQLite's own tools can still look at it."""
    number = 1
    while (target := path.with_name(f"{path.name}{_ASIDE}{number}")).exists():
        number += 1
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))
    return target


def _objects(path: Path) -> Iterator[str]:
    if path.exists() and (why := _damage(lambda: _read_objects(path))):
        yield why
        yield f"moved it to {_move_aside(path)}"
        yield (
            "objects cannot be found in the kernel: start the agent and `rdmanet apply` them again; until then no"
            " policy is in force, and no service has backends"
        )


def _state(config: Config, path: Path) -> Iterator[str]:
    why = _damage(lambda: _read_state(path)) if path.exists() else None
    if why is None and path.exists():
        with Store(path) as store:
            known = store.attachments()
            found = _look(config, store, known)
            if found.attachments or found.effects:
                store.restore(found.attachments, found.effects, found.last_id)
                yield f"{path} had lost rows"
                yield from found.sentences()
        return
    new = path.with_name(path.name + _NEW)
    for suffix in ("", "-wal", "-shm"):
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    with Store(new) as store:
        found = _look(config, store, ())
        store.restore(found.attachments, found.effects, found.last_id)
        store.begin(node.boot_id())
    if why is None and not found.attachments and not found.effects:
        new.unlink()
        return
    yield why or f"{path} was not there"
    if why is not None:
        yield f"moved it to {_move_aside(path)}"
    new.rename(path)
    yield from found.sentences()


@dataclass
class _Found:
    """What the kernel shows that the rows do not have."""

    effects: Mapping[str, str]
    last_id: int
    attachments: list[Attachment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def sentences(self) -> Iterator[str]:
        """For people."""
        for one in self.attachments:
            if one.state is AttachmentState.READY:
                device = f" and {one.device.name}" if one.device else ""
                addresses = ", ".join(map(str, one.addresses))
                yield f"found {one.host_ifname}{device} of {one.pod}, {addresses}, at {one.netns}"
            else:
                yield f"{one.host_ifname} of {one.pod} is not whole: the next start removes it"
        yield from self.problems
        names = ", ".join(sorted(self.effects))
        yield f"wrote {len(self.attachments)} attachment(s), and what was done to the host ({names or 'nothing'})"


@dataclass(frozen=True)
class _Maps:
    """What the pinned maps say, read once."""

    attachments: Mapping[int, AttachmentEntry]  # by index of the host's end
    endpoints: Mapping[bytes, int]  # attachment ids
    last_id: int
    bandwidths: Mapping[int, Bandwidth]  # by attachment id


def _look(config: Config, store: Store, known: Sequence[Attachment]) -> _Found:
    links = adoption.strangers(known)
    maps = _maps(config)
    effects = {name: detail for name, detail in node.find_effects().items() if name not in store.effects()}
    numbers = [_number(link) for link in links]
    found = _Found(effects, max([maps.last_id, *numbers]))
    places = search.find(
        {link.peer_namespace: _described(link).netns for link in links if link.peer_namespace is not None}
    )
    store.restore((), effects, 0)  # a shared device's addresses are lent as recorded
    devices = find_devices(config, store)[0]
    taken = {address_key(address) for one in known for address in one.addresses}
    keys = {(one.container_id, one.ifname) for one in known}
    held = {one.slot for one in known}
    slots = cdi.holders(config.kubernetes.cdi_dir, "RDMANET_ADDRESS")
    for link in sorted(links, key=_number):
        place = None if link.peer_namespace is None else places.get(link.peer_namespace)
        one = _attachment(link, place, maps)
        if place is not None and alias.attachment(link.alias) is None:
            one = replace(one, ifname=_name_inside(link, place) or one.ifname)
        if (one.container_id, one.ifname) in keys:
            one = replace(one, container_id=_unknown(link))
        if taken & {address_key(address) for address in one.addresses}:
            one = replace(one, ipv4=None, ipv6=None, state=AttachmentState.RELEASING)
        if one.wants_rdma and one.state is AttachmentState.READY:
            one = _with_device(one, devices, found)
            slot = slots.get(str(one.addresses[0]))
            one = replace(one, slot=None if slot in held else slot)
        found.problems += _problems(link, one)
        keys.add((one.container_id, one.ifname))
        taken |= {address_key(address) for address in one.addresses}
        found.attachments.append(one)
    return found


def _maps(config: Config) -> _Maps:
    if not config.datapath.bpffs_dir.is_dir():
        return _Maps({}, {}, 0, {})
    artifact = Kept(config.datapath_dir).choose(Artifact.load(config.datapath.artifact_dir))
    pins = config.datapath.bpffs_dir
    with Datapath.open(artifact, pins, config.map_sizes(), config.datapath_dir) as datapath:
        attachments = datapath.attachments()
        endpoints = {key: entry.attachment_id for key, entry in datapath.endpoints().items()}
        # Ids are never used twice, and flows outlive their attachments: the next one is above all that is spoken of.
        spoken = [
            *(entry.attachment_id for entry in attachments.values()),
            *endpoints.values(),
            *datapath.namespaces().values(),
            *(number for number, _, _ in datapath.drops_by_direction()),
            *datapath.flows.attachments(),
        ]
        bandwidths = {entry.attachment_id: datapath.bandwidth(entry.attachment_id) for entry in attachments.values()}
        return _Maps(attachments, endpoints, max(spoken, default=0), bandwidths)


def _number(link: messages.Link) -> int:
    match = adoption.HOST_END.fullmatch(link.name)
    assert match is not None
    return int(match[1])


def _unknown(link: messages.Link) -> str:
    return f"unknown-{_number(link)}"


def _name_inside(link: messages.Link, place: search.Place) -> str | None:
    """What the pod calls its end. Under another name it would be missing from the pod, and be made anew."""
    index = link.peer_index or 0
    try:
        with namespace.opened(place.path) as descriptor:
            name = namespace.run_inside(descriptor, lambda: socket.if_indextoname(index))
    except (OSError, RdmanetError):  # gone since
        return None
    return name if name.isascii() and name.isprintable() else None  # a pod may have named it anything


def _described(link: messages.Link) -> alias.Described:
    return alias.attachment(link.alias) or alias.Described(
        container_id=_unknown(link),
        ifname=f"unknown{_number(link)}"[:15],
        wants_rdma=False,
        max_leases=DEFAULT_MAX_LEASES,
        service_level=0,
        network=None,
        pod=None,
        pod_uid=None,
        netns=None,
    )


def _attachment(link: messages.Link, place: search.Place | None, maps: _Maps) -> Attachment:
    number, said, entry = _number(link), _described(link), maps.attachments.get(link.index)
    if entry is not None and entry.attachment_id != number:
        entry = None
    addresses = [] if entry is None else [address_of(key) for key in (entry.ipv4, entry.ipv6) if any(key)]
    whole = bool(addresses) and place is not None
    whole = whole and all(maps.endpoints.get(address_key(address)) == number for address in addresses)
    return Attachment(
        id=number,
        container_id=said.container_id,
        ifname=said.ifname,
        network=said.network or "unknown",
        netns=place.path if place else said.netns or "/",
        netns_id=place.netns_id if place else NetnsId(dev=0, ino=0),
        pod=said.pod or PodName(_DEFAULT_NAMESPACE, said.container_id),
        state=AttachmentState.READY if whole else AttachmentState.RELEASING,
        mac=entry.mac.hex(":") if entry else "",
        mtu_bytes=link.mtu_bytes,
        ipv4=next((a for a in addresses if isinstance(a, ipaddress.IPv4Address)), None),
        ipv6=next((a for a in addresses if isinstance(a, ipaddress.IPv6Address)), None),
        wants_rdma=said.wants_rdma,
        guard=GuardMode.ENFORCE if entry and entry.enforce else GuardMode.OBSERVE,
        max_leases=said.max_leases,
        traffic_class=entry.traffic_class if entry else 0,
        service_level=said.service_level,
        pod_uid=said.pod_uid,
        bandwidth=maps.bandwidths[number] if entry else UNLIMITED,
    )


def _with_device(one: Attachment, devices: DeviceBackend | None, found: _Found) -> Attachment:
    device = None
    if devices is not None:
        with contextlib.suppress(NotFoundError, RequestError), namespace.opened(one.netns) as descriptor:
            device = devices.find(one, descriptor)
    if device is None:
        found.problems.append(f"{one.pod} had an RDMA device, which cannot be found: DEL and ADD the pod again")
    return replace(one, device=device)


def _problems(link: messages.Link, one: Attachment) -> Iterable[str]:
    said = alias.attachment(link.alias)
    if said is None or said.container_id != one.container_id:
        yield (
            f"whose {one.host_ifname} is cannot be found: it goes on, and no DEL will find it; it is removed when its"
            " network namespace is gone"
        )
    elif said.pod is None:
        yield f"the name of {one.host_ifname}'s pod was too long to be kept: to policies it is {one.pod} until its ADD"
    elif said.network is None:
        yield f"the name of {one.host_ifname}'s network was too long to be kept: GC does not collect it, DEL does"
