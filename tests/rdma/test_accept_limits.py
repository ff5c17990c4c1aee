"""The rows `quota` and `isolation` of the acceptance proof, small."""

from __future__ import annotations

import pytest

from benchmarks.accept.rdma import isolation, quota
from benchmarks.peers import namespaces
from rdmanet.model import RdmaMode
from testbed.host import Host


@pytest.fixture(autouse=True)
def shared_mode(rdma_mode: RdmaMode) -> None:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")


def test_each_limit_is_reached_told_and_counted() -> None:
    sizes = quota.Sizes(leases=8, handles=2, objects=60, packets=5)
    with Host.scratch("quota") as host:
        host.start_agent(sizes.configuration)
        results = quota.all_limits(host, sizes)
        host.stop_agent()
        host.uninstall()
    assert set(results) == {"contexts", "objects", "leases", "connections", "services", "traffic class"}


def test_nothing_that_is_tried_against_another_pod_succeeds() -> None:
    # How long others wait is not for a test to say.
    sizes = isolation.Sizes(opens=3, guesses=40, floods=())
    with namespaces.agent_host("isolation") as host:
        results = isolation.all_attempts(host, sizes)
    assert len(results) >= 17, sorted(results)
    assert {result["successes"] for result in results.values()} == {0}
