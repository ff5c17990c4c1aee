"""Row `nat-full`: the table of flows is full, and what is in it lives on.

The table is made small. One pod takes all that a pod may have, another one works beside it, a third fills the table:
streams and questions that began before go on, and what is new fails by name. When the idle flows have been collected
new ones work again. At the end the ports run out, too.
"""

from __future__ import annotations

from rdmanet.model import address_key
from testbed.rows import Figure, need
from testbed.services import FAMILIES, KINDS, TARGET_PORT, wait_until
from testbed.terrain import BEHIND, FAR, ON_LINK, Terrain

GREEDY, WORKER, FILLER = PODS = ("greedy", "worker", "filler")
#: Entries: a flow that is translated has two.
TABLE, SHARE = 1024, 300
TRACKING = {"max_flows": TABLE, "max_flows_per_pod": SHARE, "interval_s": 1.0}
FIRST_PORT, LAST_PORT = 61000, 61255
SERVER_PORT = 7000
#: More than the share, and than what is free.
ASKED = 500
AT_ONCE = 4
ROUNDS = 100
CALLS = 10
#: Until echoes are idle (RFC 5508 REQ-1) and have been collected.
COLLECTED_S = 150.0


def measure() -> Figure:
    """Full, then empty again, then without ports."""
    with Terrain.start("nat-full", PODS, {"tracking": TRACKING}) as terrain:
        terrain.scene.ask("outside", "serve", name="outside", port=SERVER_PORT)
        _begin(terrain)
        limited = _greedy(terrain)
        _works(terrain, WORKER)
        full = _fill(terrain)
        flows = [flow for flow in terrain.flows() if not flow.is_alias]
        need(len(terrain.flows()) >= TABLE - 1, f"the table has {len(terrain.flows())} of {TABLE} entries")
        refused = _new_ones_fail(terrain)
        _go_on(terrain)
        waited_s = wait_until(
            lambda: len(terrain.flows()) < TABLE / 4, "idle flows are collected", timeout_s=COLLECTED_S
        )
        for pod in PODS:
            _works(terrain, pod)
        _go_on(terrain)
        used = _no_ports(terrain)
        streamed = _end(terrain)
    detail = (
        f"{len(flows)} flows filled the {TABLE} entries; a greedy pod got its {SHARE} and was refused {limited} more"
        f" (flow_limit) while another one worked; {full} of a third were refused (flow_table_full), and {refused} new"
        f" flows of others; streams, questions and answers went on all the time, {streamed} bytes equal at the end;"
        f" {waited_s:.0f} s later the idle ones were collected and new ones worked; of {LAST_PORT - FIRST_PORT + 1}"
        f" ports {used} to one address were used before a flow found none (nat_no_port)"
    )
    return Figure(len(flows), "flows", detail)


def _begin(terrain: Terrain) -> None:
    """What has to live on: a stream over each family, and questions by TCP and UDP."""
    for pod, version in ((WORKER, 4), (FILLER, 6)):
        port = terrain.tcp["outside"].ask("serve", address=FAR[version])["port"]
        terrain.tcp[pod].ask("stream_begin", address=FAR[version], port=port, pause_s=0.005)
    for version in FAMILIES:
        for kind in KINDS:
            for name, address, port in (
                ("outside", ON_LINK[version], SERVER_PORT),
                ("pod", terrain.scene.addresses[GREEDY][version], TARGET_PORT),
            ):
                request = {"id": f"{name} {kind} {version}", "kind": kind, "address": address, "port": port}
                opened = terrain.scene.ask(WORKER, "open", **request)
                need(not opened["refused"], f"{WORKER} to [{address}] by {kind}: {opened['refused']}")
    _go_on(terrain)


def _go_on(terrain: Terrain) -> None:
    for version in FAMILIES:
        for kind in KINDS:
            for name in ("outside", "pod"):
                said = terrain.scene.ask(WORKER, "say", id=f"{name} {kind} {version}")
                need(not said["refused"], f"the {kind} flow over IPv{version} to {name}: {said['refused']}")
    for pod in (WORKER, FILLER):
        done = terrain.tcp[pod].ask("stream_reach", rounds=0, within_s=1)["rounds"]
        terrain.tcp[pod].ask("stream_reach", rounds=done + ROUNDS, within_s=60)


def _end(terrain: Terrain) -> int:
    total = 0
    for pod in (WORKER, FILLER):
        ended = terrain.tcp[pod].ask("stream_end")
        need(ended["equal"], f"the stream of {pod} came as something else: {ended}")
        total += int(ended["bytes"])
    return total


def _scatter(terrain: Terrain, pod: str, reason: str, address: str) -> int:
    """Begins as many flows as it can; how many were refused for the reason."""
    before = terrain.scene.drops(reason, pod)
    terrain.ask(pod, "scatter", address=address, first=1, count=ASKED)
    return terrain.scene.drops(reason, pod) - before


def _greedy(terrain: Terrain) -> int:
    """No flow more than its share."""
    limited = sum(_scatter(terrain, GREEDY, "flow_limit", FAR[version]) for version in FAMILIES)
    inside, outside = terrain.halves(GREEDY)
    need(len(inside) == len(outside) == SHARE, f"{GREEDY} has {len(inside)} flows, outside sees {len(outside)}")
    need(limited == len(FAMILIES) * ASKED - SHARE, f"{limited} of {len(FAMILIES) * ASKED} were refused")
    return limited


def _works(terrain: Terrain, pod: str) -> None:
    """New flows of a pod, to outside and to another pod."""
    target = terrain.scene.addresses[WORKER if pod != WORKER else FILLER]
    for version in FAMILIES:
        for kind in KINDS:
            for address, port in ((ON_LINK[version], SERVER_PORT), (target[version], TARGET_PORT)):
                answer = terrain.scene.ask(pod, "many", kind=kind, address=address, port=port, count=CALLS)
                need(not answer["refused"], f"{pod} to [{address}] by {kind}: {answer['refused']}")
        said = terrain.ask(pod, "echo", address=FAR[version], identifier=60000, count=1)
        need(said["answers"] == 1, f"{pod}: no answer to an echo to [{FAR[version]}]")


def _fill(terrain: Terrain) -> int:
    full = sum(_scatter(terrain, FILLER, "flow_table_full", FAR[version]) for version in FAMILIES)
    need(full > 0, "the table did not fill")
    inside, outside = terrain.halves(FILLER)
    need(len(inside) == len(outside) < SHARE, f"{FILLER} has {len(inside)} flows, outside sees {len(outside)}")
    return full


def _new_ones_fail(terrain: Terrain) -> int:
    """Of pods, and of the host to pods; the host's own way out is nobody's business."""
    refused = 0
    target = terrain.scene.addresses[FILLER]
    for version in FAMILIES:
        for kind in KINDS:
            for place, address, port in (
                (WORKER, ON_LINK[version], SERVER_PORT),
                (WORKER, target[version], TARGET_PORT),
                ("host", target[version], TARGET_PORT),
            ):
                whose = WORKER if place == WORKER else FILLER
                before = terrain.scene.drops("flow_table_full", whose)
                request = {"kind": kind, "address": address, "port": port, "count": 1, "wait_s": 0.5}
                answer = terrain.scene.ask(place, "many", **request)
                need(not answer["names"], f"{place} to [{address}] by {kind} in a full table: {answer}")
                counted = terrain.scene.drops("flow_table_full", whose) - before
                need(counted > 0, f"{place} to [{address}] by {kind} was refused and not counted")
                refused += 1
            answer = terrain.scene.ask(
                "host", "many", kind=kind, address=ON_LINK[version], port=SERVER_PORT, count=CALLS
            )
            need(not answer["refused"], f"the host by {kind} to outside: {answer['refused']}")
    return refused


def _no_ports(terrain: Terrain) -> int:
    """Under another configuration: how many ports to one address were used before a flow found none in some tries.
    Those that have a port of the range before go on."""
    terrain.scene.host.stop_agent()
    ports = {"first_port": FIRST_PORT, "last_port": LAST_PORT}
    terrain.scene.host.start_agent({"tracking": {**TRACKING, "max_flows_per_pod": 0}, "masquerade": ports})
    asked = without = 0
    while not without:
        before = terrain.scene.drops("nat_no_port", GREEDY)
        terrain.ask(GREEDY, "scatter", address=BEHIND[4], first=asked + 1, count=AT_ONCE)
        without = terrain.scene.drops("nat_no_port", GREEDY) - before
        asked += AT_ONCE
    inside, _ = terrain.halves(GREEDY, protocol=1)
    used = len({flow.translated_port for flow in inside if flow.aimed_at[0] == address_key(BEHIND[4])})
    need(used + without == asked, f"{used} ports and {without} refusals for {asked} flows")
    _go_on(terrain)
    return used
