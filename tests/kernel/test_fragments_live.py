"""Parts of datagrams that come in any order, between real stacks: pods, host, and a world behind the uplink."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rdmanet.datapath import bpf, tables
from testbed import datagrams
from testbed.bpf import lab as labs
from testbed.bpf import packets
from testbed.bpf.lab import FAR, GATEWAYS, UPLINK, Lab, Namespace, Pod
from tests.kernel.test_datapath_live import VERSIONS, until

ORDERS = ("forward", "first", "backward")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    labs.require_root()
    with Lab.build(labs.artifact()) as built:
        for device in (True, True, False):
            built.add_pod(device=device)
        yield built


@pytest.fixture
def web(lab: Lab) -> Pod:
    """A pod that has sent nothing in parts yet."""
    for name in ("fragments", "waiting"):
        definition = lab.artifact.maps[name]
        for key in list(bpf.keys(lab.map(name), definition.key_size, definition.max_entries)):
            bpf.delete(lab.map(name), key)
    lab.datapath.forget(lab.pods[2].id)
    return lab.pods[2]


def ways(lab: Lab, web: Pod, way: str, version: int) -> tuple[Namespace, str, Namespace, str]:
    """Client and its address, server and its address."""
    own = web.addresses[version]
    return {
        "pod to pod": (web.namespace, own, lab.pods[0].namespace, lab.pods[0].addresses[version]),
        "host to pod": (lab.host, GATEWAYS[version], web.namespace, own),
        "pod to host": (web.namespace, own, lab.host, UPLINK[version]),
        "pod to outside": (web.namespace, own, lab.outside, FAR[version]),
    }[way]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", ["pod to pod", "host to pod", "pod to host", "pod to outside"])
def test_parts_come_in_any_order_there_and_back(lab: Lab, web: Pod, way: str, order: str, version: int) -> None:
    """RFC 4787 REQ-14."""
    client, own, server, address = ways(lab, web, way, version)
    port = server.run(lambda: datagrams.reflect(address, 0, order))["port"]
    for size in (3000, 50_000):
        said = client.run(lambda size=size: datagrams.reflected(address, port, size, source=own, order=order))  # type: ignore[misc]
        assert said["equal"]
        assert said["seen"][0][0] == (UPLINK[version] if way == "pod to outside" else own)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_hosts_own_parts_come_in_any_order(lab: Lab, order: str, version: int) -> None:
    """They pass the uplink's program on their way to the host's stack."""
    port = lab.host.run(lambda: datagrams.reflect(UPLINK[version], 0, order))["port"]
    own = labs.OUTSIDE[version]
    said = lab.outside.run(lambda: datagrams.reflected(UPLINK[version], port, 5000, source=own, order=order))
    assert said["equal"]


@pytest.mark.parametrize("version", VERSIONS)
def test_parts_do_not_wait_for_ever(lab: Lab, web: Pod, version: int) -> None:
    """Identifications come again: what waited for too long is not put behind another packet's first part."""
    parts, sniffer, raw = _parts(lab, web, version)
    with sniffer, raw:
        raw.send(parts[1])
        until(lab, lambda: _waits(lab, web))
        for key in list(bpf.keys(lab.map("waiting_parts"), 4, lab.artifact.maps["waiting_parts"].max_entries)):
            value = bpf.lookup(lab.map("waiting_parts"), key, tables.WAITING_PART.size)
            assert value is not None
            number, previous, _, *rest = tables.WAITING_PART.unpack(value)
            bpf.update(lab.map("waiting_parts"), key, tables.WAITING_PART.pack(number, previous, 0, *rest))
        raw.send(parts[0])
        assert _next_part(sniffer, version) == parts[0][14:][-len(b"first") :]
        raw.send(parts[1])
        assert _next_part(sniffer, version) == parts[1][14:][-len(b"later") :]
    assert lab.datapath.drops()[web.id, "fragment_early"] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_parts_of_a_refused_first_one_do_not_come(lab: Lab, web: Pod, version: int) -> None:
    target = lab.pods[0].addresses[version]
    first = packets.fragment(web.addresses[version], target, packets.roce(17, payload=bytes(64)), more=True)
    later = packets.fragment(web.addresses[version], target, bytes(64), offset=1480)
    with web.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        for ip in (later, first):
            raw.send(_frame(web, ip))
        until(lab, lambda: lab.datapath.drops().get((web.id, "fragment_unknown")) == 1)
    found = {reason: count for (pod, reason), count in lab.datapath.drops().items() if pod == web.id}
    assert found == {"fragment_early": 1, "roce_no_device": 1, "fragment_unknown": 1}


def _frame(pod: Pod, ip: packets.Ip) -> bytes:
    ethertype = packets.ETHERTYPE_IPV4 if ip.version == 4 else packets.ETHERTYPE_IPV6
    return packets.ethernet(labs.GATEWAY_MAC, pod.mac, ethertype, bytes(ip))


def _parts(lab: Lab, web: Pod, version: int) -> tuple[list[bytes], socket.socket, socket.socket]:
    """A first and a later part to a pod, what sees them there, and what sends them."""
    receiver = lab.pods[0]
    source, target = web.addresses[version], receiver.addresses[version]
    head = packets.udp(5000, 5001, bytes(11) + b"first")
    made = [
        packets.fragment(source, target, head, more=True),
        packets.fragment(source, target, b"the later", offset=len(head)),
    ]
    sniffer = receiver.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    sniffer.bind(("eth0", 3))
    raw = web.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW)
    raw.bind(("eth0", 0))
    return [_frame(web, ip) for ip in made], sniffer, raw


def _waits(lab: Lab, web: Pod) -> bool:
    return lab.datapath.drops().get((web.id, "fragment_early")) == 1


def _next_part(sniffer: socket.socket, version: int) -> bytes:
    """The last five bytes of the next part that comes in."""
    while True:
        frame = sniffer.recv(1 << 16)
        later = frame[14 + 6 : 14 + 8] != b"\0\0" if version == 4 else frame[14 + 6] == packets.FRAGMENT
        if frame[12:14] in (b"\x08\x00", b"\x86\xdd") and later:
            return frame[-5:]
