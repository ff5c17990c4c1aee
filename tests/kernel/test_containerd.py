"""containerd, as Debian has it, asked by CRI as kubelet asks: real pods on our network."""

from __future__ import annotations

import concurrent.futures
import random
from collections.abc import Iterator
from typing import Any

import pytest

from testbed.containerd import PLUGINS, Containerd, Pod
from testbed.cri import CriError
from testbed.hold import Hold
from testbed.host import diff
from testbed.outside import HOST_IPV4, HOST_IPV6
from testbed.world import World
from tests.kernel.test_chain import without_bases
from tests.kernel.test_podman import SERVE, fetch, url

OURS: dict[str, Any] = {"type": "rdmanet", "capabilities": {"io.kubernetes.cri.pod-annotations": True}}
PORTMAP: dict[str, Any] = {"type": "portmap", "capabilities": {"portMappings": True}}
VERSIONS = ("0.3.1", "0.4.0", "1.0.0")
NODE = {4: HOST_IPV4, 6: HOST_IPV6}
PODS_AT_ONCE = 8
KILLS = 6
SEED = 21


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("containerd") as world:
        world.host.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
        yield world


@pytest.fixture(scope="module")
def containerd(world: World) -> Iterator[Containerd]:
    with Containerd.start(world.host) as containerd:
        yield containerd


@pytest.fixture(scope="module")
def hold(world: World, containerd: Containerd) -> Hold:
    return Hold(world.host, PLUGINS)


@pytest.fixture(autouse=True)
def unchanged(world: World, containerd: Containerd) -> Iterator[None]:
    """No pod is left, and nothing of ours."""
    containerd.network("net", [OURS, PORTMAP])
    before = without_bases(world.snapshot())
    try:
        yield
    finally:
        containerd.remove_all()
    assert diff(before, without_bases(world.snapshot())) == []


def served(containerd: Containerd, name: str, **options: Any) -> Pod:
    """A pod with a container that serves, and listens."""
    pod = containerd.run_pod(name, **options)
    containerd.run_container(pod, "main", "sh", "-c", f"HOSTNAME={name}; {SERVE}")
    fetch(containerd.host, containerd.addresses(pod)[4])
    return pod


@pytest.mark.parametrize("version", VERSIONS)
def test_pods_talk(world: World, containerd: Containerd, version: str) -> None:
    """Start, TCP between two of them by both families, stop, remove: with each spec version."""
    containerd.network("net", [OURS, PORTMAP], version)
    server, client = served(containerd, "server"), served(containerd, "client")
    for address in containerd.addresses(server).values():
        assert containerd.exec(client, "main", "wget", "-q", "-O", "-", url(address)) == "from server\n"
    assert {row["pod"] for row in world.status()["attachments"]} == {"default/server", "default/client"}
    containerd.stop_pod(server.id)
    assert [row["pod"] for row in world.status()["attachments"]] == ["default/client"]
    containerd.stop_pod(server.id)  # as kubelet may: DEL once more, without CNI_NETNS
    containerd.remove_pod(server.id)
    containerd.remove_pod(client.id)


def test_port_mappings(world: World, containerd: Containerd) -> None:
    """From outside, the host and another pod."""
    served(containerd, "server", ports={8080: 80})
    client = served(containerd, "client")
    assert world.host.outside is not None
    for address in NODE.values():
        for place in (world.host.outside.container, world.host):
            assert fetch(place, address, 8080).stdout == "from server\n"
        assert containerd.exec(client, "main", "wget", "-q", "-O", "-", url(address, 8080)) == "from server\n"


def test_bandwidth_by_annotations(world: World, containerd: Containerd) -> None:
    """As Kubernetes has them; containerd says that the burst is 2^32-1 bits, and means that it has none in mind."""
    containerd.network("net", [{"type": "rdmanet", "capabilities": {"bandwidth": True}}, PORTMAP])
    wanted = {"kubernetes.io/ingress-bandwidth": "1G", "kubernetes.io/egress-bandwidth": "8M"}
    served(containerd, "limited", annotations=wanted)
    containerd.run_pod("free")
    found = {row["pod"]: row["bandwidth"] for row in world.status()["attachments"]}
    assert found == {
        "default/limited": {
            "ingress": {"bits_per_s": 10**9, "burst_bytes": 31_250_000},
            "egress": {"bits_per_s": 8_000_000, "burst_bytes": 262_144},
        },
        "default/free": {"ingress": None, "egress": None},
    }


def test_many_pods_at_once(world: World, containerd: Containerd) -> None:
    with concurrent.futures.ThreadPoolExecutor(PODS_AT_ONCE) as pool:
        pods = list(pool.map(containerd.run_pod, [f"pod-{n}" for n in range(PODS_AT_ONCE)]))
        found = list(pool.map(containerd.addresses, pods))
    for version in (4, 6):
        assert len({addresses[version] for addresses in found}) == PODS_AT_ONCE
    assert len(world.status()["attachments"]) == PODS_AT_ONCE
    with concurrent.futures.ThreadPoolExecutor(PODS_AT_ONCE) as pool:
        list(pool.map(containerd.remove_pod, [pod.id for pod in pods]))


def test_a_refusal_is_containerds_error(containerd: Containerd) -> None:
    """With our sentence, and nothing left of it."""
    containerd.network("wrong", [{"type": "rdmanet", "mtu": 100}])
    with pytest.raises(CriError, match="write a whole number from 1280"):
        containerd.run_pod("refused")


def test_a_container_that_runc_lost_is_made_anew(containerd: Containerd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the testbed: as kubelet does. Any other refusal is nobody's to hide."""
    pod = containerd.run_pod("again")
    call, lost = containerd.cri.call, ["runc create failed: read init-p: connection reset by peer: unknown"]

    def start(method: str, *values: float, **fields: Any) -> dict[str, Any]:
        if method == "StartContainer" and lost:
            raise CriError(lost.pop(), operation=method)
        return call(method, *values, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(type(containerd.cri), "call", lambda self, *values, **fields: start(*values, **fields))
        containerd.run_container(pod, "main", "sleep", "1000")
        assert containerd.exec(pod, "main", "echo", "here") == "here\n"
        lost.append("another reason")
        with pytest.raises(CriError, match="another reason"):
            containerd.run_container(pod, "second", "sleep", "1000")


@pytest.mark.parametrize("order", ["before", "behind"])
def test_containerd_is_killed_while_plugins_work(world: World, containerd: Containerd, hold: Hold, order: str) -> None:
    """Before our ADD and after it. When it runs again, what it began is taken back, and the pod can be run."""
    containerd.network("held", [{"type": "hold"}, OURS] if order == "before" else [OURS, {"type": "hold"}])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(containerd.run_pod, "killed")
        hold.wait()
        containerd.kill()
        hold.go()
        assert isinstance(asked.exception(), CriError)
    containerd.run()
    for id in containerd.pods():
        containerd.remove_pod(id)
    containerd.network("held", [OURS])
    pod = served(containerd, "killed")
    assert fetch(world.host, containerd.addresses(pod)[6]).stdout == "from killed\n"
    collect(world, containerd)
    assert fetch(world.host, containerd.addresses(pod)[4]).stdout == "from killed\n"


def collect(world: World, containerd: Containerd) -> None:
    """GC with the pods that containerd knows, as its later versions do by themselves."""
    valid = [{"containerID": id, "ifname": "eth0"} for id in containerd.pods()]
    for name in ("net", "held"):
        conf = {"cniVersion": "1.1.0", "name": name, "type": "rdmanet", "cni.dev/valid-attachments": valid}
        outcome = world.host.cni("GC", None, conf)
        assert outcome.returncode == 0, outcome.sentence


def test_containerd_is_killed_at_any_moment(world: World, containerd: Containerd) -> None:
    """Whatever it was at: it runs again, its pods are removed, and another one of that name is there."""
    moments = random.Random(SEED)
    for _ in range(KILLS):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(containerd.run_pod, "killed")
            concurrent.futures.wait([asked], moments.uniform(0.01, 0.3))
            containerd.kill()
            asked.exception()
        containerd.run()
        containerd.remove_all()
    pod = served(containerd, "killed")
    collect(world, containerd)
    (row,) = world.status()["attachments"]
    assert row["container_id"] == pod.id
    assert fetch(world.host, containerd.addresses(pod)[4]).stdout == "from killed\n"


def test_pods_go_on_without_containerd(world: World, containerd: Containerd) -> None:
    """And are its own again when it is back."""
    pod = served(containerd, "alone")
    addresses = containerd.addresses(pod)
    containerd.kill()
    for address in addresses.values():
        assert fetch(world.host, address).stdout == "from alone\n"
    containerd.run()
    assert containerd.addresses(pod) == addresses
    containerd.remove_pod(pod.id)


def test_the_agent_is_away(world: World, containerd: Containerd) -> None:
    """A pod can be removed while no agent runs; one can be started when there is one again."""
    pod = served(containerd, "server")
    world.host.kill_agent()
    with pytest.raises(CriError, match="Start the agent"):
        containerd.run_pod("refused")
    containerd.remove_pod(pod.id)
    world.start_agent()
    again = served(containerd, "server")
    assert fetch(world.host, containerd.addresses(again)[6]).stdout == "from server\n"
