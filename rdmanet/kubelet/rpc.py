"""gRPC by the tables of ``messages``: handlers for a server, and calls for a client, over unix sockets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The library's own log would tell each end of a connection, past ours; it is read when it is imported first.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
from grpc import StatusCode as Code
from grpc.aio import AioRpcError as Refusal

from rdmanet.kubelet.messages import MESSAGE_MAX_BYTES, SERVICES, Method, message

__all__ = ["Code", "Refusal", "call", "channel", "handlers", "server"]

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    # Kubelet is away for seconds when it restarts; gRPC's own pauses grow to minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)


def channel(socket: Path, *more: tuple[str, int]) -> Any:
    """A channel to a unix socket, to be used as an asynchronous context; ``more`` are further arguments of gRPC's."""
    # By default :authority is the socket's path, which servers written in Go may refuse.
    return grpc.aio.insecure_channel(
        f"unix:{socket}", options=(*_OPTIONS, ("grpc.default_authority", "localhost"), *more)
    )


def server() -> Any:
    """A server without services yet."""
    return grpc.aio.server(options=_OPTIONS)


def handlers(service: str, methods: Mapping[str, Any]) -> Any:
    """A server's handlers of a service: a coroutine function per method, an asynchronous generator where it streams.

    KeyError where one is missing.
    """
    made = {name: _handler(service, method, methods[name]) for name, method in SERVICES[service].items()}
    return grpc.method_handlers_generic_handler(service, made)


def _handler(service: str, method: Method, work: Any) -> Any:
    request, response = _of(service, method)
    make = grpc.unary_stream_rpc_method_handler if method.streams else grpc.unary_unary_rpc_method_handler
    return make(work, request_deserializer=request.FromString, response_serializer=response.SerializeToString)


def call(opened: Any, service: str, name: str) -> Any:
    """A client's method on a channel: called with the request, it is awaited, or iterated where it streams."""
    method = SERVICES[service][name]
    request, response = _of(service, method)
    make = opened.unary_stream if method.streams else opened.unary_unary
    return make(
        f"/{service}/{name}", request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )


def _of(service: str, method: Method) -> tuple[Any, Any]:
    package = service.partition(".")[0]
    return message(package, method.request), message(package, method.response)
