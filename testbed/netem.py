"""Packets lost, doubled, delayed or reordered on their way out of pods (tc-netem(8)).

The queueing discipline sits on the pod's own interface: what one pod sends to another on the same host never passes
that of the host's end, as the datapath redirects it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence

from testbed.pod import Pod


@contextlib.contextmanager
def netem(pods: Sequence[Pod], *what: str) -> Iterator[None]:
    """Let netem do `what` ("loss", "1%") to everything these pods send, from the host: pods may not do so."""
    with contextlib.ExitStack() as stack:
        for pod in pods:
            _tc(pod, "qdisc", "replace", "dev", pod.ifname, "root", "netem", *what)
            stack.callback(_tc, pod, "qdisc", "delete", "dev", pod.ifname, "root")
        yield


def lost(pods: Sequence[Pod]) -> int:
    """How many packets netem has dropped so far, of all these pods."""
    found = 0
    for pod in pods:
        for qdisc in json.loads(_tc(pod, "-j", "-s", "qdisc", "show", "dev", pod.ifname)):
            if qdisc["kind"] == "netem":
                found += int(qdisc["drops"])
    return found


def _tc(pod: Pod, *words: str) -> str:
    return pod.host.exec(["nsenter", f"--net={pod.netns}", "tc", *words]).stdout
