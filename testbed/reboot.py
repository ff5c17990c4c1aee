"""A host that reboots: its disk is kept, and nothing that the kernel held."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from testbed.container_init import MS_BIND
from testbed.host import Host

#: What says to programs that the machine has booted.
BOOT_ID = "/proc/sys/kernel/random/boot_id"
STATE = "/var/lib/rdmanet"


def reboot(host: Host, kept: Sequence[str], prepare: Callable[[Host], None] = lambda _: None) -> Host:
    """Power off and on again: a new scratch host with these directories of the old one and the agent's state.

    `prepare` makes places for them where a mount has to. The old host is stopped; no agent runs on the new one.
    """
    host.kill_agent()
    tar = ["tar", "--create", "--xattrs", "--sparse", "--directory", "/", "--file", "/run/disk.tar"]
    host.exec([*tar, *(path.lstrip("/") for path in (STATE, *kept))])
    disk = host.path("/run/disk.tar").read_bytes()
    connected = host.outside is not None
    host.stop()
    again = Host.scratch(f"{host.name}-again")
    try:
        again.container.act(
            ("write", "/run/boot_id", f"{uuid.uuid4()}\n"), ("mount", "/run/boot_id", BOOT_ID, "", MS_BIND, "")
        )
        prepare(again)
        again.path("/run/disk.tar").write_bytes(disk)
        again.exec(["tar", "--extract", "--xattrs", "--directory", "/", "--file", "/run/disk.tar"])
        again.container.act(("unlink", "/run/disk.tar"))
        if connected:
            again.connect_outside()
    except BaseException:
        again.stop()
        raise
    return again
