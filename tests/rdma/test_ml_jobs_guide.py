"""docs/ml-jobs.md, its way without Kubernetes, block by block as a reader would type it on the host."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdmanet.model import RdmaMode
from testbed.guide import HOST, Block, blocks
from testbed.host import Host
from testbed.jobs import left
from testbed.paths import BUILD, REPOSITORY

BLOCKS = [block for block in blocks(REPOSITORY / "docs/ml-jobs.md") if block.place == HOST]
TOOLS = BUILD / "ml-jobs-guide"
#: Where the page installs to: hidden, so that the machine's own is not touched.
HIDDEN = ("/opt/cni/bin", "/usr/lib/rdmanet")
TIMEOUT_S = 240.0


class Reader:
    """Somebody who does what the page says, with `rdmanet` and `python3` as in the clone's environment."""

    def __init__(self, host: Host):
        self._host = host
        TOOLS.mkdir(parents=True, exist_ok=True)
        command = TOOLS / "rdmanet"
        # Options of `run` come before its command.
        options = f'command=$1; shift; exec {sys.executable} -m rdmanet "$command" --config {host._config_file()} "$@"'
        command.write_text(f"#!/bin/sh\n{options}\n")
        command.chmod(0o755)
        for directory in HIDDEN:
            host.container.act(("mkdir", directory), ("mount", "tmpfs", directory, "tmpfs", 0, "mode=755"))
        host.container.act(("mkdir", str(Path(host._config_file()).parent)), ("write", host._config_file(), ""))

    def take(self, block: Block) -> None:
        """Carry out one block."""
        if block.background:
            assert block.text == "rdmanet agent\n"
            self._host.start_agent({"datapath": {"artifact_dir": "/usr/lib/rdmanet/artifact"}})
            return
        environment = {
            "PATH": f"{TOOLS}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OPENBLAS_NUM_THREADS": "1",
        }
        done = self._host.exec(
            ["bash", "-euo", "pipefail", "-c", block.text],
            environment=environment,
            cwd=str(REPOSITORY),
            check=False,
            timeout_s=TIMEOUT_S,
        )
        words = f"{block.name}: status {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, words
        assert block.prints(done.stdout), words


@pytest.fixture(scope="module")
def reader(rdma_mode: RdmaMode) -> Iterator[Reader]:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    in_vm = os.environ.get("RDMANET_IN_VM") == "1"
    with Host.machine("ml-jobs-guide") if in_vm else Host.scratch("ml-jobs-guide") as host:
        yield Reader(host)
        assert left(host) == []
        if host.agent is not None:
            print(host.agent.log)
            host.stop_agent()
        host.uninstall()
        for directory in HIDDEN:
            host.container.act(("umount", directory))


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_block(reader: Reader, block: Block) -> None:
    """In the page's order. One that fails does not keep the others from being tried."""
    reader.take(block)
