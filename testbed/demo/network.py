"""The demo's steps on the kernel's path: agent, add, tcp, ebpf."""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

from testbed import cni_spec
from testbed.demo.world import FAMILIES, PODS, World
from testbed.host import DUMP
from testbed.outside import FAR_IPV4, FAR_IPV6, HOST_IPV4, HOST_IPV6
from testbed.pod import Pod
from testbed.rows import Figure, need

VERIFIED_BYTES = 1 << 20
PROBE_BYTES = 32 << 20
THROUGHPUT_S = 2.0
FAR = {"ipv4": FAR_IPV4, "ipv6": FAR_IPV6}
UPLINK = {"ipv4": HOST_IPV4, "ipv6": HOST_IPV6}
#: Attempts at reading the datapath's and the kernel's counters with no packet in between.
STILL_ATTEMPTS = 20
#: Drops have no byte counter. A pod's own kernel sends multicast (neighbour discovery, MLD), which is dropped.
SMALLEST_FRAME_BYTES, LARGEST_FRAME_BYTES = 14 + 40, 14 + 1500


def agent(world: World) -> Figure:
    """The agent is ready."""
    ready_s = world.host.start_agent()
    status = world.status()["agent"]
    need(status["rdma_mode"] is not None, f"the agent sees no RDMA: {status['rdma_missing']}")
    return Figure(ready_s * 1000, "ms", f"Linux {status['kernel']}, RDMA {status['rdma_mode']} mode, both IP families")


def add(world: World) -> Figure:
    """Three pods, by executing the CNI plugin as a runtime does."""
    elapsed_ms = []
    for name in PODS:
        pod = world.pods[name] = Pod.create(world.host, name)
        configuration = world.configuration(name)
        outcome = world.host.cni("ADD", pod, configuration)
        need(outcome.returncode == 0, f"ADD of {name}: {outcome.sentence or outcome.stderr}")
        cni_spec.validate_result(outcome.output, configuration["cniVersion"], ifname=pod.ifname, netns=pod.netns)
        elapsed_ms.append(outcome.elapsed_s * 1000)
    world.start_pods()
    devices = ", ".join(f"{name} {device or 'no device'}" for name, device in world.devices.items())
    each = ", ".join(f"{value:.0f}" for value in elapsed_ms)
    return Figure(median(elapsed_ms), "ms", f"p50 of {each}; {devices}; results valid as 1.1.0 and 1.0.0")


def tcp(world: World) -> Figure:
    """Every way that ordinary traffic takes, each byte checked, in both families; then the rate between pods."""
    world.need_pods()
    own = host_addresses(world)
    for family in FAMILIES:
        for source, target, address in (
            ("train-0", "train-1", world.addresses["train-1"][family]),
            ("host", "web-0", world.addresses["web-0"][family]),
            ("train-0", "host", own[family]),
            ("web-0", "host", UPLINK[family]),
            ("web-0", "outside", FAR[family]),
        ):
            sent = exchange(world, source, target, address)
            seen = UPLINK[family] if target == "outside" else sent["own"]
            need(sent["peer"] == seen, f"{target} saw {sent['peer']} instead of {seen} when {source} connected")
    for peer in world.verbs.values():
        peer.ask("hello")  # their imports would share the processors with what is measured now
    port = world.traffic["train-1"].ask("serve", address=world.addresses["train-1"]["ipv4"])["port"]
    size = PROBE_BYTES
    for _ in range(2):  # the first only to know how much takes some two seconds
        sent = world.traffic["train-0"].ask(
            "send", address=world.addresses["train-1"]["ipv4"], port=port, bytes=size, verify=False
        )
        gbit_s = size * 8 / sent["elapsed_s"] / 1e9
        size = max(PROBE_BYTES, int(gbit_s * 1e9 / 8 * THROUGHPUT_S))
    return Figure(
        gbit_s,
        "Gbit/s",
        "pod to pod; also host to pod, pod to host, pod to outside behind the host's addresses: "
        f"{5 * len(FAMILIES)} transfers of {VERIFIED_BYTES >> 20} MiB equal by SHA-256, IPv4 and IPv6",
    )


def host_addresses(world: World) -> dict[str, str]:
    """What pods see the host as when it talks to them: the source that its routes to a pod choose."""
    found = {}
    for family in FAMILIES:
        route = world.host.exec(["ip", "-json", "route", "get", world.addresses["train-0"][family]]).json()[0]
        found[family] = str(route["prefsrc"])
    return found


def exchange(world: World, source: str, target: str, address: str) -> dict[str, Any]:
    """Send verified bytes from a place to another one."""
    port = world.traffic[target].ask("serve", address=address)["port"]
    sent = world.traffic[source].ask("send", address=address, port=port, bytes=VERIFIED_BYTES, verify=True)
    need(sent["equal"], f"{source} to {target} at {address}: the bytes that arrived are not those that were sent")
    return sent


def ebpf(world: World) -> Figure:
    """The datapath counted what the kernel saw; and nothing else carries the traffic."""
    world.need_pods()
    packets = sum(accounted(world, name) for name in PODS)
    found = world.host.exec([sys.executable, "-I", "-S", "-E", str(DUMP), "nftables", "iptables"]).json()
    for section in ("nftables", "iptables"):
        need(found[section] == world.before[section], f"{section} changed: {found[section]}")
    bridges = [link["ifname"] for link in found["links"] if link.get("linkinfo", {}).get("info_kind") == "bridge"]
    need(not bridges, f"there are bridges: {bridges}")
    return Figure(
        packets,
        "packets",
        "counted by the eBPF programs, with every byte that the pods' interfaces counted, in and out; "
        "no bridge, no iptables or nftables change",
    )


def accounted(world: World, name: str) -> int:
    """Packets from and to a pod by the datapath's counters; their bytes must be those of the pod's interface."""
    for _ in range(STILL_ATTEMPTS):
        first = counted(world, name)
        kernel = world.traffic[name].ask("counters", ifname=world.pods[name].ifname)
        if first == counted(world, name):
            break
    else:
        need(False, f"{name} never was without traffic")
    # Packets cannot be compared: the interface counts a GSO frame once, the datapath what it becomes on a wire.
    need(
        first["to_pod_bytes"] == kernel["rx_bytes"],
        f"{name}: the datapath counted {first['to_pod_bytes']} bytes to it, its interface {kernel['rx_bytes']}",
    )
    missing = kernel["tx_bytes"] - first["from_pod_bytes"]
    low, high = (first["dropped"] * frame_bytes for frame_bytes in (SMALLEST_FRAME_BYTES, LARGEST_FRAME_BYTES))
    need(
        low <= missing <= high,
        f"{name}: its interface sent {missing} bytes more than the datapath counted, which {first['dropped']} "
        "dropped packets do not explain",
    )
    return first["from_pod_packets"] + first["to_pod_packets"]


def counted(world: World, name: str) -> dict[str, int]:
    """The datapath's sums from and to a pod, and the number of packets from it that were dropped (by name)."""
    status = world.status()
    attachment = world.attachment(name, status)
    sums = {
        f"{direction}_{what}": sum(n[what] for key, n in attachment["counters"].items() if key.startswith(direction))
        for direction in ("from_pod", "to_pod")
        for what in ("packets", "bytes")
    }
    sums["dropped"] = sum(drop["packets"] for drop in status["drops"] if drop["pod"] == attachment["pod"])
    return sums
