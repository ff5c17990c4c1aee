"""What goes wrong under running leased transfers, small; `make accept ONLY=rdma ROWS=faults,leaks` is the full size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.accept.rdma import faults, leaks
from benchmarks.peers import namespaces
from rdmanet.model import RdmaMode
from testbed.host import Host


@pytest.fixture(scope="module")
def host(rdma_mode: RdmaMode) -> Iterator[Host]:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    with faults.limited_host() as host:
        yield host


@pytest.mark.parametrize("name", ["peer-killed", "loss-1%", "device-removed"])
def test_every_byte_arrives_or_the_caller_is_told(host: Host, name: str) -> None:
    result = faults.measured(host, name, faults.CASES[name])
    assert result["lost_bytes"] == 0
    # Under loss it may be either: a device that gets no processor for seconds gives up as one whose packets are lost.
    assert result["outcome"] == "exception" or name == "loss-1%"
    assert all(size > 0 for size in result["bytes"].values()), result


@pytest.fixture
def plain_host(rdma_mode: RdmaMode) -> Iterator[Host]:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    with namespaces.agent_host("leaks") as host:
        yield host


def test_leases_leave_nothing_behind(plain_host: Host) -> None:
    """Objects are counted to the last one; memory is for the full size."""
    with leaks.Churn.begin(plain_host) as churn:
        churn.every_way(64)
        warm = churn.state()
        churn.every_way(300)
        after = churn.state()
    assert after.objects == warm.objects
    assert (after.objects["leases"], after.objects["guard entries"]) == (0, 0)
