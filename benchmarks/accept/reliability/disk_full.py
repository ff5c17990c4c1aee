"""Row `disk-full`: the state directory without one free byte. ADD is refused with code 104 before anything is done,
CHECK, DEL, GC, a start, a stop and an uninstall work, and with room again everything is as if it had never been."""

from __future__ import annotations

from testbed.filling import STATE, fill, full, mount_small
from testbed.host import CniOutcome, diff
from testbed.rows import Figure, need
from testbed.world import World, config

PODS = 50
COLLECTED = 10


def measure() -> Figure:
    """How many DELs a full disk carried out."""
    with World.start("disk-full", agent=False) as world:
        mount_small(world.host)
        world.start_agent()
        pristine = world.snapshot()
        attached = [world.add() for _ in range(PODS)]
        new, before, refusals = world.pod(), world.snapshot(), 0
        with full(world.host):
            for _ in range(COLLECTED):
                _refused(world.host.cni("ADD", new, config({})), 104)
                refusals += 1
            _refused(world.host.cni("STATUS", None, config({})), 50)
            changed = diff(before, world.snapshot())
            need(not changed, f"refused ADDs have left: {changed[:3]}")
            for one in attached[COLLECTED:]:
                _done(world.check(one))
                _done(world.host.cni("DEL", one.pod, one.conf))
            world.host.stop_agent()
            fill(world.host)
            world.start_agent()
            _refused(world.host.cni("ADD", new, config({})), 104)
            _done(world.host.cni("GC", None, config({"cni.dev/valid-attachments": []})))
            left = diff(pristine, world.snapshot())
            need(not left, f"left behind: {left[:3]}")
        _done(world.host.cni("STATUS", None, config({})))
        one = world.add(new)
        world.delete(one)
        left = diff(pristine, world.snapshot())
        need(not left, f"left behind with room again: {left[:3]}")
        world.add(new)
        world.host.stop_agent()
        fill(world.host)
        world.command("uninstall")
        files = [path.name for path in world.host.path(STATE).iterdir()]
        need(files == ["filling"], f"an uninstall has left {files}")
    detail = (
        f"{refusals} ADDs refused with code 104 and nothing done; {PODS - COLLECTED} DELs, a GC of {COLLECTED}, a stop,"
        " a start and an uninstall on a disk without one free byte; nothing left, and ADD works when there is room"
    )
    return Figure(PODS, "attachments removed", detail, {"refused": refusals})


def _refused(outcome: CniOutcome, code: int) -> None:
    found = (outcome.output or {}).get("code")
    need(found == code, f"{outcome.command} answers {outcome.sentence or 'nothing'} instead of code {code}")


def _done(outcome: CniOutcome) -> None:
    need(outcome.returncode == 0, f"{outcome.command}: {outcome.sentence}")
