"""cni/rdmanet's queue of DELs: what it holds, its bounds, its lock. Builds as in test_cni_executable.py."""

from __future__ import annotations

import asyncio
import fcntl
from pathlib import Path
from typing import IO

import pytest

from rdmanet.cni import Command, Request, parse_pending, pending_name
from testbed.cni_executable import BUILDS, Runtime, agent, empty, make, missing_for, raw_server


@pytest.fixture(scope="module", params=BUILDS)
def executable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = missing_for(request.param)
    if missing:
        pytest.skip(missing)
    return make(tmp_path_factory.mktemp("cni"), request.param)


@pytest.fixture
def runtime(executable: Path, tmp_path: Path) -> Runtime:
    return Runtime(executable, tmp_path)


async def test_del_without_an_agent_is_queued_whole(runtime: Runtime) -> None:
    body = runtime.body(prevResult={"ips": []}, args={"x": "\r\n\r\nä"})
    outcome = await runtime.run("DEL", body, CNI_IFNAME="e_1", CNI_ARGS="A=b\r\nc", CNI_NETNS=None)
    assert outcome.success() == b""
    assert runtime.queued == [pending_name("c1", "e_1")]
    entry = (runtime.pending / runtime.queued[0]).read_bytes()
    variables, found = parse_pending(entry)
    assert found == body
    assert variables == {
        "CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "e_1", "CNI_ARGS": "A=b\r\nc"
    }  # fmt: skip
    assert Request.parse(variables, found).command is Command.DEL
    modes = [oct(p.stat().st_mode)[-3:] for p in (runtime.pending, runtime.pending / runtime.queued[0])]
    assert modes == ["700", "600"]


async def test_a_repeated_del_replaces_its_entry(runtime: Runtime) -> None:
    for netns in ("/run/netns/c1", None, None):
        (await runtime.run("DEL", CNI_NETNS=netns)).success()
    assert runtime.queued == ["c1@eth0"]
    assert b"CNI-NetNS" not in (runtime.pending / "c1@eth0").read_bytes()


async def test_many_dels_at_once_are_all_queued(runtime: Runtime) -> None:
    outcomes = await asyncio.gather(*(runtime.run("DEL", CNI_CONTAINERID=f"c{n}") for n in range(20)))
    assert [o.success() for o in outcomes] == [b""] * 20
    assert runtime.queued == sorted(f"c{n}@eth0" for n in range(20))


async def test_a_full_queue_refuses_new_entries_only(runtime: Runtime) -> None:
    runtime.pending.mkdir(parents=True)
    for n in range(4096):
        (runtime.pending / f"x{n}@eth0").touch()
    sentence = (await runtime.run("DEL")).error(11)
    assert "4096" in sentence
    assert str(runtime.pending) in sentence
    (await runtime.run("DEL", CNI_CONTAINERID="x7")).success()
    assert len(runtime.queued) == 4096
    assert (runtime.pending / "x7@eth0").stat().st_size > 0


async def test_a_del_too_large_for_the_queue_is_refused(runtime: Runtime) -> None:
    assert "64 KiB" in (await runtime.run("DEL", runtime.body(args={"x": "y" * 65536}))).error(11)
    assert runtime.queued == []


async def test_a_queue_that_cannot_be_made_is_an_io_failure(runtime: Runtime) -> None:
    (runtime.folder / "state").write_text("a file")
    sentence = (await runtime.run("DEL")).error(5)
    assert str(runtime.pending) in sentence
    assert "Not a directory" in sentence


def _lock(runtime: Runtime) -> IO[str]:
    """Hold the queue's lock until the file is closed."""
    runtime.pending.mkdir(parents=True, exist_ok=True)
    lock = (runtime.pending / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


async def test_del_asks_again_under_the_lock(runtime: Runtime) -> None:
    """The agent comes back between the first try and the lock: nothing may be queued behind its draining."""
    with _lock(runtime) as lock:
        async with raw_server(runtime, b"") as heads:
            running = asyncio.create_task(runtime.run("DEL"))
            await asyncio.wait_for(heads.get(), 30)
        async with agent(runtime, empty) as calls:
            lock.close()
            assert (await running).success() == b""
    assert [call.command for call in calls] == ["DEL"]
    assert runtime.queued == []


async def test_a_queue_that_stays_locked_is_waited_for_only_so_long(runtime: Runtime) -> None:
    with _lock(runtime):
        assert "lock" in (await runtime.run("DEL")).error(11)
    assert runtime.queued == []


async def test_del_of_a_hung_agent_is_queued(runtime: Runtime) -> None:
    runtime.timeout_s = 1
    async with raw_server(runtime, None) as heads:
        (await runtime.run("DEL")).success()
        assert heads.qsize() == 1
    assert runtime.queued == ["c1@eth0"]
