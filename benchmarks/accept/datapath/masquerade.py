"""Row `masquerade`: pods reach the outside behind the host's address, and nobody reaches them.

TCP, UDP and ICMP echo, both families, by several pods at once, also from the same port to the same server. Then the
range of ports is made as small as sixteen and filled, while the host has two of them in use. Both halves of each flow
are looked up in the table, also after their pod was deleted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rdmanet.datapath.flows import Flow
from testbed.flow_halves import alias_key, inside_key
from testbed.rows import Figure, need
from testbed.services import FAMILIES, KINDS, NETWORK, NODE, wait_until
from testbed.terrain import FAR, ON_LINK, Terrain

PODS = ("one", "two", "three")
SERVER_PORT = 7000
CALLS = 50
ECHOES = 20
FIRST_PORT, LAST_PORT = 61000, 65535
#: Sixteen ports, of which the host listens at one and has a connection from another.
FEW_FIRST, FEW_LAST = 61000, 61015
LISTENING, CONNECTED = 61003, 61012
CONFIG: Mapping[str, Mapping[str, object]] = {
    "masquerade": {"first_port": FIRST_PORT, "last_port": LAST_PORT},
    "tracking": {"interval_s": 1.0},
}
FEW: Mapping[str, Mapping[str, object]] = {
    "masquerade": {"first_port": FEW_FIRST, "last_port": FEW_LAST},
    "tracking": {"interval_s": 1.0},
}
SAME_PORT = 5000
PROTOCOLS = {"tcp": 6, "udp": 17}
ICMPS = {4: 1, 6: 58}


def measure() -> Figure:
    """Many flows, then few ports."""
    with Terrain.start("masquerade", PODS, CONFIG) as terrain:
        terrain.scene.ask("outside", "serve", name="outside", port=SERVER_PORT)
        flows = _many(terrain)
        flows += _same_port(terrain)
        halves = _halves(terrain)
        strangers = _unsolicited(terrain)
        gone = _deleted(terrain)
        terrain.scene.host.stop_agent()
        terrain.scene.host.start_agent(FEW)
        few, refused = _few_ports(terrain)
        flows += few
    detail = (
        f"{flows} flows of {len(PODS)} pods by TCP, UDP and ICMP echo, IPv4 and IPv6: outside saw the host's address"
        f" alone, and no port twice; {halves} flows had both halves in the table, and the {gone} of a deleted pod went"
        f" together; {strangers} packets of others to translated ports reached no pod; of {FEW_LAST - FEW_FIRST + 1}"
        f" ports two were the host's and never chosen, and {refused} flows found none free (nat_no_port)"
    )
    return Figure(flows, "flows", detail)


def _many(terrain: Terrain) -> int:
    flows = 0
    for version in FAMILIES:
        terrain.ask("outside", "watch", ifname="eth0")
        for pod in PODS:
            for kind in KINDS:
                request = {"kind": kind, "address": ON_LINK[version], "port": SERVER_PORT, "count": CALLS}
                answer = terrain.scene.ask(pod, "many", **request)
                need(answer["names"] == {"outside": CALLS}, f"{pod} by {kind} to [{ON_LINK[version]}]: {answer}")
                need(answer["seen"] == [NODE[version]], f"{pod} by {kind} was seen as {answer['seen']}")
            for identifier in range(1, ECHOES + 1):
                said = terrain.ask(pod, "echo", address=FAR[version], identifier=identifier, count=2)
                need(said["answers"] == 2, f"{pod}: {said['answers']} of 2 echoes to [{FAR[version]}] were answered")
            flows += len(KINDS) * CALLS + ECHOES
        seen = terrain.ask("outside", "watched")
        need(set(seen["sources"]) == {NODE[version]}, f"outside has seen {sorted(seen['sources'])}")
        need(not seen["lost"], f"{seen['lost']} packets were not looked at")
        for protocol, expected in ((6, CALLS), (17, CALLS), (ICMPS[version], ECHOES)):
            ports = [port for _, of, port in seen["ports"] if of == protocol and port]
            inside = sum(FIRST_PORT <= port <= LAST_PORT for port in ports)
            need(
                inside == len(ports) == len(PODS) * expected,
                f"{len(PODS) * expected} flows of protocol {protocol} had {len(ports)} ports, {inside} in the range",
            )
    return flows


def _same_port(terrain: Terrain) -> int:
    """Three pods from one port, or with one identifier: each gets its own answers, at the same port all the time."""
    flows = 0
    for version in FAMILIES:
        for kind in KINDS:
            for pod in PODS:
                request = {"id": f"{kind} {version}", "kind": kind, "address": ON_LINK[version], "port": SERVER_PORT}
                own = {"source": terrain.scene.addresses[pod][version], "source_port": SAME_PORT}
                opened = terrain.scene.ask(pod, "open", **request, **own)
                need(not opened["refused"], f"{pod} from port {SAME_PORT} by {kind}: {opened['refused']}")
            rounds = [
                [tuple(terrain.scene.ask(pod, "say", id=f"{kind} {version}")["seen"]) for pod in PODS] for _ in range(3)
            ]
            need(len(set(rounds[0])) == len(PODS), f"port {SAME_PORT} of {len(PODS)} pods by {kind}: {rounds[0]}")
            need(rounds[0] == rounds[1] == rounds[2], f"{kind} from port {SAME_PORT} has changed its port: {rounds}")
            flows += len(PODS)
        terrain.ask("outside", "watch", ifname="eth0")
        for pod in PODS:
            said = terrain.ask(pod, "echo", address=ON_LINK[version], identifier=SAME_PORT, count=3)
            need(said["answers"] == 3, f"{pod} with identifier {SAME_PORT}: {said}")
        ports = terrain.ask("outside", "watched")["ports"]
        identifiers = {port for _, of, port in ports if of == ICMPS[version] and port}
        need(len(identifiers) == len(PODS), f"identifier {SAME_PORT} of {len(PODS)} pods became {identifiers}")
        flows += len(PODS)
    return flows


def _lonely(inside: list[Flow], outside: list[Flow]) -> Iterator[Flow]:
    """Halves without the other."""
    inner, outer = {flow.key for flow in inside}, {flow.key for flow in outside}
    yield from (flow for flow in inside if alias_key(flow) not in outer)
    yield from (flow for flow in outside if inside_key(flow) not in inner)


def _halves(terrain: Terrain) -> int:
    pairs = 0
    for pod in PODS:
        inside, outside = terrain.halves(pod)
        lonely = list(_lonely(inside, outside))
        need(bool(inside) and len(inside) == len(outside), f"{pod} has {len(inside)} halves, outside {len(outside)}")
        need(not lonely, f"{pod}: {len(lonely)} halves without the other")
        pairs += len(inside)
    return pairs


def _received(terrain: Terrain, pod: str) -> int:
    """IP packets that were brought into a pod."""
    rows = terrain.scene.host.api("GET", "/v1/status")["attachments"]
    (counters,) = [row["counters"] for row in rows if row["pod"] == f"default/{pod}"]
    return int(counters["to_pod_ip"]["packets"])


def _unsolicited(terrain: Terrain) -> int:
    """Others, and another port of the server, call the port behind which a pod talks: the host refuses them, as nobody
    listens there."""
    sent = 0
    for version in FAMILIES:
        for kind in KINDS:
            said = terrain.scene.ask("one", "say", id=f"{kind} {version}")
            before = _received(terrain, "one")
            for source in (FAR[version], ON_LINK[version]):
                request = {"address": NODE[version], "port": said["seen"][1], "source": source, "count": 5}
                answer = terrain.scene.ask("outside", "many", kind=kind, **request)
                need(answer["refused"] == {"ECONNREFUSED": 5}, f"{source} to a pod's port by {kind}: {answer}")
                sent += 5
            need(_received(terrain, "one") == before, f"packets of others by {kind} came into the pod")
            again = terrain.scene.ask("one", "say", id=f"{kind} {version}")
            need(again["seen"] == said["seen"], f"the flow by {kind} that others had called: {again}")
    return sent


def _deleted(terrain: Terrain) -> int:
    """A pod goes, and both halves of its flows with it; others' stay."""
    pod = PODS[-1]
    inside, _ = terrain.halves(pod)
    others = [len(half) for name in PODS[:-1] for half in terrain.halves(name)]
    outcome = terrain.scene.host.cni("DEL", terrain.scene.pods[pod], NETWORK)
    need(outcome.returncode == 0, f"DEL of {pod}: {outcome.sentence}")
    wait_until(lambda: terrain.halves(pod) == ([], []), f"{pod} is deleted and has no flows")
    need([len(half) for name in PODS[:-1] for half in terrain.halves(name)] == others, "others' flows went as well")
    for version in FAMILIES:
        for name in PODS[:-1]:
            said = terrain.scene.ask(name, "say", id=f"tcp {version}")
            need(not said["refused"], f"{name}, after {pod} was deleted: {said}")
    return len(inside)


def _few_ports(terrain: Terrain) -> tuple[int, int]:
    """All ports that are free are used, and no other."""
    flows = refused = 0
    port = SERVER_PORT + 1
    terrain.scene.ask("outside", "serve", name="outside", port=port)
    terrain.scene.ask("host", "serve", name="host", port=LISTENING)
    free = set(range(FEW_FIRST, FEW_LAST + 1)) - {LISTENING, CONNECTED}
    for version in FAMILIES:
        for kind in KINDS:
            end = {"kind": kind, "address": ON_LINK[version], "port": port}
            own = {"source": NODE[version], "source_port": CONNECTED}
            terrain.scene.ask("host", "open", id=f"{kind} {version}", **end, **own)
            said = terrain.scene.ask("host", "say", id=f"{kind} {version}")
            need(said["seen"] == [NODE[version], CONNECTED], f"the host from port {CONNECTED}: {said}")
            seen = []
            for number in range(len(free)):
                pod, name = PODS[number % 2], f"{kind} {version} {number}"
                terrain.scene.ask(pod, "open", id=name, **end)
                seen.append(terrain.scene.ask(pod, "say", id=name)["seen"][1])
            need(sorted(seen) == sorted(free), f"{kind} over IPv{version} has used {sorted(seen)} of {sorted(free)}")
            before = terrain.scene.drops("nat_no_port", "one")
            answer = terrain.scene.ask("one", "many", **end, count=1, wait_s=0.5)
            need(not answer["names"], f"another flow by {kind} without a free port: {answer}")
            counted = terrain.scene.drops("nat_no_port", "one") - before
            need(counted > 0, f"a flow by {kind} without a free port was not counted")
            said = terrain.scene.ask("host", "say", id=f"{kind} {version}")
            need(said["seen"] == [NODE[version], CONNECTED], f"the host's flow from {CONNECTED} afterwards: {said}")
            flows += len(seen)
            refused += 1
    return flows, refused
