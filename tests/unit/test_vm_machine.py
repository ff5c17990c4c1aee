"""The virtual machine's edges: modules in order, the command's script, the ports, the console."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdmanet.errors import UnavailableError
from testbed.kernel import Kernel
from testbed.vm.image import ModuleTree, command_script, guest_environment, module_name
from testbed.vm.machine import GuestFailure, Machine, StatusReader, console_tail
from testbed.vm.qemu import Qemu
from testbed.vm.runner import Settings, qemu_arguments

DEPENDENCIES = """\
kernel/drivers/infiniband/core/ib_core.ko.xz:
kernel/net/ipv4/udp_tunnel.ko.xz:
kernel/net/ipv6/ip6_udp_tunnel.ko.xz: kernel/net/ipv4/udp_tunnel.ko.xz
kernel/drivers/infiniband/sw/rxe/rdma-rxe.ko.xz: kernel/net/ipv6/ip6_udp_tunnel.ko.xz kernel/net/ipv4/udp_tunnel.ko.xz
"""


def test_modules_come_after_what_they_need_and_once() -> None:
    tree = ModuleTree(DEPENDENCIES, "kernel/drivers/virtio/virtio_pci.ko\n")
    names = [name for name, _ in tree.order(["virtio_pci", "rdma_rxe", "ib_core", "udp_tunnel"])]
    assert names == ["udp_tunnel", "ip6_udp_tunnel", "rdma_rxe", "ib_core"]


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(UnavailableError, match="no module floppy"):
        ModuleTree(DEPENDENCIES, "").order(["floppy"])


def test_module_names_are_the_kernels() -> None:
    assert module_name("kernel/sound/snd-pcm.ko.xz") == "snd_pcm"


def test_the_command_keeps_its_words_and_its_environment(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.getcwd(), sorted(os.environ))"
    script = command_script([sys.executable, "-SEc", code, "it's", "two words", "$HOME", ""], tmp_path, {"A": "b c'd"})
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert "[\"it's\", 'two words', '$HOME', '']" in shown
    assert str(tmp_path) in shown
    assert "HOME" not in shown.rpartition("[")[2]
    assert "'A'" in shown


def test_the_commands_exit_status_is_the_scripts(tmp_path: Path) -> None:
    script = command_script(["sh", "-c", "exit 43"], tmp_path, {"PATH": os.environ["PATH"]})
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 43


def test_little_of_the_environment_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDMANET_CACHE", "/somewhere")
    monkeypatch.setenv("AWS_SECRET", "x")
    environment = guest_environment()
    assert environment["RDMANET_CACHE"] == "/somewhere"
    assert environment["RDMANET_IN_VM"] == "1"
    assert "AWS_SECRET" not in environment


def test_status_lines_arrive_in_any_pieces() -> None:
    reader = StatusReader()
    for piece in (b"boo", b"ted\nex", b"it 1"):
        reader.feed(piece)
    assert reader.booted
    assert reader.exit_status is None
    reader.feed(b"3\n")
    assert reader.exit_status == 13


def test_the_console_is_shown_from_the_panic_on() -> None:
    text = "\r\n".join(["early"] * 100 + ["Kernel panic - not syncing: x", "trace"])
    assert console_tail(text).splitlines() == ["Kernel panic - not syncing: x", "trace"]
    assert console_tail("a\nb\nc", lines=2) == "b\nc"


@pytest.mark.parametrize(("threads", "word"), [(True, "thread=multi"), (False, "thread=single")])
def test_qemu_has_threads_only_where_they_are_sound_and_never_a_network_card(threads: bool, word: str) -> None:
    kernel = Kernel("7.3", Path("/k"), Path("/m"))
    argv = qemu_arguments(
        Qemu(("qemu",), threads), kernel, Path("/i"), Path("/c"), Settings(smp=3), False, [], {"stdout": 5}
    )
    assert argv[argv.index("-accel") + 1].endswith(word)
    assert argv[argv.index("-smp") + 1] == "3"
    assert not [w for w in argv if "net" in w.split(",")[0]]
    assert "-nodefaults" in argv


def test_counting_instructions_takes_one_cpu() -> None:
    kernel = Kernel("7.3", Path("/k"), Path("/m"))
    settings = Settings(smp=4, icount=True)
    argv = qemu_arguments(Qemu(("qemu",), True), kernel, Path("/i"), Path("/c"), settings, False, [], {})
    assert argv[argv.index("-smp") + 1] == "1"
    assert "-icount" in argv


class Guest:
    """A machine whose QEMU is a shell script; $stdout, $stderr and $status are its ports' descriptors."""

    def __init__(self, directory: Path):
        self.out, self.err = io.BytesIO(), io.BytesIO()
        self._console = directory / "console"

    def run(self, script: str, timeout_s: float | None = None, boot_timeout_s: float = 60) -> int:
        machine = Machine(self._console, self.out, self.err, timeout_s=timeout_s, boot_timeout_s=boot_timeout_s)
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            return machine.run(lambda ports: ["bash", "-c", self._script(script, ports)], "a script", null)
        finally:
            os.close(null)

    def _script(self, script: str, ports: dict[str, int]) -> str:
        names = "; ".join(f"{name}={number}" for name, number in ports.items())
        return f"{names}; console={self._console}; {script}"


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def test_output_and_status_come_back_and_the_machine_is_ended(guest: Guest) -> None:
    data = "head -c 300000 /dev/zero"
    script = f"echo booted >&$status; {data} >&$stdout; printf 'a\\0\\xff' >&$stderr; echo exit 9 >&$status; sleep 600"
    assert guest.run(script) == 9
    assert guest.out.getvalue() == bytes(300000)
    assert guest.err.getvalue() == b"a\0\xff"


def test_a_panic_is_told_with_the_console(guest: Guest) -> None:
    with pytest.raises(GuestFailure, match="Kernel panic - not syncing") as failure:
        guest.run("echo booted >&$status; echo 'Kernel panic - not syncing: test' >$console; exit 3")
    assert failure.value.operation == "guest"


def test_a_failed_boot_is_told_apart(guest: Guest) -> None:
    with pytest.raises(GuestFailure, match=r"ended with 1.*cannot find the kernel") as failure:
        guest.run("echo cannot find the kernel >&2; exit 1")
    assert failure.value.operation == "boot"


def test_time_runs_out_for_command_and_boot(guest: Guest) -> None:
    with pytest.raises(GuestFailure, match=r"command did not end within 0.1 s") as failure:
        guest.run("echo booted >&$status; sleep 600", timeout_s=0.1)
    assert failure.value.operation == "time-out"
    with pytest.raises(GuestFailure, match=r"did not boot within 0.1 s") as failure:
        guest.run("sleep 600", boot_timeout_s=0.1)
    assert failure.value.operation == "boot"
