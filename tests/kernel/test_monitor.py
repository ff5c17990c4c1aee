"""`rdmanet monitor`: drops and new flows with names, filters, who watches and who does not, floods, swaps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.container import CommandError
from testbed.monitoring import Stage, all_seen
from testbed.watching import until, watching


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage.start("monitor") as made:
        yield made


def shows(stage: Stage) -> bool:
    """Whether programs write events."""
    with stage.world.datapath() as datapath:
        node = datapath.node()
        assert node is not None
        return node.monitor


def test_every_drop_and_every_flow_is_shown_with_names(stage: Stage) -> None:
    assert not shows(stage)
    with watching(stage.world.host) as watch:
        assert shows(stage)
        assert all_seen(stage, watch, 20) == 2 * 9 * 20
        assert watch.lost == 0
    until(lambda: not shows(stage), "events are still written though nobody watches")


def test_filters(stage: Stage) -> None:
    host = stage.world.host
    frames = stage.dropped(4)
    with (
        watching(host, reason="no_endpoint") as by_reason,
        watching(host, pod="two") as by_pod,
        watching(host, pod="default/one", verdict="allowed") as by_verdict,
    ):
        stage.send([frames["not_ip"], frames["no_endpoint"], frames["fragment_early"], stage.flow(4, 5000)])
        by_reason.wait(bool, "no_endpoint was not shown")
        by_pod.wait(lambda events: any(event["verdict"] == "allowed" for event in events), "nothing of pod two")
        by_verdict.wait(lambda events: any(event["source_port"] == 25000 for event in events), "no flow of pod one")
    assert {event["reason"] for event in by_reason.events} == {"no_endpoint"}
    assert all("default/two" in (event["pod"], event["peer"]) for event in by_pod.events)
    assert {event["verdict"] for event in by_verdict.events} == {"allowed"}
    with pytest.raises(CommandError) as caught:
        stage.world.command("monitor", "--reason", "bad_luck")
    assert "There is no drop reason bad_luck" in caught.value.completed.stderr


def test_an_agent_that_died_leaves_nobody_watching(stage: Stage) -> None:
    with watching(stage.world.host) as watch:
        assert shows(stage)
        stage.world.host.kill_agent()
        watch_ended = watch.ended_within()
    assert watch_ended
    assert shows(stage)
    stage.world.start_agent()
    assert not shows(stage)


def test_the_watch_goes_on_across_swaps_and_the_previous_one_can_be_put_back(stage: Stage) -> None:
    with watching(stage.world.host) as watch:
        answer = stage.world.host.api("POST", "/v1/swap")
        assert set(answer) == {"pod", "host", "uplink"}
        stage.send([stage.dropped(6)["no_endpoint"]])
        watch.wait(lambda events: any(event.get("reason") == "no_endpoint" for event in events), "nothing is shown")
    with pytest.raises(CommandError) as caught:
        stage.world.command("datapath", "swap", "--previous")
    assert "There is no previous datapath" in caught.value.completed.stderr


def test_a_stop_ends_watches(stage: Stage) -> None:
    with watching(stage.world.host) as watch:
        assert stage.world.host.stop_agent() == 0
        assert watch.ended_within()
    stage.world.start_agent()
