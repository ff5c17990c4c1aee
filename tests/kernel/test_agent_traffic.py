"""What attached pods can and cannot send: every way, both families, TCP and UDP; MTU; spoofing; what is counted.

Live and through the agent; the datapath's own verdicts are tests/bpf's.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from testbed.outside import FAR_IPV4, FAR_IPV6, HOST_IPV4, HOST_IPV6
from testbed.peer import Peer
from testbed.world import Attached, World

GATEWAY_MAC = bytes.fromhex("027200000000")
GATEWAYS = {4: "10.213.0.1", 6: "fd72:646d:616e::1"}
FAR = {4: FAR_IPV4, 6: FAR_IPV6}
UPLINK = {4: HOST_IPV4, 6: HOST_IPV6}
METRICS_PORT = 9742
ROCE_PORT = 4791
FAMILIES = (4, 6)


@dataclass
class Place:
    """Where programs run, and its addresses by IP version."""

    addresses: dict[int, str]
    tcp: Peer
    udp: Peer


@dataclass
class Stage:
    """Two pods, the host and the outside, with their programs."""

    world: World
    one: Attached
    two: Attached
    places: dict[str, Place]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    config = {"network": {"mtu_bytes": 9000}, "agent": {"metrics_port": METRICS_PORT}}
    with World.start("traffic", config) as world:
        one, two = (world.add(world.pod(name)) for name in ("one", "two"))
        places = {}
        for attached in (one, two):
            attached.pod.start()
            container = attached.pod.running
            addresses = {version: attached.address(version) for version in FAMILIES}
            name = attached.pod.name
            places[name] = Place(addresses, world.traffic(name, container), world.prober(name, container))
        host = world.host
        assert host.outside is not None
        places["host"] = Place(GATEWAYS, world.traffic("host", host), world.prober("host", host))
        outside = host.outside
        places["outside"] = Place(FAR, world.traffic("outside", outside), world.prober("outside", outside))
        yield Stage(world, one, two, places)
        world.delete(one)
        world.delete(two)


#: From, to, and whose address the receiver sees: the sender's own, or the uplink's.
WAYS = [
    ("one", "two", None),
    ("two", "one", None),
    ("one", "host", None),
    ("host", "one", None),
    ("one", "outside", UPLINK),
    ("host", "outside", UPLINK),
]


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize(("sender", "receiver", "seen"), WAYS, ids=[f"{a} to {b}" for a, b, _ in WAYS])
def test_tcp_and_udp(stage: Stage, sender: str, receiver: str, seen: dict[int, str] | None, version: int) -> None:
    source, sink = stage.places[sender], stage.places[receiver]
    expected = (seen or source.addresses)[version]
    port = sink.tcp.ask("serve", address=sink.addresses[version])["port"]
    sent = source.tcp.ask("send", address=sink.addresses[version], port=port, bytes=4 << 20, verify=True)
    assert sent["equal"], "the bytes that arrived are not those that were sent"
    assert sent["peer"] == expected
    port = sink.udp.ask("serve", address=sink.addresses[version])["port"]
    for size in (1, 1400, 8000 if receiver != "outside" and sender != "host" else 1200):
        answer = source.udp.ask("ask", address=sink.addresses[version], port=port, wait_s=10.0, size=size)
        assert answer["seen"] == {"from": expected, "bytes": size}


@pytest.mark.parametrize("version", FAMILIES)
def test_a_pod_reaches_the_hosts_uplink_address(stage: Stage, version: int) -> None:
    port = stage.places["host"].tcp.ask("serve", address=UPLINK[version])["port"]
    sent = stage.places["one"].tcp.ask("send", address=UPLINK[version], port=port, bytes=1000, verify=True)
    assert (sent["equal"], sent["peer"]) == (True, stage.one.address(version))


@pytest.mark.parametrize("version", FAMILIES)
def test_the_outside_does_not_reach_pods(stage: Stage, version: int) -> None:
    """Nothing of the ranges is announced, and a packet that comes anyway finds the host not forwarding."""
    outside = stage.world.host.outside
    assert outside is not None
    subnet = "10.213.0.0/20" if version == 4 else "fd72:646d:616e::/64"
    via = UPLINK[version]
    outside.ip(f"route add {subnet} via {via} dev eth0")  # as if somebody had told it
    port = stage.places["one"].udp.ask("serve", address=stage.one.address(version))["port"]
    answer = stage.places["outside"].udp.ask("ask", address=stage.one.address(version), port=port, wait_s=0.3, size=10)
    outside.ip(f"route del {subnet} via {via} dev eth0")
    assert answer["seen"] is None


@pytest.mark.parametrize("version", FAMILIES)
def test_ping_and_mtu(stage: Stage, version: int) -> None:
    headers_bytes = 28 if version == 4 else 48

    def ping(target: str, mtu_bytes: int) -> int | None:
        words = ["ping", "-c", "1", "-W", "1", "-M", "do", "-s", str(mtu_bytes - headers_bytes), target]
        status: int | None = stage.one.pod.exec(words, check=False).returncode
        return status

    assert ping(stage.two.address(version), 9000) == 0
    assert ping(GATEWAYS[version], 9000) == 0
    assert ping(FAR[version], 1500) == 0
    assert ping(stage.two.address(version), 9001) != 0
    assert ping(FAR[version], 1501) != 0


# Spoofing


def udp_packet(source: str, target: str, source_port: int, target_port: int) -> bytes:
    """An IP packet with a UDP datagram, checksums right."""
    a, b = ipaddress.ip_address(source), ipaddress.ip_address(target)
    payload = bytes(32)  # to RoCE's port: a transport header, to queue pair 0
    length = 8 + len(payload)
    pseudo = a.packed + b.packed + struct.pack("!II", length, 17)
    datagram = struct.pack("!HHHH", source_port, target_port, length, 0) + payload
    checksum = internet_checksum(pseudo + datagram)
    datagram = datagram[:6] + struct.pack("!H", checksum) + payload
    if a.version == 6:
        return struct.pack("!IHBB", 6 << 28, length, 17, 64) + a.packed + b.packed + datagram
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 17, 0) + a.packed + b.packed
    return header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:] + datagram


def internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(source_mac: bytes, packet: bytes) -> str:
    """An Ethernet frame to the gateway, as hexadecimal text."""
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    return (GATEWAY_MAC + source_mac + struct.pack("!H", kind) + packet).hex()


def mac_of(attached: Attached) -> bytes:
    return bytes.fromhex(attached.mac.replace(":", ""))


@pytest.mark.parametrize("version", FAMILIES)
def test_spoofed_packets_are_dropped_and_counted(stage: Stage, version: int) -> None:
    one, two, world = stage.one, stage.two, stage.world
    sink = stage.places["two"].udp
    port = sink.ask("serve", address=two.address(version))["port"]
    own, target = one.address(version), two.address(version)
    foreign = "10.213.0.77" if version == 4 else "fd72:646d:616e::77"
    own_mac, foreign_mac = mac_of(one), bytes.fromhex("027200000077")
    bad = [
        frame(own_mac, udp_packet(foreign, target, 5000, port)),
        frame(own_mac, udp_packet(FAR[version], target, 5000, port)),
        frame(foreign_mac, udp_packet(own, target, 5000, port)),
    ]
    good = frame(own_mac, udp_packet(own, target, 5000, 9))
    before = world.drops("default/one")
    received = to_pod(world, "default/two")
    stage.places["one"].udp.ask("frames", ifname="eth0", frames=bad)
    # Same program, same CPU: when this is answered the frames before it have been judged.
    answer = stage.places["one"].udp.ask("ask", address=target, port=port, wait_s=10.0, size=10)
    assert answer["seen"]["from"] == own
    after = world.drops("default/one")
    assert after.get("spoofed_address", 0) - before.get("spoofed_address", 0) == 2
    assert after.get("spoofed_mac", 0) - before.get("spoofed_mac", 0) == 1
    assert to_pod(world, "default/two") - received == 1, "a spoofed packet arrived"
    stage.places["one"].udp.ask("frames", ifname="eth0", frames=[good])
    stage.places["one"].udp.ask("ask", address=target, port=port, wait_s=10.0, size=10)
    assert to_pod(world, "default/two") - received == 3, "an honest frame of the same make does not arrive"


def to_pod(world: World, pod: str) -> int:
    """IP packets that the datapath has delivered to a pod."""
    (row,) = [row for row in world.status()["attachments"] if row["pod"] == pod]
    return int(row["counters"].get("to_pod_ip", {"packets": 0})["packets"])


@pytest.mark.parametrize("version", FAMILIES)
def test_roce_of_a_pod_without_a_device_is_dropped(stage: Stage, version: int) -> None:
    own, target = stage.one.address(version), stage.two.address(version)
    before = stage.world.drops("default/one").get("roce_no_device", 0)
    sent = [frame(mac_of(stage.one), udp_packet(own, target, 50000, ROCE_PORT))] * 3
    stage.places["one"].udp.ask("frames", ifname="eth0", frames=sent)
    port = stage.places["two"].udp.ask("serve", address=target)["port"]
    stage.places["one"].udp.ask("ask", address=target, port=port, wait_s=10.0, size=10)
    assert stage.world.drops("default/one")["roce_no_device"] - before == 3


def test_an_address_of_nobody_is_dropped_by_name(stage: Stage) -> None:
    before = stage.world.drops("default/one").get("no_endpoint", 0)
    answer = stage.places["one"].udp.ask("ask", address="10.213.0.200", port=9, wait_s=0.05, size=10)
    assert answer["seen"] is None
    assert stage.world.drops("default/one")["no_endpoint"] > before


# Counters, metrics, listeners


def test_counters_account_for_every_packet(stage: Stage) -> None:
    port = stage.places["two"].udp.ask("serve", address=stage.two.address(4))["port"]

    def counted(pod: str, direction: str) -> int:
        (row,) = [row for row in stage.world.status()["attachments"] if row["pod"] == pod]
        return int(row["counters"][f"{direction}_ip"]["packets"])

    keys = [(pod, direction) for pod in ("default/one", "default/two") for direction in ("from_pod", "to_pod")]
    before = {key: counted(*key) for key in keys}
    for _ in range(50):
        stage.places["one"].udp.ask("ask", address=stage.two.address(4), port=port, wait_s=10.0, size=100)
    assert {key: counted(*key) - before[key] for key in keys} == dict.fromkeys(keys, 50)


def test_metrics_text(stage: Stage) -> None:
    text = stage.world.host.api("GET", "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    packets = {
        (s.labels["pod"], s.labels["interface"], s.labels["direction"], s.labels["path"]): s.value
        for s in families["rdmanet_pod_packets"].samples
    }
    for pod in ("default/one", "default/two"):
        for direction in ("from_pod", "to_pod"):
            assert packets[pod, "eth0", direction, "ip"] > 0
    ready = [s.value for s in families["rdmanet_attachments"].samples if s.labels["state"] == "ready"]
    assert ready == [2]
    adds = [
        s.value
        for s in families["rdmanet_cni_seconds"].samples
        if s.name.endswith("_count") and s.labels == {"command": "ADD", "code": "0"}
    ]
    assert adds == [2]


def listening(stage: Stage) -> set[tuple[str, str]]:
    """(table, local address) of every socket that takes traffic in the host's namespace, less the tests' own."""
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        for line in stage.world.host.exec(["cat", f"/proc/net/{table}"]).stdout.splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if table.startswith("tcp") and state != "0A":
                continue
            found.add((table, local))
    packet = stage.world.host.exec(["cat", "/proc/net/packet"]).stdout.splitlines()[1:]
    return found | {("packet", line) for line in packet}


def test_the_agent_listens_on_loopback_alone() -> None:
    with World.start("listen", {"agent": {"metrics_port": METRICS_PORT}}) as world:
        stage = Stage(world, world.add(), world.add(), {})
        assert listening(stage) == {("tcp", f"0100007F:{METRICS_PORT:04X}")}
        curl = ["import urllib.request as u; print(u.urlopen('http://127.0.0.1:%d/metrics').read().decode())"]
        text = world.host.exec(["python3", "-I", "-S", "-c", curl[0] % METRICS_PORT]).stdout
        assert re.search(r"^rdmanet_attachments\{state=\"ready\"\} 2\.0$", text, re.MULTILINE)
        path = world.host.path("/run/rdmanet/agent.sock")
        assert path.stat().st_mode & 0o777 == 0o600
        world.host.stop_agent()
        assert listening(stage) == set()
    with World.start("silent") as world:
        assert listening(Stage(world, world.add(), world.add(), {})) == set()
