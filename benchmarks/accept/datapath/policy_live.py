"""Row `policy-live`: milliseconds from a change of policy, of a pod's or a namespace's labels, until packets feel it.

A client's datagrams, over both IP families, are denied and allowed again while a friend's connections, which every
policy allows, go on. The clock starts before the agent is asked.
"""

from __future__ import annotations

from testbed.policies import CLIENT, FRIEND, SERVER, changes
from testbed.rows import Figure, need
from testbed.services import Scene

ROUNDS = 3
GOAL_MS = 1000.0
WAYS = ("policy", "pod's labels", "namespace's labels", "egress")


def measure() -> Figure:
    """The longest of all changes."""
    with Scene.start("policy-live", (SERVER, CLIENT, FRIEND)) as scene:
        felt = [one for _ in range(ROUNDS) for one in changes(scene, WAYS)]
    by_name: dict[str, float] = {}
    for one in felt:
        by_name[one.name] = max(by_name.get(one.name, 0.0), one.ms)
    worst = max(by_name.values())
    detail = (
        f"the longest of {ROUNDS} rounds, IPv4 and IPv6 together: "
        + ", ".join(f"{name} {ms:.0f} ms" for name, ms in by_name.items())
        + "; a friend's connections, allowed all the time, answered after each"
    )
    need(worst <= GOAL_MS, detail)
    return Figure(worst, "ms", detail, by_name)
