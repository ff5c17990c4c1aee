"""rtnetlink: links, addresses, neighbours, routes and tc filters of one network namespace."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError as PyrouteError

from rdmanet.errors import ConflictError, NetlinkError, NotFoundError
from rdmanet.model import IPAddress
from rdmanet.netlink import namespace
from rdmanet.netlink.batch import SOL_NETLINK, refused
from rdmanet.netlink.messages import (
    ETH_P_ALL,
    FILTER_HANDLE,
    FILTER_PRIORITY,
    IFA_F_NODAD,
    IFF_UP,
    IN6_ADDR_GEN_MODE_NONE,
    RT_TABLE_MAIN,
    RTNH_F_ONLINK,
    TC_H_CLSACT_INGRESS,
    Link,
)

__all__ = ["DefaultRoute", "Link", "RouteSocket"]

NETLINK_GET_STRICT_CHK = 12  # include/uapi/linux/netlink.h, since Linux 4.20
IFF_NOARP = 0x80
RT_SCOPE_LINK = 253
TC_H_CLSACT_EGRESS = 0xFFFFFFF3

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class DefaultRoute:
    """A default route of the main table."""

    ifindex: int
    family: int  # 4 or 6
    metric: int
    prefsrc: IPAddress | None


@contextmanager
def _translated(operation: str, subject: str) -> Iterator[None]:
    try:
        yield
    except PyrouteError as error:
        raise refused(operation, subject, abs(int(error.code or 0)) or errno.EIO) from error
    except OSError as error:
        raise refused(operation, subject, error.errno or errno.EIO) from error


def _socket() -> socket.socket:
    sock = namespace.netlink_socket(socket.NETLINK_ROUTE)
    # The kernel then dumps the routes of the table that is asked for, and not several for each of a thousand links.
    sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
    return sock


class RouteSocket:
    """rtnetlink of one namespace. Belongs to the thread that made it; use as a context manager."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        try:
            self._route = IPRoute(use_socket=sock)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def here(cls) -> RouteSocket:
        """Of the agent's own namespace, the host's."""
        return cls(_socket())

    @classmethod
    def inside(cls, descriptor: int) -> RouteSocket:
        """Of the namespace that ``descriptor`` stands for (pyroute2's own way forks a process for 9 ms)."""
        return cls(namespace.run_inside(descriptor, _socket))

    def __enter__(self) -> RouteSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._route.close()

    # Links

    def link(self, name: str) -> Link | None:
        """The link of that name, or None."""
        try:
            with _translated("RTM_GETLINK", name):
                found = list(self._route.link("get", ifname=name))
        except NotFoundError:
            return None
        return self._as_link(found[0]) if found else None

    def link_at(self, index: int) -> Link | None:
        """The link of that index, or None."""
        try:
            with _translated("RTM_GETLINK", f"link {index}"):
                found = list(self._route.link("get", index=index))
        except NotFoundError:
            return None
        return self._as_link(found[0]) if found else None

    def links(self) -> list[Link]:
        """Every link of the namespace."""
        with _translated("RTM_GETLINK", "all links"):
            return [self._as_link(message) for message in self._route.get_links()]

    @staticmethod
    def _as_link(message: Any) -> Link:
        info = message.get_attr("IFLA_LINKINFO")
        return Link(
            index=message["index"],
            name=message.get_attr("IFLA_IFNAME"),
            mac=message.get_attr("IFLA_ADDRESS") or "",
            mtu_bytes=message.get_attr("IFLA_MTU"),
            up=bool(message["flags"] & IFF_UP),
            kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        )

    def add_veth(
        self,
        name: str,
        mac: str,
        mtu_bytes: int,
        *,
        peer_name: str,
        peer_mac: str,
        peer_namespace: int | None = None,
    ) -> None:
        """A veth pair, both ends down; the peer straight in another namespace where a descriptor is given."""
        peer: dict[str, object] = {"ifname": peer_name, "address": peer_mac, "mtu": mtu_bytes}
        if peer_namespace is not None:
            peer["net_ns_fd"] = peer_namespace
        with _translated("RTM_NEWLINK", f"{name} and {peer_name}"):
            self._route.link("add", ifname=name, kind="veth", address=mac, mtu=mtu_bytes, peer=peer)

    def set_up(self, index: int, *, noarp: bool = False, link_local: bool = True) -> None:
        """Brings a link up; ``link_local=False`` keeps the kernel from giving it an fe80:: address."""
        attributes: dict[str, object] = {"arp": False} if noarp else {}
        with _translated("RTM_SETLINK", f"link {index}"):
            if not link_local:
                # A message of its own: in one with the flags it comes too late (net/core/rtnetlink.c, do_setlink).
                inet6 = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]}
                self._route.link("set", index=index, IFLA_AF_SPEC={"attrs": [("AF_INET6", inet6)]})
            self._route.link("set", index=index, state="up", **attributes)

    def delete_link(self, name: str) -> bool:
        """Removes a link (and a veth's peer); False when it was not there."""
        link = self.link(name)
        if link is None:
            return False
        try:
            with _translated("RTM_DELLINK", name):
                self._route.link("del", index=link.index)
        except NotFoundError:
            return False
        return True

    # Addresses, neighbours, routes

    def add_address(self, index: int, address: IPAddress, prefix_length: int) -> None:
        """Adds an address without duplicate address detection: ranges are ours, addresses are unique."""
        extra = {"flags": IFA_F_NODAD} if address.version == 6 else {}
        with _translated("RTM_NEWADDR", f"{address}/{prefix_length}"):
            self._route.addr("replace", index=index, address=str(address), prefixlen=prefix_length, **extra)

    def addresses(self, index: int | None = None) -> list[tuple[int, IPAddress, int]]:
        """(ifindex, address, prefix length) of every address, or of one link's."""
        found = []
        with _translated("RTM_GETADDR", "addresses"):
            messages = list(self._route.get_addr() if index is None else self._route.get_addr(index=index))
        for message in messages:
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if text:
                found.append((message["index"], ipaddress.ip_address(text), message["prefixlen"]))
        return found

    def add_permanent_neighbour(self, index: int, address: IPAddress, mac: str) -> None:
        """A neighbour that never expires and is never asked for."""
        with _translated("RTM_NEWNEIGH", str(address)):
            self._route.neigh(
                "replace",
                ifindex=index,
                dst=str(address),
                lladdr=mac,
                state="permanent",
                family=_FAMILY[address.version],
            )

    def add_route(
        self,
        destination: ipaddress.IPv4Network | ipaddress.IPv6Network,
        index: int,
        *,
        gateway: IPAddress | None = None,
        source: IPAddress | None = None,
        mtu_bytes: int | None = None,
        metric: int | None = None,
    ) -> None:
        """A route through a link: on-link through ``gateway``, or straight to the destination without one.

        Without a metric it takes the place of whatever route there is to that destination.
        """
        request: dict[str, object] = {
            "family": _FAMILY[destination.version],
            "dst": str(destination.network_address),
            "dst_len": destination.prefixlen,
            "oif": index,
        }
        if gateway is not None:
            request |= {"gateway": str(gateway), "flags": RTNH_F_ONLINK}
        elif destination.version == 4:
            request["scope"] = RT_SCOPE_LINK
        if source is not None:
            request["prefsrc"] = str(source)
        if mtu_bytes is not None:
            request["metrics"] = {"mtu": mtu_bytes}
        if metric is not None:
            request["priority"] = metric
        with _translated("RTM_NEWROUTE", str(destination)):
            self._route.route("replace", **request)

    def default_routes(self) -> list[DefaultRoute]:
        """Default routes of the main table, both families, best metric first."""
        return self._default_routes(table=RT_TABLE_MAIN)

    def default_routes_of_all_tables(self) -> list[DefaultRoute]:
        """Those of tables that rules lead to as well: the kernel filters by table only where it checks strictly."""
        self._sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 0)
        try:
            return self._default_routes()
        finally:
            self._sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)

    def _default_routes(self, **match: int) -> list[DefaultRoute]:
        found = []
        for version, family in _FAMILY.items():
            with _translated("RTM_GETROUTE", "default"):
                messages = list(self._route.get_routes(family=family, **match))
            for message in messages:
                index = message.get_attr("RTA_OIF")
                if message["dst_len"] != 0 or index is None or message["type"] != 1:
                    continue
                source = message.get_attr("RTA_PREFSRC")
                found.append(
                    DefaultRoute(
                        ifindex=index,
                        family=version,
                        metric=message.get_attr("RTA_PRIORITY") or 0,
                        prefsrc=ipaddress.ip_address(source) if source else None,
                    )
                )
        return sorted(found, key=lambda route: route.metric)

    def routes(self) -> list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int]]:
        """(destination, ifindex) of every unicast route of the main table except the default ones."""
        found: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int]] = []
        for family in _FAMILY.values():
            with _translated("RTM_GETROUTE", "main table"):
                messages = list(self._route.get_routes(family=family, table=RT_TABLE_MAIN))
            for message in messages:
                text = message.get_attr("RTA_DST")
                index = message.get_attr("RTA_OIF")
                if text and index:
                    found.append((ipaddress.ip_network(f"{text}/{message['dst_len']}"), index))
        return found

    # tc

    def add_clsact(self, index: int) -> bool:
        """Adds the clsact qdisc; False when the link has one already."""
        try:
            with _translated("RTM_NEWQDISC", f"clsact on link {index}"):
                self._route.tc("add", "clsact", index)
        except ConflictError:
            return False
        return True

    def delete_clsact(self, index: int) -> bool:
        """Removes the clsact qdisc with all filters on it; False when there is none."""
        try:
            with _translated("RTM_DELQDISC", f"clsact on link {index}"):
                self._route.tc("del", "clsact", index)
        except (NotFoundError, NetlinkError) as error:
            if error.errno in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                return False
            raise
        return True

    def set_ingress_filter(self, index: int, program: int, name: str) -> None:
        """Puts a direct-action program at our fixed place of the link's ingress; replaces in place without loss."""
        with _translated("RTM_NEWTFILTER", f"{name} on link {index}"):
            self._route.tc(
                "replace-filter",
                "bpf",
                index,
                FILTER_HANDLE,
                fd=program,
                name=name,
                parent=TC_H_CLSACT_INGRESS,
                protocol=ETH_P_ALL,
                prio=FILTER_PRIORITY,
                direct_action=True,
            )

    def delete_ingress_filter(self, index: int) -> bool:
        """Removes our filter from the link's ingress; False when it is not there."""
        try:
            with _translated("RTM_DELTFILTER", f"link {index}"):
                self._route.tc(
                    "del-filter",
                    "bpf",
                    index,
                    FILTER_HANDLE,
                    parent=TC_H_CLSACT_INGRESS,
                    protocol=ETH_P_ALL,
                    prio=FILTER_PRIORITY,
                )
        except (NotFoundError, NetlinkError) as error:
            if error.errno in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                return False
            raise
        return True

    def ingress_filter_names(self, index: int) -> list[str]:
        """Names of the bpf filters on the link's ingress, ours and others'."""
        try:
            with _translated("RTM_GETTFILTER", f"link {index}"):
                messages = list(self._route.get_filters(index=index, parent=TC_H_CLSACT_INGRESS))
        except (NotFoundError, NetlinkError) as error:
            if error.errno in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                return []
            raise
        names = []
        for message in messages:
            options = message.get_attr("TCA_OPTIONS")
            name = options.get_attr("TCA_BPF_NAME") if options is not None else None
            if name:
                names.append(name)
        return names

    def has_filters(self, index: int) -> bool:
        """Whether any filter hangs on the link's clsact qdisc, in either direction."""
        for parent in (TC_H_CLSACT_INGRESS, TC_H_CLSACT_EGRESS):
            try:
                with _translated("RTM_GETTFILTER", f"link {index}"):
                    if list(self._route.get_filters(index=index, parent=parent)):
                        return True
            except (NotFoundError, NetlinkError) as error:
                if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                    raise
        return False

    def qdisc_kinds(self, index: int) -> list[str]:
        """Kinds of the qdiscs on a link."""
        with _translated("RTM_GETQDISC", f"link {index}"):
            return [message.get_attr("TCA_KIND") for message in self._route.get_qdiscs(index=index)]
