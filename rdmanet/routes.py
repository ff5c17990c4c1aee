"""HTTP for objects: what ``rdmanet apply``, ``get`` and ``delete`` ask.

=======================  ====================================================================================
``PUT /v1/objects``      {"documents": [...]}: creates and changes, all or none; {"objects": [{"kind",
                         "namespace", "name", "outcome"}]}, outcome created, configured or unchanged
``DELETE /v1/objects``   the same body, of which apiVersion, kind and metadata matter; outcome deleted or not found
``GET /v1/objects``      ?kind=&namespace=&name=: {"items": [...]}, the documents
=======================  ====================================================================================
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

from aiohttp import web

from rdmanet.api import codes
from rdmanet.errors import RdmanetError, RequestError
from rdmanet.monitor import TICK_S, Filter, Monitor
from rdmanet.objects.body import documents_of
from rdmanet.objects.keeping import Objects, Result
from rdmanet.objects.reading import keys
from rdmanet.objects.values import Kind

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


class MonitorRoute:
    """``GET /v1/monitor``: ?pod=&reason=&verdict=: events, each a line of JSON, until the client goes."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor

    def add_to(self, application: web.Application) -> None:
        """Adds the route; all answers end when the application does."""
        application.router.add_get("/v1/monitor", refusing(self._get))
        application.on_shutdown.append(self._stop)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        watcher = await self._monitor.join(Filter.of(request.query, self._monitor.reasons))
        try:
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
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
