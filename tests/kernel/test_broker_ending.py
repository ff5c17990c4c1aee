"""Who waits for the broker, and the broker's work ends or somebody else waits no more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rdmanet.errors import UnavailableError
from tests.kernel.test_broker_server import Broker, Process, broker, leased, namespaces

__all__ = ["broker", "namespaces"]

WAIT_S = 30.0


async def test_whoever_waits_no_more_does_not_end_the_others(broker: Broker) -> None:
    await leased(await Process.connect(broker, 0), await Process.connect(broker, 1))
    views = list(broker.pods.views.values())
    broker.guard.may_write.clear()
    hasty = asyncio.create_task(broker.server.pod_gone(views[1].name, views[1].addresses, None))
    patient = asyncio.create_task(broker.server.pod_gone(views[0].name, views[0].addresses, None))
    await asyncio.sleep(0)  # both wait now
    hasty.cancel()
    broker.guard.may_write.set()
    async with asyncio.timeout(WAIT_S):
        await patient
    assert broker.guard.entries == {}


async def test_an_error_that_nobody_expects_leaves_nobody_waiting(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a DEL, which must not say that the addresses are free, nor the agent's end."""
    await leased(await Process.connect(broker, 0), await Process.connect(broker, 1))
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))

    def broken(entries: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(broker.guard, "set_guards", broken)
    view = broker.pods.views[broker.namespaces[1].cookie]
    async with asyncio.timeout(WAIT_S):
        for _ in range(2):
            with pytest.raises(UnavailableError, match="The broker of leases has ended"):
                await broker.server.pod_gone(view.name, view.addresses, None)
        await broker.server.stop()
    assert [str(context["exception"]) for context in contexts] == ["a fault of ours"]
