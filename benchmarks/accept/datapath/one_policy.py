"""Row `one-policy`: one policy for both worlds, whatever two pods talk.

Three pods with a device each, and policies of every kind between them: for each ordered pair and each IP family, a TCP
connection is tried, and a lease asked for; what comes of it must be what Kubernetes' semantics say of TCP 8080 and of
UDP 4791 (testbed.semantics), and the same for both where a policy does not tell them apart. Then policy takes away what
is leased, with transfers under way, and gives it back; queue pairs without a lease need it both ways; and RoCE that
would need NAT is dropped by that name.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.accept.rdma import guard, perftest
from benchmarks.peers import namespaces, programs
from benchmarks.peers.namespaces import End, Pair
from benchmarks.peers.transfers import POOL_SIZE
from rdmanet.model import GuardMode
from rdmanet.objects.reading import read
from rdmanet.objects.values import NetworkPolicy
from testbed.host import Host
from testbed.outside import FAR_IPV4, FAR_IPV6
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.policies import labelled, pods
from testbed.rows import Figure, need
from testbed.semantics.network_policy import Flow, Judgement, PolicyPod, PolicyWorld
from testbed.services import FAMILIES, NODE, TARGET_PORT, Document, start_caller

NAMES = ("one", "two", "three")
TRANSFERS = ("-m", "benchmarks.peers.transfers")
TCP, UDP = 6, 17
ROCE_PORT = 4791
#: No answer for so long, and a drop that policy counted: denied.
QUIET_S = 1.0
ATTEMPTS = 5
KINDS = ("write", "send", "pool")
SIZE_BYTES = 4096
ROUNDS = 5
WITHIN_S = 30.0
#: perftest's ends give up by themselves after a second, or wait for ever for each other.
DENIED_S = 10.0
REACH_TIMEOUT_S = 240.0
#: RoCE packets written by hand, towards a lease that is gone.
PACKETS = 100
NODE_PORT = 30791
FAR = {4: FAR_IPV4, 6: FAR_IPV6}
#: All that is not RoCE.
OTHERWISE = (
    {"protocol": "TCP"},
    {"protocol": "UDP", "port": 1, "endPort": ROCE_PORT - 1},
    {"protocol": "UDP", "port": ROCE_PORT + 1, "endPort": 65535},
)
ROCE = {"protocol": "UDP", "port": ROCE_PORT}

Rules = Sequence[Document]
Request = dict[str, Any]


def policy(name: str, selects: str, *, ingress: Rules | None = None, egress: Rules | None = None) -> Document:
    """Selects the pod of that name (empty: all), in the directions that are given; each rule is a pair of what
    `rule` makes."""
    spec: Document = {"podSelector": {"matchLabels": {"app": selects}} if selects else {}, "policyTypes": []}
    for direction, word, rules in (("Ingress", "from", ingress), ("Egress", "to", egress)):
        if rules is not None:
            spec["policyTypes"].append(direction)
            spec[direction.lower()] = [{word: one["peers"], "ports": one["ports"]} for one in rules]
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name}, "spec": spec}


def rule(*peers: str | Document, ports: Sequence[Document] = ()) -> Document:
    """Peers by pods' names, or as documents."""
    named = [pods(app=peer) if isinstance(peer, str) else peer for peer in peers]
    return {"peers": named, "ports": list(ports)}


@dataclass
class Scene:
    """The pods, and a program for TCP and one for leases in each."""

    host: Host
    ends: dict[str, End]
    callers: dict[str, Peer]
    leases: dict[str, Peer]
    applied: list[Document] = field(default_factory=list)
    checks: int = 0

    def check(self, condition: bool, sentence: str) -> None:
        """One that counts; StepError with the sentence otherwise."""
        need(condition, sentence)
        self.checks += 1

    def put(self, *policies: Document) -> None:
        """These policies and no others."""
        apply(self.host, self.applied, policies)
        self.applied = list(policies)

    def address(self, name: str, version: int) -> str:
        """Of a pod."""
        return self.ends[name].addresses[version]

    def drops(self, prefix: str) -> int:
        """Packets dropped for reasons that begin so, of all pods."""
        rows = self.host.api("GET", "/v1/status")["drops"]
        return sum(row["packets"] for row in rows if row["reason"].startswith(prefix))

    def connects(self, one: str, other: str, version: int) -> bool:
        """Whether a TCP connection comes about; if not, policy has dropped its packets."""
        for _ in range(ATTEMPTS):
            before, address = self.drops("policy_"), self.address(other, version)
            request: Request = {
                "kind": "tcp",
                "address": address,
                "port": TARGET_PORT,
                "count": 1,
                "wait_s": QUIET_S,
            }
            if self.callers[one].ask("many", **request)["names"]:
                return True
            if self.drops("policy_") > before:
                return False
        need(False, f"TCP from {one} to {other} over IPv{version} is neither answered nor dropped")
        return False

    def leased(self, one: str, other: str, version: int) -> str:
        """Empty where a lease is granted, else what the process was told."""
        answer = self.leases[one].ask("connect", target=f"{other}:params", count=1, address=self.address(one, version))
        need(bool(answer["leased"]) != bool(answer["sentence"]), f"a lease from {one} to {other}: {answer}")
        return str(answer["sentence"])


def apply(host: Host, before: Sequence[Document], after: Sequence[Document]) -> None:
    """Policies: what is new comes first, so that nobody is allowed in between who is not before and after."""
    if after:
        host.api("PUT", "/v1/objects", {"documents": list(after)})
    names = {one["metadata"]["name"] for one in after}
    if gone := [one for one in before if one["metadata"]["name"] not in names]:
        host.api("DELETE", "/v1/objects", {"documents": gone})


@contextlib.contextmanager
def scene(host: Host) -> Iterator[Scene]:
    """All pods serve both worlds."""
    with contextlib.ExitStack() as stack:
        attached = stack.enter_context(namespaces.attached(host, NAMES))
        ends = dict(zip(NAMES, attached, strict=True))
        callers, leases = {}, {}
        for name, end in ends.items():
            callers[name] = stack.enter_context(start_caller(host, name, end.pod))
            argv = [sys.executable, *TRANSFERS]
            leases[name] = stack.enter_context(Peer.start(f"{name}-leases", end.pod.popen, argv, cwd=str(REPOSITORY)))
            leases[name].tell("hello")
        for name in NAMES:
            leases[name].answer()
            leases[name].ask("serve", service="params")
            callers[name].ask("serve", name=name, port=TARGET_PORT)
        host.api("PUT", "/v1/objects", {"documents": [labelled(name, app=name) for name in NAMES]})
        yield Scene(host, ends, callers, leases)


# Who may talk to whom


@dataclass(frozen=True)
class Case:
    """Policies; `alike` where they do not tell TCP 8080 from UDP 4791."""

    name: str
    policies: Callable[[Scene], list[Document]]
    alike: bool = True


def _blocks(at: Scene) -> list[Document]:
    one, three = at.ends["one"].addresses, at.ends["three"].addresses
    wide4 = str(ipaddress.ip_network(f"{one[4]}/16", strict=False))
    wide6 = str(ipaddress.ip_network(f"{three[6]}/64", strict=False))
    first = {"ipBlock": {"cidr": wide4, "except": [f"{one[4]}/32"]}}
    second = {"ipBlock": {"cidr": wide6, "except": [f"{three[6]}/128"]}}
    return [policy("blocks", "two", ingress=[rule(first, second)])]


def _one_address(at: Scene) -> list[Document]:
    block = {"ipBlock": {"cidr": f"{at.address('one', 4)}/32"}}
    return [policy("one-address", "two", ingress=[rule(block)])]


def _of_ports(name: str, *ports: Document) -> Callable[[Scene], list[Document]]:
    return lambda at: [policy(name, "two", ingress=[rule("one", ports=ports)])]


CASES = (
    Case("no policy", lambda at: []),
    Case("ingress from nobody", lambda at: [policy("closed", "two", ingress=[])]),
    Case("ingress from one pod", lambda at: [policy("from-one", "two", ingress=[rule("one")])]),
    Case("egress to nobody", lambda at: [policy("shut", "one", egress=[])]),
    Case("egress to one pod", lambda at: [policy("to-two", "one", egress=[rule("two")])]),
    Case(
        "both ends, and each says no to somebody",
        lambda at: [
            policy("to-two", "one", egress=[rule("two")]),
            policy("from-three", "two", ingress=[rule("three")]),
        ],
    ),
    Case(
        "two policies of a pod add up",
        lambda at: [
            policy("from-one", "two", ingress=[rule("one")]),
            policy("from-three", "two", ingress=[rule("three")]),
        ],
    ),
    Case(
        "nobody but one pair",
        lambda at: [
            policy("nobody", "", ingress=[], egress=[]),
            policy("to-two", "one", egress=[rule("two")]),
            policy("from-one", "two", ingress=[rule("one")]),
        ],
    ),
    Case("an address of one family", _one_address),
    Case("blocks with exceptions", _blocks),
    Case("ranges that hold both", _of_ports("ranges", {"port": 8000, "endPort": 9000}, {**ROCE, "endPort": 5000})),
    Case("RoCE's port alone", _of_ports("roce", ROCE), alike=False),
    Case("all but RoCE's port", _of_ports("otherwise", *OTHERWISE), alike=False),
)


def matrix(at: Scene, cases: Sequence[Case] = CASES) -> None:
    """Every pair, in every case, both ways and over both families."""
    known = tuple(
        PolicyPod(
            "default",
            name,
            {"kubernetes.io/metadata.name": "default"},
            {"app": name},
            tuple(map(ipaddress.ip_address, end.addresses.values())),
        )
        for name, end in at.ends.items()
    )
    outcomes = set()
    for case in cases:
        documents = case.policies(at)
        at.put(*documents)
        values = [read(document).value for document in documents]
        world = PolicyWorld(known, frozenset(), tuple(v for v in values if isinstance(v, NetworkPolicy)))
        for one, other in itertools.permutations(NAMES, 2):
            for version in FAMILIES:
                ends = [ipaddress.ip_address(at.address(name, version)) for name in (one, other)]
                tcp, roce = (
                    world.judge(Flow(ends[0], ends[1], protocol, port)) is Judgement.ALLOWED
                    for protocol, port in ((TCP, TARGET_PORT), (UDP, ROCE_PORT))
                )
                said = f"{case.name}: {one} to {other} over IPv{version}"
                need(tcp == roce or not case.alike, f"{said}: the case tells TCP from RoCE")
                connects, sentence = at.connects(one, other, version), at.leased(one, other, version)
                at.check(connects == tcp, f"{said}: TCP {'passes' if connects else 'does not pass'}")
                at.check((not sentence) == roce, f"{said}: of the lease it is said {sentence!r}")
                if sentence:
                    _names_policy(at, sentence, one, other, documents, said)
                outcomes.add((tcp, roce))
    need({(True, True), (False, False)} <= outcomes, f"the matrix has only {outcomes}")


def _names_policy(at: Scene, sentence: str, one: str, other: str, documents: Sequence[Document], said: str) -> None:
    """Who is told no is told between whom, and which policies select the pod that says so."""
    phrase = f"policy does not let default/{one} connect to default/{other} (UDP {ROCE_PORT})"
    names = [document["metadata"]["name"] for document in documents]
    at.check(phrase in sentence and any(name in sentence for name in names), f"{said}: told {sentence!r}")


# What is leased, and is allowed no more


def revocation(at: Scene, version: int) -> None:
    """Streams from one to two, and a friend's from three: a policy against the way back leaves both alone, one against
    the way there ends the first ones with its name; allowed again, they begin anew."""
    one, three = at.leases["one"], at.leases["three"]

    def begin(name: str, kinds: Sequence[str]) -> None:
        request: Request = {"target": "two:params", "kinds": list(kinds), "size": SIZE_BYTES, "within_s": WITHIN_S}
        at.leases[name].ask("begin", address=at.address(name, version), **request)
        reach(name)

    def reach(name: str) -> None:
        at.leases[name].ask("reach", rounds=ROUNDS, within_s=REACH_TIMEOUT_S, timeout_s=REACH_TIMEOUT_S + 30)

    at.put()
    begin("one", KINDS)
    begin("three", KINDS[:1])
    held = len(at.host.api("GET", "/v1/status")["leases"])
    need(held == len(KINDS) + POOL_SIZE, f"{held} leases")

    at.put(policy("no-way-back", "two", egress=[]), policy("nothing-in", "one", ingress=[]))
    reach("one")
    at.check(_held(at.host) == held, "a policy against the way back took leases away")

    takes = policy("takes-away", "two", ingress=[rule("three"), rule("one", ports=OTHERWISE)])
    at.put(takes)
    outcomes = one.ask("broken", within_s=WITHIN_S * 2, timeout_s=WITHIN_S * 4)
    for kind in KINDS:
        said = f"a stream of {kind} over IPv{version} whose lease policy takes away"
        _names_policy(at, outcomes[kind]["error"], "one", "two", [takes], said)
        at.check(not outcomes[kind]["unequal_bytes"], f"{said}: {outcomes[kind]['unequal_bytes']} bytes are unequal")
    reach("three")
    at.check(_held(at.host) == 1, f"{_held(at.host)} leases are left and not the friend's alone")
    sentence = at.leased("one", "two", version)
    _names_policy(at, sentence, "one", "two", [takes], "a lease after that")
    at.check(at.connects("one", "two", version), "TCP, which that policy allows, does not pass")

    at.put()
    begin("one", KINDS)
    for peer, kinds in ((one, KINDS), (three, KINDS[:1])):
        outcomes = peer.ask("end", within_s=WITHIN_S * 2, timeout_s=WITHIN_S * 4)
        for kind in kinds:
            outcome = outcomes[kind]
            at.check(not outcome["error"] and not outcome["unequal_bytes"], f"allowed again: {kind}: {outcome}")


def _held(host: Host) -> int:
    return len(host.api("GET", "/v1/status")["leases"])


def _masqueraded(at: guard.Scene, source: str, destination: str) -> None:
    """RoCE to the outside, which would be sent with the node's address."""
    before = at.drops("friend").get("roce_nat", 0)
    request: Request = {"source": source, "destination": destination, "qpns": [guard.FIRST_QPN, 1], "count": PACKETS}
    sent = guard.by_hand(at.peers["friend"], "packets", request)()
    dropped = at.drops("friend").get("roce_nat", 0) - before
    need(dropped == sent, f"{dropped} of {sent} RoCE packets to {destination} were dropped as roce_nat")
    at.results[f"to be masqueraded, to {destination}"] = {"dropped": {"roce_nat": dropped}}


def packets_by_hand(host: Host) -> tuple[int, dict[str, int]]:
    """RoCE packets to queue pairs whose leases policy took away, to new ones when it allows them again, and to the
    outside: how many checks, and how many packets were dropped by reason."""
    checks, dropped = 0, dict[str, int]()
    with guard.scene(host, GuardMode.OBSERVE, guard.Sizes(repeats=PACKETS)) as at:
        names = {name: end.pod.name for name, end in at.ends.items()}
        host.api("PUT", "/v1/objects", {"documents": [labelled(pod, app=name) for name, pod in names.items()]})
        takes = policy("takes-away", "victim", ingress=[rule("friend", ports=OTHERWISE)])
        at.unleased = at.peers["victim"].ask("serve")["unleased"]
        for version in FAMILIES:
            source, destination = (at.address(name, version) for name in ("friend", "victim"))

            def lease(source: str = source) -> None:
                at.friends = at.peers["friend"].ask("lease", target=names["victim"], source=source)
                at.leased = at.peers["victim"].ask("leased")

            def case(name: str, reasons: set[str], passes: int, ends: tuple[str, str] = (source, destination)) -> None:
                family = 6 if ":" in ends[0] else 4
                for kind, source_qpns in (("rc", None), ("ud", [at.friends["ud"], 1])):
                    request: Request = {"source": ends[0], "destination": ends[1], "qpns": [at.leased[kind], 1]}
                    request |= {"source_qpns": source_qpns, "count": PACKETS}
                    work = guard.by_hand(at.peers["friend"], "packets", request)
                    at.attempt(f"{name}, {kind}, IPv{family}", "friend", reasons, work, passes=passes)

            lease()
            case("leased", set(), PACKETS)
            apply(host, [], [takes])
            deadline = time.monotonic() + guard.COUNTED_TIMEOUT_S
            while _held(host):
                need(time.monotonic() < deadline, "policy took leases away, and they do not end")
            case("taken away by policy", {"roce_revoked"}, 0)
            apply(host, [takes], [])
            case("still taken away when policy allows again", {"roce_revoked"}, 0)
            at.peers["friend"].ask("release")
            lease()
            case("leased again", set(), PACKETS)
            at.peers["friend"].ask("release")
            _masqueraded(at, source, FAR[version])
        for result in at.results.values():
            checks += 1
            for reason, packets in result["dropped"].items():
                dropped[reason] = dropped.get(reason, 0) + packets
    return checks, dropped


# Without a lease


def unleased(at: Scene, version: int) -> None:
    """perftest: its queue pairs are nobody's lease, and policy must allow both ways, as acknowledgements go to port
    4791 too. What its ends tell each other over TCP is always allowed here."""
    pair = Pair(at.ends["one"], at.ends["two"])
    case = perftest.Case("ib_send_bw", "RC", version)

    def allowed(there: bool, back: bool) -> None:
        ports = {True: (*OTHERWISE, ROCE), False: OTHERWISE}
        at.put(
            policy("to-two", "two", ingress=[rule("one", ports=ports[there])]),
            policy("back", "one", ingress=[rule("two", ports=ports[back])]),
        )

    allowed(True, True)
    perftest.run(pair, case)
    at.checks += 1
    for there, back in ((True, False), (False, True)):
        allowed(there, back)
        before = at.drops("policy_ingress")
        ended = programs.both_ends(pair, *perftest.arguments(case, pair), perftest.LISTENING, timeout_s=DENIED_S)
        said = f"perftest over IPv{version}, allowed {'there' if there else 'back'} alone"
        at.check(not ended.ok, f"{said}: passes")
        at.check(at.drops("policy_ingress") > before, f"{said}: policy dropped nothing: {ended.words}")
    at.put()


def led_by_node_port(at: Scene, outside: Peer, version: int) -> None:
    """Datagrams that a NodePort would lead to port 4791 of a pod, past its guard."""
    before = at.drops("roce_nat")
    request: Request = {"kind": "udp", "address": NODE[version], "port": NODE_PORT, "count": 2, "wait_s": QUIET_S}
    answer = outside.ask("many", **request)
    dropped = at.drops("roce_nat") - before
    at.check(not answer["names"] and dropped == 2, f"RoCE to a NodePort, IPv{version}: {dropped} dropped, {answer}")


def node_port(at: Scene) -> list[Document]:
    """A service of UDP 4791 of pod two."""
    port = {"name": "roce", "protocol": "UDP", "port": ROCE_PORT}
    addresses = ["10.96.47.91", "fd96::4791"]
    spec: dict[str, Any] = {"type": "NodePort", "clusterIP": addresses[0], "clusterIPs": addresses}
    spec |= {"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"]}
    spec["ports"] = [{**port, "targetPort": ROCE_PORT, "nodePort": NODE_PORT}]
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "roce"}, "spec": spec},
        *(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": f"roce-{version}", "labels": {"kubernetes.io/service-name": "roce"}},
                "addressType": f"IPv{version}",
                "ports": [port],
                "endpoints": [{"addresses": [at.address("two", version)], "conditions": {"ready": True}}],
            }
            for version in FAMILIES
        ),
    ]


def prove(cases: Sequence[Case] = CASES, families: Sequence[int] = FAMILIES) -> Figure:
    """All of it, or less."""
    with Host.scratch("one-policy") as host:
        outside = host.connect_outside()
        host.start_agent()
        with start_caller(host, "outside", outside) as world, scene(host) as at:
            matrix(at, cases)
            judged = at.checks
            for version in families:
                revocation(at, version)
                unleased(at, version)
            host.api("PUT", "/v1/objects", {"documents": node_port(at)})
            for version in families:
                led_by_node_port(at, world, version)
            checks = at.checks
        more, dropped = packets_by_hand(host)
        host.stop_agent()
    listed = ", ".join(f"{reason} {packets}" for reason, packets in sorted(dropped.items()))
    detail = (
        f"{len(cases)} sets of policies between {len(NAMES)} pods, IPv4 and IPv6: {judged} checks that who may connect"
        f" by TCP may lease and nobody else, who is told which policy; {checks - judged} of transfers under way, of"
        f" perftest and of NodePorts; {more} of RoCE packets by hand to leases that policy took away and to the outside"
        f" (dropped: {listed})"
    )
    return Figure(checks + more, "checks", detail, {"matrix": judged, "dropped": dropped})


def measure() -> Figure:
    """At full size."""
    return prove()
