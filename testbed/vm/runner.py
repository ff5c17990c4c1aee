"""Boots QEMU, passes the command's output through as it comes, and brings its exit status back."""

from __future__ import annotations

import functools
import itertools
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rdmanet.model import RdmaMode
from testbed import kernel as kernels
from testbed.kernel import Kernel
from testbed.paths import BUILD, REPOSITORY
from testbed.progress import say
from testbed.vm.accelerator import hardware_works
from testbed.vm.image import base_image, command_script, guest_environment, run_image
from testbed.vm.machine import GuestFailure, Machine
from testbed.vm.qemu import Qemu
from testbed.vm.qemu import find as find_qemu
from testbed.vm.trees import Tree, python_trees

__all__ = ["GuestFailure", "Settings", "run"]

#: The largest 9p message; the kernel takes no larger one over virtio.
_MSIZE_BYTES = 512000
_CONSOLES_KEPT = 10
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Settings:
    """How the virtual machine is made. ``icount`` counts virtual time in instructions, on one CPU."""

    rdma_mode: RdmaMode = RdmaMode.SHARED
    smp: int = 2
    memory_mb: int = 4096
    icount: bool = False
    timeout_s: float | None = None
    boot_timeout_s: float = 180.0
    hardware: bool | None = None  # None: where a probe shows that it works


def qemu_arguments(
    qemu: Qemu,
    kernel: Kernel,
    initrd: Path,
    console: Path,
    settings: Settings,
    hardware: bool,
    trees: list[Tree],
    ports: dict[str, int],
) -> list[str]:
    """QEMU's command line; ``ports`` are connected sockets by port name. No network card."""
    if hardware:
        accelerator = ["-accel", "kvm", "-cpu", "host"]
    elif settings.icount:
        accelerator = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", "max"]
    else:
        accelerator = ["-accel", f"tcg,thread={'multi' if qemu.threads else 'single'}", "-cpu", "max"]
    words = ["console=ttyS0", "panic=-1", "oops=panic", "quiet", "loglevel=5", "no_timer_check", "audit=0"]
    words += ["mitigations=off", "random.trust_cpu=on", "cryptomgr.notests", "init_on_alloc=0"]
    argv = [*qemu.words, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35", *accelerator]
    argv += ["-smp", str(1 if settings.icount else settings.smp), "-m", str(settings.memory_mb)]
    argv += ["-kernel", str(kernel.image), "-initrd", str(initrd), "-append", " ".join(words)]
    argv += ["-serial", f"file:{console}", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    for name, descriptor in ports.items():
        argv += ["-chardev", f"socket,id={name},fd={descriptor}"]
        argv += ["-device", f"virtserialport,chardev={name},name={name}"]
    security = "passthrough" if os.geteuid() == 0 else "none"
    for tag, path, flag in (("root", "/", ",readonly=on"), ("build", str(BUILD), "")):
        share = f"local,id={tag},path={path.replace(',', ',,')},security_model={security},multidevs=remap"
        argv += ["-fsdev", share + flag, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    for number, tree in enumerate(trees):
        drive = f"file={str(tree.image).replace(',', ',,')},if=none,id=tree{number},format=raw,readonly=on"
        argv += ["-drive", drive, "-device", f"virtio-blk-pci,drive=tree{number}"]
    return argv


def run(
    argv: list[str],
    *,
    rdma_mode: RdmaMode | str = RdmaMode.SHARED,
    smp: int = 2,
    memory_mb: int = 4096,
    icount: bool = False,
    timeout_s: float | None = None,
    hardware: bool | None = None,
    environment: Mapping[str, str] | None = None,
    stdout: BinaryIO | None = None,
    stderr: BinaryIO | None = None,
    kernel: Kernel | None = None,
) -> int:
    """Run ``argv`` in the repository's directory inside a new virtual machine and return its exit status.

    Output goes to ``stdout`` and ``stderr`` as it comes (this process's own by default). ``environment`` is
    added to the little that passes by itself. ``kernel`` is another than the newest. Files below build/ are
    shared; all else that the command writes is gone afterwards. Raises UnavailableError where no virtual machine
    can be made, GuestFailure when it ends without the command's status.
    """
    settings = Settings(RdmaMode(rdma_mode), smp, memory_mb, icount, timeout_s, hardware=hardware)
    qemu = find_qemu()
    kernel = kernel or kernels.prepare(kernels.minimum_for(settings.rdma_mode))
    use_hardware = settings.hardware
    if use_hardware is None:
        use_hardware = not settings.icount and hardware_works(kernel, qemu)
    out = stdout if stdout is not None else sys.stdout.buffer
    err = stderr if stderr is not None else sys.stderr.buffer
    trees = python_trees()
    guest = {
        "TREES": " ".join(shlex.quote(str(tree.directory)) for tree in trees),
        "ACTION": "run",
        "RELEASE": kernel.release,
        "MODULES": str(kernel.modules),
        "BUILD": str(BUILD),
        "MSIZE": str(_MSIZE_BYTES),
        "HOSTNAME": "rdmanet-vm",
        "MERGE": "1" if _same_file(out, err) else "0",
    }
    command = command_script(argv, REPOSITORY, guest_environment() | dict(environment or {}))
    logs = BUILD / "vm"
    logs.mkdir(parents=True, exist_ok=True)
    for old in sorted(logs.glob("console-*.log"), key=lambda path: path.stat().st_mtime)[:-_CONSOLES_KEPT]:
        if not Path("/proc", old.name.split("-")[1]).exists():  # its run is over
            old.unlink(missing_ok=True)
    initrd = os.memfd_create("initrd")  # in memory: whatever ends us, no file stays behind
    with os.fdopen(initrd, "wb") as handle:
        handle.write(base_image(kernel, settings.rdma_mode).read_bytes() + run_image(guest, command))
        handle.flush()
        console = logs / f"console-{os.getpid()}-{next(_numbers)}.log"
        machine = Machine(console, out, err, timeout_s=settings.timeout_s, boot_timeout_s=settings.boot_timeout_s)
        arguments = functools.partial(
            qemu_arguments,
            qemu,
            kernel,
            Path(f"/proc/self/fd/{initrd}"),
            console,
            settings,
            bool(use_hardware),
            trees,
        )
        title = f"{kernel.release}, {'KVM' if use_hardware else 'no hardware virtualisation'}"
        threading.Thread(target=_compile_bytecode, daemon=True).start()
        try:
            return machine.run(arguments, title, initrd)
        except GuestFailure as failure:
            if failure.operation != "boot":
                raise
            say(f"{failure}\nThe command has not started yet: booting once more")
            return machine.run(arguments, title, initrd)


def _compile_bytecode() -> None:
    """Bytecode for the guest, made while it boots: emulated, each source costs ten times as much to compile."""
    folders = [
        str(folder) for name in ("rdmanet", "testbed", "benchmarks", "tests") if (folder := REPOSITORY / name).is_dir()
    ]
    argv = [sys.executable, "-m", "compileall", "-q", *folders]
    # What does not compile, or cannot be written, the guest's own Python will tell better.
    subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)


def _same_file(one: BinaryIO, other: BinaryIO) -> bool:
    """Whether both are one file, so that their order to each other can be kept."""
    try:
        first, second = os.fstat(one.fileno()), os.fstat(other.fileno())
    except (OSError, ValueError):  # not backed by a descriptor
        return one is other
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
