"""The specification's rules (cni_rules.py): each has tests, and here are those that no other file has."""

from __future__ import annotations

import ast
import functools
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from testbed.chain import Chain
from testbed.cni_rule import Rule, Whom
from testbed.cni_rules import RULES
from testbed.cni_spec import VERSIONS, validate_error, validate_result
from testbed.host import diff
from testbed.paths import REPOSITORY
from testbed.world import World, config, refused, succeeded

OURS: dict[str, Any] = {"type": "rdmanet"}
#: Of the networks' names: the first for each character that is allowed, then what is not.
NAMES = ("a", "0net", "a.b-c_d", "n" * 255)
GOOD_INTERFACES = ("e", "eth0", "a.b", "-x", "123456789012345")
WRONG_INTERFACES = ("é", "1234567890123456", "a b", "..", "e%d", "e%", "a/b", "a:b")
WRONG_NAMES = ("", ".a", "-a", "_a", "a/b", "a b", "ä", "a\n", "n" * 256)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("spec") as world:
        yield world


# The table


@functools.cache
def functions(file: str) -> frozenset[str]:
    """The tests of a file."""
    tree = ast.parse((REPOSITORY / file).read_text())
    found = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(name for name in found if name.startswith("test_"))


@pytest.mark.parametrize("rule", RULES, ids=[f"{rule.section}: {rule.text}"[:100] for rule in RULES])
def test_every_rule_has_tests_that_exist(rule: Rule) -> None:
    assert rule.tests, f"nothing holds us to {rule.text!r}"
    for test in rule.tests:
        file, _, name = test.partition("::")
        assert name in functions(file), f"{test} does not exist"


def test_no_rule_is_there_twice() -> None:
    keys = [(rule.section, rule.text) for rule in RULES]
    assert len(set(keys)) == len(keys)
    assert {rule.whom for rule in RULES} == set(Whom)


def test_every_test_here_is_a_rules() -> None:
    """Or one of the table's own."""
    here = "tests/kernel/test_cni_spec.py"
    named = {test.partition("::")[2] for rule in RULES for test in rule.tests if test.startswith(here)}
    own = {"test_every_rule_has_tests_that_exist", "test_no_rule_is_there_twice", "test_every_test_here_is_a_rules"}
    assert functions(here) == named | own


# 1 Network configuration format


@pytest.mark.parametrize("name", [*NAMES, *WRONG_NAMES], ids=lambda name: repr(name[:8]))
def test_network_names(world: World, name: str) -> None:
    pod = world.pod()
    outcome = world.host.cni("ADD", pod, config({"name": name}))
    if name in NAMES:
        assert outcome.returncode == 0, outcome.sentence
        succeeded(world.host.cni("DEL", pod, config({"name": name})))
    else:
        refused(outcome, 7, '"name" is')
    pod.destroy()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_least_configuration_is_enough(world: World, version: str) -> None:
    """Keys that only the runtime's own list has (disableCheck, disableGC, capabilities) need not come."""
    attached = world.add(conf={"cniVersion": version, "name": "least", "type": "rdmanet"})
    if version != "0.3.1":
        succeeded(world.check(attached))
    world.delete(attached)


def test_type_is_no_path_to_us(world: World) -> None:
    """Runtimes look for an executable of that name; we execute nothing and look for nothing by it."""
    attached = world.add(type="../../bin/sh")
    world.delete(attached)


@pytest.mark.parametrize(("first", "then"), list(itertools.permutations(VERSIONS, 2)))
def test_an_attachment_outlives_a_change_of_version(world: World, first: str, then: str) -> None:
    """The administrator wrote another cniVersion between ADD and DEL; the result is still of the first."""
    attached = world.add(cniVersion=first)
    attached.conf["cniVersion"] = then
    if then != "0.3.1":
        succeeded(world.check(attached))
    world.delete(attached)


# 2 Execution protocol


def test_the_agents_answer_does_not_depend_on_the_callers_namespace(world: World) -> None:
    """The executable only speaks to the agent: what is done is done in the host's namespace."""
    inside, pod = world.pod(), world.pod()
    argv = ["nsenter", f"--net={inside.netns}", str(REPOSITORY / "build/cni/rdmanet")]
    environment = {"CNI_CONTAINERID": pod.container_id, "CNI_NETNS": pod.netns, "CNI_IFNAME": "eth0"}
    for command in ("ADD", "DEL"):
        done = world.host.exec(
            argv, input=json.dumps(config({})), environment={**environment, "CNI_COMMAND": command}, check=False
        )
        assert done.returncode == 0, done.stdout
        world.host.settle()
        links = {row["ifname"] for row in world.host.exec(["ip", "-j", "link"]).json()}
        assert any(name.startswith("rn-") for name in links) is (command == "ADD")
    for one in (inside, pod):
        one.destroy()


@pytest.mark.parametrize("name", [*GOOD_INTERFACES, *WRONG_INTERFACES])
def test_interface_names(world: World, name: str) -> None:
    """Used as they are, or refused: the kernel would make another name of one with %d."""
    pod = world.pod()
    outcome = world.host.cni("ADD", pod, config({}), ifname=name)
    if name in GOOD_INTERFACES:
        assert outcome.returncode == 0, outcome.sentence
        validate_result(outcome.output, "1.1.0", ifname=name, netns=pod.netns)
        links = world.host.exec(["nsenter", f"--net={pod.netns}", "ip", "-j", "link"]).json()
        assert [row["ifname"] for row in links] == ["lo", name]
        succeeded(world.host.cni("DEL", pod, config({}), ifname=name))
    else:
        refused(outcome, 4, "CNI_IFNAME")
    pod.destroy()


def test_the_exit_status_says_how_it_went(world: World) -> None:
    attached = world.add()
    calls = {
        "ADD": config({}),  # it exists
        "CHECK": {**attached.conf, "prevResult": {"interfaces": [], "ips": []}},
        "DEL": {**attached.conf, "cniVersion": "9.0.0"},
        "GC": config({}),  # without the list of what to keep
        "STATUS": config({"cniVersion": "0.4.0"}),
        "VERSION": {"cniVersion": 1},
    }
    for command, conf in calls.items():
        outcome = world.host.cni(command, attached.pod, conf)
        assert outcome.returncode != 0, command
        validate_error(outcome.output, command=command)
    world.delete(attached)


def test_another_plugin_in_front_of_ours(world: World) -> None:
    """loopback, from Debian: its interface stays in the result, in front of ours."""
    chain = Chain(world.host, [{"type": "loopback"}, OURS])
    with world.unchanged():
        pod = world.pod()
        result = chain.add(pod)
        validate_result(result, "1.0.0", ifname="eth0", netns=pod.netns)
        assert result["interfaces"][0]["name"] == "lo"
        addresses = [row["address"] for row in result["ips"]]
        assert "127.0.0.1/8" in addresses
        chain.check(pod)
        chain.delete(pod)
        pod.destroy()


@pytest.fixture(scope="module")
def unrepaired() -> Iterator[World]:
    """What is taken away stays away."""
    with World.start("spec-unrepaired", {"agent": {"repair": False}}) as world:
        yield world


def test_check_goes_by_the_result(unrepaired: World) -> None:
    """What prevResult lists of ours must be there; what a later plugin took out of it need not."""
    world = unrepaired
    attached = world.add()
    four = attached.address(4)
    world.host.exec(["nsenter", f"--net={attached.pod.netns}", "ip", "address", "del", f"{four}/32", "dev", "eth0"])
    world.host.exec(["nsenter", f"--net={attached.pod.netns}", "ip", "-6", "route", "del", "default"])
    refused(world.check(attached), 3, f"the address {four} is missing")
    without = dict(attached.result)
    without["ips"] = [ip for ip in without["ips"] if not ip["address"].startswith(four)]
    # IPv4's route went with its address.
    for version, destination in ((4, "0.0.0.0/0"), (6, "::/0")):
        refused(_check(world, attached, without), 3, f"the default route for IPv{version} is missing")
        without["routes"] = [route for route in without["routes"] if route["dst"] != destination]
    succeeded(_check(world, attached, without))
    strangers = {**without, "interfaces": [{"name": "eth9", "sandbox": attached.pod.netns}], "ips": []}
    refused(_check(world, attached, strangers), 7, '"prevResult" has no interface eth0')
    world.delete(attached)


def _check(world: World, attached: Any, result: Any) -> Any:
    return world.host.cni("CHECK", attached.pod, {**attached.conf, "prevResult": result})


def test_check_right_after_add(world: World) -> None:
    """Nothing converges later: no address is tentative, and each entry is there before ADD answers."""
    for _ in range(10):
        attached = world.add()
        succeeded(world.check(attached))
        world.delete(attached)


def test_status_says_whether_add_would_work(world: World) -> None:
    succeeded(world.host.cni("STATUS", None, config({})))
    world.host.kill_agent()
    refused(world.host.cni("STATUS", None, config({})), 50, "does not answer")
    assert world.host.cni("ADD", world.pod(), config({})).returncode != 0
    world.start_agent()
    succeeded(world.host.cni("STATUS", None, config({})))


def test_status_is_not_needed() -> None:
    """An agent that nobody has asked for its status yet serves everything else."""
    with World.start("fresh", outside=False) as fresh:
        attached = fresh.add()
        succeeded(fresh.check(attached))
        fresh.delete(attached)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_result_lists_is_on_the_interface(world: World, version: str) -> None:
    """0.4.0 "Routes": each entry is relevant for CNI_IFNAME; nor is there more than what is listed."""
    attached = world.add(cniVersion=version)
    inside = ["nsenter", f"--net={attached.pod.netns}", "ip", "-j"]
    addresses = {
        f"{row['local']}/{row['prefixlen']}"
        for link in world.host.exec([*inside, "address", "show", "dev", "eth0"]).json()
        for row in link["addr_info"]
        if row["scope"] == "global"
    }
    assert addresses == {row["address"] for row in attached.result["ips"]}
    for family, default in (("-4", "0.0.0.0/0"), ("-6", "::/0")):
        (route,) = [route for route in attached.result["routes"] if (":" in route["dst"]) == (family == "-6")]
        (found,) = world.host.exec([*inside, family, "route", "show", "default"]).json()
        assert (route["dst"], found["dev"]) == (default, "eth0")
        assert route["gw"] == found["gateway"]
    world.delete(attached)


# 3 Execution of network configurations


def test_a_container_comes_again_after_del(world: World) -> None:
    """And a runtime that has kept an older ADD's result still gets rid of it."""
    with world.unchanged():
        first = world.add()
        world.delete(first)
        second = world.add(first.pod)
        succeeded(world.check(second))
        second.result = first.result
        world.delete(second)


def test_gc_during_adds_and_dels(world: World) -> None:
    """A runtime must not, and if it does: what it lists is kept, what it deletes goes, each call ends as alone."""
    with world.unchanged():
        kept, going, pods = world.add(), [world.add() for _ in range(4)], [world.pod() for _ in range(4)]
        valid = [{"containerID": pod.container_id, "ifname": pod.ifname} for pod in [kept.pod, *pods]]
        valid += [{"containerID": one.pod.container_id, "ifname": one.pod.ifname} for one in going]
        listed = config({"cni.dev/valid-attachments": valid})
        with ThreadPoolExecutor(len(pods) + len(going) + 2) as threads:
            adds = [threads.submit(world.add, pod) for pod in pods]
            dels = [threads.submit(world.delete, one) for one in going]
            collected = [threads.submit(world.host.cni, "GC", None, listed) for _ in range(2)]
            added = [one.result() for one in adds]
            for one in dels:
                one.result()
            for outcome in collected:
                succeeded(outcome.result())
        assert len(world.status()["attachments"]) == 1 + len(added)
        for attached in [kept, *added]:
            succeeded(world.check(attached))
            world.delete(attached)


# 4 Plugin delegation


@pytest.mark.parametrize("command", ["ADD", "CHECK", "GC", "STATUS"])
def test_nothing_is_delegated(world: World, command: str) -> None:
    """An ipam section, which would have us execute another plugin, is refused by name; DEL needs none."""
    attached = world.add()
    before = world.snapshot()
    conf = {**attached.conf, "prevResult": attached.result, "ipam": {"type": "host-local"}}
    conf["cni.dev/valid-attachments"] = [{"containerID": attached.pod.container_id, "ifname": "eth0"}]
    refused(world.host.cni(command, attached.pod, conf), 2, '"ipam": {"type": "host-local"}')
    assert diff(before, world.snapshot()) == []
    succeeded(world.host.cni("DEL", attached.pod, conf))
