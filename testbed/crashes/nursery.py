"""Agents forked from a process that has imported everything: importing takes four times as much as a start.

``python -m testbed.crashes.nursery`` runs on the host. For each request on its socket (standard input) it forks: the
child is ``testbed.crashes.crash_agent`` with the request's arguments, as if it had just been executed. Its own process
id, output, signals and end are what they are for one that was.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys

from testbed.container import Process
from testbed.crashes import crash_agent
from testbed.host import Host
from testbed.paths import REPOSITORY

REQUEST_BYTES = 1 << 16


class Nursery:
    """The side of whoever wants agents; ``close`` when done."""

    def __init__(self, host: Host):
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-m", __name__]
            environment = {"PYTHONUNBUFFERED": "1"}
            self._process = host.popen(argv, cwd=str(REPOSITORY), stdin=theirs.fileno(), environment=environment)

    def begin(self, arguments: list[str], output: int) -> Process:
        """A new agent, which prints to that descriptor."""
        status, writer = os.pipe()
        try:
            socket.send_fds(self._line, [json.dumps(arguments).encode()], [output, writer])
        finally:
            os.close(writer)
        _, descriptors, _, _ = socket.recv_fds(self._line, 1, 1)
        if not descriptors:
            os.close(status)
            raise RuntimeError(f"the nursery of agents has ended with {self._process.wait()}")
        return Process(["crash_agent", *arguments], descriptors[0], status, None, None)

    def close(self) -> None:
        """Ends the nursery; agents live on."""
        self._line.close()
        self._process.close()


def serve(line: socket.socket) -> list[str] | None:
    """Forks agents until nobody wants any more. In each of these: its arguments."""
    born: dict[int, tuple[int, int]] = {}  # descriptor of the process → process id, where its end is told
    while True:
        ready, _, _ = select.select([line.fileno(), *born], [], [])
        for pidfd in born.keys() & set(ready):
            pid, status = born.pop(pidfd)
            _, ended = os.waitpid(pid, 0)
            os.write(status, struct.pack("=i", os.waitstatus_to_exitcode(ended)))
            os.close(status)
            os.close(pidfd)
        if line.fileno() not in ready:
            continue
        request, descriptors, _, _ = socket.recv_fds(line, REQUEST_BYTES, 2)
        if not request:
            return None
        output, status = descriptors
        pid = os.fork()
        if pid == 0:
            for number in (1, 2):
                os.dup2(output, number)
            for descriptor in (output, status, *born, *(status for _, status in born.values())):
                os.close(descriptor)
            line.close()
            arguments: list[str] = json.loads(request)
            return arguments
        os.close(output)
        pidfd = os.pidfd_open(pid)
        born[pidfd] = pid, status
        socket.send_fds(line, [b"+"], [pidfd])


def main() -> None:
    with socket.socket(fileno=os.dup(0)) as line:
        arguments = serve(line)
    if arguments is not None:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        crash_agent.main(arguments)


if __name__ == "__main__":
    main()
