"""Row `monitor`: every drop reason and every new flow is seen with its names, and costs nothing while nobody looks.

All reasons that a host can be brought to are provoked over both IP families (testbed/provoking.py), first unseen,
then under the eyes of `GET /v1/monitor` and of `rdmanet monitor --pod`. What was shown, what metrics count, and what
`rdmanet flows` lists must be the same; a flood of drops must be told as lost where it was not shown.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from rdmanet.datapath.ring import Ring
from testbed.paths import REPOSITORY
from testbed.provoking import BACKGROUND, Provoker, check, provoked
from testbed.rows import Figure, need
from testbed.watching import Watch, until, watching

Event = dict[str, Any]
FLOOD_FRAMES = 40_000
FLOODS_MAX = 20
POD = "default/two"

Place = tuple[str, str, str]  # pod, direction, drop reason; the last empty: a new flow


def measure() -> Figure:
    """Two lives of an agent: some reasons need another configuration."""
    with Provoker.start("accept-monitor") as provoker:
        unseen = _unseen(provoker)
        with _command(provoker) as narrowed:
            before = _counted(provoker)
            with watching(provoker.stage.world.host) as watch:
                first = _first_life(provoker, watch, before)
                _narrowed(watch, narrowed)
        flows = _listed(provoker, watch.events)
        until(lambda: not _shows(provoker), "programs still write events though nobody watches")
        lost, told = _flood(provoker)
        second, more = _second_life(provoker)
        reasons = first | second
        with provoker.datapath() as datapath:
            missing = set(datapath.drop_reasons) - reasons
    need(missing == {"no_node"}, f"not provoked: {', '.join(sorted(missing))}")
    events = len(watch.events) + more + told
    detail = (
        f"{len(reasons)} drop reasons and {flows} new flows, IPv4 and IPv6, each as often as it was provoked, with the"
        f" names of pods; {len(narrowed)} of them by `rdmanet monitor --pod`; metrics by pod, direction and reason"
        f" counted the same, and `rdmanet flows` listed these flows; of {FLOOD_FRAMES} drops at once {lost} were said"
        f" to be lost; while nobody watched {unseen} drops left the ring untouched (guard entries of RoCE are written"
        " here as the broker does; no_node alone cannot be seen: nobody watches before there is an agent)"
    )
    return Figure(events, "events", detail, {"reasons": len(reasons), "flows": flows, "lost": lost})


def _shows(provoker: Provoker) -> bool:
    with provoker.datapath() as datapath:
        node = datapath.node()
        return node is not None and node.monitor


def _unseen(provoker: Provoker) -> int:
    """Drops while nobody watches: counted, and nothing else."""
    stage = provoker.stage
    need(not _shows(provoker), "programs write events though nobody watches")
    with provoker.datapath() as datapath, contextlib.closing(datapath.events.open()) as ring:
        assert isinstance(ring, Ring)
        before, counted = ring.written, sum(_counted(provoker).values())
        for version in (4, 6):
            stage.send(list(stage.dropped(version).values()), times=50)
        drops = sum(_counted(provoker).values()) - counted
        need(drops >= 2 * 8 * 50, f"only {drops} drops were counted")
        need(ring.written == before, f"{ring.written - before} bytes of events were written for nobody")
    return drops


def _first_life(provoker: Provoker, watch: Watch, before: Counter[Place]) -> set[str]:
    for version in (4, 6):
        provoker.provoke(version)
    watch.wait(lambda events: provoked(provoker, events), "not everything is shown")
    return _agree(provoker, watch, before)


def _second_life(provoker: Provoker) -> tuple[set[str], int]:
    """Reasons, and how many events there were."""
    provoker.begin_second_life()
    provoker.expected.clear()
    before = _counted(provoker)
    with watching(provoker.stage.world.host) as watch:
        provoker.provoke_second()
        watch.wait(lambda events: provoked(provoker, events), "not everything is shown")
        return _agree(provoker, watch, before), len(watch.events)


def _agree(provoker: Provoker, watch: Watch, before: Counter[Place]) -> set[str]:
    """What was provoked is what was shown is what was counted."""
    check(provoker.expected, watch.events)
    need(watch.lost == 0, f"{watch.lost} events were lost without a flood")
    counted, shown = _counted(provoker) - before, Counter(_places(watch.events))
    for place in counted.keys() | shown.keys():
        # Pods' kernels send of their own, also before and after.
        more = place[2] in BACKGROUND and counted[place] >= shown[place]
        need(more or counted[place] == shown[place], f"{place}: {shown[place]} shown, {counted[place]} counted")
    return {reason for reason, *_ in provoker.expected}


def _places(events: list[Event]) -> Iterator[Place]:
    """As metrics count them."""
    for event in events:
        if event["verdict"] == "dropped":
            pod = event["pod"] if event["direction"] == "from_pod" else event["peer"]
            yield pod or "", event["direction"], event["reason"]
        else:
            for pod, direction in ((event["pod"], "from_pod"), (event["peer"], "to_pod")):
                if pod is not None:
                    yield pod, direction, ""


def _counted(provoker: Provoker) -> Counter[Place]:
    found: Counter[Place] = Counter()
    for family in text_string_to_metric_families(provoker.stage.world.host.api("GET", "/metrics")):
        for sample in family.samples:
            if sample.name in ("rdmanet_drops_total", "rdmanet_pod_flows_begun_total"):
                labels = sample.labels
                found[labels["pod"], labels["direction"], labels.get("reason", "")] += int(sample.value)
    return found


@contextlib.contextmanager
def _command(provoker: Provoker) -> Iterator[list[Event]]:
    """`rdmanet monitor --pod`, from when it watches on; ended with Ctrl-C."""
    host, events = provoker.stage.world.host, list[Event]()
    argv = [sys.executable, "-m", "rdmanet", "monitor", "--pod", "two", "--json", "--config", host._config_file()]
    with host.popen(argv, cwd=str(REPOSITORY), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = process.stdout
        reader = threading.Thread(target=lambda: events.extend(map(json.loads, lines)))
        reader.start()
        until(lambda: _shows(provoker), "`rdmanet monitor` does not watch")
        yield events
        process.signal(signal.SIGINT)
        need(process.wait() == 0, f"`rdmanet monitor` ended with {process.returncode}")
        reader.join()


def _narrowed(watch: Watch, narrowed: list[Event]) -> None:
    wanted = [event for event in watch.events if POD in (event["pod"], event["peer"])]
    until(lambda: all(event in narrowed for event in wanted), "`rdmanet monitor --pod` does not show everything")
    others = [event for event in narrowed if POD not in (event["pod"], event["peer"])]
    need(not others, f"`rdmanet monitor --pod two` shows others': {others[:3]}")


def _listed(provoker: Provoker, events: list[Event]) -> int:
    """New flows are in the list with the same ends; nothing else is."""
    keys = ("protocol", "source", "source_port", "pod", "destination", "destination_port", "peer")
    translated = ("translated", "translated_port")
    output = provoker.stage.world.command("flows", "-o", "json").stdout
    there = {tuple(flow.get(key) for key in (*keys, *translated)) for flow in json.loads(output)["flows"]}
    begun = {tuple(event.get(key) for key in (*keys, *translated)) for event in events if event["verdict"] == "allowed"}
    need(begun == there, f"shown and not listed: {list(begun - there)[:3]}; the other way: {list(there - begun)[:3]}")
    return len(begun)


def _flood(provoker: Provoker) -> tuple[int, int]:
    """More drops than are read: how many of them were told as lost, and how many were shown."""
    stage = provoker.stage
    frame = stage.dropped(4)["not_ip"]
    for _ in range(FLOODS_MAX):
        before = _counted(provoker)
        with watching(stage.world.host) as watch:
            stage.send([frame], times=FLOOD_FRAMES)
            watch.wait(
                lambda events, watch=watch: _floods(events) + watch.lost >= FLOOD_FRAMES,  # type: ignore[misc]
                "neither shown nor told as lost",
            )
            shown, lost = _floods(watch.events), watch.lost
        counted = _counted(provoker) - before
        drops = counted["default/one", "from_pod", "not_ip"]
        need(drops == FLOOD_FRAMES, f"{drops} of {FLOOD_FRAMES} drops were counted")
        others = sum(counted.values()) - drops
        need(shown + lost <= FLOOD_FRAMES + others, f"{shown} shown and {lost} lost of {FLOOD_FRAMES} and {others}")
        if lost:
            return lost, shown
    need(False, f"{FLOODS_MAX} floods of {FLOOD_FRAMES} drops, and nothing was lost: nothing is shown of losses")
    return 0, 0


def _floods(events: list[Event]) -> int:
    return sum(event.get("reason") == "not_ip" for event in events)
