"""Row `kubelet-restart`: kubelet ends and starts anew, again and again, while pods run, come and go.

At each start kubelet removes the plugin's socket. Each time the plugin registers again, all slots are healthy again,
what pods had stays theirs, and an ADD that meets no kubelet is refused with code 11 or waits for the next one. Nothing
of earlier sockets is left. Once the plugin itself is killed and started anew.
"""

from __future__ import annotations

import signal
import statistics
import threading

from benchmarks.accept.ml_jobs.stage import add, delete, slot_ids, stage, told_ms
from rdmanet.model import PodName
from testbed.host import CniOutcome
from testbed.kubelet_host import RESOURCE, KubeletHost
from testbed.rows import Figure, need

SLOTS = 8
RESTARTS = 20


def measure() -> Figure:
    """Milliseconds from kubelet's start until it has the slots again, the longest."""
    with stage("kubelet-restart", SLOTS, kubernetes={"timeout_s": 20.0}) as found:
        kubelet, everything = found.loop.kubelet, slot_ids(SLOTS)
        running = found.admit("running")
        add(found, running)
        spent_ms = []
        for number in range(RESTARTS):
            found.loop.do(kubelet.stop())
            registered = len(kubelet.registrations)
            outcomes: list[CniOutcome] = []
            waiting = None
            if number % 5 == 0:  # an ADD that meets no kubelet
                sandbox = found.admit(f"between-{number}", count=0)
                waiting = threading.Thread(target=lambda: outcomes.append(found.add(sandbox)))  # noqa: B023
                waiting.start()
            spent_ms.append(told_ms(found, lambda: found.loop.do(kubelet.start()), *everything))
            need(len(kubelet.registrations) == registered + 1, f"registrations: {kubelet.registrations[registered:]}")
            if waiting is not None:
                waiting.join()
                need(outcomes[0].returncode == 0, f"the ADD between two kubelets: {outcomes[0].sentence}")
                delete(found, sandbox)
            pod = found.admit(f"after-{number}")
            need(kubelet.slot_of(pod.name) == "slot-1", f"the running pod's slot was given: {kubelet.given}")
            add(found, pod)
            delete(found, pod)
        sockets = sorted(path.name for path in kubelet.plugins.iterdir())
        need(sockets == sorted(["kubelet.sock", kubelet.registrations[-1]]), f"sockets are left: {sockets}")
        killed_ms = _plugin_dies(found, everything)
        delete(found, running)
    detail = (
        f"the longest of {RESTARTS} starts, {statistics.median(spent_ms):.0f} ms in the middle; one registration each,"
        f" a running pod kept its slot, pods before and after got theirs, {RESTARTS // 5} ADDs waited for the next"
        f" kubelet; a killed plugin's slots were back {killed_ms:.0f} ms after the next one's start"
    )
    return Figure(max(spent_ms), "ms", detail, {"all_ms": spent_ms, "plugin_killed_ms": killed_ms})


def _plugin_dies(found: KubeletHost, everything: tuple[str, ...]) -> float:
    kubelet = found.loop.kubelet
    need(found.stop_plugin(signal.SIGKILL) == -signal.SIGKILL, "the plugin was not killed")
    found.healthy()
    name = PodName("default", "nobody")
    need(not kubelet.healthy(RESOURCE), f"{name} would have got a slot of a plugin that is dead")
    spent_ms = told_ms(found, found.start_plugin, *everything)
    sockets = sorted(path.name for path in kubelet.plugins.iterdir())
    need(sockets == sorted(["kubelet.sock", kubelet.registrations[-1]]), f"a killed plugin's socket is left: {sockets}")
    return spent_ms
