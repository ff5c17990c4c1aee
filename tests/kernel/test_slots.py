"""Slots with a real agent, a real plugin process and a kubelet beside them, on a host that has no RDMA to give.

What a slot gives is tested where there is RDMA (tests/rdma/test_slots.py); here is what must hold on any host: nobody
waits for kubelet but the pod that asks, and no pod that has a slot comes up without its device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdmanet.errors import UnavailableError
from rdmanet.netlink import nldev
from testbed.host import CniOutcome, Host, diff
from testbed.kubelet import AdmissionError
from testbed.kubelet_host import CDI, NETWORK, PLUGIN, RESOURCE, KubeletHost, Sandbox
from testbed.world import refused, succeeded


@pytest.fixture(scope="module")
def stage() -> Iterator[KubeletHost]:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    with Host.scratch("slots") as host:
        before = host.dump()
        with KubeletHost.begin(host, kubernetes={"timeout_s": 2.0}) as stage:
            yield stage
        assert host.stop_agent() == 0
        host.uninstall()
        assert diff(before, host.dump()) == []
        assert not host.path(CDI).exists()


@pytest.fixture(autouse=True)
def without_rdma() -> None:
    try:
        with nldev.RdmaSocket.here():
            pytest.skip("this kernel has RDMA: tests/rdma/test_slots.py says more")
    except UnavailableError:
        pass


def added(stage: KubeletHost, sandbox: Sandbox, **changes: object) -> CniOutcome:
    outcome = stage.add(sandbox, **changes)
    assert outcome.returncode == 0, outcome.sentence
    return outcome


def test_slots_that_nobody_can_use(stage: KubeletHost) -> None:
    kubelet = stage.loop.kubelet
    stage.loop.do(kubelet.until(lambda: RESOURCE in kubelet.endpoints, "the plugin"))
    stage.healthy()
    problems = {one["problem"] for one in stage.slots().values()}
    assert len(stage.slots()) == 4
    assert all("this host has no RDMA devices for pods" in str(problem) for problem in problems)
    with pytest.raises(AdmissionError, match="available 0"):
        stage.admit("train-0")


def test_the_plugin_needs_no_capability(stage: KubeletHost) -> None:
    """As deploy/ starts it: by the unit, and by the DaemonSet."""
    kubelet = stage.loop.kubelet
    assert stage.stop_plugin() == 0
    registered = len(kubelet.registrations)
    stage.start_plugin(("-m", "testbed.limited", "", "--", *PLUGIN))
    stage.loop.do(kubelet.until(lambda: len(kubelet.registrations) > registered, "the plugin without capabilities"))
    assert stage.plugin is not None
    status = Path(f"/proc/{stage.plugin.pid}/status").read_text()
    assert "CapBnd:\t0000000000000000" in status
    assert "CapEff:\t0000000000000000" in status
    stage.loop.do(kubelet.until(lambda: len(kubelet.endpoints[RESOURCE].devices) == 4, "its list"))
    stage.healthy()


def test_a_pod_without_a_slot_gets_its_network(stage: KubeletHost) -> None:
    web = stage.admit("web-0", count=0)
    asked = stage.loop.kubelet.asked
    added(stage, web)
    assert stage.loop.kubelet.asked == asked + 1
    refused(stage.add(stage.admit("web-1", count=0), rdma=True), 102, "kubelet has given it no slot")
    succeeded(stage.delete(web))


def test_a_pod_with_a_slot_gets_none_without_its_device(stage: KubeletHost) -> None:
    train = stage.admit("train-1", count=0)
    stage.loop.call(lambda: stage.loop.kubelet.given.__setitem__(train.name, {"main": (RESOURCE, ["slot-1"])}))
    refused(stage.add(train), 102, "This host has no RDMA to give to pods")
    assert stage.files() == []
    stage.host.settle()
    assert stage.host.api("GET", "/v1/status")["attachments"] == []
    stage.loop.call(lambda: stage.loop.kubelet.given.__setitem__(train.name, {"main": (RESOURCE, ["slot-9"])}))
    refused(stage.add(train), 7, "has slot-9, which is no slot of rdmanet.io/rdma: those are slot-0 to slot-3")
    refused(
        stage.add(train, runtimeConfig={"deviceID": "0000:3b:00.1"}), 7, "deviceID is 0000:3b:00.1, which is no slot"
    )


def test_a_kubelet_that_does_not_answer_holds_up_nobody_else(stage: KubeletHost) -> None:
    kubelet = stage.loop.kubelet
    web, other = stage.admit("web-2", count=0), stage.admit("web-3", count=0)
    stage.loop.call(kubelet.answering.clear)
    try:
        outcomes: list[CniOutcome] = []
        waiting = threading.Thread(target=lambda: outcomes.append(stage.add(web)))
        asked = kubelet.asked
        waiting.start()
        while kubelet.asked == asked:
            waiting.join(0.01)
        # Not kubelet's: it has no name there. And a GC.
        succeeded(stage.host.cni("GC", None, {**NETWORK, "cni.dev/valid-attachments": []}))
        outcome = stage.host.cni("ADD", other.pod, NETWORK, args="")
        assert outcome.returncode == 0, outcome.sentence
        assert waiting.is_alive(), "it was to be asked still"
        waiting.join()
        refused(outcomes[0], 11, "Without its answer default/web-2 gets no network")
    finally:
        stage.loop.call(kubelet.answering.set)
    added(stage, web)
    for sandbox in (web, other):
        succeeded(stage.delete(sandbox))


def test_kubelet_is_away(stage: KubeletHost) -> None:
    web = stage.admit("web-4", count=0)
    stage.loop.do(stage.loop.kubelet.stop())
    refused(stage.add(web), 11, "Kubelet does not say on /run/kubelet/pod-resources/kubelet.sock")
    stage.loop.do(stage.loop.kubelet.start())
    added(stage, web)
    succeeded(stage.delete(web))


def test_the_plugin_ends_when_it_is_told(stage: KubeletHost) -> None:
    kubelet = stage.loop.kubelet
    assert stage.stop_plugin() == 0
    stage.loop.do(kubelet.until(lambda: kubelet.endpoints[RESOURCE].ended, "the plugin's end"))
    assert [path.name for path in kubelet.plugins.iterdir()] == ["kubelet.sock"]
    stage.start_plugin()
    stage.loop.do(kubelet.until(lambda: not kubelet.endpoints[RESOURCE].ended, "the next one"))
