"""Aliases of links: what is written is read again, whatever its length, and never longer than the kernel takes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rdmanet import alias
from rdmanet.model import Attachment, PodName
from tests.unit.test_store import wanted

LONG_ID = "f" * 64
TYPICAL = wanted(
    container_id=LONG_ID,
    network="k8s-pod-network",
    netns="/var/run/netns/cni-3d0a1ff4-9a7d-4d0a-8f0e-1a2b3c4d5e6f",
    pod=PodName("kube-system", "coredns-5d78c9869d-abcde"),
    pod_uid="0a1b2c3d-1111-2222-3333-444455556666",
)


def described(attachment: Attachment) -> alias.Described:
    text = alias.of_attachment(attachment)
    assert len(text.encode()) <= alias.MAX_BYTES
    found = alias.attachment(text)
    assert found is not None
    assert (found.container_id, found.ifname) == (attachment.container_id, attachment.ifname)
    assert (found.wants_rdma, found.max_leases) == (attachment.wants_rdma, attachment.max_leases)
    assert found.service_level == attachment.service_level
    return found


@pytest.mark.parametrize(
    "attachment",
    [
        wanted(),
        TYPICAL,
        wanted(wants_rdma=True, max_leases=3, service_level=7, pod_uid="6f2d-1"),
        wanted(netns="/run/ä b/at=c  d"),
        wanted(pod=PodName("web", "c1")),
    ],
)
def test_what_fits_is_read_again(attachment: Attachment) -> None:
    found = described(attachment)
    assert (found.network, found.pod, found.netns) == (attachment.network, attachment.pod, attachment.netns)
    assert found.pod_uid == attachment.pod_uid


def test_what_a_runtime_gives_fits_whole() -> None:
    assert None not in dataclasses.astuple(described(TYPICAL))


def test_what_does_not_fit_is_left_away_and_never_cut() -> None:
    path = described(dataclasses.replace(TYPICAL, netns="/run/" + "n" * 200))
    assert (path.netns, path.pod, path.network) == (None, TYPICAL.pod, TYPICAL.network)
    pod = described(dataclasses.replace(TYPICAL, pod=PodName("a" * 63, "b" * 253)))
    assert (pod.pod, pod.network, pod.netns) == (None, TYPICAL.network, TYPICAL.netns)
    network = described(dataclasses.replace(TYPICAL, network="n" * 255))
    assert (network.network, network.pod) == (None, TYPICAL.pod)


def test_the_longest_container_id_and_interface_always_fit() -> None:
    found = described(
        wanted(
            container_id="c" * 200,
            ifname="i" * 15,
            wants_rdma=True,
            max_leases=65536,
            service_level=7,
            network="n" * 255,
            netns="/" + "p" * 8000,
            pod=PodName("a" * 253, "b" * 253),
        )
    )
    assert (found.network, found.pod, found.netns) == (None, None, None)


@pytest.mark.parametrize(
    "text", ["", "uplink of rack 7", "rdmanet:2 id=a if=b", "rdmanet:1 id=a", "rdmanet:1 id=a if=b sl=x"]
)
def test_others_aliases_are_nobodys(text: str) -> None:
    assert alias.attachment(text) is None


def test_effects() -> None:
    effects = {"bpffs": "/sys/fs/bpf", "uplink:eth0": json.dumps({"clsact": "ours"}), "rdma-controller:/a b": ""}
    assert alias.effects(alias.of_effects(effects)) == effects
    many = {**effects, **{f"uplink:eth{number}": json.dumps({"clsact": "theirs"}) for number in range(1, 20)}}
    text = alias.of_effects(many)
    assert len(text.encode()) <= alias.MAX_BYTES
    assert 3 <= len(alias.effects(text).items() & many.items()) == len(alias.effects(text))


@pytest.mark.parametrize("text", ["", "mine", "rdmanet:1", "rdmanet:1 [1]", "rdmanet:2 {}"])
def test_no_effects(text: str) -> None:
    assert alias.effects(text) == {}
