"""examples/allreduce at its smallest: the same results over both transports as in one process, over both families."""

from __future__ import annotations

import pytest

from benchmarks.accept.rdma.allreduce import agreement, ring_bytes, sent_bytes, train
from benchmarks.peers.namespaces import agent_host, attached
from rdmanet.model import RdmaMode

#: Three pods: with two, left and right would be the same pod.
PODS = ("train-0", "train-1", "train-2")
#: Two hidden layers, the first so small that some chunks of a gradient differ in length.
HIDDEN, STEPS = (3, 40), 3


def test_three_pods_learn_what_one_process_does(rdma_mode: RdmaMode) -> None:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    with agent_host("example") as host, attached(host, PODS) as ends:
        trained = train(ends, ("rdma", "tcp"), 6, HIDDEN, STEPS, compare=True)
        sent = sent_bytes(host, "roce")
        assert host.api("GET", "/v1/status")["leases"] == []
    leased, over_tcp = trained[: len(HIDDEN)], trained[len(HIDDEN) :]
    assert min(sent.values()) >= ring_bytes(leased, "rdma") > 0
    for trainings in zip(leased, over_tcp, strict=True):
        assert [[report["pod"] for report in training] for training in trainings] == [list(PODS)] * 2
        assert [training[0]["transport"] for training in trainings] == ["rdma", "tcp"]
        assert agreement(trainings) < 1e-14
