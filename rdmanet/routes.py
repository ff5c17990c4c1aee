"""HTTP for objects, events, flows and slots: what most commands, and the device plugin, ask.

=======================  ====================================================================================
``PUT /v1/objects``      {"documents": [...]}: creates and changes, all or none; {"objects": [{"kind",
                         "namespace", "name", "outcome"}]}, outcome created, configured or unchanged
``DELETE /v1/objects``   the same body, of which apiVersion, kind and metadata matter; outcome deleted or not found
``GET /v1/objects``      ?kind=&namespace=&name=: {"items": [...]}, the documents
``GET /v1/monitor``      ?pod=&reason=&verdict=: events, each a line of JSON, until the client goes
``GET /v1/slots``        slots and why they cannot be used; ?watch=1: again after each change, a line of JSON each
``GET /v1/flows``        ?pod=: tracked connections, each a line of JSON; the last line has the numbers, or an error
=======================  ====================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

from aiohttp import web

from rdmanet.api import codes
from rdmanet.connections import Connections
from rdmanet.errors import RdmanetError, RequestError
from rdmanet.monitor import TICK_S, Filter, Monitor
from rdmanet.objects.body import documents_of
from rdmanet.objects.keeping import Objects, Result
from rdmanet.objects.reading import keys
from rdmanet.objects.values import Kind
from rdmanet.slots import Slots

#: Fifty thousand services with their slices are some 70 MB.
BODY_MAX_BYTES = 256 * 1024 * 1024

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def refusing(handler: Handler) -> Handler:
    """Answers an error of ours as {"error": sentence} with its HTTP status."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except RdmanetError as error:
            return web.json_response({"error": str(error)}, status=codes(error)[1])

    return answer


class ObjectRoutes:
    """The handlers. ``executor`` runs what blocks."""

    def __init__(self, objects: Objects, executor: Executor):
        self._objects = objects
        self._executor = executor

    def add_to(self, application: web.Application) -> None:
        """Adds the routes."""
        router = application.router
        router.add_put("/v1/objects", refusing(self._put))
        router.add_delete("/v1/objects", refusing(self._delete))
        router.add_get("/v1/objects", refusing(self._get))

    async def _put(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._blocking(self._apply, await _body(request)))

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._blocking(self._remove, await _body(request)))

    async def _get(self, request: web.Request) -> web.StreamResponse:
        kind, namespace, name = (request.query.get(key) for key in ("kind", "namespace", "name"))
        if kind is not None and kind not in tuple(Kind):
            raise RequestError(f"There are no objects of this kind; it can be {', '.join(Kind)}.")
        return _json(await self._blocking(self._list, Kind(kind) if kind else None, namespace, name))

    def _apply(self, body: bytes) -> bytes:
        return _results(self._objects.apply(documents_of(body)))

    def _remove(self, body: bytes) -> bytes:
        return _results(self._objects.delete(keys(documents_of(body))))

    def _list(self, kind: Kind | None, namespace: str | None, name: str | None) -> bytes:
        # One by one: dumps of all would hold the interpreter for seconds.
        items = (json.dumps(document) for document in self._objects.documents(kind, namespace, name))
        return f'{{"items": [{", ".join(items)}]}}'.encode()

    async def _blocking(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)


async def _body(request: web.Request) -> bytes:
    """The whole body; the application's own limit is for CNI, whose bodies are small."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > BODY_MAX_BYTES:
            raise RequestError(
                f"The body has more than {BODY_MAX_BYTES // 1024 // 1024} MiB; send the documents in several requests."
            )
    return bytes(body)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


def _results(results: list[Result]) -> bytes:
    lines = (
        json.dumps({"kind": key.kind, "namespace": key.namespace, "name": key.name, "outcome": outcome})
        for key, outcome in results
    )
    return f'{{"objects": [{", ".join(lines)}]}}'.encode()


class RepairRoute:
    """``POST /v1/repair``: ?pod=namespace/name, or ?pod=node; without it all that was given up. {"left": [...]}: what
    is broken afterwards."""

    def __init__(self, ask: Callable[[str | None], Awaitable[list[dict[str, object]]]]):
        self._ask = ask

    def add_to(self, application: web.Application) -> None:
        """Adds the route."""
        application.router.add_post("/v1/repair", refusing(self._post))

    async def _post(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"left": await self._ask(request.query.get("pod"))})


class _Streams:
    """Answers that are being written: a client that reads no more must not hold up the agent's end."""

    def __init__(self) -> None:
        self._open: set[asyncio.Transport] = set()

    @contextlib.asynccontextmanager
    async def begin(self, request: web.Request) -> AsyncIterator[web.StreamResponse]:
        """An answer of lines, until the block ends or the client has gone."""
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        self._open.add(transport)
        try:
            yield response
        finally:
            self._open.discard(transport)

    def stop(self, *, stalled: bool = False) -> None:
        """Ends all at once; ``stalled``: those that wait for their clients alone."""
        for transport in self._open:
            if not stalled or transport.get_write_buffer_size():
                transport.abort()


class SlotRoute:
    """``GET /v1/slots``."""

    def __init__(self, slots: Slots):
        self._slots = slots
        self._streams = _Streams()

    def add_to(self, application: web.Application) -> None:
        """Adds the route; all answers end when the application does."""
        application.router.add_get("/v1/slots", refusing(self._get))
        application.on_shutdown.append(self._stop)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") != "1":
            return web.json_response(await self._slots.document())
        response = web.StreamResponse()
        try:
            async with (
                self._streams.begin(request) as response,
                contextlib.aclosing(self._slots.watch()) as documents,
            ):
                async for document in documents:
                    await response.write(json.dumps(document).encode() + b"\n")
        except ConnectionError:
            pass  # the client has gone
        return response

    async def _stop(self, application: web.Application) -> None:
        self._slots.stop()
        self._streams.stop(stalled=True)


class MonitorRoute:
    """``GET /v1/monitor``."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self._streams = _Streams()

    def add_to(self, application: web.Application) -> None:
        """Adds the route; all answers end when the application does."""
        application.router.add_get("/v1/monitor", refusing(self._get))
        application.on_shutdown.append(self._stop)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        watcher = await self._monitor.join(Filter.of(request.query, self._monitor.reasons))
        response = web.StreamResponse()
        try:
            async with self._streams.begin(request) as response:
                while not watcher.ended and request.transport is not None and not request.transport.is_closing():
                    taken = await watcher.take(TICK_S)
                    if taken:
                        await response.write(taken)
        except ConnectionError:
            pass  # the client has gone
        finally:
            await asyncio.shield(self._monitor.leave(watcher))
        return response

    async def _stop(self, application: web.Application) -> None:
        self._monitor.stop()
        self._streams.stop(stalled=True)


class FlowsRoute:
    """``GET /v1/flows``."""

    def __init__(self, connections: Connections):
        self._connections = connections
        self._streams = _Streams()

    def add_to(self, application: web.Application) -> None:
        """Adds the route; answers end in the middle when the application does, which clients see by the last line."""
        application.router.add_get("/v1/flows", refusing(self._get))
        application.on_shutdown.append(self._stop)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        try:
            # What is wrong with the query is answered before anything else is.
            async with contextlib.aclosing(self._connections.pages(request.query)) as pages:
                page = await anext(pages)
                async with self._streams.begin(request) as response:
                    await self._write(response, page, pages)
        except ConnectionError:
            pass  # the client has gone
        return response

    async def _write(self, response: web.StreamResponse, page: bytes, pages: AsyncIterator[bytes]) -> None:
        try:
            await response.write(page)
            async for page in pages:
                await response.write(page)
        except RdmanetError as error:
            await response.write(json.dumps({"error": str(error)}).encode() + b"\n")

    async def _stop(self, application: web.Application) -> None:
        self._streams.stop()
