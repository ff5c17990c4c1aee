"""HTTP over the agent's unix socket; the only place that maps errors to HTTP and CNI codes.

======================  =====================================================================================
``POST /v1/cni``        a CNI call as ``cni/rdmanet`` sends it; 200 with the result, else the specification's error
``GET /v1/status``      everything that ``rdmanet status`` shows, as JSON
``GET /v1/rdma``        devices, pods and leases with what they count: what ``rdmanet rdma`` shows, as JSON
``GET /v1/settled``     answers when no link is left to remove; ?timeout_s=30 at most, then 503
``GET /metrics``        Prometheus' text format
``POST /v1/swap``       puts the artifact that now lies in datapath.artifact_dir under the running traffic;
                        ?previous=1: the one that ran before
======================  =====================================================================================
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Protocol, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from rdmanet import pending
from rdmanet.attach import Attachments
from rdmanet.calls import Calls
from rdmanet.cni import (
    BODY_MAX_BYTES,
    SUPPORTED_VERSIONS,
    CniCode,
    CniError,
    Command,
    Request,
    Result,
    error_json,
    variables_of_headers,
)
from rdmanet.errors import (
    ConflictError,
    ExhaustedError,
    InputError,
    KernelError,
    NotFoundError,
    RdmanetError,
    StateError,
    UnavailableError,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How long ``GET /v1/settled`` waits unless it is told.
SETTLED_TIMEOUT_S = 30.0

#: CNI reserves codes from 100 on for plugins (specification, "Error"). docs/errors.md explains each to the people who
#: meet it.
CODE_CONFLICT = 100
CODE_EXHAUSTED = 101
CODE_UNAVAILABLE = 102
CODE_KERNEL = 103
CODE_STATE = 104
CODE_OTHER = 199

#: (exception, CNI code, HTTP status), most particular first. Where a namespace is gone nothing needs a DEL: code 3
#: says so.
_CODES: tuple[tuple[type[RdmanetError], int, int], ...] = (
    (InputError, int(CniCode.CONFIG), 400),
    (NotFoundError, int(CniCode.UNKNOWN_CONTAINER), 404),
    (ConflictError, CODE_CONFLICT, 409),
    (ExhaustedError, CODE_EXHAUSTED, 507),
    (UnavailableError, CODE_UNAVAILABLE, 503),
    (StateError, CODE_STATE, 500),
    (KernelError, CODE_KERNEL, 500),
)


def codes(error: RdmanetError) -> tuple[int, int]:
    """(CNI error code, HTTP status) of an error."""
    if isinstance(error, CniError):
        return int(error.code), 503 if error.code in (CniCode.TRY_AGAIN, CniCode.NOT_AVAILABLE) else 400
    for kind, code, status in _CODES:
        if isinstance(error, kind):
            return code, status
    return CODE_OTHER, 500


class Observer(Protocol):
    """Told of every CNI call that has ended."""

    def cni_call(self, command: str, code: int, seconds: float) -> None: ...


class Api:
    """The handlers. ``executor`` runs what blocks."""

    def __init__(
        self,
        attachments: Attachments,
        executor: Executor,
        *,
        status: Callable[[], Awaitable[dict[str, object]]],
        rdma: Callable[[], Awaitable[dict[str, object]]],
        metrics: Callable[[], bytes],
        swap: Callable[[bool], dict[str, str]],
        observer: Observer,
        pending_dir: Path,
        settled: Callable[[], Future[None]],
        calls: Calls,
        slot: Callable[[Request], Awaitable[str | None]],
    ):
        self._attachments = attachments
        self._executor = executor
        self._status = status
        self._rdma = rdma
        self._metrics = metrics
        self._swap = swap
        self._observer = observer
        self._pending = pending_dir
        self._settled = settled
        self._calls = calls
        self._slot = slot

    def application(self) -> web.Application:
        """The aiohttp application for the root-only unix socket."""
        app = web.Application(client_max_size=BODY_MAX_BYTES, middlewares=[_roots_alone, _to_the_end])
        app.router.add_post("/v1/cni", self._cni)
        app.router.add_get("/v1/status", self._get_status)
        app.router.add_get("/v1/rdma", self._get_rdma)
        app.router.add_get("/v1/settled", self._get_settled)
        app.router.add_post("/v1/swap", self._post_swap)
        app.router.add_get("/metrics", self._get_metrics)
        return app

    def metrics_application(self) -> web.Application:
        """The same metrics alone, for a loopback port where one is configured."""
        app = web.Application()
        app.router.add_get("/metrics", self._get_metrics)
        return app

    async def _get_status(self, request: web.Request) -> web.Response:
        return web.json_response(await self._status())

    async def _get_rdma(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(await self._rdma())
        except RdmanetError as error:
            _, status = codes(error)
            return web.json_response({"error": str(error)}, status=status)

    async def _get_settled(self, request: web.Request) -> web.Response:
        try:
            timeout_s = float(request.query.get("timeout_s", SETTLED_TIMEOUT_S))
        except ValueError:
            return web.json_response({"error": "timeout_s must be a number of seconds."}, status=400)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wrap_future(self._settled())
        except TimeoutError:
            sentence = f"Links are still being removed after {timeout_s:g} s; GET /v1/status says which and why."
            return web.json_response({"error": sentence}, status=503)
        except RdmanetError as error:
            _, status = codes(error)
            return web.json_response({"error": str(error)}, status=status)
        return web.json_response({})

    async def _get_metrics(self, request: web.Request) -> web.Response:
        body = await self._blocking(self._metrics)
        return web.Response(body=body, content_type="text/plain", charset="utf-8")

    async def _post_swap(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(await self._blocking(self._swap, request.query.get("previous") == "1"))
        except RdmanetError as error:
            _, status = codes(error)
            return web.json_response({"error": str(error)}, status=status)

    async def _blocking(self, function: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, functools.partial(function, *arguments))

    # CNI

    async def _cni(self, request: web.Request) -> web.Response:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            status, document = _refusal(b"", CniError("The network configuration has more than 1 MiB", CniCode.DECODE))
            return web.json_response(document, status=status)
        try:
            variables = variables_of_headers(request.headers)
        except CniError as error:
            status, document = _refusal(body, error)
        else:
            status, document = await self.call(variables, body)
        if document is None:
            return web.Response(status=status)
        return web.json_response(document, status=status)

    async def call(
        self, variables: dict[str, str], body: bytes, still_wanted: Callable[[], bool] = lambda: True
    ) -> tuple[int, dict[str, object] | None]:
        """One CNI call, from its variables and standard input: (HTTP status, what the executable prints if any).

        A DEL asks ``still_wanted`` when its turn has come: a queued one may have been superseded by an ADD.
        """
        started = time.perf_counter()
        command, code = "unknown", CODE_OTHER  # until it is known to be anything else
        try:
            call = Request.parse(variables, body)
            command = str(call.command)
            document = await self._run(call, still_wanted)
            code = 0
            return 200, document
        except RdmanetError as error:
            code, _ = codes(error)
            log.warning("%s refused with code %d: %s", command, code, error)
            return _refusal(body, error)
        finally:
            self._observer.cni_call(command, code, time.perf_counter() - started)

    async def _run(self, call: Request, still_wanted: Callable[[], bool]) -> dict[str, object] | None:
        if call.command is Command.STATUS:
            # An agent that answers is ready, as it listens only then; but its disk may be full.
            await self._blocking(self._attachments.ready)
            return None
        if call.command is Command.GC:
            async with self._calls.alone():
                valid = call.config.valid_attachments or ()
                await self._blocking(self._attachments.collect, call.config.name, valid)
            return None
        # Kubelet may take its time: nobody else waits with this call.
        slot = await self._slot(call) if call.command is Command.ADD else None
        if slot is not None:
            await self._collect_holder(slot)
        async with self._calls.of(call.container_id):
            if call.command is Command.ADD:
                return call.answer(await self._blocking(self._add, call, slot))
            if call.command is Command.CHECK:
                await self._blocking(self._attachments.check, call)
            elif still_wanted():
                await self._blocking(self._attachments.delete, call.container_id, call.ifname)
            return None

    async def _collect_holder(self, slot: str) -> None:
        """Before the ADD's own turn: nobody waits for another container's turn while having one."""
        holder = await self._blocking(self._attachments.holder, slot)
        if holder is not None:
            async with self._calls.of(holder.container_id):
                await self._blocking(self._attachments.collect_ended, holder.id)

    def _add(self, call: Request, slot: str | None) -> Result:
        if pending.superseded(self._pending, call.container_id, call.ifname):
            self._attachments.delete(call.container_id, call.ifname)
        return self._attachments.add(call, slot)


@web.middleware
async def _roots_alone(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Mode 0600 keeps others from connecting; this holds also where somebody has changed the mode."""
    sock = request.transport.get_extra_info("socket") if request.transport is not None else None
    if sock is not None and sock.family == socket.AF_UNIX:
        _, uid, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()):
            return web.json_response({"error": f"The agent answers root alone, not user {uid}."}, status=403)
    return await handler(request)


@web.middleware
async def _to_the_end(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Whoever hangs up in the middle of its body, or sends none that can be read, is no error of the agent's."""
    try:
        return await handler(request)
    except (ConnectionResetError, web.RequestPayloadError) as error:
        return web.json_response({"error": f"The body cannot be read: {error}."}, status=400)


class NotHttp(logging.Filter):
    """Leaves out what aiohttp says of requests that are no HTTP, a traceback for each: they are answered with 400, and
    a pod may send as many as it likes."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _refusal(body: bytes, error: RdmanetError) -> tuple[int, dict[str, object] | None]:
    code, status = codes(error)
    number = f"errno {error.errno}" if error.errno is not None else ""
    details = " ".join(part for part in (error.operation, error.subject, number) if part)
    return status, error_json(_version_of(body) or SUPPORTED_VERSIONS[-1], code, error.sentence, details)


def _version_of(body: bytes) -> str | None:
    """The version to answer in, also for a request that is refused: errors echo it (specification, "Error")."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    version = document.get("cniVersion") if isinstance(document, dict) else None
    return version if isinstance(version, str) else None
