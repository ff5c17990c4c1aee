"""What people and programs break of a running agent's, and how long until it is whole again (``rdmanet.reconcile``)."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rdmanet.datapath import bpf
from rdmanet.datapath.artifact import HOOKS, Artifact
from rdmanet.datapath.maps import Datapath
from rdmanet.model import Bandwidth, Limit, address_key
from testbed.host import ARTIFACT, Host
from testbed.outside import FAR_IPV4, FAR_IPV6, UPLINK
from testbed.pod import Pod
from testbed.rows import need

PINS = "/sys/fs/bpf/rdmanet"
GATEWAYS = {4: "10.213.0.1", 6: "fd72:646d:616e::1"}
RANGES = {4: "10.213.0.0/20", 6: "fd72:646d:616e::/64"}
FAR = {4: FAR_IPV4, 6: FAR_IPV6}
NODE = "the node"
#: Emulated and busy; what is promised is 5 s.
PATIENCE_S = 60.0
LOOK_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Target:
    """A host, and one attached pod on it that is broken."""

    host: Host
    pod: str  # namespace/name
    netns: str
    ifname: str
    host_ifname: str
    addresses: Mapping[int, str]

    def inside(self, *words: str) -> None:
        """A command in the pod's network namespace, as root of the host."""
        self.host.exec(["nsenter", f"--net={self.netns}", *words])

    def on_host(self, *words: str) -> None:
        """A command on the host."""
        self.host.exec(list(words))

    @property
    def name(self) -> str:
        """As the agent calls it."""
        return f"{self.pod} {self.ifname}"


@dataclass(frozen=True, slots=True)
class Break:
    """``kind`` is what the agent calls it; ``node`` says that it is not the pod's."""

    kind: str
    work: Callable[[Target], None]
    node: bool = False


def _inside(kind: str, *words: str) -> Break:
    def work(target: Target) -> None:
        place = {
            "ifname": target.ifname,
            "ipv4": target.addresses[4],
            "ipv6": target.addresses[6],
            "device": f"rxe_{target.host_ifname.replace('-', '')}",
        }
        target.inside(*(word.format(**place) for word in words))

    return Break(kind, work)


def _on_host(kind: str, *words: str, node: bool = True) -> Break:
    return Break(
        kind, lambda target: target.on_host(*(word.format(rn=target.host_ifname) for word in words)), node=node
    )


def _datapath(change: Callable[[Datapath, Target], None]) -> Callable[[Target], None]:
    def work(target: Target) -> None:
        with Datapath.open(Artifact.load(ARTIFACT), target.host.path(PINS)) as datapath:
            change(datapath, target)

    return work


def _without_endpoint(datapath: Datapath, target: Target) -> None:
    datapath.delete_endpoint(address_key(target.addresses[6]))


def _without_entry(datapath: Datapath, target: Target) -> None:
    key = address_key(target.addresses[4])
    (ifindex,) = [index for index, entry in datapath.attachments().items() if entry.ipv4 == key]
    datapath.delete_attachment(ifindex)


def _other_limits(datapath: Datapath, target: Target) -> None:
    endpoint = datapath.endpoint(address_key(target.addresses[4]))
    assert endpoint is not None
    datapath.set_bandwidth(endpoint.attachment_id, Bandwidth(egress=Limit(1000, 1 << 17)))


def _renamed(target: Target) -> None:
    # Down first: older kernels rename no other.
    target.inside("ip", "link", "set", target.ifname, "down")
    target.inside("ip", "link", "set", target.ifname, "name", "renamed0")


def _without_node(datapath: Datapath, target: Target) -> None:
    datapath._update("node", bytes(4), bytes(datapath._pinned.artifact.maps["node"].value_size))


def _without_program(datapath: Datapath, target: Target) -> None:
    bpf.delete(datapath._pinned.maps["programs"], struct.pack("=I", HOOKS["uplink"]))


#: Everything that the agent has made and repairs, by name.
BREAKS: dict[str, Break] = {
    "pod-end": _inside("link", "ip", "link", "delete", "{ifname}"),
    "host-end": _on_host("link", "ip", "link", "delete", "{rn}", node=False),
    "renamed": Break("link", _renamed),
    "pod-down": _inside("interface", "ip", "link", "set", "{ifname}", "down"),
    "host-end-down": _on_host("interface", "ip", "link", "set", "{rn}", "down", node=False),
    "address-4": _inside("address", "ip", "address", "delete", "{ipv4}/32", "dev", "{ifname}"),
    "address-6": _inside("address", "ip", "address", "delete", "{ipv6}/128", "dev", "{ifname}"),
    "gateway-4": _inside("gateway_mac", "ip", "neigh", "delete", GATEWAYS[4], "dev", "{ifname}"),
    "gateway-6": _inside("gateway_mac", "ip", "neigh", "delete", "fe80::1", "dev", "{ifname}"),
    "route-4": _inside("route", "ip", "route", "delete", "default"),
    "route-6": _inside("route", "ip", "-6", "route", "delete", "default"),
    "pod-filter": _on_host("filter", "tc", "filter", "delete", "dev", "{rn}", "ingress", node=False),
    "pod-clsact": _on_host("filter", "tc", "qdisc", "delete", "dev", "{rn}", "clsact", node=False),
    "endpoint": Break("entry", _datapath(_without_endpoint)),
    "attachment": Break("entry", _datapath(_without_entry)),
    "limits": Break("entry", _datapath(_other_limits)),
    "host-link": _on_host("link", "ip", "link", "delete", "rdmanet0"),
    "host-peer": _on_host("link", "ip", "link", "delete", "rdmanet1"),
    "host-link-down": _on_host("interface", "ip", "link", "set", "rdmanet0", "down"),
    "host-address-4": _on_host("address", "ip", "address", "delete", f"{GATEWAYS[4]}/32", "dev", "rdmanet0"),
    "host-address-6": _on_host("address", "ip", "address", "delete", f"{GATEWAYS[6]}/128", "dev", "rdmanet0"),
    "host-route-4": _on_host("route", "ip", "route", "delete", RANGES[4], "dev", "rdmanet0"),
    "host-route-6": _on_host("route", "ip", "-6", "route", "delete", RANGES[6], "dev", "rdmanet0"),
    "host-filter": _on_host("filter", "tc", "filter", "delete", "dev", "rdmanet1", "ingress"),
    "host-clsact": _on_host("filter", "tc", "qdisc", "delete", "dev", "rdmanet1", "clsact"),
    "uplink-filter": _on_host("filter", "tc", "filter", "delete", "dev", UPLINK, "ingress"),
    "uplink-clsact": _on_host("filter", "tc", "qdisc", "delete", "dev", UPLINK, "clsact"),
    "forwarding-4": _on_host("forwarding", "sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/rdmanet0/forwarding"),
    "forwarding-6": _on_host("forwarding", "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/rdmanet0/forwarding"),
    "node-entry": Break("entry", _datapath(_without_node), node=True),
    "program": Break("program", _datapath(_without_program), node=True),
    "pinned-map": _on_host("pin", "rm", f"{PINS}/endpoints"),
    "pinned-program": _on_host("pin", "rm", f"{PINS}/dispatch_pod"),
    "pinned-link": _on_host("pin", "rm", f"{PINS}/link_connect4"),
    "moved-pin": _on_host("pin", "mv", f"{PINS}/flows", f"{PINS}/elsewhere"),
    "all-pins": _on_host("pin", "rm", "-r", PINS),
}


#: Where pods have devices of their own.
RDMA_BREAKS: dict[str, Break] = {"rxe-device": _inside("device", "rdma", "link", "delete", "{device}")}


def repairs(host: Host) -> dict[str, Any]:
    """What `rdmanet status` says of them. Asking makes the agent look for what nobody announces."""
    found: dict[str, Any] = host.api("GET", "/v1/status")["repairs"]
    return found


@dataclass(frozen=True, slots=True)
class Repaired:
    """Seconds from the break until status showed it, and until it was repaired; what status said."""

    shown_s: float
    repaired_s: float
    sentence: str


def break_and_wait(target: Target, name: str) -> Repaired:
    """Breaks it, and returns when `rdmanet status` says that it is whole again. StepError where that does not come."""
    broken = (BREAKS | RDMA_BREAKS)[name]
    what = NODE if broken.node else target.name
    before = max((one["number"] for one in repairs(target.host)["done"]), default=0)
    begun = time.monotonic()
    broken.work(target)
    shown_s: float | None = None
    while time.monotonic() - begun < PATIENCE_S:
        found = repairs(target.host)
        elapsed_s = time.monotonic() - begun
        if shown_s is None and any(one["what"] == what for one in found["broken"]):
            shown_s = elapsed_s
        for one in found["done"]:
            if one["what"] == what and one["kind"] == broken.kind and one["number"] > before:
                need(one["outcome"] == "repaired", f"{name}: {one['sentence']}: {one['outcome']}")
                if not any(other["what"] == what for other in found["broken"]):
                    return Repaired(elapsed_s if shown_s is None else shown_s, elapsed_s, one["sentence"])
        time.sleep(LOOK_EVERY_S)
    raise AssertionError(f"{name} is not repaired after {PATIENCE_S:g} s: {repairs(target.host)}")


def forgive(host: Host, *pods: str) -> None:
    """Forgets how often things broke: one after another is broken here, more often than is repaired."""
    for name in ("node", *pods):
        host.api("POST", f"/v1/repair?pod={name}", timeout_s=PATIENCE_S)


def target_of(host: Host, pod: Pod) -> Target:
    """The pod's attachment, as `rdmanet status` shows it."""
    rows = host.api("GET", "/v1/status")["attachments"]
    (row,) = [one for one in rows if (one["container_id"], one["ifname"]) == (pod.container_id, pod.ifname)]
    addresses = {4: row["ipv4"], 6: row["ipv6"]}
    return Target(host, row["pod"], pod.netns, pod.ifname, row["host_ifname"], addresses)
