"""Debian user spaces made on the spot with mmdebstrap, from the archive that this machine's apt uses."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rdmanet.errors import UnavailableError
from testbed.apt import machine_archive, machine_settings
from testbed.paths import REPOSITORY, cache_directory, locked
from testbed.pip_settings import Pip
from testbed.progress import heartbeat

TRIXIE = "trixie"
#: As Debian's own slim images leave it out.
_SLIM = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "info", "locale")]
#: How to reach the mirror; what is fetched and where it is kept are the new system's own affair.
_REACHING = re.compile(r"Acquire::(Check-|Force|Retries|https?\b)")
_TIMEOUT_S = 900.0
#: Enters a root: its own mounts in a mount namespace of its own, so that namespaces made inside have that root too.
_ENTER = """
set -e
mount --bind "$1" "$1"
cd "$1"
for place in proc sys dev; do mount --rbind "/$place" "$place"; done
for place in run tmp; do mount -t tmpfs -o mode=1777 tmpfs "$place"; done
for place in $2; do mkdir -p ".$place"; mount --rbind -o ro "$place" ".$place"; done
pivot_root . mnt
umount -l /mnt
cd "$3"
shift 3
exec "$@"
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Of the machine: how names are resolved.
_COPIED = ("etc/resolv.conf", "etc/hosts")
#: Not where the package ca-certificates writes its own.
_PIP_CERTIFICATES = "etc/pip.pem"
#: What a run makes in a checkout.
_MADE = (".venv", "build")


def root_archive(suite: str = TRIXIE) -> Path:
    """A slim root file system of the suite as a tar archive, whose apt asks the mirror that this machine's apt asks.

    From the cache, where it stays for as long as the machine's apt and these words are the same. UnavailableError
    without mmdebstrap or mirror.
    """
    if shutil.which("mmdebstrap") is None:
        raise UnavailableError("mmdebstrap is missing; run: make setup")
    archive = machine_archive()
    settings = [line for line in machine_settings() if _REACHING.match(line)]
    keyring = [f"--keyring={archive.keyring}"] if archive.keyring else []
    words = ["--quiet", "--variant=minbase", *_SLIM, *(f"--aptopt={line}" for line in settings), *keyring]
    digest = hashlib.sha256("\n".join([*words, suite, archive.uri]).encode()).hexdigest()[:16]
    made = cache_directory() / f"debian-{suite}-{digest}.tar"
    with locked(f"debian-{suite}"):
        if not made.exists():
            with (
                heartbeat(f"mmdebstrap of Debian {suite}"),
                tempfile.TemporaryDirectory(dir=cache_directory(), prefix="debian-") as scratch,
            ):
                new = Path(scratch) / "root.tar"
                argv = ["mmdebstrap", *words, suite, str(new), archive.uri]
                done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
                if done.returncode != 0:
                    raise UnavailableError(f"mmdebstrap failed: {done.stderr.strip()[-600:]}", operation="mmdebstrap")
                new.rename(made)
    return made


@dataclass(frozen=True, slots=True)
class UserSpace:
    """A root file system on the running kernel, network and devices of this machine; made by `prepare`."""

    root: Path
    pip: Pip

    @classmethod
    @contextlib.contextmanager
    def prepare(cls, suite: str = TRIXIE) -> Iterator[UserSpace]:
        """The suite's, kept in the cache with whatever was installed into it; nobody else has it meanwhile."""
        archive = root_archive(suite)
        root = archive.with_suffix(".root")
        with locked(root.name):
            if not root.exists():
                new = root.with_suffix(".new")
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                subprocess.run(["tar", "-xpf", str(archive), "-C", str(new), "--numeric-owner"], check=True)
                new.rename(root)
            pip = Pip.of_machine()
            for name in _COPIED:
                if (Path("/") / name).exists():
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(Path("/") / name, root / name)
            (root / "etc/pip.conf").write_text(pip.text(f"/{_PIP_CERTIFICATES}"))
            (root / _PIP_CERTIFICATES).write_bytes(pip.certificates)
            yield cls(root, pip)

    def copy_checkout(self, to: str) -> None:
        """This checkout as it is, without what was made in it; what an earlier run has made there stays."""
        there = self.root / to.lstrip("/")
        there.mkdir(parents=True, exist_ok=True)
        for path in there.iterdir():
            if path.name not in _MADE:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        leave = shutil.ignore_patterns(*_MADE, ".git", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(REPOSITORY, there, symlinks=True, dirs_exist_ok=True, ignore=leave)

    def run(
        self, argv: Sequence[str], *, directory: str = "/", timeout_s: float, output: int | BinaryIO | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """A command inside, to its end; it ends with this process too."""
        places = " ".join(str(path) for path in self.pip.places)
        enter = ["sh", "-c", _ENTER, "enter", str(self.root), places, directory, *argv]
        unshare = ["unshare", "--mount", "--propagation", "private", "--fork", "--kill-child", "--"]
        env = {"PATH": _PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "TERM": os.environ.get("TERM", "dumb")}
        return subprocess.run(
            [*unshare, *enter],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env=env,
            timeout=timeout_s,
            check=False,
        )
