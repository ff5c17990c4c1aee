"""A CNI plugin that waits in ADD until it is told to go on: what a runtime does to the plugins before it is done, and
its runtime can be killed in the middle."""

from __future__ import annotations

import os
import select

from rdmanet.errors import UnavailableError
from testbed.host import Host

NAME = "hold"
#: Gives the result on that it was given; knows nothing else.
PROGRAM = """#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0"]}' ;;
ADD)
	input=$(cat)
	echo reached > REACHED
	read -r line < GO
	exec python3 -c '
import json, sys
given = json.loads(sys.argv[1])
result = given.get("prevResult") or {"interfaces": [], "ips": []}
print(json.dumps({**result, "cniVersion": given["cniVersion"]}))' "$input"
	;;
*) cat > /dev/null ;;
esac
"""


class Hold:
    """The plugin in a directory of a host, as one more type for a network's configuration."""

    def __init__(self, host: Host, directory: str, state: str = "/run"):
        self._host = host
        names = {name: f"{state}/hold.{name}" for name in ("reached", "go")}
        self._reached, self._go = (host.path(names[name]) for name in ("reached", "go"))
        for fifo in (self._reached, self._go):
            os.mkfifo(fifo)
        program = PROGRAM.replace("REACHED", names["reached"]).replace("GO", names["go"])
        path = host.path(f"{directory}/{NAME}")
        path.write_text(program)
        path.chmod(0o755)

    def wait(self, timeout_s: float = 60.0) -> None:
        """Until an ADD has come to the plugin; UnavailableError where none does."""
        with os.fdopen(os.open(self._reached, os.O_RDONLY | os.O_NONBLOCK), "rb") as descriptor:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                raise UnavailableError(f"no ADD came to the plugin {NAME} within {timeout_s:g} s")
            descriptor.read()

    def go(self) -> None:
        """Let the ADD that waits go on."""
        self._go.write_text("go\n")
