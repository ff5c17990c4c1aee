"""Row `health`: what goes wrong with a device, a link or the agent is kubelet's news, and so is its end.

For each case the slots that kubelet believes to be healthy must be exactly the right ones, before, during and after.
Last a device of the host that all pods share: it is everybody's slot that is unhealthy then, also of nobody's.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from benchmarks.accept.ml_jobs.stage import add, delete, slot_ids, stage, told_ms
from benchmarks.peers import host_device
from testbed.kubelet import AdmissionError
from testbed.kubelet_host import KubeletHost
from testbed.rows import Figure, need

SLOTS = 4


def measure() -> Figure:
    """Milliseconds from what happens until kubelet is told, the longest but for those where time must pass."""
    told: dict[str, float] = {}
    with stage("health", SLOTS) as found:
        _pods_device(found, told)
        _agent(found, told)
    with stage("health-shared", SLOTS, within=host_device.host_device, more=host_device.CONFIG) as found:
        _hosts_device(found, told)
    quick = {name: ms for name, ms in told.items() if not name.startswith("agent")}
    worst = max(quick, key=lambda name: quick[name])
    detail = (
        f"the longest of {len(quick)} ({worst}): "
        + ", ".join(f"{name} {ms:.0f} ms" for name, ms in quick.items())
        + "; where patience is due: "
        + ", ".join(f"{name} {ms / 1000:.1f} s" for name, ms in told.items() if name not in quick)
    )
    return Figure(quick[worst], "ms", detail, told)


def _pods_device(found: KubeletHost, told: dict[str, float]) -> None:
    everything = slot_ids(SLOTS)
    one, other = found.admit("train-0"), found.admit("train-1")
    for sandbox in (one, other):
        add(found, sandbox)
    link = ["nsenter", f"--net={one.pod.netns}", "ip", "link", "set", "eth0"]
    told["link down"] = told_ms(found, _exec(found, [*link, "down"]), *everything[1:])
    told["link up"] = told_ms(found, _exec(found, [*link, "up"]), *everything)
    device = next(row["device"]["name"] for row in _attachments(found) if row["pod"] == str(one.name))
    told["device gone"] = told_ms(found, _exec(found, ["rdma", "link", "delete", device]), *everything[1:])
    reason = found.slots()["slot-0"]["problem"]
    need(f"{device} is missing" in reason, f"the reason is {reason!r}")
    delete(found, one)
    found.healthy(*everything)  # nobody's any more
    delete(found, other)


def _agent(found: KubeletHost, told: dict[str, float]) -> None:
    everything = slot_ids(SLOTS)
    one = found.admit("train-2")
    add(found, one)
    told["agent dead"] = told_ms(found, found.host.kill_agent)
    try:
        found.admit("train-3")
        need(False, "a slot was given while nobody could make its device")
    except AdmissionError:
        pass
    told["agent back"] = told_ms(found, found.start_agent, *everything)
    agent = found.host.agent
    assert agent is not None
    told["agent hangs"] = told_ms(found, lambda: agent.process.signal(signal.SIGSTOP))
    told["agent goes on"] = told_ms(found, lambda: agent.process.signal(signal.SIGCONT), *everything)
    delete(found, one)


def _hosts_device(found: KubeletHost, told: dict[str, float]) -> None:
    everything = slot_ids(SLOTS)
    one = found.admit("train-4")
    add(found, one)
    told["shared link down"] = told_ms(found, _exec(found, ["ip", "link", "set", host_device.NETDEV, "down"]))
    told["shared link up"] = told_ms(found, _exec(found, ["ip", "link", "set", host_device.NETDEV, "up"]), *everything)
    delete(found, one)
    told["shared device gone"] = told_ms(found, lambda: host_device.delete_device(found.host))
    told["shared device back"] = told_ms(found, lambda: host_device.make_device(found.host), *everything)


def _attachments(found: KubeletHost) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = found.host.api("GET", "/v1/status")["attachments"]
    return rows


def _exec(found: KubeletHost, argv: list[str]) -> Callable[[], object]:
    return lambda: found.host.exec(argv)
