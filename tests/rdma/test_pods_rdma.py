"""Pods with RDMA devices from the agent, in both modes of the RDMA subsystem."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from rdmanet.model import RdmaMode
from testbed.cni_spec import validate_result
from testbed.host import Host, diff
from testbed.paths import REPOSITORY
from testbed.peer import Peer, PeerError
from testbed.pod import Pod, rdma_nodes

NETWORK: dict[str, Any] = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet"}


def start(host: Host, pod: Pod, rdma: bool) -> dict[str, Any]:
    """ADD, then the container with what the agent's status says it has; the attachment."""
    outcome = host.cni("ADD", pod, {**NETWORK, "rdma": rdma})
    assert outcome.returncode == 0, outcome.sentence
    validate_result(outcome.output, "1.1.0", ifname=pod.ifname, netns=pod.netns)
    (attachment,) = [a for a in host.api("GET", "/v1/status")["attachments"] if a["container_id"] == pod.container_id]
    device = attachment["device"]
    pod.start(rdma_nodes(device["uverbs"], device["major"], device["minor"]) if device else ())
    return dict(attachment)


@pytest.mark.parametrize(
    "mode", [RdmaMode.SHARED, pytest.param(RdmaMode.EXCLUSIVE, marks=pytest.mark.exclusive)], ids=str
)
def test_two_pods_lease_and_leave_nothing(
    host: Host, make_pod: Callable[[str], Pod], rdma_mode: RdmaMode, mode: RdmaMode
) -> None:
    if rdma_mode is not mode:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not {mode}")
    before = host.dump()
    host.start_agent()
    names = ("train-0", "train-1", "web-0")
    pods = {name: make_pod(name) for name in names}
    attachments = {name: start(host, pod, rdma=name != "web-0") for name, pod in pods.items()}
    assert host.api("GET", "/v1/status")["agent"]["rdma_mode"] == mode
    assert attachments["web-0"]["device"] is None
    for name, pod in pods.items():
        device = attachments[name]["device"]
        own = [device["name"]] if device else []
        seen = pod.exec(["ls", "/sys/class/infiniband"], check=False).stdout.split()
        # In shared mode every namespace sees every name; what it may open is what its /dev has.
        assert set(own) <= set(seen) if mode is RdmaMode.SHARED else seen == own
        nodes = pod.exec(["ls", "/dev/infiniband"], check=False).stdout.split()
        assert nodes == (["rdma_cm", device["uverbs"]] if device else [])

    peers = {
        name: Peer.start(
            f"{name}-verbs", pod.popen, [sys.executable, "-m", "testbed.demo.verbs_peer"], cwd=str(REPOSITORY)
        )
        for name, pod in pods.items()
    }
    peers["train-1"].ask("serve", service="params")
    written = peers["train-0"].ask("write", target="train-1:params", bytes=1 << 20)
    assert written["equal"]
    with pytest.raises(PeerError, match="web-0 has no RDMA device"):
        peers["web-0"].ask("connect", target="train-1:params")

    # Killed and started again: the devices and what is leased over them stay.
    peers["train-0"].ask("stream_begin", target="train-1:params", pause_s=0.05)
    rounds = peers["train-0"].ask("stream_reach", rounds=5, within_s=60)["rounds"]
    host.kill_agent()
    rounds = peers["train-0"].ask("stream_reach", rounds=rounds + 5, within_s=60)["rounds"]
    host.start_agent()
    peers["train-0"].ask("stream_reach", rounds=rounds + 5, within_s=60)
    assert peers["train-0"].ask("stream_end")["equal"]

    for name, pod in pods.items():
        peers[name].close()
        pod.stop()
        outcome = host.cni("DEL", pod, {**NETWORK, "rdma": name != "web-0"})
        assert (outcome.returncode, outcome.output) == (0, None), outcome.sentence
        pod.destroy()
    assert host.stop_agent() == 0
    host.uninstall()
    assert diff(before, host.dump()) == []
