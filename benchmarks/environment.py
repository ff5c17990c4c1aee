"""What a figure depends on: kernel, processors, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from testbed.paths import REPOSITORY

#: Debian packages whose versions a figure depends on.
PACKAGES = (
    "containernetworking-plugins",
    "iptables",
    "ipvsadm",
    "perftest",
    "rdma-core",
    "rdmacm-utils",
    "python3-pyverbs",
    "qemu-system-x86",
)


def describe() -> dict[str, Any]:
    """The environment of this process; what cannot be found is absent or empty, never an error."""
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processor": _after_colon(Path("/proc/cpuinfo"), "model name"),
        "processors": os.cpu_count() or 0,
        "memory_mb": int(_after_colon(Path("/proc/meminfo"), "MemTotal").split()[0]) // 1024,
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "packages": _package_versions(),
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's commit, with ``+`` where files differ from it; empty outside a checkout."""
    revision = _output("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD")
    changed = revision and _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return revision + ("+" if changed else "")


def _package_versions() -> dict[str, str]:
    shown = _output("dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\n", *PACKAGES)
    rows = [line.split() for line in shown.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 3 and row[2] == "installed"}


def _output(*argv: str) -> str:
    """A command's output; empty where it does not exist. Unknown packages make dpkg-query fail and still print."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _after_colon(file: Path, name: str) -> str:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
