"""A kernel that can give a network namespace its own rxe device: the running one, or Debian's newest.

rxe got a UDP socket per network namespace with 7.1; with 7.3 a device can also be moved (exclusive mode).
``python -m testbed.kernel`` prints the directory of the prepared kernel.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rdmanet.errors import RdmanetError, UnavailableError
from rdmanet.model import RdmaMode
from testbed.apt import Package, PrivateApt, machine_archive
from testbed.paths import cache_directory, locked
from testbed.progress import say

#: The first kernel whose rxe works in a network namespace, and the first where it can be moved into one.
MINIMUM_SHARED = (7, 1)
MINIMUM_EXCLUSIVE = (7, 3)

_META_PACKAGE = "linux-image-amd64"
#: In the cache: what was unpacked, written when all of it is there.
_MARKER = "complete.json"


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: ``release`` as uname gives it, its image, and the directory modprobe wants."""

    release: str
    image: Path
    modules: Path


def release_number(release: str) -> tuple[int, int]:
    """Major and minor of a kernel release or package version: ``7.3.4+deb13-amd64`` is (7, 3)."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def missing_for(minimum: tuple[int, int], release: str, rxe: bool, root: bool) -> str:
    """What the running kernel lacks to give namespaces their own rxe, as a sentence; empty when nothing."""
    if release_number(release) < minimum:
        return f"the running kernel is {release}, before {minimum[0]}.{minimum[1]}"
    if not rxe:
        return f"the running kernel {release} has no module rdma_rxe"
    if not root:
        return "only root can make network namespaces and RDMA devices"
    return ""


def capable(minimum: tuple[int, int] = MINIMUM_SHARED) -> str:
    """Whether the running kernel itself can do it: empty, or the sentence that names what is missing.

    Loads rdma_rxe where it is available and not loaded yet.
    """
    release = platform.release()
    rxe = Path("/sys/module/rdma_rxe").is_dir()
    if not rxe and release_number(release) >= minimum and shutil.which("modprobe"):
        rxe = subprocess.run(["modprobe", "-q", "rdma_rxe"], check=False).returncode == 0
    return missing_for(minimum, release, rxe, os.geteuid() == 0)


def why_not_here(mode: RdmaMode) -> str:
    """Why tests in ``mode`` cannot run on the running kernel as it is; empty when they can.

    The mode is the host owner's choice (it can only change while no other network namespace exists), never ours.
    """
    missing = capable(minimum_for(mode))
    if missing:
        return missing
    if shutil.which("rdma") is None:
        return "there is no command rdma (package iproute2) to read the RDMA subsystem's mode"
    # In words: iproute2 6.1 ignores -json here.
    answer = subprocess.run(["rdma", "system"], capture_output=True, text=True, check=True).stdout
    current = namespace_mode(answer)
    return "" if current == mode.value else f"the RDMA subsystem's namespace mode here is {current}, not {mode.value}"


def namespace_mode(words: str) -> str:
    """The mode in what ``rdma system`` prints; ``unknown`` where it prints none."""
    match = re.search(r"\bnetns (shared|exclusive)\b", words)
    return match[1] if match else "unknown"


def minimum_for(mode: RdmaMode) -> tuple[int, int]:
    """The first kernel that can do rxe in namespaces in ``mode``."""
    return MINIMUM_EXCLUSIVE if mode is RdmaMode.EXCLUSIVE else MINIMUM_SHARED


def kernel_packages(versions: Callable[[str], list[Package]], image: Package) -> list[Package]:
    """The packages that make up ``image``'s kernel: its linux-* dependencies of the same version, with files.

    From 7.x the image is split into linux-binary-V, linux-modules-V and linux-base-V.
    """
    found: dict[str, Package] = {}
    waiting = [image.name]
    while waiting:
        name = waiting.pop()
        package = next((p for p in versions(name) if p.version == image.version), None)
        if name in found or package is None:
            continue
        found[name] = package
        waiting += [d for d in package.depends if re.match(r"linux-(image|binary|modules|base)-\d", d)]
    return [found[name] for name in sorted(found) if name != _META_PACKAGE]


def find_unpacked(directory: Path) -> Kernel:
    """The kernel below an unpacked directory; images lie in /boot, or beside the modules since 7.x."""
    for modules in sorted(directory.glob("usr/lib/modules/*")) + sorted(directory.glob("lib/modules/*")):
        for image in (modules / "vmlinuz", directory / "boot" / f"vmlinuz-{modules.name}"):
            if image.is_file() and (modules / "kernel").is_dir():
                return Kernel(modules.name, image, modules)
    raise UnavailableError(f"No kernel image with modules below {directory}: remove the directory and try again")


def _newest(minimum: tuple[int, int]) -> tuple[PrivateApt, Package]:
    """The newest image: stable-backports first, further suites only while exclusive mode lacks its kernel."""
    archive = machine_archive()
    best: tuple[PrivateApt, Package] | None = None
    # A mirror's alias may lag behind the suite's own name, even be out of date: both are asked.
    waiting = ["stable-backports", "testing", "sid"]
    troubles = []
    for suite in waiting:
        apt = PrivateApt(archive, (suite,))
        try:
            apt.update()
        except UnavailableError as error:
            say(f"{suite} cannot be used: {error.sentence}")
            troubles.append(f"{suite}: {error.sentence}")
            if suite == "stable-backports":
                waiting.insert(1, "stable")  # its codename leads to the backports' own name
            continue
        codename = apt.codename(suite)
        if suite in ("stable-backports", "stable") and codename != suite:
            waiting.insert(
                waiting.index(suite) + 1, codename if suite == "stable-backports" else f"{codename}-backports"
            )
        images = [image for image in apt.versions(_META_PACKAGE) if "~rc" not in image.version]
        if images and (best is None or release_number(images[0].version) > release_number(best[1].version)):
            best = (apt, images[0])
        if best is not None and not suite.startswith("stable") and release_number(best[1].version) >= MINIMUM_EXCLUSIVE:
            break
    if best is None or release_number(best[1].version) < minimum:
        newest = best[1].version if best else "none"
        raise UnavailableError(
            f"No kernel of {minimum[0]}.{minimum[1]} or later in the Debian archive {archive.uri} "
            f"(newest: {newest}); rxe in a network namespace needs one. {' '.join(troubles)}".strip()
        )
    return best


def prepare(minimum: tuple[int, int] = MINIMUM_SHARED) -> Kernel:
    """The test kernel: from the cache, else downloaded from this machine's own Debian mirror.

    Raises UnavailableError with what is missing when neither is possible.
    """
    with locked("kernel"):
        cached = [kernel for kernel in _cached() if release_number(kernel.release) >= minimum]
        if cached:
            return max(cached, key=lambda kernel: release_number(kernel.release))
        _require_x86_64()
        return _fetch(*_newest(minimum))


def prepare_distribution() -> Kernel:
    """The kernel of this machine's own Debian release, which may be older than what rxe in namespaces needs: to show
    what works there. From the cache, else downloaded; raises UnavailableError as ``prepare`` does."""
    archive = machine_archive()
    with locked("kernel"):
        _require_x86_64()
        apt = PrivateApt(archive, (archive.suite,))
        apt.update()
        images = apt.versions(_META_PACKAGE)
        if not images:
            raise UnavailableError(f"No {_META_PACKAGE} in {archive.suite} of the Debian archive {archive.uri}")
        directory = _directory(images[0])
        return find_unpacked(directory) if (directory / _MARKER).exists() else _fetch(apt, images[0])


def _cached() -> list[Kernel]:
    return [find_unpacked(marker.parent) for marker in cache_directory().glob(f"kernel-*/{_MARKER}")]


def _directory(image: Package) -> Path:
    return cache_directory() / f"kernel-{image.version}"


def _require_x86_64() -> None:
    if platform.machine() != "x86_64":
        raise UnavailableError(f"The test kernel is fetched for x86_64 only; this machine is {platform.machine()}")


def _fetch(apt: PrivateApt, image: Package) -> Kernel:
    """Download and unpack into the cache."""
    directory = _directory(image)
    shutil.rmtree(directory, ignore_errors=True)
    packages = kernel_packages(apt.versions, image)
    apt.unpack(packages, directory)
    kernel = find_unpacked(directory)
    subprocess.run(["depmod", "-b", _depmod_base(kernel.modules), kernel.release], check=True)
    marker = {"version": image.version, "packages": [f"{p.name}={p.version}" for p in packages]}
    (directory / _MARKER).write_text(json.dumps(marker, indent=1))
    say(f"kernel {kernel.release} is ready in {directory}")
    return kernel


def _depmod_base(modules: Path) -> Path:
    """depmod looks in BASE/lib/modules: make that path exist for kernels unpacked into usr/lib."""
    root = modules.parents[2]
    if root.name == "usr":
        root = root.parent
        if not (root / "lib").exists():
            (root / "lib").symlink_to("usr/lib")
    return root


def main() -> int:
    """Prepare the kernel and print its directory."""
    try:
        kernel = prepare()
    except RdmanetError as error:
        say(str(error))
        return 1
    print(kernel.modules)
    return 0


if __name__ == "__main__":
    sys.exit(main())
