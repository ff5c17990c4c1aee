"""The node as the agent sets it up: the host's link, uplinks, filters, and what the datapath knows of them.

``prepare`` is what a start does, and what repairs do again: every effect is idempotent, and nothing is lost meanwhile.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from pathlib import Path

from rdmanet import ipam, node
from rdmanet.config import Config
from rdmanet.datapath.layout import NodeEntry, UplinkEntry
from rdmanet.datapath.maps import Datapath
from rdmanet.errors import ConfigError
from rdmanet.model import GATEWAY_MAC, address_key
from rdmanet.netlink import messages
from rdmanet.netlink.batch import BatchSocket
from rdmanet.netlink.route import Link, RouteSocket
from rdmanet.node import HOST_LINK, HOST_PEER, NodeNetwork, Uplink
from rdmanet.reconcile import NodeFacts
from rdmanet.store import Store

log = logging.getLogger(__name__)


class NodeSetup:
    """Synchronous; one call at a time. ``cgroup`` is the root of the hierarchy, where sockets' programs are attached;
    None where they are not."""

    def __init__(self, config: Config, store: Store, datapath: Datapath):
        self._config = config
        self._store = store
        self._datapath = datapath
        self._uplinks: list[Uplink] = []
        self._network: NodeNetwork | None = None
        self._wanted: NodeEntry | None = None
        self.cgroup: Path | None = None

    @property
    def links(self) -> set[str]:
        """Names of the links that this is about, those that are not there as well."""
        return {HOST_LINK, HOST_PEER, *self._config.network.uplinks, *(uplink.name for uplink in self._uplinks)}

    @property
    def indexes(self) -> set[int]:
        """Of those that were there."""
        found = {uplink.ifindex for uplink in self._uplinks}
        if self._network is not None:
            found |= {self._network.host_ifindex, self._network.peer_ifindex}
        return found

    @property
    def pins(self) -> Path:
        """The directory of pins."""
        return self._config.datapath.bpffs_dir

    # Making

    def prepare(self) -> NodeNetwork:
        """The node's effects, in order; each recorded first (``rdmanet.node``). Raises ConfigError for an uplink that
        is configured and not there, or a range that is in use, KernelError where the kernel refuses."""
        with RouteSocket.here() as route:
            return self._prepare(node.find_uplinks(self._config, route), route)

    def repair(self) -> NodeNetwork:
        """The same again, with those uplinks that there are."""
        with RouteSocket.here() as route:
            return self._prepare(self._find(route), route)

    def restore_pins(self) -> None:
        """What was pinned and is not. Raises as ``Pins.restore``."""
        node.prepare_bpffs(self.pins, self._store)
        self._datapath.pins.restore(self.cgroup)

    def _find(self, route: RouteSocket) -> list[Uplink]:
        try:
            return node.find_uplinks(self._config, route)
        except ConfigError:  # one that is configured is away
            there = (route.link(uplink.name) for uplink in self._uplinks)
            indexes = {link.index for link in there if link is not None}
            return [uplink for uplink in self._uplinks if uplink.ifindex in indexes]

    def _prepare(self, uplinks: list[Uplink], route: RouteSocket) -> NodeNetwork:
        store, datapath = self._store, self._datapath
        host, peer = node.prepare_host_link(self._config, store, route)
        self._wanted = self._entry(host)
        if self._network is None:
            # That somebody was watching an earlier agent is over.
            datapath.configure(self._wanted)
        else:
            present = datapath.node()
            # Where the epoch is lost it must be none that a flow was judged in.
            epoch = secrets.randbits(31) if present is None else present.epoch
            monitor = present is not None and present.monitor
            datapath.configure(replace(self._wanted, monitor=monitor, epoch=epoch))
        route.add_clsact(peer.index)
        route.set_ingress_filter(peer.index, datapath.dispatcher("host"), "rdmanet/host")
        for uplink in uplinks:
            datapath.set_uplink(uplink.ifindex, _entry_of(uplink))
            node.prepare_uplink(uplink, datapath.dispatcher("uplink"), store, route)
        for ifindex in set(datapath.uplinks()) - {uplink.ifindex for uplink in uplinks}:
            datapath.delete_uplink(ifindex)
        node.release_uplinks(store, route, {uplink.name for uplink in uplinks})
        node.describe_effects(store)
        self._uplinks = uplinks
        self._network = node.network(self._config, host, peer, uplinks)
        return self._network

    def _entry(self, host: Link) -> NodeEntry:
        config = self._config
        return NodeEntry(
            gateway_mac=bytes.fromhex(GATEWAY_MAC.replace(":", "")),
            masquerade=config.masquerade.enabled,
            host_ifindex=host.index,
            first_port=config.masquerade.first_port,
            last_port=config.masquerade.last_port,
            maglev_size=config.services.maglev_size,
            max_flows_per_pod=config.tracking.max_flows_per_pod,
        )

    # Looking

    def facts(self) -> tuple[NodeFacts, NodeFacts]:
        """What should be and what there is. Raises KernelError where the kernel does not answer."""
        network = self._network
        assert network is not None, "prepared before"
        datapath, ranges = self._datapath, network.ranges
        with RouteSocket.here() as route:
            uplinks = self._find(route)
            links = {name: link for name in (HOST_LINK, HOST_PEER) if (link := route.link(name)) is not None}
            ours = {HOST_LINK: network.host_ifindex, HOST_PEER: network.peer_ifindex}
            links = {name: link for name, link in links.items() if link.index == ours[name]}
            hooks = {HOST_PEER: (network.peer_ifindex, "host")}
            hooks |= {uplink.name: (uplink.ifindex, "uplink") for uplink in uplinks}
            programs = {hook: datapath.dispatcher_id(hook) for hook in ("host", "uplink")}
            filters = _filters({name: index for name, (index, _) in hooks.items()})
            entry = datapath.node()
            known = self._wanted
            seen = NodeFacts(
                links_up={name: link.up for name, link in links.items()},
                addresses=frozenset(address for _, address, _ in route.addresses(network.host_ifindex))
                if HOST_LINK in links
                else frozenset(),
                routes=frozenset(to for to, index in route.routes() if index == network.host_ifindex),
                forwarding=node.forwards(),
                filters=filters,
                uplinks=datapath.uplinks(),
                node=entry,
                missing_pins=frozenset(datapath.pins.missing(self.cgroup)),
                empty_slots=frozenset(datapath.pins.empty_slots()),
            )
        wanted = NodeFacts(
            links_up=dict.fromkeys(ours, True),
            addresses=frozenset(ipam.gateway(one) for one in ranges),
            routes=frozenset(ranges),
            forwarding=dict.fromkeys(node.FAMILIES, True),
            filters={name: programs[hook] for name, (_, hook) in hooks.items()},
            uplinks={uplink.ifindex: _entry_of(uplink) for uplink in uplinks},
            # Others write these.
            node=replace(known, epoch=entry.epoch, monitor=entry.monitor) if known and entry else known,
        )
        return wanted, seen


def _entry_of(uplink: Uplink) -> UplinkEntry:
    return UplinkEntry(
        ipv4=address_key(uplink.ipv4) if uplink.ipv4 else bytes(16),
        ipv6=address_key(uplink.ipv6) if uplink.ipv6 else bytes(16),
    )


def _filters(indexes: dict[str, int]) -> dict[str, int | None]:
    """The program at our place of each link's ingress, by the link's name."""
    found: dict[str, int | None] = {}
    with BatchSocket() as host:
        replies = host.exchange([messages.get_ingress_filter(index) for index in indexes.values()])
    for name, reply in zip(indexes, replies, strict=True):
        found[name] = messages.bpf_filter(reply.payloads[0]).program_id if reply.payloads else None
    return found
