"""What ``rdmanet.netlink.messages`` packs by hand, read back by pyroute2, and the reverse for replies."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.nsidmsg import nsidmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from rdmanet.errors import ConflictError, NetlinkError, NotFoundError, RdmanetError
from rdmanet.model import GATEWAY_MAC, IPAddress, pod_mac
from rdmanet.netlink import messages
from rdmanet.netlink.batch import Reply, accepted, refused
from rdmanet.netlink.messages import Message

V4, V6 = ipaddress.ip_address("10.9.0.1"), ipaddress.ip_address("fd09::1")
CREATE, REPLACE, EXCLUSIVE = messages.NLM_F_CREATE, messages.NLM_F_REPLACE, messages.NLM_F_EXCL


def decoded(message: Message, kind: Any) -> Any:
    """A message as pyroute2 reads it."""
    header = struct.pack("=IHHII", 16 + len(message.body), message.type, message.flags, 7, 0)
    found = kind(header + message.body)
    found.decode()
    return found


def encoded(kind: Any, fields: dict[str, object], attributes: list[tuple[str, object]]) -> bytes:
    """A message's payload as pyroute2 writes it."""
    message = kind()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data[16:])


def test_a_veth_pair_into_a_namespace() -> None:
    message = messages.add_veth("rn-7", GATEWAY_MAC, 9000, peer_name="eth0", peer_mac=pod_mac(7), peer_namespace=33)
    found = decoded(message, ifinfmsg)
    assert message.flags & (CREATE | EXCLUSIVE) == CREATE | EXCLUSIVE
    assert (found.get_attr("IFLA_IFNAME"), found.get_attr("IFLA_ADDRESS")) == ("rn-7", GATEWAY_MAC)
    info = found.get_attr("IFLA_LINKINFO")
    assert info.get_attr("IFLA_INFO_KIND") == "veth"
    peer = info.get_attr("IFLA_INFO_DATA").get_attr("VETH_INFO_PEER")
    assert (peer.get_attr("IFLA_IFNAME"), peer.get_attr("IFLA_ADDRESS")) == ("eth0", pod_mac(7))
    assert peer.get_attr("IFLA_NET_NS_FD") == 33
    for end in (found, peer):
        assert end.get_attr("IFLA_MTU") == 9000
        assert (end.get_attr("IFLA_NUM_TX_QUEUES"), end.get_attr("IFLA_NUM_RX_QUEUES")) == (1, 1)
        assert end["flags"] == 0, "down until its filter is there"
    assert message.subject == "rn-7 and eth0"


def test_links_by_name_and_index() -> None:
    assert decoded(messages.get_link("rn-7"), ifinfmsg).get_attr("IFLA_IFNAME") == "rn-7"
    up = decoded(messages.set_up(5), ifinfmsg)
    assert (up["index"], up["flags"], up["change"]) == (5, 1, 1)
    no_address = decoded(messages.no_link_local(5), ifinfmsg)
    assert (no_address["index"], no_address["change"]) == (5, 0)
    inet6 = no_address.get_attr("IFLA_AF_SPEC").get_attr("AF_INET6")
    assert inet6.get_attr("IFLA_INET6_ADDR_GEN_MODE") == 1
    grouped = decoded(messages.set_group("rn-7", 0x40000001), ifinfmsg)
    assert (grouped["index"], grouped.get_attr("IFLA_GROUP")) == (0, 0x40000001)
    assert decoded(messages.delete_link("rn-7"), ifinfmsg).get_attr("IFLA_IFNAME") == "rn-7"
    group = decoded(messages.delete_group(0x40000001), ifinfmsg)
    assert (group["index"], group.get_attr("IFLA_IFNAME"), group.get_attr("IFLA_GROUP")) == (0, None, 0x40000001)


@pytest.mark.parametrize(("address", "flags"), [(V4, 0), (V6, 2)])
def test_addresses(address: IPAddress, flags: int) -> None:
    message = messages.add_address(5, address, address.max_prefixlen)
    found = decoded(message, ifaddrmsg)
    assert message.flags & (CREATE | REPLACE) == CREATE | REPLACE
    assert (found["index"], found["prefixlen"]) == (5, address.max_prefixlen)
    assert found.get_attr("IFA_LOCAL") == found.get_attr("IFA_ADDRESS") == str(address)
    assert found.get_attr("IFA_FLAGS") == flags


@pytest.mark.parametrize("address", [V4, V6])
def test_neighbours(address: IPAddress) -> None:
    found = decoded(messages.add_permanent_neighbour(5, address, GATEWAY_MAC), ndmsg)
    assert (found["ifindex"], found["state"]) == (5, 0x80)
    assert (found.get_attr("NDA_DST"), found.get_attr("NDA_LLADDR")) == (str(address), GATEWAY_MAC)


@pytest.mark.parametrize(
    ("destination", "gateway", "mtu_bytes"),
    [("0.0.0.0/0", V4, 1500), ("::/0", V6, None), ("10.9.0.0/16", V4, None), ("fd09::/64", V6, 1400)],
)
def test_routes(destination: str, gateway: IPAddress, mtu_bytes: int | None) -> None:
    network = ipaddress.ip_network(destination)
    found = decoded(messages.add_route(network, 5, gateway=gateway, mtu_bytes=mtu_bytes, metric=12), rtmsg)
    assert (found["dst_len"], found["table"], found["type"], found["flags"]) == (network.prefixlen, 254, 1, 4)
    expected = str(network.network_address) if network.prefixlen else None
    assert found.get_attr("RTA_DST") == expected
    assert (found.get_attr("RTA_OIF"), found.get_attr("RTA_PRIORITY")) == (5, 12)
    assert found.get_attr("RTA_GATEWAY") == str(gateway)
    metrics = found.get_attr("RTA_METRICS")
    assert (metrics.get_attr("RTAX_MTU") if metrics else None) == mtu_bytes


def test_tc() -> None:
    qdisc = decoded(messages.add_clsact(5), tcmsg)
    assert (qdisc["index"], qdisc["parent"], qdisc["handle"]) == (5, 0xFFFFFFF1, 0xFFFF0000)
    assert qdisc.get_attr("TCA_KIND") == "clsact"
    for message in (messages.set_ingress_filter(5, 33, "rdmanet/pod"), messages.get_ingress_filter(5)):
        found = decoded(message, tcmsg)
        assert (found["index"], found["parent"], found["handle"]) == (5, 0xFFFFFFF2, 1)
        assert found["info"] == 0x7D0A << 16 | 0x0300
        assert found.get_attr("TCA_KIND") == "bpf"
    options = decoded(messages.set_ingress_filter(5, 33, "rdmanet/pod"), tcmsg).get_attr("TCA_OPTIONS")
    assert (options.get_attr("TCA_BPF_FD"), options.get_attr("TCA_BPF_NAME")) == (33, "rdmanet/pod")
    assert options.get_attr("TCA_BPF_FLAGS") == 1


# Replies


def test_a_link_is_read() -> None:
    payload = encoded(
        ifinfmsg,
        {"index": 9, "flags": 0x1043},
        [
            ("IFLA_IFNAME", "rn-7"),
            ("IFLA_MTU", 1500),
            ("IFLA_ADDRESS", GATEWAY_MAC),
            ("IFLA_LINK", 2),
            ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "veth")]}),
        ],
    )
    assert messages.link(payload) == messages.Link(9, "rn-7", GATEWAY_MAC, 1500, True, "veth", 2)
    bare = encoded(ifinfmsg, {"index": 1, "flags": 0}, [("IFLA_IFNAME", "lo"), ("IFLA_MTU", 65536)])
    assert messages.link(bare) == messages.Link(1, "lo", "", 65536, False, None, None)


def test_a_filter_is_read() -> None:
    name, number = b"rdmanet/pod\0", struct.pack("=HHI", 8, 11, 77)
    options = struct.pack("=HH", 4 + len(name), 7) + name + number
    kind = struct.pack("=HH", 8, 1) + b"bpf\0"
    payload = bytes(20) + kind + struct.pack("=HH", 4 + len(options), 2 | 0x8000) + options
    assert messages.bpf_filter(payload) == messages.Filter("rdmanet/pod", 77)


def test_attributes_that_are_cut_short_end_the_row() -> None:
    assert list(messages.attributes(struct.pack("=HHI", 8, 3, 1) + struct.pack("=HH", 0, 9))) == [(3, b"\1\0\0\0")]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(17, ConflictError), (16, ConflictError), (19, NotFoundError), (3, NotFoundError), (1, NetlinkError)],
)
def test_errnos_are_exceptions(number: int, kind: type[RdmanetError]) -> None:
    message = Message(16, 1, b"", "RTM_NEWLINK", "rn-7 and eth0")
    with pytest.raises(kind, match="The kernel refused RTM_NEWLINK for rn-7 and eth0: no room") as caught:
        accepted([message], [Reply(number, "no room")])
    error = caught.value
    assert isinstance(error, RdmanetError)
    assert (error.operation, error.subject, error.errno) == ("RTM_NEWLINK", "rn-7 and eth0", number)
    assert str(refused("a", "b", 1)).startswith("The kernel refused a for b. (a: b")


def test_the_first_refusal_that_is_not_accepted_is_raised() -> None:
    fine = Message(17, 1, b"", "RTM_DELLINK", "first", accepted=(19,))
    wrong = Message(17, 1, b"", "RTM_DELLINK", "second", accepted=(19,))
    assert len(accepted([fine, wrong], [Reply(19), Reply(0)])) == 2
    with pytest.raises(NetlinkError, match="second"):
        accepted([fine, wrong], [Reply(19), Reply(1)])


def test_alias_and_the_number_of_a_namespace() -> None:
    found = decoded(messages.set_alias("rn-7", "ä note"), ifinfmsg)
    assert (found.get_attr("IFLA_IFNAME"), found.get_attr("IFLA_IFALIAS")) == ("rn-7", "ä note")
    asked = decoded(messages.get_nsid(33), nsidmsg)
    assert asked.get_attr("NETNSA_FD") == 33
    for value, expected in ((5, 5), (-1, None)):
        answer = bytes(4) + messages.attribute(1, value.to_bytes(4, "little", signed=True))
        assert messages.nsid(answer) == expected
    assert messages.nsid(bytes(4)) is None
