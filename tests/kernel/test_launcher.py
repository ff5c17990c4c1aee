"""Commands that a program in one pod starts in another."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from testbed.host import Host
from testbed.launcher import AGENT, Launcher
from testbed.pod import Pod


@pytest.fixture
def pods(host: Host, make_pod: Callable[[str], Pod]) -> list[Pod]:
    return [make_pod(name).start() for name in ("launch-0", "launch-1")]


def test_a_command_runs_where_it_should(pods: list[Pod]) -> None:
    with Launcher(pods[0], pods, {"launch-1": {"TOLD": "so"}}):
        done = pods[0].exec(
            [*AGENT, "launch-1", "echo", "$(hostname)", "$TOLD;", "cat;", "echo oops >&2; exit 3"],
            input="in",
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (3, "launch-1 so\nin", "oops\n")
        killed = pods[0].exec([*AGENT, "launch-1", "kill -9 $$"], check=False)
        assert killed.returncode == 137


def test_the_socket_goes_with_it_and_takes_what_still_runs(pods: list[Pod]) -> None:
    for _ in range(2):
        with (
            Launcher(pods[0], pods, {}),
            pods[0].popen([*AGENT, "launch-1", "echo ready; exec sleep 600"], stdout=-1) as started,
        ):
            assert started.stdout is not None
            assert started.stdout.readline() == b"ready\n"
        assert "sleep" not in pods[1].exec(["ps", "-eo", "comm"]).stdout
    done = pods[0].exec([*AGENT, "launch-1", "true"], check=False)
    assert done.returncode != 0


def test_a_pod_that_is_not_known_is_said(pods: list[Pod]) -> None:
    with Launcher(pods[0], pods[:1], {}):
        done = pods[0].exec([*AGENT, "launch-1", "true"], check=False)
        assert done.returncode == 255
        assert "there is no pod launch-1 here" in done.stderr
