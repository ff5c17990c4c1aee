"""The demo's steps on the RDMA path: lease, perftest, refused, restart, and the end of everything: clean."""

from __future__ import annotations

import math
import re
import select
import subprocess
import time
from statistics import median
from typing import Any

from testbed.container import CommandError, Completed, Process
from testbed.demo.world import SERVICE, TRAINERS, Clock, World
from testbed.host import diff
from testbed.paths import BUILD
from testbed.peer import PeerError
from testbed.rows import Figure, StepError, need

LEASE_BYTES = 64_000_000
TARGET = f"train-1:{SERVICE}"
SHORT_BYTES = 1 << 20
WARM_CONNECTS = 3
READY_TIMEOUT_S = 60.0
PERFTEST_TIMEOUT_S = 90.0
CLIENT_ATTEMPTS = 5
RATE_ATTEMPTS = 5
FEWEST_COLUMNS = 5
#: Rounds of 64 KiB that each stream must make in each of: before, without an agent, after.
ROUNDS = 20
ROUNDS_TIMEOUT_S = 60.0
#: Slow enough that an agent can start beside the streams where two emulated processors do everything.
PAUSE_S = 0.05


def lease(world: World) -> Figure:
    """Lease, connect, RDMA WRITE, through the library."""
    world.need_pods()
    for name in TRAINERS:
        need(world.devices[name] is not None, f"{name} has no device")
    world.verbs["train-1"].ask("serve", service=SERVICE)
    written = world.verbs["train-0"].ask("write", target=TARGET, bytes=LEASE_BYTES, timeout_s=120)
    need(written["equal"] and written["bytes"] == LEASE_BYTES, "the receiver's checksum differs from the sender's")
    ready_ms = [world.verbs["train-0"].ask("connect", target=TARGET)["ready_ms"] for _ in range(WARM_CONNECTS)]
    for address in world.addresses["train-0"].values():
        short = world.verbs["train-0"].ask("write", target=TARGET, bytes=SHORT_BYTES, address=address)
        need(short["equal"], f"the receiver's checksum differs from the sender's, written from {address}")
    mb_s = LEASE_BYTES / 1e6 / written["write_s"]
    return Figure(
        median(ready_ms),
        "ms",
        f"from asking to ready to send, p50 of {WARM_CONNECTS} (the first, with imports and opening the device: "
        f"{written['ready_ms']:.0f} ms); RDMA WRITE of 64 MB random bytes at {mb_s:.0f} MB/s, SHA-256 equal; "
        "IPv4 and IPv6",
    )


def perftest(world: World) -> Figure:
    """Unmodified tools between the two pods."""
    world.need_pods()
    address = world.addresses["train-1"]["ipv4"]
    devices = {name: str(world.devices[name]) for name in TRAINERS}
    figures = {}
    for tool, options, column in (("ib_send_lat", ["-F", "-n", "200"], 4), ("ib_write_bw", ["-F", "-n", "500"], 3)):
        for _ in range(RATE_ATTEMPTS):
            done = pair(
                world,
                [tool, "-d", devices["train-1"], *options],
                [tool, "-d", devices["train-0"], *options, address],
                "Waiting for client",
            )
            figures[tool] = last_figures(done)[column]
            if 0 < figures[tool] < math.inf:
                break
        else:
            raise StepError(f"{tool} could not tell the clock's rate, {RATE_ATTEMPTS} times in a row")
    pair(
        world,
        ["rping", "-s", "-d", "-C", "10", "-a", address],
        ["rping", "-c", "-C", "10", "-v", "-a", address],
        "rdma_listen",
    )
    detail = f"ib_send_lat, typical; ib_write_bw {figures['ib_write_bw']:.0f} MB/s; rping 10 rounds"
    return Figure(figures["ib_send_lat"], "µs", detail)


def pair(world: World, server: list[str], client: list[str], listening: str) -> Completed:
    """Run a tool's two ends, the server in train-1; the client's output."""
    with (
        (BUILD / "peers" / f"{server[0]}.log").open("wb") as complaints,
        # Line by line: what says that the server listens would else stay in its buffer.
        world.pods["train-1"].popen(
            ["stdbuf", "-oL", *server], stdout=subprocess.PIPE, stderr=complaints.fileno()
        ) as process,
    ):
        wait_for_line(process, listening, READY_TIMEOUT_S)
        for attempt in range(CLIENT_ATTEMPTS):
            try:
                done = world.pods["train-0"].exec(client, timeout_s=PERFTEST_TIMEOUT_S)
                break
            except CommandError as error:
                # perftest says that it waits just before it listens.
                refused = "connect" in error.completed.stderr + error.completed.stdout
                if not refused or process.poll() is not None or attempt + 1 == CLIENT_ATTEMPTS:
                    raise
        status = process.wait(READY_TIMEOUT_S)
        need(status == 0, f"{server[0]}'s server ended with status {status}")
    return done


def wait_for_line(process: Process, text: str, timeout_s: float) -> None:
    """Read a command's output up to a line that has `text`; StepError when it does not come."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    seen = ""
    while text not in seen:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        data = process.stdout.read1() if ready else b""  # type: ignore[attr-defined] # buffered: popen made it
        if not data:
            raise StepError(f"{process.argv[2]} did not say {text!r}: {seen.strip()[-200:]}")
        seen += data.decode(errors="replace")


def last_figures(done: Completed) -> list[float]:
    """The numbers of a perftest table's last row. The standard deviation may be nan, for perftest's rounding. Rates are
    0 and times inf where perftest could not tell the clock's rate, as on a busy machine (get_clock.c,
    sample_get_cpu_mhz)."""
    for line in reversed(done.stdout.splitlines()):
        fields = line.split()
        if len(fields) >= FEWEST_COLUMNS and all(re.fullmatch(r"\d+(\.\d+)?|-?nan|inf", field) for field in fields):
            return [float(field) for field in fields]
    raise StepError(f"{done.argv[0]} printed no figures")


def messages(done: Completed) -> int:
    """How many messages a perftest tool has sent, by its table: they have all been answered."""
    return int(last_figures(done)[1])


def refused(world: World) -> Figure:
    """A pod without a device gets none, whatever it tries."""
    world.need_pods()
    name = str(world.devices["train-0"])
    nodes = world.pods["web-0"].exec(["ls", "/dev/infiniband"], check=False)
    need(nodes.returncode != 0, f"web-0 has RDMA nodes: {nodes.stdout}")
    opened = world.pods["web-0"].exec(["ib_send_lat", "-d", name], check=False, timeout_s=30)
    need(opened.returncode not in (0, None), f"web-0 could open {name}")
    clock = Clock()
    sentence = ""
    try:
        world.verbs["web-0"].ask("connect", target=TARGET)
    except PeerError as error:
        sentence = error.sentence
    need("web-0 has no RDMA device" in sentence, f"web-0's lease was not refused as it should: {sentence!r}")
    return Figure(clock.elapsed_ms, "ms", f"no node, ib_send_lat cannot open {name}, lease: {sentence}")


def restart(world: World) -> Figure:
    """SIGKILL under a TCP stream and an RDMA stream; both go on, and the next agent adopts."""
    world.need_pods()
    address = world.addresses["train-1"]["ipv4"]
    port = world.traffic["train-1"].ask("serve", address=address)["port"]
    world.traffic["train-0"].ask("stream_begin", address=address, port=port, pause_s=PAUSE_S)
    world.verbs["train-0"].ask("stream_begin", target=TARGET, pause_s=PAUSE_S)
    before = progress(world, (0, 0))
    devices = {name: world.attachment(name)["device"] for name in world.pods}
    world.host.kill_agent()
    without = progress(world, before)
    ready_s = world.host.start_agent()
    after = progress(world, progress(world, without))
    status = world.status()
    for name in world.pods:
        adopted = world.attachment(name, status)
        need(adopted["state"] == "ready", f"{name} is {adopted['state']} after the restart")
        need(adopted["device"] == devices[name], f"{name} has another device after the restart")
    ends = [world.traffic["train-0"].ask("stream_end"), world.verbs["train-0"].ask("stream_end")]
    for kind, end in zip(("TCP", "RDMA"), ends, strict=True):
        need(end["equal"], f"the {kind} stream lost or changed bytes")
    new = world.verbs["train-0"].ask("write", target=TARGET, bytes=SHORT_BYTES)
    need(new["equal"], "the new lease's bytes differ")
    counts = "; ".join(
        f"{kind} {end['bytes']} bytes equal by SHA-256, rounds {b} before, +{w - b} without agent, +{a - w} after"
        for kind, end, b, w, a in zip(("TCP", "RDMA"), ends, before, without, after, strict=True)
    )
    return Figure(
        ready_s * 1000, "ms", f"until the next agent had adopted; {counts}; new lease {new['ready_ms']:.0f} ms"
    )


def progress(world: World, done: tuple[int, int]) -> tuple[int, int]:
    """Wait until both streams have gone on by `ROUNDS`; how far they are."""
    peers = (world.traffic["train-0"], world.verbs["train-0"])
    for peer, rounds in zip(peers, done, strict=True):
        peer.tell("stream_reach", rounds=rounds + ROUNDS, within_s=ROUNDS_TIMEOUT_S)
    tcp, rdma = (int(peer.answer(timeout_s=ROUNDS_TIMEOUT_S + 10)["rounds"]) for peer in peers)
    return tcp, rdma


def clean(world: World) -> Figure:
    """DEL of all, uninstall, and the host is what it was."""
    world.stop_pods()
    if world.host.agent is None:
        world.host.start_agent()  # a step before failed: the pods go all the same
    elapsed_ms = []
    for name, pod in world.pods.items():
        outcome = world.host.cni("DEL", pod, world.configuration(name))
        need(outcome.returncode == 0 and outcome.output is None, f"DEL of {name}: {outcome.sentence or outcome.output}")
        elapsed_ms.append(outcome.elapsed_s * 1000)
    status = world.host.stop_agent()
    need(status == 0, f"the agent ended with status {status}")
    for pod in world.pods.values():
        pod.destroy()
    world.host.uninstall()
    after = world.host.dump()
    differences = diff(world.before, after)
    need(not differences, f"{len(differences)} differences: " + "; ".join(differences[:20]))
    sizes: list[Any] = [f"{key} {len(value)}" for key, value in sorted(after.items())]
    return Figure(median(elapsed_ms), "ms", f"p50 per DEL; byte for byte as before: {', '.join(sizes)}")
