"""Work beside the calls: how it ends, and who hears of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rdmanet import background
from rdmanet.errors import UnavailableError


async def heard(work: Any, *, cancel: bool = False) -> list[UnavailableError | None]:
    """What the event loop's handler makes of a piece of work."""
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
    task = background.begin(work, "look at stones")
    if cancel:
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    return [background.failure(context) for context in contexts]


async def fails() -> None:
    raise ValueError("7")


async def test_an_error_is_told_with_its_cause() -> None:
    (failure,) = await heard(fails())
    assert failure is not None
    assert failure.operation == "look at stones"
    assert failure.sentence.startswith("The agent cannot go on without its look at stones, which ended by an error")
    assert "ValueError('7')" in failure.sentence
    assert isinstance(failure.__cause__, ValueError)


@pytest.mark.parametrize("cancel", [False, True])
async def test_an_end_is_none(cancel: bool) -> None:
    assert await heard(asyncio.sleep(1000 if cancel else 0), cancel=cancel) == []


async def test_a_thread_of_its_own() -> None:
    contexts: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: contexts.append(context))
    background.failed(loop, "counting", KeyError("one"))
    failure = background.failure(contexts[0])
    assert failure is not None
    assert failure.operation == "counting"


def test_other_errors_are_none_of_it() -> None:
    assert background.failure({"message": "a callback failed", "exception": ValueError()}) is None
