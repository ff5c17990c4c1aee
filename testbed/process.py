"""What a process has, by proc(5)."""

from __future__ import annotations

import os
from pathlib import Path


def rss_bytes(pid: int | str = "self") -> int:
    """A process's resident memory (proc(5), statm)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int | str = "self") -> int:
    """How many a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
