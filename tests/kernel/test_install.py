"""`rdmanet install` on real file systems, and a pod on the network that it has put there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.host import CNI_EXECUTABLE
from testbed.paths import REPOSITORY
from testbed.world import World, succeeded

INSTALL = [sys.executable, "-m", "rdmanet", "install", "--config", "/dev/null", "--executable", str(CNI_EXECUTABLE)]


def directories(root: Path) -> list[str]:
    return ["--bin-dir", str(root / "bin"), "--conf-dir", str(root / "net.d")]


def test_a_pod_on_the_installed_network(tmp_path: Path) -> None:
    with World.start("install") as world:
        world.host.exec([*INSTALL, *directories(tmp_path)], cwd=str(REPOSITORY))
        document = json.loads((tmp_path / "net.d/10-rdmanet.conflist").read_text())
        (plugin,) = document.pop("plugins")
        del plugin["capabilities"]  # libcni's, which hands on what they ask for
        network, executable = {**document, **plugin}, tmp_path / "bin/rdmanet"
        pod = world.pod()
        added = world.host.cni("ADD", pod, network, executable=executable)
        assert added.returncode == 0, added.sentence
        assert added.output is not None
        families = {":" in one["address"] for one in added.output["ips"]}
        assert families == {True, False}
        # A further installation is under the running pod, and takes nothing from it.
        world.host.exec([*INSTALL, *directories(tmp_path)], cwd=str(REPOSITORY))
        succeeded(world.host.cni("CHECK", pod, {**network, "prevResult": added.output}, executable=executable))
        succeeded(world.host.cni("DEL", pod, network, executable=executable))
        world.host.exec([*INSTALL, *directories(tmp_path), "--remove"], cwd=str(REPOSITORY))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("-o size=16k", "rdmanet cannot be written: No space left on device"),
        ("-o ro", "rdmanet cannot be written: Read-only file system"),
    ],
)
def test_a_file_system_that_takes_nothing_is_a_sentence(tmp_path: Path, mount: str, words: str) -> None:
    script = f'mount -t tmpfs {mount} none "$0" && "$@"; status=$?; find "$0" -mindepth 1; exit $status'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(tmp_path), *INSTALL, *directories(tmp_path)],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "call again" in done.stderr
    assert done.stdout == ""  # nothing half-written stays
