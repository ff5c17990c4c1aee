"""Pods' addresses on a netdev of the host, so that its RDMA device has GIDs of them.

The kernel makes a RoCE device's GIDs of the addresses on its netdev (drivers/infiniband/core/roce_gid_mgmt.c). An
address brings a ``local`` route along, by which the host would take for its own what it sends to the pod: that route
is removed, and the host goes on reaching pods through rdmanet0. RDMA asks for routes with the netdev given
(core/addr.c, set_addr_netns_by_gid_rcu; rxe_net.c, rxe_find_route4): a rule for that netdev alone leads those
questions to a table in which every pod's address is local, and so the packets between two pods to the device's own
MAC, where both ends are. The addresses are of host scope (IPv4) and deprecated (IPv6): the host never sends from them.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Collection, Iterable, Sequence

from rdmanet.errors import NotFoundError
from rdmanet.model import IPAddress
from rdmanet.netlink.batch import BatchSockets
from rdmanet.netlink.messages import (
    FAMILY,
    IFA_ADDRESS,
    IFA_F_NODAD,
    IFA_FLAGS,
    IFA_LOCAL,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    RTA_DST,
    RTA_OIF,
    RTM_DELADDR,
    RTM_NEWADDR,
    RTM_NEWROUTE,
    RTPROT_STATIC,
    IPNetwork,
    Message,
    attribute,
    get_link,
    link,
    number,
    text,
)
from rdmanet.netlink.route import RouteSocket

#: Number of the table, and priority of the rule that leads to it: after the local table, before the main one.
TABLE = 4791

RTM_DELROUTE = 25
RTM_NEWRULE, RTM_DELRULE = 32, 33
RT_TABLE_LOCAL = 255
RTN_LOCAL = 2
RT_SCOPE_HOST = 254
RT_SCOPE_NOWHERE = 255
FR_ACT_TO_TBL = 1
FRA_PRIORITY, FRA_TABLE, FRA_OIFNAME = 6, 15, 17
IFA_CACHEINFO = 6
IFA_F_NOPREFIXROUTE = 0x200
RTA_TABLE = 15
FOREVER_S = 0xFFFFFFFF
#: How long the kernel may take to make an IPv6 address's route; afterwards its announcement leads back here.
_ROUTE_TIMEOUT_S = 2.0
_ROUTE_PAUSE_S = 0.001


class LentAddresses:
    """Lends pods' addresses to netdevs of the agent's namespace; thread-safe. ``ranges`` are those of all pods."""

    def __init__(self, ranges: Sequence[IPNetwork]):
        self._ranges = tuple(ranges)
        self._sockets = BatchSockets()

    def lend(self, netdev: str, addresses: Iterable[IPAddress]) -> None:
        """Puts the rule, its table and the addresses where they are missing; blocks for milliseconds.

        Raises NotFoundError without the netdev.

        The kernel puts an address's ``local`` route back whenever the netdev comes up: call this again then, and when
        such a route is announced.
        """
        (reply,) = self._sockets.exchange([get_link(netdev)])
        if reply.errno:
            raise NotFoundError(f"This host has no netdev {netdev}.", operation="RTM_GETLINK", subject=netdev)
        index = link(reply.payloads[0]).index
        wanted = [rule(RTM_NEWRULE, network, netdev) for network in self._ranges]
        wanted += [table_route(network, index) for network in self._ranges]
        self._sockets.send(wanted)
        addresses = tuple(addresses)
        replies = self._sockets.send([add_address(index, address) for address in addresses])
        new = [address for address, reply in zip(addresses, replies, strict=True) if not reply.errno]
        late = self._without_routes(index, addresses) & {address for address in new if address.version == 6}
        deadline_s = time.monotonic() + _ROUTE_TIMEOUT_S
        # The kernel's worker makes the routes of new IPv6 addresses (net/ipv6/addrconf.c, addrconf_dad_completed).
        while late and time.monotonic() < deadline_s:
            time.sleep(_ROUTE_PAUSE_S)
            late = self._without_routes(index, late)

    def _without_routes(self, index: int, addresses: Collection[IPAddress]) -> set[IPAddress]:
        """Removes the routes of these addresses; those whose route was not there."""
        replies = self._sockets.send([delete_local_route(index, address) for address in addresses])
        return {address for address, reply in zip(addresses, replies, strict=True) if reply.errno}

    def take_back(self, netdev: str, addresses: Iterable[IPAddress]) -> None:
        """Removes the addresses where they are. Idempotent; a netdev that is gone has none."""
        (reply,) = self._sockets.exchange([get_link(netdev)])
        if not reply.errno:
            index = link(reply.payloads[0]).index
            self._sockets.send([delete_address(index, address) for address in addresses])

    def undo(self, netdev: str) -> None:
        """Takes rule, table and every address of the ranges back. Idempotent; a netdev that is gone took them along,
        all but the rule."""
        wanted = [rule(RTM_DELRULE, network, netdev) for network in self._ranges]
        (reply,) = self._sockets.exchange([get_link(netdev)])
        if not reply.errno:
            index = link(reply.payloads[0]).index
            wanted += [table_route(network, index, kind=RTM_DELROUTE) for network in self._ranges]
            with RouteSocket.here() as route:
                for _, address, prefix_length in route.addresses(index):
                    ours = any(address in network for network in self._ranges)
                    if ours and prefix_length == address.max_prefixlen:
                        wanted.append(delete_address(index, address))
        self._sockets.send(wanted)

    def close(self) -> None:
        """Gives the sockets back. Idempotent."""
        self._sockets.close()


# Messages: linux/fib_rules.h, rtnetlink.h, if_addr.h


def rule(kind: int, network: IPNetwork, netdev: str) -> Message:
    """``from all oif NETDEV lookup TABLE`` of the range's family."""
    body = struct.pack("=BBBBBBBBI", FAMILY[network.version], 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0)
    body += number(FRA_PRIORITY, TABLE) + number(FRA_TABLE, TABLE) + text(FRA_OIFNAME, netdev)
    flags = NLM_F_REQUEST | (NLM_F_CREATE | NLM_F_EXCL if kind == RTM_NEWRULE else 0)
    name = "RTM_NEWRULE" if kind == RTM_NEWRULE else "RTM_DELRULE"
    return Message(kind, flags, body, name, f"oif {netdev}", (errno.EEXIST, errno.ENOENT))


def table_route(network: IPNetwork, index: int, kind: int = RTM_NEWROUTE) -> Message:
    """``local RANGE dev NETDEV`` of our table."""
    body = _route(network.version, network.prefixlen, RTPROT_STATIC, RT_SCOPE_HOST, RTN_LOCAL)
    body += number(RTA_TABLE, TABLE) + attribute(RTA_DST, network.network_address.packed) + number(RTA_OIF, index)
    flags = NLM_F_REQUEST | (NLM_F_CREATE | NLM_F_EXCL if kind == RTM_NEWROUTE else 0)
    name = "RTM_NEWROUTE" if kind == RTM_NEWROUTE else "RTM_DELROUTE"
    return Message(kind, flags, body, name, f"local {network}", (errno.EEXIST, errno.ESRCH))


def delete_local_route(index: int, address: IPAddress) -> Message:
    """The route that the kernel has made for an address of the link."""
    body = _route(address.version, address.max_prefixlen, 0, RT_SCOPE_NOWHERE, RTN_LOCAL)
    body += number(RTA_TABLE, RT_TABLE_LOCAL) + attribute(RTA_DST, address.packed) + number(RTA_OIF, index)
    return Message(RTM_DELROUTE, NLM_F_REQUEST, body, "RTM_DELROUTE", f"local {address}", (errno.ESRCH,))


def _route(version: int, prefix_length: int, protocol: int, scope: int, kind: int) -> bytes:
    # struct rtmsg: a table above 255 is told by its attribute.
    return struct.pack("=BBBBBBBBI", FAMILY[version], prefix_length, 0, 0, 0, protocol, scope, kind, 0)


def add_address(index: int, address: IPAddress) -> Message:
    """One of a pod's addresses on a link, that nothing of the host is to be sent from."""
    flags = IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if address.version == 6 else 0)
    body = _address(index, address, RT_SCOPE_HOST if address.version == 4 else 0) + number(IFA_FLAGS, flags)
    if address.version == 6:
        # struct ifa_cacheinfo: preferred for no time (that is: deprecated), valid for ever.
        body += attribute(IFA_CACHEINFO, struct.pack("=IIII", 0, FOREVER_S, 0, 0))
    what = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_EXCL
    return Message(RTM_NEWADDR, what, body, "RTM_NEWADDR", str(address), (errno.EEXIST,))


def delete_address(index: int, address: IPAddress) -> Message:
    """Takes it off the link, if it is there."""
    body = _address(index, address, 0)
    nothing = (errno.EADDRNOTAVAIL, errno.ENODEV)
    return Message(RTM_DELADDR, NLM_F_REQUEST, body, "RTM_DELADDR", str(address), nothing)


def _address(index: int, address: IPAddress, scope: int) -> bytes:
    body = struct.pack("=BBBBI", FAMILY[address.version], address.max_prefixlen, 0, scope, index)
    return body + attribute(IFA_LOCAL, address.packed) + attribute(IFA_ADDRESS, address.packed)
