"""Where tests of RDMA run: on a kernel whose namespaces can have rxe devices, as the suite boots one."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from rdmanet.model import RdmaMode
from testbed.host import Host
from testbed.kernel import why_not_here
from testbed.pod import Pod
from testbed.session import end_session
from tests.rdma import lease_lab
from tests.rdma.lease_lab import Lab

SCRATCH_NETNS = Path("/run/netns/rxe-test")


@functools.cache
def mode_or_reason() -> RdmaMode | str:
    """The mode that the host is in, or what is missing where rxe cannot be had in namespaces."""
    reasons = {mode: why_not_here(mode) for mode in RdmaMode}
    found = next((mode for mode, reason in reasons.items() if not reason), None)
    return found or f"rxe in network namespaces: {reasons[RdmaMode.SHARED]}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Nearly everything here needs rxe in namespaces, which is known before anything is made."""
    found = mode_or_reason()
    if not isinstance(found, RdmaMode) and item.get_closest_marker("any_kernel") is None:
        pytest.skip(found)


@pytest.fixture(scope="session")
def rdma_mode() -> RdmaMode:
    """The mode that the host is in."""
    found = mode_or_reason()
    if not isinstance(found, RdmaMode):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session", autouse=True)
def testbed_session() -> Iterator[None]:
    """Whatever a test forgot goes with the session."""
    yield
    end_session()


@pytest.fixture
def host(rdma_mode: RdmaMode) -> Iterator[Host]:
    """Where an agent can run: the virtual machine itself, or a scratch host elsewhere; prints the agent's log."""
    in_vm = os.environ.get("RDMANET_IN_VM") == "1"
    if rdma_mode is RdmaMode.EXCLUSIVE and not in_vm:
        pytest.skip("in exclusive mode the agent needs the initial network namespace, which is not the tests' here")
    with Host.machine("rdma") if in_vm else Host.scratch("rdma") as host:
        yield host
        if host.agent is not None:
            print(host.agent.log)


@pytest.fixture
def make_pod(host: Host) -> Iterator[Callable[[str], Pod]]:
    """Creates pods on `host` (network namespaces; `start` them yourself) and destroys them afterwards."""
    pods: list[Pod] = []

    def make(name: str) -> Pod:
        pods.append(Pod.create(host, name))
        return pods[-1]

    yield make
    for pod in pods:
        pod.destroy()


@pytest.fixture
def scratch_netns() -> Iterator[Path]:
    """A network namespace of its own, for tests that need no pod around it."""
    subprocess.run(["ip", "netns", "add", SCRATCH_NETNS.name], check=True)
    yield SCRATCH_NETNS
    subprocess.run(["ip", "netns", "delete", SCRATCH_NETNS.name], check=True)


@pytest.fixture(scope="module")
def pods() -> Iterator[Lab]:
    """Made outside of any event loop: netlink sockets have one of their own."""
    with lease_lab.lab() as made:
        yield made


@pytest.fixture
async def lab(pods: Lab) -> AsyncIterator[Lab]:
    """The pods with a fresh broker."""
    await pods.start_broker()
    yield pods
    await pods.stop_broker()
