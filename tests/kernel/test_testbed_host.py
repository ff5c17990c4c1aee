"""The testbed's hosts: an agent that cannot start says why, and its programs answer or say why not."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from rdmanet.errors import UnavailableError
from testbed.container import CommandError
from testbed.host import Host
from testbed.outside import FAR_IPV4, FAR_IPV6, HOST_IPV4, HOST_IPV6
from testbed.peer import Peer, PeerError

SIZE_BYTES = 300_000


def test_an_agent_that_cannot_start_says_why(host: Host) -> None:
    with pytest.raises(CommandError, match=r"ended before it was ready: .*agent\.sokket.*did you mean socket"):
        host.start_agent({"agent": {"sokket": "/run/x"}})
    assert host.agent is None
    with pytest.raises(UnavailableError, match="no agent runs on"):
        host.stop_agent()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_signals_end_a_command_where_the_tests_ignore_them(number: signal.Signals) -> None:
    """As what a shell has started in the background does."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Host.scratch("ignoring") as host:
            done = host.exec(["sh", "-c", f"kill -{int(number)} $$; echo it goes on"], check=False)
            assert done.returncode == -number
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("far", "own"), [(FAR_IPV4, HOST_IPV4), (FAR_IPV6, HOST_IPV6)])
def test_traffic_is_checked_byte_for_byte(connected_host: Host, far: str, own: str) -> None:
    assert connected_host.outside is not None
    with (
        Peer.traffic("test-host", connected_host.popen) as host,
        Peer.traffic("test-outside", connected_host.outside.popen) as outside,
    ):
        port = outside.ask("serve", address=far)["port"]
        sent = host.ask("send", address=far, port=port, bytes=SIZE_BYTES, verify=True)
        assert (sent["equal"], sent["own"], sent["peer"]) == (True, own, own)
        host.ask("stream_begin", address=far, port=port, pause_s=0.001)
        rounds = host.ask("stream_reach", rounds=10, within_s=30)["rounds"]
        ended = host.ask("stream_end")
        assert ended["equal"]
        assert ended["rounds"] >= rounds >= 10
        assert outside.ask("served")["bytes"] == SIZE_BYTES + ended["bytes"]
        assert host.ask("counters", ifname="uplink0")["tx_bytes"] > SIZE_BYTES + ended["bytes"]


def test_a_broken_stream_says_so(connected_host: Host) -> None:
    assert connected_host.outside is not None
    with Peer.traffic("test-host", connected_host.popen) as host:
        outside = Peer.traffic("test-outside", connected_host.outside.popen)
        port = outside.ask("serve", address=FAR_IPV4)["port"]
        host.ask("stream_begin", address=FAR_IPV4, port=port, pause_s=0.001)
        host.ask("stream_reach", rounds=3, within_s=30)
        outside.close()
        with pytest.raises(PeerError, match="the stream broke after"):
            host.ask("stream_reach", rounds=1_000_000, within_s=30)
        with pytest.raises(PeerError, match="Connection refused"):
            host.ask("send", address=FAR_IPV4, port=port, bytes=1, verify=True)


def test_a_program_that_ends_gives_its_last_words(host: Host) -> None:
    argv = [sys.executable, "-ISEc", "import sys; sys.stdin.readline(); sys.exit('no more')"]
    with (
        Peer.start("test-ends", host.popen, argv) as peer,
        pytest.raises(PeerError, match="the program in test-ends has ended: no more"),
    ):
        peer.ask("anything")


def test_commands_see_the_callers_environment_on_a_host(host: Host) -> None:
    assert host.exec(["printenv", "PATH"]).stdout.strip() == os.environ["PATH"]
