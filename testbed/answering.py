"""The other end of `testbed.peer.Peer`: what an asyncio program inside a container does with its standard input."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rdmanet.errors import RdmanetError

#: Name (a request's "do") → what carries it out, with the request's other values.
Requests = Mapping[str, Callable[..., Awaitable[dict[str, Any]]]]


async def answer_requests(requests: Requests) -> None:
    """Carries out one request after another until the input ends; an RdmanetError or TimeoutError is an answer."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        print(json.dumps(await _answer(requests, line)), flush=True)


async def _answer(requests: Requests, line: bytes) -> dict[str, Any]:
    request = json.loads(line)
    do = requests[request.pop("do")]
    try:
        return {**await do(**request), "ok": True}
    except RdmanetError as error:
        return {"ok": False, "kind": type(error).__name__, "sentence": str(error)}
    except TimeoutError:
        return {"ok": False, "kind": "TimeoutError", "sentence": f"{line.decode().strip()} is not done in time"}
