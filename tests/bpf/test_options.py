"""Every program is loaded with every size that its maps may have, and runs with every combination of options."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from rdmanet.datapath import bpf, loader, programs
from rdmanet.datapath.artifact import DEVICE_PROGRAM, SOCKET_PROGRAMS, Artifact
from rdmanet.datapath.maps import NodeEntry
from testbed.bpf import lab as labs
from testbed.bpf import packets
from testbed.bpf.bench import REDIRECT, SHOT, UNSPEC, Bench, between, host_frame, pod_frame, to, uplink_frame
from testbed.bpf.lab import FAR, FIRST_PORT, GATEWAY_MAC, GATEWAYS, LAST_PORT, UPLINK
from testbed.bpf.packets import TCP, Ip

VERSIONS = (4, 6)
PROG_TYPE_CGROUP_SOCK_ADDR = 18  # enum bpf_prog_type
#: The verifier gives up at a million. Of `outside` it goes through 198,000 on Linux 6.18 and 189,000 on 6.1, of `pod`
#: through 218,000 and 128,000; of `outside` as Debian 13's compiler makes it, through 366,000.
MOST_VERIFIED = 500_000
#: Maps whose sizes are configured: as small as can be, and large.
SIZED = ("flows", "policy", "prefixes", "services", "backends", "members", "maglev", "affinity", "sockets", "fragments")
SIZES = {"smallest": 1, "as compiled": None, "large": 1 << 18}


@contextmanager
def maps_of(artifact: Artifact, entries: int | None) -> Iterator[dict[str, int]]:
    """New maps, the sized ones with room for so many."""
    made: dict[str, int] = {}
    try:
        for name, definition in artifact.maps.items():
            if entries is not None and name in SIZED:
                definition = replace(definition, max_entries=entries)
            made[name] = loader.create_map(definition)
        yield made
    finally:
        for descriptor in made.values():
            os.close(descriptor)


def load(artifact: Artifact, name: str, maps: dict[str, int]) -> int:
    """The program's descriptor, loaded as what it is attached to wants it."""
    if name == DEVICE_PROGRAM:
        return programs.load(artifact, name, name, maps, bpf.PROG_TYPE_CGROUP_DEVICE)
    if name in SOCKET_PROGRAMS:
        return programs.load(artifact, name, name, maps, PROG_TYPE_CGROUP_SOCK_ADDR, SOCKET_PROGRAMS[name])
    return programs.load(artifact, name, name, maps)


@pytest.mark.parametrize("size", SIZES)
def test_every_program_loads_with_maps_of_every_size(size: str) -> None:
    labs.require_root()
    artifact = labs.artifact()
    with maps_of(artifact, SIZES[size]) as maps:
        for name in artifact.programs:
            descriptor = load(artifact, name, maps)
            try:
                verified = bpf.program_info(descriptor).verified_instructions
            finally:
                os.close(descriptor)
            print(f"{name}: {verified} instructions verified")
            assert verified < MOST_VERIFIED, name


@pytest.mark.parametrize("version", VERSIONS)
def test_every_combination_of_options(bench: Bench, version: int) -> None:
    """Each option decides what it is for, whatever the others say."""
    pod, peer, outside = bench.train_0, bench.train_1, FAR[version]
    port = itertools.count(20_000)
    booleans = (False, True)
    for masquerade, services, limited, monitored, selected in itertools.product(booleans, repeat=5):
        options = (masquerade, services, limited, monitored, selected)
        bench.reset()
        node = NodeEntry(
            GATEWAY_MAC,
            bench.lab.host_ifindex,
            masquerade,
            FIRST_PORT,
            LAST_PORT,
            epoch=7,
            maglev_size=251 if services else 0,
            max_flows_per_pod=1000 if limited else 0,
            monitor=monitored,
        )
        bench.datapath.configure(node)
        if selected:
            # A set without entries: policies that allow nothing.
            entry = bench.datapath.attachment(pod.ifindex)
            assert entry is not None
            bench.datapath.set_attachment(pod.ifindex, replace(entry, identity=16, egress_set=9))
        payload = packets.tcp(next(port), 80, packets.SYN)
        refused = (SHOT, "policy_egress")
        inside = bench.from_pod(pod, pod_frame(pod, between(pod, peer, version, TCP, payload)))
        assert (inside.verdict, inside.reason) == (refused if selected else (REDIRECT, None)), options
        leaving = bench.from_pod(pod, pod_frame(pod, to(pod, outside, version, TCP, payload)))
        assert (leaving.verdict, leaving.reason) == (refused if selected else (REDIRECT, None)), options
        if not selected:
            masked = packets.look(leaving.frame).source == UPLINK[version]
            assert masked is masquerade, options
        # The node's own addresses are always allowed.
        for outcome in (
            bench.from_pod(pod, pod_frame(pod, to(pod, GATEWAYS[version], version, TCP, payload))),
            bench.from_host(host_frame(Ip(GATEWAYS[version], pod.addresses[version], TCP, payload))),
        ):
            assert (outcome.verdict, outcome.reason) == (REDIRECT, None), options
        # Of nobody's flow, and to no service: the host's own.
        stranger = uplink_frame(Ip(outside, UPLINK[version], TCP, packets.tcp(4000, 30_000, packets.SYN)))
        assert bench.from_outside(stranger).verdict == UNSPEC, options
