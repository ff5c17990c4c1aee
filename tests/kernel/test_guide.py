"""docs/policies-and-services.md, block by block, as a reader would type it: on the host and in its pods."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.container import Process
from testbed.guide import HOST, Block, blocks
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.pod import Pod

BLOCKS = blocks(REPOSITORY / "docs/policies-and-services.md")
PODS = ("web-0", "client-0")
NETWORK: dict[str, Any] = {"cniVersion": "1.0.0", "name": "net", "type": "rdmanet"}
TIMEOUT_S = 60.0
#: Of a client whose server has been started, but does not listen yet.
ATTEMPTS = 50


class Reader:
    """Somebody who does what the page says, with the agent and the pods that it takes for granted."""

    def __init__(self, host: Host, tools: Path):
        self.host = host
        self._running: list[Process] = []
        self.pods = {name: Pod.create(host, name) for name in PODS}
        host.start_agent()
        for pod in self.pods.values():
            outcome = host.cni("ADD", pod, NETWORK)
            assert outcome.returncode == 0, outcome.sentence
            pod.start()
        command = tools / "rdmanet"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rdmanet "$@" --config {host._config_file()}\n')
        command.chmod(0o755)
        self._environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
        }

    def take(self, block: Block) -> None:
        """Carry out one block; again while a program that was left running does not listen yet."""
        place = self.host if block.place == HOST else self.pods[block.place]
        argv = ["bash", "-euc", block.text]
        if block.background:
            self._running.append(place.popen(argv, environment=self._environment))
            return
        for attempt in range(ATTEMPTS):
            done = place.exec(argv, environment=self._environment, check=False, timeout_s=TIMEOUT_S)
            if done.returncode == 0 or attempt + 1 == ATTEMPTS or "refused" not in done.stderr:
                break
        words = f"{block.name}: status {done.returncode}\n{done.stdout}{done.stderr}"
        words += "".join(f"\na program that was left running has ended: {p.poll()}" for p in self._running if p.poll())
        assert done.returncode == 0, words
        assert block.prints(done.stdout), words

    def close(self) -> None:
        for process in self._running:
            process.close()
        for pod in self.pods.values():
            pod.stop()
            self.host.cni("DEL", pod, NETWORK)
            pod.destroy()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Host.scratch("policy-guide") as host:
        reader = Reader(host, tmp_path_factory.mktemp("tools"))
        yield reader
        reader.close()


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_block(reader: Reader, block: Block) -> None:
    """In the page's order. One that fails does not keep the others from being tried."""
    reader.take(block)
