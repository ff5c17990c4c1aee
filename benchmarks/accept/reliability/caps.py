"""Row `caps`: the agent with the capabilities of deploy/rdmanet.service and no others, and with one of them less.

With all of them: ADD, CHECK, traffic in both families, a swap, a namespace of another user's process, and where the
kernel has Soft-RoCE devices and leased transfers; DEL, GC, uninstall, and the host is as before. Without any one of
them something of that fails with a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.accept.rdma import faults
from testbed import kernel
from testbed.container import CommandError
from testbed.host import SOCKET, Host, diff
from testbed.limited import NAMES, granted, program
from testbed.rows import Figure, need
from testbed.world import World, config, succeeded


def measure() -> Figure:
    """How many there are, each of them needed."""
    rdma = not kernel.capable()
    with World.start("caps", agent=False) as world:
        before = world.host.dump()
        world.start_agent(*program(*granted()))
        held = _held(world.host)
        need(held == set(granted()), f"the agent holds {held}")
        _work(world)
        leases = _leases(world.host) if rdma else 0
        _is_roots(world)
        world.host.stop_agent()
        world.command("uninstall")
        for pod in world.pods:
            pod.destroy()
        left = diff(before, world.host.dump())
        need(not left, f"left behind: {left[:3]}")
    needed = {name: _without(name) for name in granted()}
    detail = (
        f"{', '.join(granted())}: with these ADD, CHECK, traffic, swap"
        + (f", transfers over {leases} leases on Soft-RoCE" if leases else "")
        + ", DEL, GC and uninstall; without "
        + "; without ".join(f"{name}: {sentence}" for name, sentence in needed.items())
    )
    return Figure(len(granted()), "capabilities", detail, {"without": needed, "leases": leases})


def _held(host: Host) -> set[str]:
    assert host.agent is not None
    status = Path(f"/proc/{host.agent.process.pid}/status").read_text(encoding="ascii")
    fields = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Cap"))
    need(fields["CapEff"] == fields["CapBnd"], f"effective and bounding set differ: {fields}")
    return set(_names(int(fields["CapBnd"], 16)))


def _names(mask: int) -> Sequence[str]:
    return [name for number, name in enumerate(NAMES) if mask >> number & 1]


def _work(world: World) -> None:
    one, two = world.add(), world.add()
    for attached in (one, two):
        attached.pod.start()
        succeeded(world.check(attached))
    for version in (4, 6):
        one.pod.exec(["ping", "-c", "1", "-W", "5", two.address(version)])
    world.command("datapath", "swap")
    need(_of_another_user(world) == "", "a namespace of another user's process is refused")
    world.delete(one)
    succeeded(world.host.cni("GC", None, config({"cni.dev/valid-attachments": []})))
    world.host.settle()
    two.pod.stop()
    one.pod.stop()


def _of_another_user(world: World) -> str:
    """ADD and DEL by such a path; what ADD says."""
    pod = world.pod()
    with world.other_users_namespace(pod.netns) as path:
        outcome = world.host.cni("ADD", pod, config({}), netns=path)
        succeeded(world.host.cni("DEL", pod, config({}), netns=path))
    return outcome.sentence


def _leases(host: Host) -> int:
    with faults.scene(host, "caps") as at:
        faults.begin(at)
        outcomes = at.client.ask("end", within_s=faults.WITHIN_S, timeout_s=faults.WITHIN_S + 30)
        received = at.server.ask("received", within_s=faults.WITHIN_S, timeout_s=faults.WITHIN_S + 30)
    result = faults.verdict("caps", True, outcomes, received)
    need(not any(result["told"].values()), f"somebody was told of an error: {result['told']}")
    return faults.LEASES


def _is_roots(world: World) -> None:
    mode = world.host.path(SOCKET).stat().st_mode & 0o777
    need(mode == 0o600, f"the socket's mode is {mode:o}")
    listening = "cat /proc/net/tcp /proc/net/tcp6 | grep ' 0A '; cat /proc/net/udp /proc/net/udp6 | grep -v local"
    found = world.host.exec(["sh", "-c", listening], check=False).stdout
    need(not found, f"something listens on the host's network: {found}")


def _without(missing: str) -> str:
    """What fails, in its own words."""
    with World.start("caps", agent=False) as world:
        try:
            world.start_agent(*program(*(name for name in granted() if name != missing)))
        except CommandError as error:
            return str(error).partition("rdmanet: ")[2].partition(" (")[0]
        sentence = _of_another_user(world)
        need(sentence != "", f"nothing fails without {missing}")
        return sentence.partition(" (")[0]
