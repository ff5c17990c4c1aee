"""Hardware virtualisation where it works: /dev/kvm may exist and still hang a guest, so it is tried once."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from rdmanet.model import RdmaMode
from testbed.kernel import Kernel
from testbed.paths import cache_directory, locked
from testbed.progress import Ticker
from testbed.vm.image import base_image, run_image
from testbed.vm.qemu import Qemu

_PROBE_TIMEOUT_S = 20.0


def hardware_works(kernel: Kernel, qemu: Qemu) -> bool:
    """Whether a guest under KVM reaches its first process; the answer is kept for this boot of the machine."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = cache_directory() / "kvm.json"
    with locked("kvm"):
        if memory.is_file():
            known = json.loads(memory.read_text())
            if known.get("boot_id") == boot_id:
                return bool(known["works"])
        works = _probe(kernel, qemu)
        memory.write_text(json.dumps({"boot_id": boot_id, "works": works}))
        return works


def _probe(kernel: Kernel, qemu: Qemu) -> bool:
    ticker = Ticker("trying hardware virtualisation")
    with tempfile.TemporaryDirectory() as name:
        initrd, answer = Path(name, "initrd"), Path(name, "answer")
        initrd.write_bytes(base_image(kernel, RdmaMode.SHARED).read_bytes() + run_image({"ACTION": "probe"}, ""))
        argv = [*qemu.words, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += [
            "-M",
            "q35",
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-smp",
            "2",
            "-m",
            "1024",
            "-kernel",
            str(kernel.image),
            "-initrd",
            str(initrd),
        ]
        argv += ["-append", "console=ttyS0 panic=-1 quiet", "-device", "virtio-serial-pci"]
        argv += ["-chardev", f"file,id=status,path={answer}"]
        argv += ["-device", "virtserialport,chardev=status,name=status"]
        try:
            subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            ticker.done("it hangs: going on without")
            return False
        works = answer.is_file() and answer.read_text().strip() == "exit 0"
    ticker.done("it works" if works else "it does not work: going on without")
    return works
