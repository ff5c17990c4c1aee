"""Databases that are written anew from the kernel's state: what must be as before, and who must notice nothing."""

from __future__ import annotations

from typing import Any

from testbed.host import Dump
from testbed.outside import FAR_IPV4, FAR_IPV6
from testbed.world import Attached, World

#: What is nowhere in the kernel: the answer that ADD gave, which nothing reads, and labels from CNI args.
NOT_KEPT = ("result", "labels")


def sinks(world: World, *attached: Attached) -> list[tuple[Any, list[str]]]:
    """Pods and the outside, with their addresses."""
    assert world.host.outside is not None
    return [*((one.pod.running, one.addresses) for one in attached), (world.host.outside, [FAR_IPV4, FAR_IPV6])]


def known(world: World) -> Dump:
    """The snapshot with rows by column, without what is in no kernel."""
    dump = world.snapshot()
    (columns,) = world.sql("SELECT name FROM pragma_table_info('attachments')")
    names = [name for (name,) in columns]
    rows = [dict(zip(names, row, strict=True)) for row in dump["table attachments"]]
    dump["table attachments"] = [{k: v for k, v in row.items() if k not in NOT_KEPT} for row in rows]
    return dump


def repair(world: World) -> list[str]:
    """What the command says."""
    return world.command("repair", "--database").stdout.splitlines()
