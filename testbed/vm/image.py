"""The guest's initramfs: busybox, the modules in loading order, the two scripts, and one run's command."""

from __future__ import annotations

import hashlib
import lzma
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from rdmanet.errors import UnavailableError
from rdmanet.model import RdmaMode
from testbed.kernel import Kernel
from testbed.paths import cache_directory, locked

_HERE = Path(__file__).resolve().parent

#: Loaded before the root file system is there.
BOOT_MODULES = ("virtio_pci", "virtio_console", "virtio_rng", "9pnet_virtio", "9p", "overlay", "virtio_blk", "ext4")

#: Loaded before the first network namespace: what the datapath, rxe, pods and fault tests need. Anything else
#: comes by modprobe, whose directory is bound into the guest's /lib/modules.
TEST_MODULES = (
    "ib_core",
    "ib_uverbs",
    "rdma_ucm",
    "rdma_rxe",
    "veth",
    "dummy",
    "bridge",
    "ifb",
    "sch_ingress",
    "sch_netem",
    "sch_tbf",
    "cls_bpf",
    "act_bpf",
)


class ModuleTree:
    """What modprobe would load, and in which order, from depmod's files (modules.dep(5))."""

    def __init__(self, dependencies: str, builtin: str):
        self._paths: dict[str, str] = {}
        self._needs: dict[str, list[str]] = {}
        for line in dependencies.splitlines():
            path, _, needs = line.partition(":")
            self._paths[module_name(path)] = path
            self._needs[module_name(path)] = [module_name(need) for need in needs.split()]
        self._builtin = {module_name(path) for path in builtin.split()}

    def order(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """(name, path below the tree) in loading order; built-in modules are left out.

        modules.dep lists each module's closure, nearest last-needed first: reversed it is a loading order.
        """
        ordered: dict[str, str] = {}
        for wanted in names:
            name = module_name(wanted)
            if name in self._builtin:
                continue
            if name not in self._paths:
                raise UnavailableError(f"The test kernel has no module {wanted}")
            for needed in (*reversed(self._needs[name]), name):
                ordered.setdefault(needed, self._paths[needed])
        return list(ordered.items())


def module_name(path: str) -> str:
    """The kernel's name of a module file: no directory, no suffix, underscores."""
    return Path(path).name.split(".ko")[0].replace("-", "_")


def _plain(path: Path) -> bytes:
    """A module's ELF image; busybox loads nothing compressed."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=True).stdout
    return data


def _archive(directory: Path) -> bytes:
    """A directory as a newc cpio archive, owned by root."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
    listing = "\0".join(names).encode() + b"\0"
    argv = ["cpio", "--quiet", "-0", "-o", "-H", "newc", "-R", "0:0"]
    return subprocess.run(argv, input=listing, cwd=directory, capture_output=True, check=True).stdout


def _busybox() -> Path:
    path = Path(shutil.which("busybox") or "/bin/busybox")
    if not path.is_file():
        raise UnavailableError("There is no busybox: apt-get install busybox-static")
    return path


def base_image(kernel: Kernel, rdma_mode: RdmaMode) -> Path:
    """The part that is the same for every run with one kernel and RDMA mode, made once."""
    tree = ModuleTree((kernel.modules / "modules.dep").read_text(), (kernel.modules / "modules.builtin").read_text())
    order = tree.order((*BOOT_MODULES, *TEST_MODULES))
    # The mode is fixed before any namespace exists: ib_core's parameter, 1 shared, 0 exclusive.
    parameters = {
        "ib_core": f"netns_mode={int(rdma_mode is RdmaMode.SHARED)}",
        "dummy": "numdummies=0",
        "ifb": "numifbs=0",
    }
    init = (_HERE / "guest_init.sh").read_bytes()
    main = (_HERE / "guest_main.sh").read_bytes()
    busybox = _busybox()
    digest = hashlib.sha256(repr((kernel.release, order, parameters, busybox.stat().st_mtime_ns)).encode())
    digest.update(init + main)
    image = cache_directory() / f"initramfs-{digest.hexdigest()[:16]}.cpio"
    with locked("initramfs"):
        if image.is_file():
            return image
        with tempfile.TemporaryDirectory(dir=cache_directory()) as name:
            root = Path(name)
            (root / "modules").mkdir()
            lines = []
            for module, path in order:
                (root / "modules" / f"{module}.ko").write_bytes(_plain(kernel.modules / path))
                lines.append(f"{module}.ko {parameters.get(module, '')}\n")
            (root / "modules" / "order").write_text("".join(lines))
            shutil.copy(busybox, root / "busybox")
            (root / "init").write_bytes(init)
            (root / "init").chmod(0o755)
            (root / "main").write_bytes(main)
            unfinished = root / "unfinished"
            data = _archive(root)
            unfinished.write_bytes(data)
            unfinished.rename(image)
    return image


def run_image(settings: Mapping[str, str], command: str) -> bytes:
    """The part of one run: the settings that the scripts read, and the command's script."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        lines = [f"{key}={shlex.quote(value)}\n" for key, value in settings.items()]
        (root / "settings").write_text("".join(lines))
        (root / "command").write_text(command)
        return _archive(root)


def command_script(argv: list[str], directory: Path, environment: Mapping[str, str]) -> str:
    """A shell script that runs ``argv`` in ``directory`` with exactly ``environment``."""
    words = ["/usr/bin/env", "-i", *(f"{key}={value}" for key, value in environment.items()), *argv]
    return f"cd {shlex.quote(str(directory))} || exit 126\nexec {shlex.join(words)}\n"


def guest_environment() -> dict[str, str]:
    """What the command sees of this process's environment: little, so that runs are alike."""
    kept = ("CI", "PYTEST_ADDOPTS", "BCC_KERNEL_SOURCE", "COLUMNS")
    environment = {key: os.environ[key] for key in kept if key in os.environ}
    environment |= {key: value for key, value in os.environ.items() if key.startswith("RDMANET_")}
    environment |= {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "RDMANET_IN_VM": "1",
        # There is no network to verify anybody on, and aiohttp's import reads all certificates: 1.7 s emulated.
        "SSL_CERT_FILE": "/dev/null",
    }
    return environment
