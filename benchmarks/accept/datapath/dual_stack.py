"""Row `dual-stack`: everything that pods send and get, over IPv4 and IPv6, each way by live packets.

First devices fill in checksums, as they do; then none does, so that every receiver verifies what the programs have
written, and somebody outside looks at each packet. Path MTU and ICMP errors come from a router behind the uplink with
a narrow link, from the node itself, and, the other way, from a pod.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from testbed.outside import UPLINK
from testbed.rows import Figure, need
from testbed.services import FAMILIES, NODE, TARGET_PORT
from testbed.terrain import BEHIND, FAR, GATEWAY, NARROW_BYTES, ON_LINK, Terrain

PODS = ("one", "two")
LARGE_BYTES = 8 << 20
#: More than the MTU, of many parts.
DATAGRAM_BYTES = 20_000
NOBODY_PORT = 9
#: Parts of a datagram (testbed.datagrams): as routers may bring them.
ORDERS = ("forward", "first", "backward")
#: type and code, by IP version (RFC 792, RFC 4443 3)
PORT_UNREACHABLE = {4: (3, 3), 6: (1, 4)}
TIME_EXCEEDED = {4: (11, 0), 6: (3, 0)}
TOO_BIG = {4: (3, 4), 6: (2, 0)}
ICMP_TCP_UDP = {4: {"1", "6", "17"}, 6: {"58", "6", "17"}}
#: How narrow the uplink becomes under pods that have been told otherwise.
UPLINK_BYTES = 1400

Ways = Counter[str]


def measure() -> Figure:
    """All ways, one after the other."""
    ways: Ways = Counter()
    with Terrain.start("dual-stack", PODS) as terrain:
        for version in FAMILIES:
            _serve(terrain, version)
        for version in FAMILIES:
            _talk(terrain, version, ways)
            _fragments(terrain, version, ways)
            _neighbours(terrain, version, ways)
            _errors(terrain, version, ways)
            _path_mtu(terrain, version, ways)
        looked_at = _without_offload(terrain, ways)
        for version in FAMILIES:
            _narrow_uplink(terrain, version, ways)
    total = sum(ways.values())
    detail = (
        "IPv4 and IPv6: "
        + ", ".join(f"{what} {times}" for what, times in ways.items())
        + f"; {looked_at} packets looked at outside, all checksums right"
    )
    return Figure(total, "ways", detail, dict(ways))


def _ends(terrain: Terrain, version: int) -> list[tuple[str, str, str, str]]:
    """From a place to a place and its address, and the address that is seen there."""
    one, two = (terrain.scene.addresses[pod][version] for pod in PODS)
    return [
        ("one", "two", two, one),
        ("host", "one", one, GATEWAY[version]),
        ("one", "host", GATEWAY[version], one),
        ("one", "host", NODE[version], one),
        ("one", "outside", ON_LINK[version], NODE[version]),
        ("one", "outside", FAR[version], NODE[version]),
        ("two", "behind", BEHIND[version], NODE[version]),
    ]


def _serve(terrain: Terrain, version: int) -> None:
    for place, address in {(place, address) for _, place, address, _ in _ends(terrain, version)}:
        terrain.ask(place, "reflect", address=address, port=TARGET_PORT + 1)
        for number, order in enumerate(ORDERS):
            terrain.ask(place, "reflect", address=address, port=TARGET_PORT + 2 + number, order=order)
    terrain.scene.ask("behind", "serve", name="behind", port=TARGET_PORT) if version == 4 else None


def _talk(terrain: Terrain, version: int, ways: Ways) -> None:
    """TCP in frames as large as they come, UDP and ICMP echo."""
    for place, to, address, seen in _ends(terrain, version):
        way = f"{place} to {to} at [{address}]"
        port = terrain.tcp[to].ask("serve", address=address)["port"]
        sent = terrain.tcp[place].ask("send", address=address, port=port, bytes=LARGE_BYTES, verify=True)
        need(sent["equal"] and sent["peer"] == seen, f"TCP, {way}: {sent}")
        for size in (1, 1200):
            said = terrain.ask(place, "reflected", address=address, port=TARGET_PORT + 1, size=size)
            need(said["equal"] and said["seen"][0][0] == seen, f"UDP of {size} bytes, {way}: {said}")
        answers = terrain.ask(place, "echo", address=address, identifier=4242, count=3)["answers"]
        need(answers == 3, f"ICMP echo, {way}: {answers} answers to 3")
        ways.update({"TCP": 1, "UDP": 1, "echo": 1})


def _fragments(terrain: Terrain, version: int, ways: Ways) -> None:
    """Datagrams and echoes larger than the MTU, cut by the stacks and by hand, both ways."""
    for place, to, address, seen in _ends(terrain, version):
        way = f"{place} to {to} at [{address}]"
        said = terrain.ask(place, "reflected", address=address, port=TARGET_PORT + 1, size=DATAGRAM_BYTES)
        need(said["equal"], f"{DATAGRAM_BYTES} bytes of UDP, {way}: {said}")
        answers = terrain.ask(place, "echo", address=address, identifier=4243, size=4000)["answers"]
        need(answers == 1, f"ICMP echo of 4000 bytes, {way}: no answer")
        for number, order in enumerate(ORDERS):
            request: dict[str, Any] = {"address": address, "port": TARGET_PORT + 2 + number, "size": 5000}
            said = terrain.ask(place, "reflected", **request, order=order)
            need(said["equal"] and said["seen"][0][0] == seen, f"parts of UDP {order}, {way}: {said}")
        ways["fragments"] += 2 + len(ORDERS)


def _neighbours(terrain: Terrain, version: int, ways: Ways) -> None:
    """The next hop is told; other addresses, in use or not, are nobody's business. The next hop is asked for last: the
    answers come in order."""
    one, two = (terrain.scene.addresses[pod][version] for pod in PODS)
    nobody = "10.213.7.7" if version == 4 else "fd72:646d:616e::777"
    hops = [GATEWAY[4]] if version == 4 else [GATEWAY[6], "fe80::1"]
    before = terrain.scene.drops("neighbour", "one")
    said = terrain.ask("one", "neighbours", ifname="eth0", source=one, targets=[two, nobody, FAR[version], *hops])
    need([answer[0] for answer in said["answers"]] == hops, f"asked for others and {hops}: {said['answers']}")
    counted = terrain.scene.drops("neighbour", "one") - before
    need(counted == 3, f"3 addresses that are no next hops were counted as {counted}")
    ways["neighbours"] += 3 + len(hops)


def _error(terrain: Terrain, place: str, expected: tuple[int, int], offender: str | None, **request: Any) -> int:
    """One datagram, and the error that its socket gets; the MTU that it names."""
    said = terrain.ask(place, "error", **request)
    what = f"{place}, {request}"
    need(said["error"] is not None, f"{what}: no ICMP error came")
    need((said["type"], said["code"]) == expected, f"{what}: {said} instead of {expected}")
    need(offender is None or said["offender"] == offender, f"{what}: {said} instead of one by {offender}")
    return int(said["mtu_bytes"])


def _errors(terrain: Terrain, version: int, ways: Ways) -> None:
    """To the pod that caused them, and from a pod to outside, also through masquerade."""
    for place, _, address, _ in _ends(terrain, version):
        _error(terrain, place, PORT_UNREACHABLE[version], address, address=address, port=NOBODY_PORT)
        ways["errors"] += 1
    for hop_limit, offender in ((1, GATEWAY[4] if version == 4 else "fe80::1"), (2, ON_LINK[version])):
        request = {"address": BEHIND[version], "port": NOBODY_PORT, "hop_limit": hop_limit}
        _error(terrain, "one", TIME_EXCEEDED[version], offender, **request)
        ways["errors"] += 1
    request = {"address": BEHIND[version], "port": TARGET_PORT + 1, "size": 1400, "dont_fragment": True}
    mtu_bytes = _error(terrain, "one", TOO_BIG[version], ON_LINK[version], **request)
    need(mtu_bytes == NARROW_BYTES, f"the error to the pod names an MTU of {mtu_bytes}")
    # A pod's socket is gone when more comes from outside.
    request = {"address": ON_LINK[version], "port": NOBODY_PORT, "source_port": 5000}
    _error(terrain, "two", PORT_UNREACHABLE[version], ON_LINK[version], **request)
    inside, _ = terrain.halves("two", protocol=17)
    wanted = (5000).to_bytes(2, "big")
    (port,) = {
        int.from_bytes(flow.translated_port, "big")
        for flow in inside
        if flow.begun_by[1] == wanted and ends_of(flow.begun_by[0]) == version
    }
    request = {"address": NODE[version], "port": port, "source_port": NOBODY_PORT}
    _error(terrain, "outside", PORT_UNREACHABLE[version], NODE[version], **request)
    ways["errors"] += 3


def ends_of(key: bytes) -> int:
    """The IP version of an address key."""
    return 4 if key.startswith(bytes(10) + b"\xff\xff") else 6


def _path_mtu(terrain: Terrain, version: int, ways: Ways) -> None:
    """Large streams there and back over the narrow link; the pod's stack has learned from an error how narrow it is."""
    port = terrain.tcp["behind"].ask("serve", address=BEHIND[version])["port"]
    for pod in PODS:
        sent = terrain.tcp[pod].ask("send", address=BEHIND[version], port=port, bytes=LARGE_BYTES, verify=True)
        need(sent["equal"] and sent["peer"] == NODE[version], f"{pod} to [{BEHIND[version]}]: {sent}")
        back = terrain.scene.ask(pod, "pour", address=BEHIND[version], port=TARGET_PORT, size=LARGE_BYTES)
        need(back["equal"], f"{pod}: a stream to [{BEHIND[version]}] came back changed")
        learned = _learned(terrain, pod, version, BEHIND[version])
        need(learned == NARROW_BYTES, f"{pod} has learned an MTU of {learned} to [{BEHIND[version]}]")
        ways["path MTU"] += 2


def _learned(terrain: Terrain, pod: str, version: int, address: str) -> int:
    """The path's MTU as the pod's stack knows it."""
    words = terrain.scene.pods[pod].exec(["ip", f"-{version}", "route", "get", address]).stdout.split()
    return int(words[words.index("mtu") + 1]) if "mtu" in words else 0


def _without_offload(terrain: Terrain, ways: Ways) -> int:
    """Everything again with checksums that stacks fill in and verify; every packet to outside is looked at."""
    for pod in (None, *PODS):
        terrain.checksums(pod, on=False)
    looked_at = 0
    for version in FAMILIES:
        terrain.ask("outside", "watch", ifname="eth0")
        again: Ways = Counter()
        _talk(terrain, version, again)
        _fragments(terrain, version, again)
        _errors_again(terrain, version, again)
        ways["without offload"] += sum(again.values())
        said = terrain.ask("outside", "watched", verify=True)
        need(not said["wrong"], f"wrong outside: {'; '.join(said['wrong'])}")
        need(not said["large"] and not said["lost"], f"{said['large']} packets too large, {said['lost']} not seen")
        need(set(said["sources"]) == {NODE[version]}, f"outside has seen {sorted(said['sources'])}")
        need(
            set(said["sources"][NODE[version]]) == ICMP_TCP_UDP[version],
            f"protocols looked at: {said['sources'][NODE[version]]}",
        )
        looked_at += int(said["checked"])
    for pod in (None, *PODS):
        terrain.checksums(pod, on=True)
    return looked_at


def _errors_again(terrain: Terrain, version: int, ways: Ways) -> None:
    for place, _, address, _ in _ends(terrain, version):
        _error(terrain, place, PORT_UNREACHABLE[version], address, address=address, port=NOBODY_PORT)
        ways["errors"] += 1


def _narrow_uplink(terrain: Terrain, version: int, ways: Ways) -> None:
    """The link's MTU falls under what pods were told: the node itself says so, and streams go on."""
    outside = terrain.scene.host.outside
    assert outside is not None
    terrain.scene.host.ip(f"link set {UPLINK} mtu {UPLINK_BYTES}")
    # Its own stack knows, but asks for segments as large as before.
    outside.ip(f"link set eth0 mtu {UPLINK_BYTES}", f"route add {NODE[version]} dev eth0 advmss 1440")
    request = {"address": FAR[version], "port": NOBODY_PORT, "size": 1440, "dont_fragment": True}
    mtu_bytes = _error(terrain, "one", TOO_BIG[version], GATEWAY[4] if version == 4 else "fe80::1", **request)
    need(mtu_bytes == UPLINK_BYTES, f"the error names an MTU of {mtu_bytes}")
    said = terrain.ask("two", "reflected", address=FAR[version], port=TARGET_PORT + 1, size=DATAGRAM_BYTES)
    need(said["equal"], f"{DATAGRAM_BYTES} bytes of UDP through the narrow uplink: {said}")
    port = terrain.tcp["outside"].ask("serve", address=FAR[version])["port"]
    sent = terrain.tcp["two"].ask("send", address=FAR[version], port=port, bytes=LARGE_BYTES, verify=True)
    need(sent["equal"], f"a stream through the narrow uplink: {sent}")
    learned = _learned(terrain, "two", version, FAR[version])
    need(learned == UPLINK_BYTES, f"the pod has learned an MTU of {learned} through the narrow uplink")
    terrain.scene.host.ip(f"link set {UPLINK} mtu 1500")
    outside.ip("link set eth0 mtu 1500", f"route del {NODE[version]} dev eth0 advmss 1440")
    ways["narrow uplink"] += 3
