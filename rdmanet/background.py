"""Work beside the calls, which nobody waits for and which ends only when it is stopped.

What is expected to go wrong in it is handled in it. Where it ends by an error all the same, that is a fault of ours,
and an agent that went on without it would look well and not be: it ends (``rdmanet.agent``), and the one that the
service manager starts next adopts what there is.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine, Mapping
from typing import Any

from rdmanet.errors import UnavailableError

#: What tells the event loop's exception handler that such work has ended.
_WORK = "rdmanet_work"


def begin(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task for ``work``, which people know as ``name``; to be cancelled, or to end by itself without an error."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(functools.partial(_ended, name))
    return task


def _ended(name: str, task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        failed(task.get_loop(), name, error)


def failed(loop: asyncio.AbstractEventLoop, name: str, error: BaseException) -> None:
    """Work that is no task, such as a thread's, has ended by an error. On the event loop."""
    loop.call_exception_handler({"message": f"{name}: ended by an error", "exception": error, _WORK: name})


def failure(context: Mapping[str, Any]) -> UnavailableError | None:
    """Why the agent cannot go on, where this is what an exception handler is told about such work."""
    if _WORK not in context:
        return None
    error = context["exception"]
    found = UnavailableError(
        f"The agent cannot go on without its {context[_WORK]}, which ended by an error that it should have handled"
        f" ({error!r}). Pods keep their network; start the agent again, and report this with the log.",
        operation=context[_WORK],
    )
    found.__cause__ = error
    return found
