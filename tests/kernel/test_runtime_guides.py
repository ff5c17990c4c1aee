"""docs/podman.md and docs/containerd.md, block by block, as a reader would type it on the host."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed import containerd as containerds
from testbed import images
from testbed import podman as podmans
from testbed.containerd import Containerd
from testbed.guide import FILES, HOST, Block, blocks
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.podman import Podman

PODMAN = blocks(REPOSITORY / "docs/podman.md")
CONTAINERD = blocks(REPOSITORY / "docs/containerd.md")
TIMEOUT_S = 60.0
#: Of a server that has been started, and a network that has been written, of which nobody has heard yet.
ATTEMPTS = 100
NOT_YET = ("refused", "NetworkReady")


class Reader:
    """Somebody who does what a page says, with the agent and the image that it takes for granted."""

    def __init__(self, host: Host, tools: Path, written: Callable[[str], None] = lambda _: None):
        self._host = host
        self._written = written
        self._tools = tools
        self.tool("rdmanet", f'exec {sys.executable} -m rdmanet "$@" --config {host._config_file()}')
        self._environment = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}

    def tool(self, name: str, line: str) -> None:
        """A command that the reader has."""
        path = self._tools / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def take(self, block: Block) -> None:
        """Carry out one block, or write its file; again while a server does not listen yet."""
        assert block.place == HOST
        if block.language in FILES:
            self._host.container.act(("mkdir", str(Path(block.path).parent)), ("write", block.path, block.text))
            self._written(block.path)
            return
        for _ in range(ATTEMPTS):
            argv = ["bash", "-euc", block.text]
            done = self._host.exec(
                argv, environment=self._environment, cwd=str(REPOSITORY), check=False, timeout_s=TIMEOUT_S
            )
            if done.returncode == 0 or not any(word in done.stderr + block.text for word in NOT_YET):
                break
        words = f"{block.name}: status {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, words
        assert block.prints(done.stdout), words


@pytest.fixture(scope="module")
def podman_reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Host.scratch("podman-guide") as host:
        host.start_agent()
        if missing := podmans.why_no_networks(host):
            pytest.skip(missing)
        podmans.prepare(host)
        reader = Reader(host, tmp_path_factory.mktemp("podman"))
        reader.tool("podman", f'exec {podmans.WRAPPER} "$@"')
        Podman(host).load(podmans.IMAGE, images.busybox_layer())
        yield reader
        Podman(host).remove_all()


@pytest.fixture(scope="module")
def containerd_reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Host.scratch("containerd-guide") as host:
        host.start_agent()
        containerds.prepare(host)
        containerd = Containerd(host)

        def written(path: str) -> None:
            """The machine's own needs are no part of the page; and the page says to restart."""
            if path == containerds.CONFIGURATION:
                text = host.path(path).read_text()
                host.container.act(("write", path, text + containerds.MACHINE))
                containerd.run()
                containerd.load_image()

        reader = Reader(host, tmp_path_factory.mktemp("containerd"), written)
        argv = f"{sys.executable} -m testbed.cri_command {containerds.SOCKET} {containerds.IMAGE}"
        reader.tool("cri", f'exec {argv} "$@"')
        yield reader
        containerd.close()


@pytest.mark.parametrize("block", PODMAN, ids=[block.name for block in PODMAN])
def test_podman(podman_reader: Reader, block: Block) -> None:
    """In the page's order. One that fails does not keep the others from being tried."""
    podman_reader.take(block)


@pytest.mark.parametrize("block", CONTAINERD, ids=[block.name for block in CONTAINERD])
def test_containerd(containerd_reader: Reader, block: Block) -> None:
    """In the page's order."""
    containerd_reader.take(block)
