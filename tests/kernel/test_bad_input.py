"""Bad input: the specification's code, a sentence that a person can act on, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from testbed.host import CNI_EXECUTABLE, CniOutcome, Dump, diff, kubernetes_args
from testbed.pod import Pod
from testbed.world import World, config, refused, succeeded

#: A /29 has room for five pods.
SMALL: dict[str, dict[str, Any]] = {
    "network": {"ipv4_range": "10.99.0.0/29", "ipv6_range": "fd99::/64"},
    "rdma": {"enabled": False},
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("bad", SMALL) as world:
        yield world


@pytest.fixture(scope="module")
def pristine(world: World) -> Dump:
    """The host before any call."""
    return world.snapshot()


@pytest.fixture(autouse=True)
def nothing_left(world: World, pristine: Dump) -> Iterator[None]:
    """After every test the host, the maps and the database are what they were at first."""
    yield
    assert diff(pristine, world.snapshot()) == []


def call(world: World, pod: Pod, text: str, **environment: str) -> CniOutcome:
    """ADD with any standard input and any variables."""
    variables = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": pod.container_id,
        "CNI_NETNS": pod.netns,
        "CNI_IFNAME": pod.ifname,
        "CNI_ARGS": kubernetes_args(pod),
        "CNI_PATH": str(CNI_EXECUTABLE.parent),
    }
    done = world.host.exec([str(CNI_EXECUTABLE)], input=text, environment={**variables, **environment}, check=False)
    output = json.loads(done.stdout) if done.stdout else None
    return CniOutcome("ADD", done.returncode or 0, output, done.stderr, done.elapsed_s)


@pytest.mark.parametrize(
    ("text", "code", "words", "version"),
    [
        ("", 6, "", None),
        ("{", 6, "", None),
        ("[]", 6, "not a JSON object", None),
        ('{"cniVersion":"1.0.0"', 6, "", None),
        ('{"cniVersion":"1.1.0","name":"net"} trailing', 6, "", None),
        ('{"name":"net","type":"rdmanet"}', 1, "version", None),
        (json.dumps(config({"cniVersion": "0.2.0"})), 1, "version", "0.2.0"),
        (json.dumps(config({"cniVersion": "2.0.0"})), 1, "version", "2.0.0"),
        (json.dumps(config({"rmda": True})), 2, '"rmda": true; did you mean "rdma"?', "1.1.0"),
        (json.dumps(config({"ipam": {"type": "host-local"}})), 2, "leave ipam away", "1.1.0"),
        (json.dumps(config({"mtu": 100})), 7, '"mtu" is 100; write a whole number from 1280 to 65535', "1.1.0"),
        (json.dumps(config({"mtu": "9000"})), 7, '"mtu" is "9000"', "1.1.0"),
        (json.dumps(config({"rdma": "yes"})), 7, '"rdma" is "yes"; write true or false', "1.1.0"),
        (json.dumps(config({"guard": "deny"})), 7, 'write "observe" or "enforce"', "1.1.0"),
        (json.dumps(config({"name": ""})), 7, '"name" is ""', "1.1.0"),
        (json.dumps(config({"cniVersion": "1.0.0", "prevResult": 5})), 7, "", "1.0.0"),
    ],
)
def test_network_configuration(world: World, text: str, code: int, words: str, version: str | None) -> None:
    refused(call(world, world.pod(), text), code, words, version)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CNI_IFNAME", "sixteencharacters"),
        ("CNI_IFNAME", "eth/0"),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", ""),
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "../../etc"),
        ("CNI_CONTAINERID", "-leading"),
        ("CNI_CONTAINERID", "x" * 201),
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "relative/path"),
        ("CNI_NETNS", "/proc/self/ns/net"),
        ("CNI_ARGS", "no equals sign"),
        ("CNI_ARGS", "UNKNOWN=1"),
        ("CNI_ARGS", "IP=not-an-address"),
        ("CNI_ARGS", "MAC=01:00:5e:00:00:01"),
        ("CNI_COMMAND", "UPDATE"),
    ],
)
def test_variables(world: World, variable: str, value: str) -> None:
    refused(call(world, world.pod(), json.dumps(config({})), **{variable: value}), 4, variable, None)


def test_a_namespace_that_is_gone(world: World) -> None:
    pod = world.pod()
    pod.destroy()
    refused(world.host.cni("ADD", pod, config({})), 3, f"There is no network namespace at {pod.netns}")


@pytest.mark.parametrize("path", ["/etc/hostname", "/run", "/dev/null"])
def test_a_path_that_is_no_namespace(world: World, path: str) -> None:
    refused(world.host.cni("ADD", world.pod(), config({}), netns=path), 7, f"{path} is not a network namespace.")


def test_a_namespace_of_another_kind(world: World) -> None:
    path = f"/proc/{world.host.container.pid}/ns/uts"
    refused(world.host.cni("ADD", world.pod(), config({}), netns=path), 7, "is not a network namespace.")


@pytest.mark.parametrize("way", ["its own path", "a bind mount"])
def test_the_hosts_own_namespace(world: World, way: str) -> None:
    own = f"/proc/{world.host.container.pid}/ns/net"
    if way == "a bind mount":
        world.host.exec(["sh", "-c", f"touch /run/own && mount --bind {own} /run/own"])
        own = "/run/own"
    refused(world.host.cni("ADD", world.pod(), config({}), netns=own), 7, "is the host's own network namespace")
    if way == "a bind mount":
        world.host.exec(["sh", "-c", "umount /run/own && rm /run/own"])


def test_an_interface_that_exists(world: World) -> None:
    pod = world.pod()
    enter = ["nsenter", f"--net={pod.netns}", "ip", "link"]
    world.host.exec([*enter, "add", "eth0", "type", "veth", "peer", "name", "other"])
    refused(world.host.cni("ADD", pod, config({})), 100, f"The interface eth0 exists already in {pod.netns}.")
    assert world.host.exec([*enter, "show", "dev", "eth0"]).returncode == 0, "somebody else's interface is gone"
    # The runtime may call DEL after a failed ADD, and the pod's own interface is still nobody's business.
    succeeded(world.host.cni("DEL", pod, config({})))
    assert world.host.exec([*enter, "show", "dev", "eth0"]).returncode == 0


def test_an_attachment_that_exists(world: World) -> None:
    attached = world.add()
    outcome = world.host.cni("ADD", attached.pod, config({}))
    refused(outcome, 100, f"Container {attached.pod.container_id} has an interface eth0 from rdmanet already (ready)")
    succeeded(world.check(attached))
    world.delete(attached)


def test_adds_of_one_id_at_once(world: World) -> None:
    pod = world.pod()
    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(lambda _: world.host.cni("ADD", pod, config({})), range(4)))
    (winner,) = [outcome for outcome in outcomes if outcome.returncode == 0]
    for loser in outcomes:
        if loser is not winner:
            refused(loser, 100, "DEL it first.")
    assert winner.output is not None
    succeeded(world.host.cni("CHECK", pod, config({"prevResult": winner.output})))
    succeeded(world.host.cni("DEL", pod, config({})))


@pytest.mark.parametrize("way", ["conf", "args"])
def test_rdma_on_a_host_without(world: World, way: str) -> None:
    conf = config({"rdma": True}) if way == "conf" else config({})
    args = None if way == "conf" else "IgnoreUnknown=1;RDMA=true"
    outcome = world.host.cni("ADD", world.pod(), conf, args=args)
    refused(outcome, 102, "This host has no RDMA to give to pods, and the pod asks for it; `rdmanet doctor` says what")


def test_rdma_is_asked_for_by_the_network_and_not_wanted_by_the_pod(world: World) -> None:
    world.delete(world.add(rdma=True, args="RDMA=false"))


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ("10.99.0.1", 7, "The address 10.99.0.1 cannot be given to a pod"),
        ("10.99.0.7", 7, "or is its gateway or broadcast address."),
        ("192.0.2.5", 7, "it is not in 10.99.0.0/29"),
        ("fd99::1", 7, "The address fd99::1 cannot be given to a pod"),
        ("10.99.0.2,10.99.0.3", 7, "One address of each family per interface, not 2."),
    ],
)
def test_addresses_asked_for(world: World, asked: str, code: int, words: str) -> None:
    refused(world.host.cni("ADD", world.pod(), config({}), args=f"IP={asked}"), code, words)


def test_a_full_range(world: World) -> None:
    """The next ADD says so and takes nothing, no IPv6 address either; after one DEL it works."""
    added = [world.add() for _ in range(5)]
    full = world.snapshot()
    waiting = world.pod()
    for _ in range(2):
        outcome = world.host.cni("ADD", waiting, config({}))
        refused(outcome, 101, "No address is free in 10.99.0.0/29 (5 pods): delete pods, let the runtime call GC")
    assert diff(full, world.snapshot()) == []
    for attached in added:
        succeeded(world.check(attached))
    world.delete(added[2])
    late = world.add(waiting)
    assert late.address(4) == added[2].address(4)
    for attached in (*added[:2], *added[3:], late):
        world.delete(attached)


def test_more_adds_at_once_than_there_is_room_for(world: World) -> None:
    pods = [world.pod() for _ in range(8)]

    def add(pod: Pod) -> CniOutcome:
        return world.host.cni("ADD", pod, config({}))

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(add, pods))
    added = [outcome for outcome in outcomes if outcome.returncode == 0]
    assert len(added) == 5
    for outcome in outcomes:
        if outcome not in added:
            refused(outcome, 101, "No address is free")
    assert len({ip["address"] for outcome in added for ip in results(outcome)["ips"]}) == 10
    succeeded(world.host.cni("GC", None, config({"cni.dev/valid-attachments": []})))


def results(outcome: CniOutcome) -> dict[str, Any]:
    assert outcome.output is not None
    return outcome.output
