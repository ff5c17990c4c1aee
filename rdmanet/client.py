"""Asking the agent over its unix socket (urllib and http.client know TCP only; aiohttp would cost half a second)."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdmanet.errors import NotFoundError, RequestError, UnavailableError

ANSWER_TIMEOUT_S = 10.0

#: What a refusal is to the caller; everything else is UnavailableError.
_REFUSALS = {400: RequestError, 404: NotFoundError}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None):
        super().__init__("rdmanet", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def answering(
    path: Path, url: str, method: str = "GET", body: object = None, timeout_s: float | None = ANSWER_TIMEOUT_S
) -> Iterator[http.client.HTTPResponse]:
    """One request to the agent; its answer, to be read inside the block, perhaps line by line for as long as it lasts.
    ``body`` is sent as JSON. ``timeout_s`` is the longest silence; None: any.

    Raises UnavailableError when nobody answers, or it refuses; RequestError and NotFoundError for what was asked.
    """
    connection = _UnixConnection(path, timeout_s)
    try:
        try:
            sent = None if body is None else json.dumps(body).encode()
            connection.request(method, url, sent, {"Content-Type": "application/json"} if sent else {})
            answer = connection.getresponse()
            refusal = json.loads(answer.read()) if answer.status != 200 else None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _silence(path, url, method, error) from error
        if refusal is not None:
            sentence = str(refusal.get("error", refusal) if isinstance(refusal, dict) else refusal)
            raise _REFUSALS.get(answer.status, UnavailableError)(sentence, operation=method, subject=url)
        yield answer
    finally:
        connection.close()


def ask(
    path: Path, url: str, method: str = "GET", body: object = None, timeout_s: float | None = ANSWER_TIMEOUT_S
) -> dict[str, Any]:
    """One request to the agent; its JSON document. Raises as ``answering`` does."""
    with answering(path, url, method, body, timeout_s) as answer:
        try:
            document: dict[str, Any] = json.loads(answer.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _silence(path, url, method, error) from error
    return document


def _silence(path: Path, url: str, method: str, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"The agent does not answer on {path}: {error}. Start it with `rdmanet agent` (as root), or name its"
        " configuration with --config.",
        operation=method,
        subject=url,
    )
