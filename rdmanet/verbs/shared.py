"""Listening and connecting with a session that every user of an event loop shares; it closes with its last user."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, overload

from rdmanet.model import IPAddress
from rdmanet.verbs.listener import Listener
from rdmanet.verbs.options import Options
from rdmanet.verbs.session import Session

if TYPE_CHECKING:
    from rdmanet.verbs.queue_pair import QueuePair
    from rdmanet.verbs.ud import Datagram

_sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Session] = weakref.WeakKeyDictionary()


def _shared_session() -> Session:
    """The loop's session, opened if need be."""
    loop = asyncio.get_running_loop()
    session = _sessions.get(loop)
    if session is None:
        session = Session()
        _sessions[loop] = session

        async def close_when_idle(session: Session = session) -> None:
            if _sessions.get(loop) is session:
                del _sessions[loop]
            await session.close()

        session.on_idle = close_when_idle
        session.start()
    return session


async def close_shared() -> None:
    """Close the running event loop's shared session with everything in it, if there is one."""
    session = _sessions.pop(asyncio.get_running_loop(), None)
    if session is not None:
        await session.close()


async def listen(service: str, *, options: Options | None = None, timeout_s: float | None = 10.0) -> Listener:
    """Session.listen of the event loop's shared session."""
    session = _shared_session()
    return await session.listen(service, options=options, timeout_s=timeout_s)


async def datagram(
    service: str | None = None, *, options: Options | None = None, timeout_s: float | None = 10.0
) -> Datagram:
    """Session.datagram of the event loop's shared session."""
    session = _shared_session()
    return await session.datagram(service, options=options, timeout_s=timeout_s)


@overload
async def connect(
    target: str,
    *,
    address: IPAddress | None = None,
    options: Options | None = None,
    timeout_s: float | None = 10.0,
) -> QueuePair: ...


@overload
async def connect(
    target: str,
    *,
    count: int,
    address: IPAddress | None = None,
    options: Options | None = None,
    timeout_s: float | None = 10.0,
) -> list[QueuePair]: ...


async def connect(
    target: str,
    *,
    count: int | None = None,
    address: IPAddress | None = None,
    options: Options | None = None,
    timeout_s: float | None = 10.0,
) -> QueuePair | list[QueuePair]:
    """Session.connect of the event loop's shared session."""
    session = _shared_session()
    if count is None:
        return await session.connect(target, address=address, options=options, timeout_s=timeout_s)
    return await session.connect(target, count=count, address=address, options=options, timeout_s=timeout_s)
