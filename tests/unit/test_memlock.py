"""What container runtimes let their containers lock, from their files and processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdmanet import memlock
from rdmanet.memlock import Limit

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max processes             63715                63715                processes
Max locked memory         {soft:<20} {hard:<20} bytes
Max address space         unlimited            unlimited            bytes
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def daemon(root: Path, pid: int, name: str, soft: str, hard: str) -> None:
    write(root / f"proc/{pid}/comm", f"{name}\n")
    write(root / f"proc/{pid}/limits", LIMITS.format(soft=soft, hard=hard))


def found(root: Path) -> dict[str, Limit]:
    return {runtime.name: runtime.limit for runtime in memlock.runtimes(root)}


def test_limits_of_a_process() -> None:
    assert memlock.parse_limits(LIMITS.format(soft="8388608", hard="unlimited")) == Limit(8 << 20, None)
    with pytest.raises(ValueError, match="locked memory"):
        memlock.parse_limits("Limit\n")


def test_daemons_hand_their_own_on(tmp_path: Path) -> None:
    assert found(tmp_path) == {}
    daemon(tmp_path, 7, "containerd", "8388608", "8388608")
    daemon(tmp_path, 8, "dockerd", "unlimited", "unlimited")
    daemon(tmp_path, 9, "crio", "65536", "65536")
    daemon(tmp_path, 10, "bash", "1", "1")
    (tmp_path / "proc/11").mkdir()  # ended just now
    assert found(tmp_path) == {
        "containerd": Limit(8 << 20, 8 << 20),
        "docker": Limit(8 << 20, 8 << 20),  # containerd starts its containers
        "cri-o": Limit(64 << 10, 64 << 10),
    }


def test_configurations_come_first(tmp_path: Path) -> None:
    daemon(tmp_path, 8, "dockerd", "1024", "1024")
    daemon(tmp_path, 9, "crio", "65536", "65536")
    write(
        tmp_path / "etc/docker/daemon.json",
        '{"default-ulimits": {"memlock": {"Name": "memlock", "Hard": -1, "Soft": 67108864}}}',
    )
    write(tmp_path / "etc/crio/crio.conf.d/10.conf", '[crio.runtime]\ndefault_ulimits = ["nofile=1:1"]\n')
    write(tmp_path / "etc/crio/crio.conf.d/20.conf", '[crio.runtime]\ndefault_ulimits = ["memlock=-1:-1"]\n')
    assert found(tmp_path) == {"docker": Limit(64 << 20, None), "cri-o": Limit(None, None)}
    assert all(runtime.limit.enough for runtime in memlock.runtimes(tmp_path))


def test_podman_has_no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "usr/bin/podman", "")
    (tmp_path / "usr/bin/podman").chmod(0o755)
    monkeypatch.setattr(memlock, "here", lambda: Limit(5, 6))
    assert found(tmp_path) == {"podman": Limit(5, 6)}
    write(tmp_path / "etc/containers/containers.conf", "[containers]\ndefault_ulimits = ['memlock=100:200']\n")
    assert found(tmp_path) == {"podman": Limit(100, 200)}


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"default-ulimits": {"nofile": {"Soft": 1, "Hard": 1}}}'])
def test_a_file_that_says_nothing_is_passed_over(tmp_path: Path, text: str) -> None:
    daemon(tmp_path, 8, "dockerd", "1024", "2048")
    write(tmp_path / "etc/docker/daemon.json", text)
    assert found(tmp_path) == {"docker": Limit(1024, 2048)}


def test_the_capability_counts_in_the_initial_user_namespace_only(tmp_path: Path) -> None:
    write(tmp_path / "self/status", "Name:\tx\nCapInh:\t0\nCapEff:\t0000000000004000\nSeccomp:\t0\n")
    write(tmp_path / "self/uid_map", "         0          0 4294967295\n")
    assert memlock.lifted(tmp_path)
    write(tmp_path / "self/uid_map", "         0       1000          1\n")
    assert not memlock.lifted(tmp_path)
    write(tmp_path / "self/uid_map", "         0          0 4294967295\n")
    write(tmp_path / "self/status", "Name:\tx\nCapEff:\t000000000000bfff\n")
    assert not memlock.lifted(tmp_path)


def test_this_process() -> None:
    own = memlock.here()
    assert str(own) in ("unlimited", f"{(own.soft_bytes or 0) >> 20} MiB", f"{(own.soft_bytes or 0) >> 10} KiB")
    assert memlock.parse_limits(Path("/proc/self/limits").read_text()) == own
