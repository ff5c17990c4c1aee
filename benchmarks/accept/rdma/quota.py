"""Row `quota`: each limit reached, what the process is told, what the metrics count, and that another pod has its own.

Pod one asks for more than it may have of everything; pod two for as much as it may have, at the same time.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import namespaces
from benchmarks.peers.namespaces import End
from rdmanet.lease import PROTOCOL_VERSION
from testbed import adversary
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.rows import Figure, need

TIMEOUT_S = 150.0
REACHED = "the pod's limit of RDMA objects is reached (rdma.max of its cgroup)"

#: Opens the device, makes completion queues, leases from itself: each until the library says why not, in JSON.
PROGRAM = """
import asyncio, json, sys
from rdmanet import verbs
from rdmanet.errors import RdmanetError
from rdmanet.verbs import compat
from rdmanet.verbs.device import OpenDevice

what, device, pod, most = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def until_refused(make):
    made = []
    while len(made) < most:
        try:
            made.append(make())
        except RdmanetError as error:
            return {"made": len(made), "kind": type(error).__name__, "errno": error.errno, "sentence": error.sentence}
    return {"made": len(made), "sentence": None}

def queue(opened):
    with compat.call("no completion queue could be made", "ibv_create_cq"):
        return compat.CQ(opened.context, 1)

async def leases():
    async with await verbs.listen("mine") as listener:
        found = {"made": 0, "sentence": None}
        while found["made"] < most:
            try:
                await verbs.connect(f"{pod}:mine")
                await listener.accept()
                found["made"] += 1
            except RdmanetError as error:
                return {**found, "kind": type(error).__name__, "reason": error.operation, "sentence": error.sentence}
        return found

if what == "contexts":
    print(json.dumps(until_refused(lambda: OpenDevice(device))))
elif what == "objects":
    opened = OpenDevice(device)
    print(json.dumps(until_refused(lambda: queue(opened))))
else:
    print(json.dumps(asyncio.run(leases())))
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The limits, and how many packets of a class are looked at."""

    leases: int = 64
    handles: int = 8
    objects: int = 500
    packets: int = 100
    traffic_class: int = 0x68

    @property
    def configuration(self) -> dict[str, dict[str, object]]:
        """The agent's."""
        return {"rdma": {"cgroup_controller": True, "max_handles": self.handles, "max_objects": self.objects}}

    @property
    def network(self) -> dict[str, object]:
        """Of the network configuration."""
        return {"rdmaMaxLeases": self.leases, "rdmaTrafficClass": self.traffic_class}


@dataclass
class Pods:
    """Two pods of one kind, and a program in each that speaks to the agent by hand."""

    host: Host
    sizes: Sizes
    ends: dict[str, End]
    speakers: dict[str, Peer]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reach(self, name: str, what: str, most: int) -> dict[str, Any]:
        """What a process in the pod got of something, and what it was told."""
        end = self.ends[name]
        argv = [sys.executable, "-c", PROGRAM, what, end.device, end.pod.name, str(most)]
        done = end.pod.exec(argv, cwd=str(REPOSITORY), timeout_s=TIMEOUT_S)
        found: dict[str, Any] = done.json()
        return found

    def metric(self, name: str, **labels: str) -> float:
        """A counter, 0 before the first."""
        words = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        for line in self.host.api("GET", "/metrics").splitlines():
            if line.startswith(f"{name}{{{words}}}"):
                return float(line.rpartition(" ")[2])
        return 0.0

    def known(self, name: str) -> dict[str, Any]:
        """The pod's attachment once its cgroup is known: it has said hello by hand."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            rows = self.host.api("GET", "/v1/status")["attachments"]
            (row,) = [r for r in rows if r["container_id"] == self.ends[name].pod.container_id]
            if row["cgroup"] is not None:
                need(row["not_limited"] is None, f"{name}: {row['not_limited']}")
                return dict(row)
            need(time.monotonic() < deadline, f"the cgroup of {name}: {row['not_limited']}")
            time.sleep(0.1)


@contextlib.contextmanager
def pods(host: Host, sizes: Sizes) -> Iterator[Pods]:
    """Attached and started, with their cgroups known."""
    with contextlib.ExitStack() as stack:
        attached = stack.enter_context(namespaces.attached(host, ["one", "two"], more=sizes.network))
        ends = {end.pod.name: end for end in attached}
        speakers = {}
        for name, end in ends.items():
            argv = [sys.executable, "-I", "-S", "-E", adversary.__file__, str(PROTOCOL_VERSION)]
            speakers[name] = stack.enter_context(Peer.start(f"quota-{name}", end.pod.popen, argv))
            speakers[name].ask("dial", line="line")
            hello = {"type": "hello", "id": 1, "version": PROTOCOL_VERSION}
            answer = speakers[name].ask("say", line="line", message=hello)["answer"]
            need(answer["max_leases"] == sizes.leases, f"hello answers {answer}")
        found = Pods(host, sizes, ends, speakers)
        for name in ends:
            found.known(name)
        yield found


def objects(at: Pods) -> None:
    """Device contexts and verbs objects, by the kernel's RDMA cgroup controller."""
    limits = {"contexts": ("hca_handle", at.sizes.handles), "objects": ("hca_object", at.sizes.objects)}
    for what, (resource, limit) in limits.items():
        labels = {"pod": "default/one", "interface": "eth0", "resource": resource}
        others = {**labels, "pod": "default/two"}
        name = "rdmanet_rdma_refused_objects_total"
        before = at.metric(name, **labels)
        found = at.reach("one", what, limit + 10)
        counted = at.metric(name, **labels) - before
        at.results[what] = {"limit": limit, **found, "counted": counted}
        need(found["sentence"] is not None and REACHED in found["sentence"], f"{what}: {found}")
        # An opened device has a protection domain as well, and counts as an object.
        need(limit - 1 <= found["made"] <= limit, f"{what}: {found['made']} of {limit}")
        need(counted >= 1, f"{what}: the metric counted {counted}")
        other = at.reach("two", what, limit - 1)
        need(other["made"] == limit - 1 and other["sentence"] is None, f"{what}: the other pod got {other}")
        need(at.metric(name, **others) == 0, f"{what}: the other pod was refused one")


def leases(at: Pods) -> None:
    """Leases, by the broker: a lease of a pod with itself needs two of its ends."""
    before = at.metric("rdmanet_leases_refused_total", reason="limit")
    found = at.reach("one", "leases", at.sizes.leases)
    counted = at.metric("rdmanet_leases_refused_total", reason="limit") - before
    at.results["leases"] = {"limit": at.sizes.leases, **found, "counted": counted}
    need(found["made"] == at.sizes.leases // 2, f"leases: {found}")
    need("leases in use" in str(found["sentence"]) or "leases left" in str(found["sentence"]), f"leases: {found}")
    need(counted == 1, f"leases: the metric counted {counted}")
    other = at.reach("two", "leases", at.sizes.leases // 2)
    need(other["made"] == at.sizes.leases // 2 and other["sentence"] is None, f"leases: the other pod got {other}")


def connections(at: Pods) -> None:
    """Connections to the agent and services, by the broker."""
    speaker, hello = at.speakers["one"], {"type": "hello", "id": 1, "version": PROTOCOL_VERSION}
    made, sentence = 1, ""
    for number in range(100):
        speaker.ask("dial", line=f"more-{number}")
        answer = speaker.ask("say", line=f"more-{number}", message=hello, or_closed=True)["answer"]
        if answer["type"] == "error":
            sentence = answer["sentence"]
            break
        made += 1
    at.results["connections"] = {"limit": 64, "made": made, "sentence": sentence}
    need(made == 64 and "connections to the agent, the most" in sentence, f"connections: {made}, {sentence}")
    for number in range(made):
        speaker.ask("hang_up", line=f"more-{number}")
    services, sentence = 0, ""
    for number in range(100):
        message = {"type": "listen", "id": 2 + number, "service": f"service-{number}", "transport": "rc"}
        answer = speaker.ask("say", line="line", message=message)["answer"]
        if answer["type"] == "error":
            sentence = answer["sentence"]
            break
        services += 1
    at.results["services"] = {"limit": 64, "made": services, "sentence": sentence}
    need(services == 64 and "services already, the most" in sentence, f"services: {services}, {sentence}")


def bandwidth_class(at: Pods) -> None:
    """Whatever class a process writes, RoCE packets carry the pod's; the congestion bits are its own."""
    sender, receiver = at.speakers["one"], at.speakers["two"]
    receiver.ask("watch_classes")
    for version in (4, 6):
        for written in (0x00, 0xB8, 0xFD):
            address = at.ends["two"].addresses[version]
            sender.ask("send_class", address=address, traffic_class=written, count=at.sizes.packets)
            found = set(receiver.ask("classes", count=at.sizes.packets)["classes"])
            wanted = at.sizes.traffic_class | written & 3
            need(found == {wanted}, f"class {written:#x} over IPv{version} arrived as {found}, not {wanted:#x}")
    at.results["traffic class"] = {"class": at.sizes.traffic_class, "packets": 6 * at.sizes.packets}


def all_limits(host: Host, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """By kind: the limit, what was had, the sentence, what the metric counted."""
    with pods(host, sizes) as at:
        objects(at)
        leases(at)
        connections(at)
        bandwidth_class(at)
        return at.results


def measure() -> Figure:
    """At full size."""
    sizes = Sizes()
    with Host.scratch("quota") as host:
        host.start_agent(sizes.configuration)
        results = all_limits(host, sizes)
        host.stop_agent()
        host.uninstall()
    reached = ", ".join(f"{name} {row['made']}" for name, row in results.items() if "made" in row)
    return Figure(
        len(results), "limits", f"reached: {reached}; each with a sentence, the other pod unaffected", results
    )
