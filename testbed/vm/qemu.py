"""Which QEMU to use: the installed one, or a newer one from the release's own backports, unpacked in the cache.

Before 8.1, multi-threaded emulation could run a half-patched kernel instruction: "Oops: int3" in some of the
guest's boots (seen in 1 of 35 with 7.2; QEMU 8.1 has "accel/tcg: Always lock pages before translation").
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rdmanet.errors import UnavailableError
from testbed.apt import PrivateApt, machine_archive
from testbed.paths import cache_directory, locked
from testbed.progress import say

_FIRST_SOUND = (8, 1)
_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data")


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU: the first words of its command line, and whether its emulation can use several threads."""

    words: tuple[str, ...]
    threads: bool


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor of ``qemu-system-x86_64 --version``, or of a Debian package version."""
    match = re.search(r"(?:version |^(?:\d+:)?)(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find() -> Qemu:
    """The QEMU for this machine; UnavailableError with what to install where there is none."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        raise UnavailableError(
            "There is no qemu-system-x86_64: apt-get install --no-install-recommends qemu-system-x86"
        )
    if _sound(path):
        return Qemu((path,), threads=True)
    with locked("qemu"):
        newer = _cached() or _download()
    return newer or Qemu((path,), threads=False)


def _sound(path: str) -> bool:
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return parse_version(shown.stdout) >= _FIRST_SOUND


def _cached() -> Qemu | None:
    for marker in sorted(cache_directory().glob("qemu-*/complete"), reverse=True):
        root = marker.parent
        path = root / "usr/bin/qemu-system-x86_64"
        if _sound(str(path)):  # also that every library it wants is here
            return Qemu((str(path), "-L", f"{root}/usr/share/qemu", "-L", "/usr/share/seabios"), threads=True)
    return None


def _download() -> Qemu | None:
    """A newer one from the release's backports; None, and why, where that cannot be had."""
    try:
        archive = machine_archive()
        apt = PrivateApt(archive, (f"{archive.suite}-backports",))
        apt.update()
        candidates = [p for p in apt.versions(_PACKAGES[0]) if parse_version(p.version) >= _FIRST_SOUND]
        if not candidates:
            raise UnavailableError(f"{apt.suites[0]} has no newer QEMU")
        version = candidates[0].version
        packages = [p for name in _PACKAGES for p in apt.versions(name) if p.version == version]
        root = cache_directory() / f"qemu-{version.partition(':')[2] or version}"
        shutil.rmtree(root, ignore_errors=True)
        apt.unpack(packages, root)
    except UnavailableError as error:
        say(f"{error.sentence}: going on with one emulation thread, as QEMU before 8.1 needs")
        return None
    Path(root, "complete").touch()
    return _cached()
