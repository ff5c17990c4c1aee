"""Unmodified RDMA programs between two pods, and what the host sees of devices."""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Callable

from testbed.container import CommandError, Completed
from testbed.demo.rdma import wait_for_line
from testbed.paths import BUILD
from testbed.pod import Pod
from testbed.world import Attached, World

TIMEOUT_S = 90.0
CLIENT_ATTEMPTS = 5


@functools.cache
def ucx_perftest() -> tuple[str, ...]:
    """Its words. One that is built with MPI (Debian 13's) takes itself for a part of an MPI job without a terminal."""
    shown = subprocess.run(["ucx_perftest", "-h"], capture_output=True, text=True, check=False)
    return ("ucx_perftest", "-P", "0") if "-P <0|1>" in shown.stdout + shown.stderr else ("ucx_perftest",)


def unhealthy(world: World, attached: Attached) -> str | None:
    """Why the pod's device cannot be used, by `rdmanet status`."""
    rows = world.host.api("GET", "/v1/status")["attachments"]
    (found,) = [row["unhealthy"] for row in rows if row["container_id"] == attached.pod.container_id]
    return None if found is None else str(found)


def until(reached: Callable[[], bool], what: str) -> None:
    """Waits for what the agent does by itself."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not reached():
        assert time.monotonic() < deadline_s, f"{what}, not within {TIMEOUT_S:g} s"
        time.sleep(0.02)


def devices(world: World) -> set[str]:
    """The devices that the host sees; in shared mode that is every one."""
    return {device["ifname"] for device in world.host.exec(["rdma", "-j", "dev"]).json()}


def tool(server_pod: Pod, client_pod: Pod, server: list[str], client: list[str], listening: str) -> Completed:
    """A tool's two ends; what the client printed. The server says `listening` when it does, and must end well."""
    (BUILD / "peers").mkdir(parents=True, exist_ok=True)
    with (
        (BUILD / "peers" / f"{server[0]}.log").open("wb") as log,
        # Line by line: what says that the server listens would else stay in its buffer.
        server_pod.popen(["stdbuf", "-oL", *server], stdout=subprocess.PIPE, stderr=log.fileno()) as process,
    ):
        wait_for_line(process, listening, TIMEOUT_S)
        for attempt in range(CLIENT_ATTEMPTS):
            try:
                done = client_pod.exec(client, timeout_s=TIMEOUT_S)
                break
            except CommandError as error:
                # perftest says that it waits just before it listens.
                said = error.completed.stderr + error.completed.stdout
                if "connect" not in said or process.poll() is not None or attempt + 1 == CLIENT_ATTEMPTS:
                    raise
        assert process.wait(TIMEOUT_S) == 0
    return done
