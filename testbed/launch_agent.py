"""What mpirun runs instead of ssh: ``launch_agent.py POD COMMAND...`` has the testbed start COMMAND in another pod.

Standard library only, for use inside a pod (``python -I -S -E``); `testbed.launcher` answers on SOCKET. The command
has this process's standard input, output and error, and its status is this process's.
"""

from __future__ import annotations

import json
import socket
import sys

SOCKET = "/run/launcher"


def main() -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(SOCKET)
        # As ssh does: the words are joined, and a shell reads them.
        request = {"pod": sys.argv[1], "command": " ".join(sys.argv[2:])}
        socket.send_fds(sock, [json.dumps(request).encode()], [0, 1, 2])
        answer = json.loads(sock.recv(4096) or '{"sentence": "the testbed went away"}')
    if "sentence" in answer:
        print(f"launch_agent: {answer['sentence']}", file=sys.stderr)
        return 255
    return int(answer["status"])


if __name__ == "__main__":
    sys.exit(main())
