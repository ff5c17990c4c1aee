"""What GET /v1/rdma says, from what the back end, the datapath, the limits and the broker tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rdmanet.datapath.layout import Count
from rdmanet.limits import Usage
from rdmanet.model import Attachment, Backend
from rdmanet.numbers import RdmaNumbers
from tests.unit.test_store import DEVICE, wanted


@dataclass
class Reading:
    port_active: bool
    events: dict[str, int]


class World:
    """All four."""

    def __init__(self, *attachments: Attachment) -> None:
        self.attachments = {one.id: one for one in attachments}
        self.problems: dict[int, str] = {}
        self.readings: dict[int, Reading] = {one.id: Reading(True, {"sent_pkts": one.id}) for one in attachments}
        self.asked = 0

    def with_device(self) -> Mapping[int, Attachment]:
        return self.attachments

    def unhealthy(self) -> dict[int, str]:
        return self.problems

    def read(self, attachments: Sequence[Attachment], enter: object) -> dict[int, Reading]:
        self.asked += 1
        return {one.id: self.readings[one.id] for one in attachments if one.id in self.readings}

    def usage(self) -> Mapping[int, Usage]:
        return {1: Usage({"hca_handle": 1, "hca_object": 9}, {"hca_handle": None, "hca_object": 40}, {})}

    def counters(self) -> Mapping[tuple[int, str, str], Count]:
        return {(1, "from_pod", "roce"): Count(3, 300), (1, "from_pod", "ip"): Count(9, 900)}


def numbers(world: World) -> RdmaNumbers:
    return RdmaNumbers(world, world, world, world)  # type: ignore[arg-type]


def lease(connector: Attachment, listener: Attachment) -> dict[str, Any]:
    return {"lease": "3f", "connector": {"pod": str(connector.pod)}, "listener": {"pod": str(listener.pod)}}


def test_devices_of_their_own() -> None:
    one, two = (
        dataclasses.replace(wanted(n), id=n, device=dataclasses.replace(DEVICE, name=f"rxe_rn{n}", index=n))
        for n in (1, 2)
    )
    world = World(one, two)
    world.problems = {2: "its RDMA device rxe_rn2 is missing"}
    del world.readings[2]
    found = numbers(world).document([lease(one, two), lease(one, one)])
    assert [(row["device"], row["pods"], row["port"], row["events"]) for row in found["devices"]] == [
        ("rxe_rn1", [str(one.pod)], "active", {"sent_pkts": 1}),
        ("rxe_rn2", [str(two.pod)], None, {}),
    ]
    first, second = found["pods"]
    assert (first["leases"], second["leases"], first["max_leases"]) == (3, 1, one.max_leases)
    assert first["sent"] == {"packets": 3, "bytes": 300}
    assert first["received"] == {"packets": 0, "bytes": 0}
    assert first["resources"]["hca_object"] == {"used": 9, "limit": 40}
    assert (second["resources"], second["unhealthy"]) == (None, "its RDMA device rxe_rn2 is missing")
    assert [row["counted"] for row in (*found["pods"], *found["leases"])] == [True] * 4
    assert world.asked == 1


def test_a_device_that_pods_share_is_one() -> None:
    device = dataclasses.replace(DEVICE, name="host0", backend=Backend.SHARED)
    one, two = (dataclasses.replace(wanted(n), id=n, device=device) for n in (1, 2))
    world = World(one, two)
    world.readings[1] = world.readings[2] = Reading(False, {"sent_pkts": 7})
    found = numbers(world).document([lease(one, two)])
    (row,) = found["devices"]
    assert (row["pods"], row["port"], row["events"]) == ([str(one.pod), str(two.pod)], "down", {"sent_pkts": 7})
    assert [row["counted"] for row in (*found["pods"], *found["leases"])] == [False] * 3


def test_a_host_without_devices() -> None:
    nothing: dict[str, object] = {"devices": [], "pods": [], "leases": []}
    assert numbers(World()).document([]) == nothing
    assert RdmaNumbers(None, World(), World(), World()).document([]) == nothing
