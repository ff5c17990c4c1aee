"""Row `redirect-policy`: what redirect_peer brings into a pod was let in by the pod's ingress policy before, on every
path, and nothing gets around it (testbed/bpf/redirects.py)."""

from __future__ import annotations

import os

from testbed.bpf import lab as labs
from testbed.bpf.redirects import Redirects, carry_out
from testbed.rows import Figure, need

ROUNDS = 10
#: An emulated machine is some twenty times slower.
ROUNDS_IN_VM = 1


def measure() -> Figure:
    """Everything again and again: flows of the rounds before are known to the tables."""
    attempts = stopped = 0
    with Redirects.build(labs.artifact()) as lab:
        for _ in range(ROUNDS_IN_VM if os.environ.get("RDMANET_IN_VM") else ROUNDS):
            proof = carry_out(lab)
            need(not proof.wrong, f"{len(proof.wrong)} of {proof.attempts}: {'; '.join(proof.wrong[:5])}")
            attempts += proof.attempts
            stopped += proof.stopped
    need(stopped > attempts / 2, f"only {stopped} frames came where everything was allowed")
    detail = (
        f"{attempts} attempts from pods, from the host and from outside, by known flows, masqueraded ones and services,"
        f" as fragments, ICMP errors, spoofed, out of state and malformed, IPv4 and IPv6: {stopped} frames came in"
        " where policy allows everything, none of these where it allows nothing; replies and the node's own always did"
    )
    return Figure(attempts, "attempts", detail, {"stopped": stopped, "came_around": 0})
