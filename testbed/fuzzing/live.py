"""A running agent: bytes on its own socket, and on the lease socket of a pod. It lives, says no, and stays its size.

What an agent reaches cannot be seen from here; seeds and what is answered otherwise than before guide the search.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from rdmanet.netlink import namespace
from testbed.adversary import TEXT, Line, frame
from testbed.fuzzing import executable, parsers
from testbed.fuzzing.search import Failure, Places, Target
from testbed.host import SOCKET, Host
from testbed.pod import Pod
from testbed.process import descriptors, rss_bytes

TIMEOUT_S = 30.0
#: Half a request is not answered before its end.
SILENT_S = 0.2
ANSWER_BYTES = 4096
#: By which the agent may have grown after thousands of inputs, all of them together: what one of 64 KiB kept would be.
GROWN_BYTES = 24 << 20
#: The last connections may be open still.
SPARE_DESCRIPTORS = 8
#: Inputs by which a pod's connection is used before there is a new one.
PER_LINE = 40
#: What is answered. 500, 503 and 507 are what the kernel, RDMA and the ranges refuse; a fault of the agent's own leaves
#: a traceback in its log.
STATUSES = {200, 204, 400, 401, 403, 404, 405, 408, 409, 411, 413, 414, 415, 417, 426, 431, 500, 501, 503, 505, 507}

#: What comes before an answer where the request asks for it (RFC 9110, section 10.1.1).
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_WORD = re.compile(rb"[a-z_]{3,}")


class Watched:
    """An agent that is looked at after each input."""

    def __init__(self, host: Host):
        assert host.agent is not None
        self._host, self._agent = host, host.agent
        self._read = 0
        self._rss = 0
        self._descriptors = 0

    def warm(self) -> None:
        """From now on its size counts."""
        pid = self._agent.process.pid
        self._rss, self._descriptors = rss_bytes(pid), descriptors(pid)

    def look(self) -> None:
        """Failure where it has ended, or its log has a traceback."""
        if self._agent.process.poll() is not None:
            raise Failure(f"the agent ended with {self._agent.process.poll()}: {self._agent.log[-500:]}")
        path = Path(self._agent._log.name)
        if path.stat().st_size > self._read:
            with path.open("rb") as log:
                log.seek(self._read)
                new = log.read()
            self._read += len(new)
            if b"Traceback" in new:
                raise Failure(f"a traceback in the agent's log: {new[-1500:].decode(errors='replace')}")

    def grown(self) -> tuple[int, int]:
        """Bytes and descriptors since ``warm``."""
        pid = self._agent.process.pid
        return rss_bytes(pid) - self._rss, descriptors(pid) - self._descriptors


def _http_seeds() -> list[bytes]:
    gets = (
        "status",
        "rdma",
        "settled?timeout_s=0.5",
        "objects",
        "objects?kind=Pod",
        "slots",
        "flows?limit=2",
        "monitor",
    )
    found = [f"GET /v1/{path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for path in gets]
    found += [
        b"GET /metrics HTTP/1.0\r\n\r\n",
        b"POST /v1/repair?pod=node HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    ]
    document = json.dumps(
        {"documents": [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}]}
    ).encode()
    for method in ("PUT", "DELETE"):
        found.append(_request(method, "/v1/objects", {}, document))
    for command in executable.COMMANDS[:5]:
        headers = {
            "CNI-Command": command,
            "CNI-ContainerID": "c1",
            "CNI-IfName": "eth0",
            "CNI-NetNS": "/run/netns/none",
        }
        body = {**executable.CONFIGURATION, "prevResult": executable.RESULT, "cni.dev/valid-attachments": []}
        found.append(_request("POST", "/v1/cni", headers, json.dumps(body).encode()))
    return found


def _request(method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: a", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _repaired(data: bytes) -> bytes:
    """With the length that its body has: otherwise hardly a body would be read."""
    head, blank, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body)]) + blank + body


def http(watched: Watched, host: Host) -> Target:
    """The agent's own socket."""
    path = str(host.path(SOCKET))
    count = 0

    def run(data: bytes) -> Places:
        nonlocal count
        count += 1
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(TIMEOUT_S)
            line.connect(path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not hear everything
                line.sendall(_repaired(data) if count % 5 else data)
            answer = _answer(line)
        watched.look()
        if not answer:
            return set()
        words = answer.split(b" ", 2)
        if len(words) < 2 or not words[1].isdigit() or int(words[1]) not in STATUSES:
            raise Failure(f"the answer begins with {answer[:100]!r}")
        return {(words[1], *_gist(answer))}

    tokens = [
        *executable.TOKENS,
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"/v1/",
        b"?pod=",
        b"nan",
    ]
    tokens += [b"timeout_s=", b"limit=", b"Upgrade: websocket\r\n", b"Connection: upgrade\r\n", b"HTTP/1.0", b"inf"]
    return Target("HTTP bodies", _http_seeds(), run, tokens)


def _answer(line: socket.socket) -> bytes:
    """Its beginning; nothing where the request has no end."""
    answer = _heard(line)
    while answer.startswith(CONTINUE):
        answer = answer.removeprefix(CONTINUE) or _heard(line)
    return answer


def _heard(line: socket.socket) -> bytes:
    line.settimeout(SILENT_S)
    with contextlib.suppress(ConnectionResetError):
        try:
            return line.recv(ANSWER_BYTES)
        except TimeoutError:
            line.shutdown(socket.SHUT_WR)
            line.settimeout(TIMEOUT_S)
            return line.recv(ANSWER_BYTES)
    return b""


def _gist(answer: bytes) -> Places:
    """What tells one answer from another: its first words, without what it repeats of the input."""
    return {b" ".join(_WORD.findall(answer.partition(b"\r\n\r\n")[2] or answer)[:3])}


@contextlib.contextmanager
def leases(watched: Watched, host: Host, pod: Pod) -> Iterator[Target]:
    """The pod's lease socket, from inside its network namespace."""
    descriptor = os.open(host.path(pod.netns), os.O_RDONLY)
    try:
        yield _leases(watched, lambda: namespace.run_inside(descriptor, Line))
    finally:
        os.close(descriptor)


def _leases(watched: Watched, dial: Callable[[], Line]) -> Target:
    line: Line | None = None
    count = 0
    hello = parsers.lease_messages()[0]

    def run(data: bytes) -> Places:
        nonlocal line, count
        count += 1
        if line is None or count % PER_LINE == 0:
            if line is not None:
                line.close()
            line = dial()
            line.ask(json.loads(hello))  # answered, whatever there was before
        try:
            if count % 5:
                line.send_raw(frame(data[:60_000], TEXT))
            else:
                line.send_raw(data)
            line._socket.setblocking(False)
            answer = line._socket.recv(1 << 16)
        except BlockingIOError:
            answer = b"?"
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        finally:
            line._socket.settimeout(TIMEOUT_S)
        if not answer:
            line.close()
            line = None
        watched.look()
        return _gist(answer)

    messages = [text.encode() for text in parsers.lease_messages()]
    frames = [frame(text) for text in messages[:2]] + [frame(b"", 9), frame(b"\x03\xe8", 8), b"\x01\x80\0\0\0\0"]
    return Target("lease socket", [*messages, *frames], run, [b'"type"', b'"id"', b"\x81\xfe", b"\x00\xff" * 4])
