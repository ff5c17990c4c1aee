"""Every drop reason on a live host, as `rdmanet monitor` shows it and as metrics count it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.provoking import Provoker, check, provoked
from testbed.watching import watching


@pytest.fixture(scope="module")
def provoker() -> Iterator[Provoker]:
    with Provoker.start("reasons") as made:
        yield made


def test_every_reason_is_shown_with_names(provoker: Provoker) -> None:
    host = provoker.stage.world.host
    with watching(host) as watch:
        for version in (4, 6):
            provoker.provoke(version)
        watch.wait(lambda events: provoked(provoker, events), "not everything is shown")
        check(provoker.expected, watch.events)
        assert watch.lost == 0
    shown = {reason for reason, *_ in provoker.expected}
    provoker.begin_second_life()
    with watching(host) as watch:
        provoker.expected.clear()
        provoker.provoke_second()
        watch.wait(lambda events: provoked(provoker, events), "not everything is shown")
        check(provoker.expected, watch.events)
        assert watch.lost == 0
    shown |= {reason for reason, *_ in provoker.expected}
    with provoker.datapath() as datapath:
        assert set(datapath.drop_reasons) - shown == {"no_node"}
