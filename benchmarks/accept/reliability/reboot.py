"""Row `reboot`: state directory and runtimes' storage kept, kernel state gone: nothing is leaked or stale."""

from __future__ import annotations

import time

from benchmarks.accept.reliability.tested import passed
from testbed.host import Host
from testbed.pod import Pod
from testbed.reboot import reboot
from testbed.rows import Figure, need

CONFIGURATION = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet"}
#: Every address of the range is taken: 256 without the network's own, the gateway's and the last.
AGENT = {"network": {"ipv4_range": "10.213.0.0/24"}}
PODS = 253
TESTS = ("tests/kernel/test_reboot.py",)


def _fill(host: Host) -> list[Pod]:
    pods = [Pod.create(host, f"pod-{number}") for number in range(PODS)]
    for pod in pods:
        outcome = host.cni("ADD", pod, CONFIGURATION)
        need(outcome.returncode == 0, f"ADD of {pod.name}: {outcome.sentence}")
    return pods


def measure() -> Figure:
    """A full range before, and the whole range free and full again after it."""
    with Host.scratch("accept-reboot") as host:
        host.start_agent(AGENT)
        _fill(host)
        with reboot(host, ()) as again:
            ready_s = again.start_agent(AGENT)
            left = again.api("GET", "/v1/status")["attachments"]
            need(not left, f"{len(left)} attachments are left of before the reboot")
            begun = time.monotonic()
            _fill(again)
            filled_s = time.monotonic() - begun
    count = passed(TESTS)
    detail = (
        f"{PODS} pods before, never DELed: none left when the agent was ready ({ready_s:.1f} s), {PODS} again"
        f" with every address in {filled_s:.0f} s; podman's containers started anew, containerd's old pods removed:"
        f" {count} tests"
    )
    return Figure(ready_s, "s", detail, {"pods": PODS, "leaked": 0, "tests": count})
