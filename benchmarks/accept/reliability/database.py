"""Row `database`: the database damaged and lost in every way of testbed/damage.py under live pods, and written anew.

Each time a start refuses with the sentence that names the command, the command writes the rows from the kernel's
state, and the next agent adopts every pod, while TCP goes on in both families between pods and to the outside. CHECK
succeeds, policy holds, DEL works for each, every address is free and nothing is left.
"""

from __future__ import annotations

from testbed.container import CommandError
from testbed.damage import DAMAGES, damage
from testbed.host import diff
from testbed.policies import labelled, policy
from testbed.rebuilding import known, repair, sinks
from testbed.rows import Figure, need
from testbed.streams import streams
from testbed.world import DATABASE, World, succeeded

PODS = 20
COMMAND = "`rdmanet repair --database`"


def measure() -> Figure:
    """How many ways, and how many pods were adopted."""
    rounds, adopted = 0, 0
    for how in DAMAGES:
        with World.start("database") as world:
            done, found = _damaged(world, how)
            rounds += done
            adopted += found
    detail = (
        f"{len(DAMAGES)} ways to damage or lose the database ({', '.join(DAMAGES)}): each start was refused with the"
        f" command that repairs it, {adopted} of {adopted} pods were adopted again with rows as before, {rounds} rounds"
        " of TCP lost no byte meanwhile, and after the DELs nothing was left"
    )
    return Figure(0, "bytes", detail, {"ways": len(DAMAGES), "adopted": adopted, "rounds": rounds})


def _damaged(world: World, how: str) -> tuple[int, int]:
    pristine = world.snapshot()
    attached = [world.add(world.pod(f"pod{number}")) for number in range(PODS)]
    one, two = attached[:2]
    for pod in (one, two):
        pod.pod.start()
    documents = [labelled("pod2", app="server"), policy("nobody")]
    world.host.api("PUT", "/v1/objects", {"documents": documents})
    before = known(world)
    with streams(world.host, one.pod.running, sinks(world, two)) as running:
        world.host.kill_agent()
        damage(world.host, DATABASE, how)
        need(COMMAND in _refusal(world), f"{how}: the start was refused without the command")
        said = repair(world)
        world.start_agent()
        running.go_on()
    changed = diff(before, known(world))
    need(not changed, f"{how}: not as before: {changed[:3]}; {said}")
    for pod in attached:
        succeeded(world.check(pod))
        world.delete(pod)
    world.host.api("DELETE", "/v1/objects", {"documents": documents})
    left = diff(pristine, world.snapshot())
    need(not left, f"{how}: left behind: {left[:3]}")
    return running.rounds, len(attached)


def _refusal(world: World) -> str:
    try:
        world.start_agent()
    except CommandError as error:
        return str(error)
    return ""
