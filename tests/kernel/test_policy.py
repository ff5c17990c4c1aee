"""Network policies through the agent: changes bite, what is allowed goes on, and a restart forgets nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.policies import CLIENT, FRIEND, SERVER, changes, labelled, pods, policy
from testbed.services import FAMILIES, TARGET_PORT, Scene

#: A denied datagram is not answered for so long; where one is allowed the answer comes in less than a millisecond.
QUIET_S = 1.0


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene.start("policy", (SERVER, CLIENT, FRIEND)) as scene:
        yield scene


def refused(scene: Scene, place: str, version: int) -> dict[str, int]:
    """Of one question by UDP."""
    address = scene.addresses[SERVER][version]
    answer = scene.ask(place, "many", kind="udp", address=address, port=TARGET_PORT, count=1, wait_s=QUIET_S)
    found: dict[str, int] = answer["refused"]
    return found


def test_changes_bite_and_allowed_connections_go_on(scene: Scene) -> None:
    felt = changes(scene, ("policy", "pod's labels", "namespace's labels", "egress"))
    assert len(felt) == 8


def test_a_restart_under_a_policy_breaks_nothing_and_allows_nothing(scene: Scene) -> None:
    scene.put(
        labelled(SERVER, app=SERVER),
        labelled(FRIEND, role="friend"),
        labelled(CLIENT, app=CLIENT),
        policy("server", pods(role="friend")),
        policy("client", pods(app=SERVER), selects=CLIENT, direction="egress"),
    )
    for version in FAMILIES:
        scene.ask(FRIEND, "open", id="kept", kind="tcp", address=scene.addresses[SERVER][version], port=TARGET_PORT)
        before = scene.drops("policy_ingress", SERVER)
        assert refused(scene, CLIENT, version) == {"ETIMEDOUT": 1}
        assert scene.drops("policy_ingress", SERVER) > before
        scene.host.stop_agent()
        assert scene.ask(FRIEND, "say", id="kept")["name"] == SERVER, "without an agent"
        scene.host.start_agent()
        assert scene.ask(FRIEND, "say", id="kept")["name"] == SERVER
        scene.ask(FRIEND, "close", id="kept")
        assert refused(scene, CLIENT, version) == {"ETIMEDOUT": 1}
        assert refused(scene, FRIEND, version) == {}
        assert refused(scene, "host", version) == {}, "the node always may"


def test_status_says_who_selects_a_pod(scene: Scene) -> None:
    rows = {row["pod"]: row for row in scene.host.api("GET", "/v1/status")["attachments"]}
    said = rows[f"default/{SERVER}"]["policy"]
    assert said["labels"] == {"app": SERVER}
    assert [name.rpartition("/")[2] for name in said["policies"]["ingress"]] == ["server"]
    assert said["policies"]["egress"] == []
    assert rows[f"default/{FRIEND}"]["policy"]["policies"] == {"ingress": [], "egress": []}
