"""Row `clusterip`: a service is its backends for pods and for the host, with both families, TCP and UDP.

Every call goes to the service's address; the backends say who answered and whom they saw. A process sees nothing but
the service (getpeername, and where answers come from), a backend nothing but the client: no packet is translated, and
the flows that the datapath tracks say so. Then everything is taken away under open connections.
"""

from __future__ import annotations

from collections import Counter

from rdmanet.datapath import sockets
from rdmanet.datapath.artifact import SOCKET_PROGRAMS
from testbed.outside import FAR_IPV4
from testbed.rows import Figure, need
from testbed.services import (
    CLUSTER_IP,
    FAMILIES,
    KINDS,
    NODE,
    NODE_PORT,
    PORT,
    TARGET_PORT,
    Scene,
    service,
    shares,
    slices,
)

BACKENDS = ("one", "two", "three")
CALLS = 150
#: Three backends share CALLS calls evenly; a share below this comes by chance less than once in a billion rows.
LEAST = 15
PINS = "/sys/fs/bpf/rdmanet"


def measure() -> Figure:
    """Calls from a backend, from another pod and from the host."""
    with Scene.start("clusterip", ("client", *BACKENDS)) as scene:
        scene.apply(service(node_port=NODE_PORT), *slices(scene.of(*BACKENDS)))
        calls, answered = 0, Counter[str]()
        for address, port in ((CLUSTER_IP, PORT), (NODE, NODE_PORT)):
            for version in FAMILIES:
                for kind in KINDS:
                    for place in ("client", "one", "host"):
                        answered += _many(scene, place, kind, version, address[version], port)
                        calls += CALLS
        seen = sum(_sees_the_service(scene, version, family) for version, family in ((4, 4), (6, 6), (4, 6)))
        refused = _refusals(scene)
        survived = _uninstalled(scene)
    detail = (
        f"{calls} calls by pods, by a backend itself and by the host, to ClusterIPs and NodePorts, IPv4 and IPv6, TCP"
        f" and UDP, none failed: {shares(answered)}; {seen} sockets saw the service alone, {refused} calls without a"
        f" backend were refused at once; {survived}"
    )
    return Figure(calls, "calls", detail, {"answered": dict(answered)})


def _many(scene: Scene, place: str, kind: str, version: int, address: str, port: int) -> Counter[str]:
    answer = scene.ask(place, "many", kind=kind, address=address, port=port, count=CALLS)
    way = f"{place} to [{address}]:{port} by {kind}"
    need(not answer["refused"], f"{way}: {answer['refused']}")
    few = {name: times for name, times in answer["names"].items() if times < LEAST}
    need(set(answer["names"]) == set(BACKENDS) and not few, f"{way}: {answer['names']} answered")
    own = {scene.addresses[place][version], address_of_loopback(version)} if place in scene.addresses else None
    need(own is None or set(answer["seen"]) <= own, f"{way}: the backends saw {answer['seen']} instead of {own}")
    return Counter(answer["names"])


def address_of_loopback(version: int) -> str:
    """A pod that calls itself may be seen there."""
    return "127.0.0.1" if version == 4 else "::1"


def _sees_the_service(scene: Scene, version: int, family: int) -> int:
    """Connected and unconnected sockets, also IPv6 ones with mapped addresses."""
    address, sockets_ = CLUSTER_IP[version], 0
    expected = [f"::ffff:{address}" if (version, family) == (4, 6) else address, PORT]
    for kind, connected in (("tcp", True), ("udp", True), ("udp", False)):
        scene.ask("client", "open", id="x", kind=kind, address=address, port=PORT, family=family, connected=connected)
        for _ in range(3):
            said = scene.ask("client", "say", id="x")
            need(not said["refused"], f"{kind} to {address}: {said['refused']}")
            need(
                not connected or said["peername"] == expected,
                f"getpeername of {kind} to {address} says {said['peername']}",
            )
            need(kind == "tcp" or said["source"] == expected, f"the answer of {address} came from {said['source']}")
        scene.ask("client", "close", id="x")
        sockets_ += 1
    return sockets_


def _refusals(scene: Scene) -> int:
    """No backend at all: refused at connect and at send, and counted."""
    scene.apply(service(node_port=NODE_PORT), *slices({}))
    before, calls = scene.drops("no_backend", "client"), 0
    for version in FAMILIES:
        for kind in KINDS:
            answer = scene.ask("client", "many", kind=kind, address=CLUSTER_IP[version], port=PORT, count=10)
            need(answer["refused"] == {"ECONNREFUSED": 10}, f"without a backend: {answer}")
            calls += 10
    counted = scene.drops("no_backend", "client") - before
    need(counted == calls, f"{calls} calls without a backend were counted as {counted}")
    return calls


def _uninstalled(scene: Scene) -> str:
    """The host's own connection through a ClusterIP to somebody outside goes on when everything is gone."""
    scene.ask("outside", "serve", name="outside", port=TARGET_PORT)
    scene.apply(service(), *slices({"outside": {4: FAR_IPV4, 6: "2001:db8:200::1"}}))
    scene.ask("host", "open", id="long", kind="tcp", address=CLUSTER_IP[4], port=PORT)
    need(scene.ask("host", "say", id="long").get("name") == "outside", "the host does not reach a backend outside")
    pins = scene.host.path(PINS)
    need(len(sockets.attached(pins)) == len(SOCKET_PROGRAMS), "not all socket programs are attached")
    scene.host.stop_agent()
    need(scene.ask("host", "say", id="long").get("name") == "outside", "the connection broke with the agent's end")
    scene.host.uninstall()
    need(not pins.exists(), "pins are left")
    need(scene.ask("host", "say", id="long").get("name") == "outside", "the connection broke with uninstall")
    fresh = scene.ask("host", "open", id="new", kind="udp", address=CLUSTER_IP[4], port=PORT)
    need(fresh["peername"] == [CLUSTER_IP[4], PORT], f"after uninstall a socket is still led to {fresh['peername']}")
    return "after uninstall the host's open connection went on, and new sockets met nobody"
