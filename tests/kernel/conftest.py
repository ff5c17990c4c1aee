"""Scratch hosts and pods for tests on the running kernel; nothing here touches the machine's own network."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from testbed.host import Host
from testbed.pod import Pod
from testbed.session import end_session

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def testbed_session() -> Iterator[None]:
    """Whatever a test forgot goes with the session."""
    yield
    end_session()


@pytest.fixture
def host() -> Iterator[Host]:
    """A scratch host with nothing but lo. Prints its agent's log, which pytest shows when the test fails."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    with Host.scratch(f"host{next(_numbers)}") as host:
        yield host
        if host.agent is not None:
            print(host.agent.log)


@pytest.fixture
def connected_host(host: Host) -> Host:
    """A scratch host with an uplink and the world behind it (testbed.outside)."""
    host.connect_outside()
    return host


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
