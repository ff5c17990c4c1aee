"""docs/rdma.md, block by block, as a reader would type it: on the host and in the pods that it speaks of."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rdmanet.model import RdmaMode
from testbed.container import Completed, Process
from testbed.guide import HOST, Block, blocks
from testbed.host import ARTIFACT, Host, toml
from testbed.paths import BUILD, REPOSITORY
from testbed.pod import Pod, rdma_nodes
from testbed.rdma_tools import ucx_perftest

BLOCKS = blocks(REPOSITORY / "docs/rdma.md")
#: Pod → the network that it is in, by the name in its conflist.
PODS = {"train-0": "rdma", "train-1": "rdma", "small-0": "small", "web-0": "plain"}
PLAIN = {"cniVersion": "1.0.0", "name": "plain", "type": "rdmanet"}
#: Where the page says it is, and rdmanet with the test's own configuration in the place of /etc/rdmanet.
TOOLS = BUILD / "guide"
TIMEOUT_S = 120.0
#: Of a client whose server has been started, but does not listen yet.
ATTEMPTS = 20


def is_json(block: Block) -> bool:
    """Whether it is a network configuration list."""
    return block.language == "json"


def network(block: Block) -> tuple[str, dict[str, Any]]:
    """Its name, and what libcni hands to the one plugin in it."""
    document = json.loads(block.text)
    (plugin,) = document["plugins"]
    return document["name"], {"cniVersion": document["cniVersion"], "name": document["name"], **plugin}


class Reader:
    """Somebody who does what the page says: has files, an agent, pods, and programs that were left running."""

    def __init__(self, host: Host):
        self.host = host
        self.pods: dict[str, Pod] = {}
        self._running: list[tuple[Block, Process, Path]] = []
        TOOLS.mkdir(parents=True, exist_ok=True)
        self._configure({})
        command = TOOLS / "rdmanet"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rdmanet "$@" --config {TOOLS}/rdmanet.toml\n')
        command.chmod(0o755)
        # A reader has a terminal.
        _, *words = ucx_perftest()
        path = shutil.which("ucx_perftest")
        (TOOLS / "ucx_perftest").write_text(f'#!/bin/sh\nexec {path} {" ".join(words)} "$@"\n')
        (TOOLS / "ucx_perftest").chmod(0o755)

    def _configure(self, config: dict[str, Any]) -> None:
        """The page's configuration, with the artifact that `make setup` built."""
        self.config = {**config, "datapath": {"artifact_dir": str(ARTIFACT)}}
        (TOOLS / "rdmanet.toml").write_text(toml(self.config))

    def take(self, block: Block) -> None:
        """Carry out one block."""
        if is_json(block):
            # With the first network there are pods, those of later ones too: the page shows them all in one list.
            if not self.pods:
                self._attach({"plain": PLAIN, **dict(map(network, filter(is_json, BLOCKS)))})
        elif block.language == "toml":
            self._configure(tomllib.loads(block.text))
        elif (block.place, block.text) == (HOST, "rdmanet agent\n"):
            self.host.start_agent(self.config)
        elif block.background:
            self._start(block)
        else:
            self._run(block)
            self._finish()

    def _argv(self, block: Block) -> list[str]:
        return [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-euc", block.text]

    @property
    def _places(self) -> dict[str, Host | Pod]:
        return {HOST: self.host, **self.pods}

    def _attach(self, networks: dict[str, dict[str, Any]]) -> None:
        """What the runtime does with its networks: all pods of the page, ADD, then the container with its nodes."""
        for name, wanted in PODS.items():
            pod = self.pods[name] = Pod.create(self.host, name)
            outcome = self.host.cni("ADD", pod, networks[wanted])
            assert outcome.returncode == 0, outcome.sentence
        rows = {row["pod"].split("/")[-1]: row for row in self.host.api("GET", "/v1/status")["attachments"]}
        hosts = {name: rows[name]["ipv4"] for name in PODS}
        for name, pod in self.pods.items():
            device = rows[name]["device"]
            nodes = rdma_nodes(device["uverbs"], device["major"], device["minor"]) if device else ()
            pod.start(nodes, hosts=hosts)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": f"{TOOLS}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
        }

    def _start(self, block: Block) -> None:
        output = TOOLS / f"line-{block.line}.out"
        with output.open("wb") as out, output.with_suffix(".err").open("wb") as complaints:
            process = self._places[block.place].popen(
                self._argv(block), environment=self._environment(), stdout=out.fileno(), stderr=complaints.fileno()
            )
        self._running.append((block, process, output))

    @staticmethod
    def _said(output: Path) -> str:
        """What a program that was left running has printed, complaints first."""
        return output.with_suffix(".err").read_text(errors="replace") + output.read_text(errors="replace")

    def _run(self, block: Block) -> None:
        """Run it to its end: again while a program that it talks to is there but does not listen yet."""
        for attempt in range(ATTEMPTS):
            done = self._places[block.place].exec(
                self._argv(block), environment=self._environment(), check=False, timeout_s=TIMEOUT_S
            )
            waiting = [process for _, process, _ in self._running if process.poll() is None]
            if done.returncode == 0 or len(waiting) < len(self._running) or not waiting or attempt + 1 == ATTEMPTS:
                break
        self._check(block, done)

    def _check(self, block: Block, done: Completed) -> None:
        words = f"{block.name}: status {done.returncode}\n{done.stdout}{done.stderr}"
        for other, _, output in self._running:
            words += f"\n{other.name} said:\n{self._said(output)}"
        assert done.returncode == 0, words
        assert block.prints(done.stdout), words

    def _finish(self) -> None:
        """What was left running ends by itself, its client being done, and has printed what it should."""
        for block, process, output in self._running:
            status = process.wait(TIMEOUT_S)
            process.close()
            words = f"{block.name}: status {status}\n{self._said(output)}"
            assert status == 0, words
            assert block.prints(output.read_text(errors="replace")), words
        self._running.clear()

    def close(self) -> None:
        for _, process, _ in self._running:
            process.close()
        for pod in self.pods.values():
            pod.stop()
            self.host.cni("DEL", pod, PLAIN)
            pod.destroy()


@pytest.fixture(scope="module")
def reader(rdma_mode: RdmaMode) -> Iterator[Reader]:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    in_vm = os.environ.get("RDMANET_IN_VM") == "1"
    with Host.machine("guide") if in_vm else Host.scratch("guide") as host:
        reader = Reader(host)
        yield reader
        if host.agent is not None:
            print(host.agent.log)
        reader.close()
        if host.agent is not None:
            host.stop_agent()
        host.uninstall()


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_block(reader: Reader, block: Block) -> None:
    """In the page's order. One that fails does not keep the others from being tried."""
    reader.take(block)
