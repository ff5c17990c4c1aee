"""The Dockerfile's image, built with podman on a Debian base that is made here too: no image registry is asked.

podman keeps the layers in the cache, in a root of its own; the machine's images and settings are never touched.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rdmanet.errors import UnavailableError
from testbed.debian import root_archive
from testbed.paths import REPOSITORY, cache_directory, locked
from testbed.pip_settings import Pip
from testbed.progress import heartbeat

NAME = "localhost/rdmanet:built"
DOCKERFILE = REPOSITORY / "Dockerfile"
#: On a busy machine, with compiler, LLVM and kernel headers to fetch.
_BUILD_TIMEOUT_S = 2400.0


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """``archive`` is for ``podman load``; sizes are of the unpacked files, as podman counts them."""

    archive: Path
    size_bytes: int
    base_bytes: int


def sources() -> list[Path]:
    """What the Dockerfile copies out of the checkout, each as a file or folder."""
    found = []
    for line in DOCKERFILE.read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from="):
            found += [REPOSITORY / word for word in words[1:-1]]
    return found


def _digest(base: Path) -> str:
    """Of all that the image is made of; a new release of what apt and pip fetch is not seen."""
    whole = hashlib.sha256(f"{base.name} {base.stat().st_size}".encode())
    for source in [DOCKERFILE, *sources()]:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file() and "__pycache__" not in path.parts:
                whole.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def build() -> BuiltImage:
    """The image, from the cache where nothing of it has changed. UnavailableError where podman, mmdebstrap or what
    they fetch is missing, with the last words."""
    if shutil.which("podman") is None:
        raise UnavailableError("podman is missing; run: make setup")
    base = root_archive()
    archive = cache_directory() / f"image-{_digest(base)}.tar"
    notes = archive.with_suffix(".json")
    with locked("image"):
        if not notes.exists():
            with tempfile.TemporaryDirectory(prefix="rdmanet-image-") as scratch, heartbeat("building the image"):
                sizes = _Builder(Path(scratch)).build(base, archive)
            for old in cache_directory().glob("image-*.*"):
                if old not in (archive, notes):
                    old.unlink()
            notes.write_text(json.dumps(sizes))
        sizes = json.loads(notes.read_text())
    return BuiltImage(archive, sizes["size"], sizes["base"])


class _Builder:
    """podman with its images in the cache, and all else in ``scratch``."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        store = cache_directory() / "podman"  # which remembers its other places: they must stay the same
        places = ["--root", str(store / "root"), "--runroot", str(store / "run"), "--tmpdir", str(store / "tmp")]
        self._podman = ["podman", *places, "--events-backend", "none"]
        (scratch / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def build(self, base: Path, archive: Path) -> dict[str, int]:
        """Writes the archive; sizes of image and base."""
        base_name = f"localhost/{base.stem}:base"
        policy = ["--signature-policy", str(self.scratch / "policy.json")]
        if base_name not in self._run("images", "--format", "{{.Repository}}:{{.Tag}}").split():
            self._run("import", *policy, str(base), base_name)
        pip = Pip.of_machine()
        (self.scratch / "pip.conf").write_text(pip.text("/etc/pip.pem"))
        (self.scratch / "pip.pem").write_bytes(pip.certificates)
        words = ["--build-arg", f"BASE={base_name}"]
        for name in ("pip.conf", "pip.pem"):
            words += ["--secret", f"id={name},src={self.scratch / name}"]
        for place in pip.places:
            words += ["--volume", f"{place}:{place}:ro"]
        # chroot: a machine where tests run may give its root less than a container wants (testbed.podman.SETTINGS).
        # docker: OCI's format has no health check.
        words += ["--isolation", "chroot", "--format", "docker", "--network", "host", "--cap-add", "CAP_SYS_ADMIN"]
        self._run("build", *policy, "--pull=never", *words, "--tag", NAME, str(REPOSITORY))
        archive.unlink(missing_ok=True)
        self._run("save", "--format", "docker-archive", "--output", str(archive), NAME)
        return {"size": self._size(NAME), "base": self._size(base_name)}

    def _size(self, name: str) -> int:
        return int(self._run("image", "inspect", "--format", "{{.Size}}", name))

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            [*self._podman, *words],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_BUILD_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise UnavailableError(f"podman {words[0]} failed: {last}", operation=words[0])
        return done.stdout.strip()
