"""Executes CNI plugins as a container runtime does, and takes each call's time. Standard library only.

Runs inside a scratch host, so that nothing but the plugin lies between the two readings of the clock: posix_spawn, the
configuration on standard input, the result on standard output, the end seen through a pidfd. Requests are lines of
JSON on standard input, answers lines on standard output.

``{"do": "call", "chains": [[CALL...]...], "at_once": N, "settled": PATH or null}`` runs the calls of each chain one
after another, and N chains at a time. A CALL is ``{"argv", "environment", "input", "previous"}``: input is an object,
and ``previous`` puts the result of the call before it into it as prevResult. Answered by ``{"chains":
[[{"elapsed_s", "status", "output"}...]...], "wall_s", "settled_s"}``; ``settled_s`` is when the agent at PATH said that
nothing is left to remove, from the start of the first call as wall_s is (without PATH: wall_s).
``{"do": "settings", "netns": [PATH...], "values": {FILE: TEXT}}`` writes sysctls inside network namespaces, and here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import socket
import sys
import time
from typing import Any

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h; os.setns exists from Python 3.12 only
SETTLE_TIMEOUT_S = 120.0


class Chain:
    """Calls one after another; one of them runs."""

    def __init__(self, calls: list[dict[str, Any]]):
        self.results: list[dict[str, Any]] = []
        self._calls = calls
        self._process = 0
        self._output = -1
        self._started_s = 0.0

    def start(self) -> int:
        """Starts the next call; a pidfd that is readable when it has ended."""
        call = self._calls[len(self.results)]
        document = dict(call["input"])
        if call.get("previous") and self.results:
            document["prevResult"] = json.loads(self.results[-1]["output"] or "null")
        # Files in memory: the plugin reads and writes them as pipes, and nobody has to serve it meanwhile.
        source, self._output = os.memfd_create("stdin"), os.memfd_create("stdout")
        os.write(source, json.dumps(document).encode())
        os.lseek(source, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, source, 0), (os.POSIX_SPAWN_DUP2, self._output, 1)]
        self._started_s = time.monotonic()
        self._process = os.posix_spawn(call["argv"][0], call["argv"], call["environment"], file_actions=actions)
        os.close(source)
        return os.pidfd_open(self._process)

    def end(self, ended_s: float) -> bool:
        """Keeps the call's result; whether there is another one."""
        _, status = os.waitpid(self._process, 0)
        os.lseek(self._output, 0, os.SEEK_SET)
        with os.fdopen(self._output, "rb") as file:
            output = file.read().decode(errors="replace")
        self.results.append(
            {
                "elapsed_s": ended_s - self._started_s,
                "status": os.waitstatus_to_exitcode(status),
                "output": output,
            }
        )
        return self.results[-1]["status"] == 0 and len(self.results) < len(self._calls)


def call(request: dict[str, Any]) -> dict[str, Any]:
    """All chains, so many at a time."""
    chains = [Chain(calls) for calls in request["chains"]]
    waiting = list(reversed(chains))
    running: dict[int, Chain] = {}
    poll = select.poll()

    def start(chain: Chain) -> None:
        descriptor = chain.start()
        running[descriptor] = chain
        poll.register(descriptor, select.POLLIN)

    began_s = time.monotonic()
    while waiting or running:
        while waiting and len(running) < request["at_once"]:
            start(waiting.pop())
        ended = poll.poll()
        ended_s = time.monotonic()
        for descriptor, _ in ended:
            chain = running.pop(descriptor)
            poll.unregister(descriptor)
            os.close(descriptor)
            if chain.end(ended_s):
                start(chain)
    wall_s = time.monotonic() - began_s
    if request["settled"]:
        settle(request["settled"])
    return {
        "chains": [chain.results for chain in chains],
        "wall_s": wall_s,
        "settled_s": time.monotonic() - began_s if request["settled"] else wall_s,
    }


def settle(path: str) -> None:
    """Returns when the agent has nothing left to remove (GET /v1/settled); OSError when it does not say so."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SETTLE_TIMEOUT_S)
        connection.connect(path)
        connection.sendall(b"GET /v1/settled HTTP/1.1\r\nHost: rdmanet\r\nConnection: close\r\n\r\n")
        answer = b""
        while more := connection.recv(65536):
            answer += more
    if answer.split(b" ", 2)[1:2] != [b"200"]:
        raise OSError(f"the agent does not say whether all is removed: {answer[:200]!r}")


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Writes files below /proc/sys/net in each of the namespaces and in the own one."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    for path in [*request["netns"], ""]:
        descriptor = os.open(path, os.O_RDONLY) if path else os.dup(home)
        if libc.setns(descriptor, CLONE_NEWNET) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"enter {path}: {os.strerror(number)}")
        os.close(descriptor)
        for file, text in request["values"].items():
            with open(file, "w", encoding="ascii") as handle:  # noqa: PTH123 - pathlib would double the start time
                handle.write(text)
    os.close(home)
    return {}


def main() -> None:
    gc.disable()  # a collection in the middle of a call would be its time
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = call(request) if request["do"] == "call" else settings(request)
        except OSError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        gc.collect()


if __name__ == "__main__":
    main()
