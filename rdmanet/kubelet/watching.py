"""The agent's word on slots, for as long as the plugin runs: ``GET /v1/slots?watch=1``, asked again when it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

log = logging.getLogger(__name__)

#: An agent says something every 5 s; one that is silent for longer hangs.
SILENCE_S = 15.0
#: An agent that is started anew answers within this: until then what it said last holds.
GRACE_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


async def watch(
    socket: Path,
    take: Callable[[dict[str, Any]], Awaitable[object]],
    lose: Callable[[str], Awaitable[object]],
) -> None:
    """Tells ``take`` each document of the agent, and ``lose`` a sentence when it is away; until it is cancelled."""
    pause_s = _FIRST_PAUSE_S
    heard_s = time.monotonic() - GRACE_S  # nothing holds yet
    while True:
        why = "it has ended the answer"
        try:
            connector = aiohttp.UnixConnector(str(socket))
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 22) as session,
                session.get("http://rdmanet/v1/slots?watch=1", raise_for_status=True) as answer,
            ):
                async for line in answer.content:
                    await take(json.loads(line))
                    heard_s, pause_s = time.monotonic(), _FIRST_PAUSE_S
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            why = str(error) or type(error).__name__
        if time.monotonic() - heard_s >= GRACE_S:
            await lose(f"the agent does not answer on {socket}: {why}")
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
