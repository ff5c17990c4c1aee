"""Python's own files as read-only disks: emulated, the first pass over thousands of small files costs over 9p
three times what it costs from a disk's page cache. Everything else of the root stays on 9p.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from testbed.paths import cache_directory, locked

_BLOCK_BYTES = 4096
_LARGEST_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Tree:
    """A directory of this machine, and the ext4 image that stands for it in the guest."""

    directory: Path
    image: Path


def python_trees() -> list[Tree]:
    """The virtual environment, the standard library, and the distribution's packages; none without mke2fs."""
    mke2fs = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if mke2fs is None:
        return []
    directories = [Path(sysconfig.get_path("stdlib")), Path("/usr/lib/python3/dist-packages")]
    if sys.prefix != sys.base_prefix:
        directories.insert(0, Path(sys.prefix))
    trees = [_image(mke2fs, directory.resolve()) for directory in directories if directory.is_dir()]
    return [tree for tree in trees if tree is not None]


def _image(mke2fs: str, directory: Path) -> Tree | None:
    """The image of ``directory`` as it is now: names, sizes and times of all files are its key."""
    files, size_bytes = 0, 0
    key = hashlib.sha256()
    for parent, folders, names in os.walk(directory):
        folders.sort()
        files += 1 + len(names) + sum(Path(parent, name).is_symlink() for name in folders)
        size_bytes += _BLOCK_BYTES
        for name in sorted(names):
            status = Path(parent, name).lstat()
            size_bytes += -(-status.st_size // _BLOCK_BYTES) * _BLOCK_BYTES
            key.update(f"{parent}/{name} {status.st_size} {status.st_mtime_ns} {status.st_mode}\n".encode())
    if size_bytes > _LARGEST_BYTES:
        return None
    family = "tree-" + hashlib.sha256(str(directory).encode()).hexdigest()[:8]
    image = cache_directory() / f"{family}-{key.hexdigest()[:16]}.ext4"
    with locked(family):
        if image.is_file():
            return Tree(directory, image)
        unfinished = image.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        blocks = (size_bytes + size_bytes // 8) // _BLOCK_BYTES + files // 8 + 4096  # inodes are 256 bytes
        argv = [mke2fs, "-q", "-F", "-t", "ext4", "-O", "^has_journal,^resize_inode", "-m", "0"]
        argv += ["-b", str(_BLOCK_BYTES), "-N", str(files + 1024), "-d", str(directory), str(unfinished), str(blocks)]
        if subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode != 0:
            unfinished.unlink(missing_ok=True)
            return None  # 9p serves the directory, slower
        for old in cache_directory().glob(f"{family}-*.ext4"):
            old.unlink()  # machines that run keep theirs open
        unfinished.rename(image)
        return Tree(directory, image)
