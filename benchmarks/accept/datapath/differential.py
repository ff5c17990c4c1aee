"""Row `differential`: random policies and services, and the plain model of Kubernetes' semantics beside everything that
answers: programs (a flow's first packet, its answer, a question back), leases, packets, maps and sockets of ours, and
iptables for a sample (testbed/bpf/differential.py, testbed/bpf/service_differential.py)."""

from __future__ import annotations

from random import Random

from testbed.bpf import lab as labs
from testbed.bpf.differential import PolicyLab, Tally
from testbed.bpf.service_differential import ServiceLab
from testbed.progress import say
from testbed.rows import Figure, need
from testbed.semantics.network_policy import Judgement

POLICY_WORLDS, FLOWS, LIVE = 400, 120, 60
SERVICE_WORLDS, SOCKETS, TRANSLATED = 80, 100, 40
FIXED_SEED = 5
EVERY = 40  # worlds, between two lines of progress


def measure() -> Figure:
    """Half of it from a fixed seed, half from one that is new each time."""
    policies, services = Tally(), Tally()
    seeds = (FIXED_SEED, Random().randrange(1 << 32))
    say(f"differential: seeds {seeds[0]} and {seeds[1]}")
    artifact = labs.artifact()
    with PolicyLab.build(artifact) as policy_lab:
        for seed in seeds:
            random = Random(seed)
            for number in range(1, POLICY_WORLDS // len(seeds) + 1):
                policy_lab.compare(policies, random, flows=FLOWS, live=LIVE)
                _progress("policy", seed, number, policies)
    with ServiceLab.build(artifact) as service_lab:
        for seed in seeds:
            random = Random(seed)
            for number in range(1, SERVICE_WORLDS // len(seeds) + 1):
                service_lab.compare(services, random, live=SOCKETS, beside=TRANSLATED)
                _progress("services", seed, number, services)
    judged = ", ".join(f"{policies.judgements[judgement]} {judgement}" for judgement in Judgement)
    wrong = [*policies.disagreements, *services.disagreements]
    need(not wrong, f"seeds {seeds}: {len(wrong)} disagreements, the first: {'; '.join(wrong[:3])}")
    need(min(policies.judgements.values()) > 1000, f"too few of a kind: {judged}")
    detail = (
        f"{policies.cases} of policy ({judged}) and {services.cases} of services: {policies.text()}, {services.text()};"
        f" 0 disagreements, seeds {seeds[0]} and {seeds[1]}"
    )
    more = {
        "disagreements": 0,
        "seeds": list(seeds),
        "policy": dict(policies.kinds),
        "services": dict(services.kinds),
    }
    return Figure(policies.cases + services.cases, "cases", detail, more)


def _progress(what: str, seed: int, number: int, tally: Tally) -> None:
    if number % EVERY == 0:
        wrong = len(tally.disagreements)
        say(f"differential: {number} worlds of {what}, seed {seed}: {tally.cases} cases, {wrong} wrong")
