"""Container images made on the spot, from this machine's own programs: no registry is asked."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

from rdmanet.errors import UnavailableError

#: Debian's busybox-static.
BUSYBOX = "busybox"
APPLETS = ("sh", "cat", "echo", "hostname", "httpd", "ip", "ls", "mkdir", "nc", "ping", "sleep", "true", "wget")
#: As Debian's merged /usr has them.
USR_LINKS = ("bin", "sbin", "lib", "lib64")


def _add(tar: tarfile.TarFile, path: str, *, content: bytes = b"", kind: bytes = tarfile.REGTYPE, to: str = "") -> None:
    """A member whose bytes depend on nothing but the arguments."""
    member = tarfile.TarInfo(path)
    member.type = kind
    member.mode = 0o755
    member.linkname = to
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def busybox() -> Path:
    """The static busybox; UnavailableError without one."""
    found = shutil.which(BUSYBOX)
    if found is None:
        raise UnavailableError("busybox is missing; install busybox-static")
    return Path(found).resolve()


def busybox_layer() -> bytes:
    """A root file system of busybox and its links, as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for directory in ("bin", "etc", "proc", "sys", "dev", "tmp"):
            _add(tar, directory, kind=tarfile.DIRTYPE)
        _add(tar, "bin/busybox", content=busybox().read_bytes())
        for applet in APPLETS:
            _add(tar, f"bin/{applet}", kind=tarfile.SYMTYPE, to="busybox")
    return buffer.getvalue()


def usr_layer() -> bytes:
    """A root file system of nothing but places for the machine's own /usr (``-v /usr:/usr:ro``)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for directory in ("usr", "etc", "proc", "sys", "dev", "tmp", "run"):
            _add(tar, directory, kind=tarfile.DIRTYPE)
        for link in USR_LINKS:
            _add(tar, link, kind=tarfile.SYMTYPE, to=f"usr/{link}")
    return buffer.getvalue()


def oci_archive(layer: bytes, name: str, command: tuple[str, ...], labels: Mapping[str, str] | None = None) -> bytes:
    """An image of one layer as an OCI archive, which `ctr image import` and `podman load` read."""
    blobs: dict[str, bytes] = {}

    def blob(content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"digest": f"sha256:{digest}", "size": len(content)}

    vendor = "application/vnd.oci.image"
    below = {"mediaType": f"{vendor}.layer.v1.tar", **blob(layer)}
    config = {
        "architecture": _architecture(),
        "os": "linux",
        "config": {"Cmd": list(command), "Env": ["PATH=/bin:/usr/bin:/usr/sbin"], "Labels": dict(labels or {})},
        "rootfs": {"type": "layers", "diff_ids": [below["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{vendor}.manifest.v1+json",
        "config": {"mediaType": f"{vendor}.config.v1+json", **blob(json.dumps(config).encode())},
        "layers": [below],
    }
    names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                "mediaType": f"{vendor}.manifest.v1+json",
                **blob(json.dumps(manifest).encode()),
                "annotations": names,
            }
        ],
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        _add(tar, "oci-layout", content=b'{"imageLayoutVersion": "1.0.0"}')
        _add(tar, "index.json", content=json.dumps(index).encode())
        for path, content in blobs.items():
            _add(tar, path, content=content)
    return buffer.getvalue()


def _architecture() -> str:
    """As Go names it."""
    import platform

    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
