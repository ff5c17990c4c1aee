"""Lets a program in one pod start commands in others, as `kubectl exec` or ssh do for MPI's launchers.

A socket in the first pod's /run; `testbed/launch_agent.py` is what the program there runs instead of ssh.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from testbed import launch_agent
from testbed.container import Process
from testbed.container_init import receive
from testbed.pod import Pod

AGENT = (sys.executable, "-I", "-S", "-E", str(Path(launch_agent.__file__)))


class Launcher:
    """Serves `first` until it is closed; `environments` are added to what is started in each pod, by its name."""

    def __init__(self, first: Pod, pods: Sequence[Pod], environments: Mapping[str, Mapping[str, str]]):
        self._pods = {pod.name: pod for pod in pods}
        self._environments = environments
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"/proc/{first.running.pid}/root{launch_agent.SOCKET}")
        self._listener.listen()
        self._lock = threading.Lock()
        self._ending = False
        self._processes: list[Process] = []
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._serve, name="launcher")
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._ending:
                connection.close()
                return
            self._threads.append(threading.Thread(target=self._answer, args=(connection,), name="launched"))
            self._threads[-1].start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            data, descriptors = receive(connection)
            if len(descriptors) != len(("stdin", "stdout", "stderr")):
                return  # `close` woke the listener, or somebody else knocked
            try:
                request = json.loads(data)
                process = self._start(request["pod"], request["command"], descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            if process is None:
                connection.send(json.dumps({"sentence": f"there is no pod {request['pod']} here"}).encode())
                return
            status = process.wait(None)
            with contextlib.suppress(BrokenPipeError):  # whoever asked does not wait any more
                connection.send(json.dumps({"status": status if status >= 0 else 128 - status}).encode())

    def _start(self, name: str, command: str, descriptors: list[int]) -> Process | None:
        pod = self._pods.get(name)
        if pod is None:
            return None
        stdin, stdout, stderr = descriptors
        environment = self._environments.get(name)
        process = pod.popen(["sh", "-c", command], stdin=stdin, stdout=stdout, stderr=stderr, environment=environment)
        with self._lock:
            self._processes.append(process)
            if self._ending:
                process.signal(signal.SIGKILL)
        return process

    def close(self) -> None:
        """End what it has started, and stop; idempotent."""
        with self._lock:
            if self._ending:
                return
            self._ending = True
            for process in self._processes:
                process.signal(signal.SIGKILL)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wake:
            wake.connect(self._listener.getsockname())
        self._thread.join()
        Path(self._listener.getsockname()).unlink(missing_ok=True)
        self._listener.close()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.close()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
