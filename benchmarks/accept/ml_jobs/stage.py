"""What the rows about slots have in common: a host with kubelet, agent and plugin, and how long it took to be told."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from testbed.host import Host
from testbed.kubelet_host import KubeletHost, Sandbox
from testbed.rows import need


def slot_ids(count: int) -> tuple[str, ...]:
    """All of a host's."""
    return tuple(f"slot-{number}" for number in range(count))


@contextlib.contextmanager
def stage(
    name: str,
    slots: int,
    within: Callable[[Host], contextlib.AbstractContextManager[None]] = lambda host: contextlib.nullcontext(),
    **options: Any,
) -> Iterator[KubeletHost]:
    """A scratch host of that name; kubelet believes all its slots to be healthy. What was made is taken back, and that
    is looked at. ``within`` makes what must be there before the agent; ``options`` as in ``KubeletHost.begin``."""
    with Host.scratch(name) as host, within(host):
        with KubeletHost.begin(host, slots=slots, **options) as found:
            found.healthy(*slot_ids(slots))
            yield found
        need(host.stop_agent() == 0, "the agent did not end as it should")
        need(found.files() == [], f"CDI files are left: {found.files()}")


def told_ms(stage: KubeletHost, change: Callable[[], object], *healthy: str) -> float:
    """Milliseconds from before a change until kubelet believes exactly these slots to be healthy."""
    started = time.monotonic()
    change()
    stage.healthy(*healthy)
    return (time.monotonic() - started) * 1000


def add(stage: KubeletHost, sandbox: Sandbox, **changes: Any) -> None:
    """ADD, which must succeed."""
    outcome = stage.add(sandbox, **changes)
    need(outcome.returncode == 0, f"ADD of {sandbox.name}: {outcome.sentence}")


def delete(stage: KubeletHost, sandbox: Sandbox) -> None:
    """The pod ends, and its namespace goes."""
    outcome = stage.delete(sandbox)
    need(outcome.returncode == 0, f"DEL of {sandbox.name}: {outcome.sentence}")
    sandbox.pod.destroy()
    stage.sandboxes.remove(sandbox)
