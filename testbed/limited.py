"""``python -m testbed.limited CAP,CAP -- ARGUMENTS``: Python again, with these capabilities and no others, as systemd
starts it with CapabilityBoundingSet=, NoNewPrivileges= and MemoryDenyWriteExecute=."""

from __future__ import annotations

import configparser
import ctypes
import os
import re
import struct
import sys
from pathlib import Path

from testbed.paths import REPOSITORY

SERVICE = REPOSITORY / "deploy/rdmanet.service"
#: Numbers of include/uapi/linux/capability.h.
_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
NAMES = tuple(_NAMES.split())
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_MDWE = 24, 38, 65
_CAPABILITY_VERSION_3 = 0x20080522


def service() -> configparser.ConfigParser:
    """The unit; keys that come more than once are the last."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(SERVICE.read_text(encoding="utf-8"))
    return unit


def granted() -> tuple[str, ...]:
    """The capabilities that the unit gives, without CAP_."""
    return tuple(name.removeprefix("CAP_") for name in service()["Service"]["CapabilityBoundingSet"].split())


def program(*capabilities: str) -> tuple[str, ...]:
    """For ``Host.start_agent``: the agent with these."""
    return ("-m", "testbed.limited", ",".join(capabilities), "--", "-m", "rdmanet", "agent")


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    kept = {NAMES.index(name) for name in sys.argv[1].split(",") if name}
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    for number in set(range(last + 1)) - kept:
        if libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "PR_CAPBSET_DROP")
    # What is inheritable would come back with execve (capabilities(7), "Capabilities and execution of programs by
    # root").
    (permitted,) = re.findall(r"^CapPrm:\t(\w+)$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    held = int(permitted, 16)
    low, high = held & 0xFFFFFFFF, held >> 32
    present = struct.pack("=IIIIII", low, low, 0, high, high, 0)
    if libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), present):
        raise OSError(ctypes.get_errno(), "capset")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_MDWE, 1, 0, 0, 0)  # before Linux 6.3 it does not exist
    arguments = sys.argv[sys.argv.index("--") + 1 :]
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main()
