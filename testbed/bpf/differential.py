"""Random policies at work in a lab: what the programs, leases and iptables say, beside what the plain model says."""

from __future__ import annotations

import ipaddress
import itertools
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from rdmanet.datapath import bpf, layout
from rdmanet.datapath.artifact import Artifact
from rdmanet.model import Attachment, AttachmentState, IPAddress, NetnsId, PodName, address_key
from rdmanet.objects.changes import Changes
from rdmanet.objects.values import Kind, Object, ObjectKey
from rdmanet.policy.engine import Policy
from testbed.bpf.bench import REDIRECT, SHOT, host_frame, pod_frame
from testbed.bpf.lab import FAR, GATEWAYS, OUTSIDE, UPLINK, Lab
from testbed.bpf.packets import Ip
from testbed.bpf.wire import Router, Wire, answer_packet, flow_packet, lab_wire, question_back
from testbed.semantics import random_policies
from testbed.semantics.iptables import PolicyTable
from testbed.semantics.network_policy import Flow, Judgement, PolicyPod, PolicyWorld

PODS = 6
NODE = frozenset(ipaddress.ip_address(text) for texts in (GATEWAYS, UPLINK) for text in texts.values())
ABROAD = tuple(ipaddress.ip_address(text) for texts in (FAR, OUTSIDE) for text in texts.values())
LEASE_PROTOCOL, LEASE_PORT = 17, 4791
#: Why what the pods' own stacks send when they begin is dropped (RFC 4861, RFC 3810).
CHATTER = {"multicast", "neighbour"}


@dataclass
class Tally:
    """How much was compared, and what was not the same."""

    kinds: Counter[str] = field(default_factory=Counter)  # what answered, and how often
    judgements: Counter[Judgement] = field(default_factory=Counter)
    disagreements: list[str] = field(default_factory=list)

    def compare(self, what: str, wanted: object, found: object, *about: object) -> None:
        """One case."""
        self.kinds[what] += 1
        if isinstance(wanted, Judgement):
            self.judgements[wanted] += 1
        if wanted != found:
            self.disagreements.append(f"{what}: {found} instead of {wanted}: {' '.join(map(str, about))}")

    @property
    def cases(self) -> int:
        """How many."""
        return self.kinds.total()

    def text(self) -> str:
        """For a row's detail."""
        return ", ".join(f"{number} by {kind}" for kind, number in self.kinds.items())


class PolicyLab:
    """A lab whose pods' policy is what the engine makes of random worlds, one after the other."""

    def __init__(self, lab: Lab, wire: Wire, router: Router, beside: Wire):
        self.lab, self.wire, self._router, self._beside = lab, wire, router, beside
        self.policy = Policy(lab.datapath)
        self.policy.recover([], {})
        self.addresses = [tuple(ipaddress.ip_address(pod.addresses[version]) for version in (4, 6)) for pod in lab.pods]
        self._objects: dict[ObjectKey, Object] = {}
        self._numbers = itertools.count()

    @classmethod
    @contextmanager
    def build(cls, artifact: Artifact, pods: int = PODS) -> Iterator[PolicyLab]:
        """Pods around the datapath, and the same ones again around iptables."""
        with ExitStack() as stack:
            lab = stack.enter_context(Lab.build(artifact))
            for _ in range(pods):
                lab.add_pod()
            # Translated is only what has ports that NAT knows; policy judges everything.
            lab.datapath.change_node(lambda node: replace(node, masquerade=False))
            for address in NODE:
                bpf.update(lab.map("node_addresses"), address_key(address), layout.U32.pack(1))
            addresses = [tuple(ipaddress.ip_address(a) for a in pod.addresses.values()) for pod in lab.pods]
            router = stack.enter_context(Router.build(addresses, ABROAD, sorted(NODE, key=str)))
            wire = stack.enter_context(lab_wire(lab))
            yield cls(lab, wire, router, stack.enter_context(router.wire()))

    def world(self, random: Random) -> PolicyWorld:
        """Another one, and the datapath and iptables are brought to it."""
        world, spaces = random_policies.world(random, self.addresses, NODE, ABROAD)
        for pod in self.lab.pods:
            self.policy.leave(pod.id)
        # What has nothing to say may have no object: a pod without labels, a namespace with its name alone.
        objects: dict[ObjectKey, Object] = {
            ObjectKey(Kind.NAMESPACE, "", name): space for name, space in spaces.items() if len(space.labels) > 1
        }
        for one in world.pods:
            if one.labels or one.ports:
                objects[ObjectKey(Kind.POD, one.namespace, one.name)] = random_policies.pod_object(one)
        for policy in world.policies:
            objects[ObjectKey(Kind.NETWORK_POLICY, policy.namespace, policy.name)] = policy
        # Some changes meet pods that are there, others come first.
        joined = random.random() < 0.5
        if joined:
            self._join(world)
        removed = {key: value for key, value in self._objects.items() if key not in objects}
        changed = {key: value for key, value in objects.items() if self._objects.get(key) != value}
        changes = Changes(changed, removed, objects)
        self.policy.check(changes)
        self.policy.objects_changed(changes)
        self._objects = objects
        if not joined:
            self._join(world)
        return world

    def _join(self, world: PolicyWorld) -> None:
        for pod, one in zip(self.lab.pods, world.pods, strict=True):
            self.policy.join(attachment(pod.id, one))

    def flows(self, random: Random, world: PolicyWorld, count: int) -> list[Flow]:
        """Of this world; none is a pod's to itself, and none is RoCE."""
        flows: list[Flow] = []
        while len(flows) < count:
            flow = random_policies.flow(random, world, ABROAD)
            source = world.pod_of(flow.source)
            inside = source is not None and source is world.pod_of(flow.destination)
            if not inside and (flow.protocol, flow.port) != (LEASE_PROTOCOL, LEASE_PORT):
                flows.append(flow)
        return flows

    def compare_programs(self, tally: Tally, world: PolicyWorld, flows: list[Flow]) -> None:
        """What the programs say to each flow's first packet, to its answer, and to a question back."""

        def compare() -> None:
            for flow in flows:
                self._compare_flow(tally, world, flow)

        self.lab.host.run(compare)

    def _compare_flow(self, tally: Tally, world: PolicyWorld, flow: Flow) -> None:
        number = next(self._numbers) % 40_000
        wanted = world.judge(flow)
        tally.compare("programs", wanted, self._verdict(flow_packet(flow, number)), flow)
        answer = answer_packet(flow, number)
        if wanted is Judgement.ALLOWED:
            tally.compare("answers", wanted, self._verdict(answer), flow)
        question = question_back(flow, number)
        if question is not None:
            packet, back = question
            tally.compare("questions back", world.judge(back), self._verdict(packet), back)

    def _verdict(self, ip: Ip) -> str:
        """Allowed, or the drop reason."""
        pod = next((p for p in self.lab.pods if ip.source in p.addresses.values()), None)
        context = bytearray(192)  # struct __sk_buff
        hook, ifindex = ("host", self.lab.peer_ifindex) if pod is None else ("pod", pod.ifindex)
        struct.pack_into("=I", context, 40, ifindex)
        frame = host_frame(ip) if pod is None else pod_frame(pod, ip)
        done = bpf.run_program(self.lab.datapath.dispatcher(hook), frame, bytes(context))
        if done.verdict == REDIRECT:
            return Judgement.ALLOWED
        assert done.verdict == SHOT, done.verdict
        reasons = {key[-1] for key, count in self.lab.datapath.drops().items() if count}
        self.forget_drops()
        return " and ".join(sorted(reasons - CHATTER or reasons))

    def forget_drops(self) -> None:
        definition = self.lab.artifact.maps["drops"]
        for key in list(bpf.keys(self.lab.map("drops"), definition.key_size, definition.max_entries)):
            bpf.delete(self.lab.map("drops"), key)

    def forget_flows(self) -> None:
        """So that numbers can come again."""
        definition = self.lab.artifact.maps["flows"]
        for key in list(bpf.keys(self.lab.map("flows"), definition.key_size, definition.max_entries)):
            bpf.delete(self.lab.map("flows"), key)

    def set_iptables(self, world: PolicyWorld) -> None:
        """The same policies as rules beside."""
        for version, command in ((4, "iptables-restore"), (6, "ip6tables-restore")):
            restore = partial(
                subprocess.run, [command], input=PolicyTable(world, version).text(), text=True, check=True
            )
            self._router.namespace.run(restore)

    def compare(self, tally: Tally, random: Random, *, flows: int, live: int) -> None:
        """One world: programs and leases against the model, and for a sample what arrives here and beside iptables."""
        world = self.world(random)
        self.forget_drops()
        self.forget_flows()
        tested = self.flows(random, world, flows)
        self.compare_programs(tally, world, tested)
        for source, destination in itertools.permutations(world.pods, 2):
            for near, far in zip(source.addresses, destination.addresses, strict=True):
                lease = world.judge(Flow(near, far, LEASE_PROTOCOL, LEASE_PORT))
                sentence = self.refusal(source, near, destination, far)
                tally.compare("leases", lease is Judgement.ALLOWED, sentence is None, source.name, destination.name)
        if not live:
            return
        self.set_iptables(world)
        self.forget_flows()
        # The node itself is at no end of the wire.
        sample = [flow for flow in self.flows(random, world, 2 * live) if not {flow.source, flow.destination} & NODE]
        sample = sample[:live]
        ours, theirs = self.wire.arrivals(sample), self._beside.arrivals(sample)
        for number, flow in enumerate(sample):
            wanted = world.judge(flow) is Judgement.ALLOWED
            tally.compare("iptables", wanted, number in theirs, flow)
            tally.compare("packets", wanted, number in ours, flow)

    def refusal(self, source: PolicyPod, near: IPAddress, destination: PolicyPod, far: IPAddress) -> str | None:
        """Why a lease would be refused."""
        return self.policy.refusal(
            PodName(source.namespace, source.name),
            address_key(near),
            PodName(destination.namespace, destination.name),
            address_key(far),
        )


def attachment(number: int, pod: PolicyPod) -> Attachment:
    """The pod's, as the store has it."""
    ipv4, ipv6 = pod.addresses
    assert isinstance(ipv4, ipaddress.IPv4Address)
    assert isinstance(ipv6, ipaddress.IPv6Address)
    return Attachment(
        number,
        pod.name,
        "eth0",
        "net",
        f"/run/netns/{pod.name}",
        NetnsId(0, number),
        PodName(pod.namespace, pod.name),
        AttachmentState.READY,
        "02:72:00:00:00:01",
        1500,
        ipv4,
        ipv6,
        False,
    )
