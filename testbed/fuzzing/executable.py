"""The CNI executable under the address and undefined-behaviour sanitizers: environment, standard input, agent's answer.

An input is up to three parts with two NULs between: variables with a NUL behind each, standard input, what an agent
answers to whatever it is asked (none: there is no agent). ``harness.c`` runs it, with a directory for root.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from testbed.cni_executable import SOURCE
from testbed.cni_spec import validate_error, validate_version
from testbed.fuzzing.search import Failure, Places, Target

HARNESS = Path(__file__).with_name("harness.c")
SANITIZED = ("-O1", "-g", "-std=gnu11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PLACES = 65536
BETWEEN = b"\0\0"
COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
RESULT = {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0"}], "ips": [{"address": "10.0.0.2/32"}]}
CONFIGURATION = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet", "args": {"a": ["ä", 1.5e3, None, True]}}
TOKENS = tuple(
    word.encode()
    for word in (
        "CNI_COMMAND=", "CNI_CONTAINERID=", "CNI_NETNS=", "CNI_IFNAME=", "CNI_ARGS=", "CNI_PATH=",
        "RDMANET_CNI_TIMEOUT_S=1", '"cniVersion"', '"socket":"/x"', '"stateDir":"/var/lib/y"', '"prevResult":{}',
        '"1.0.0"', '"0.3.1"', "\\u0041", "\\ud83d\\ude00", "\\ud800", "true", "null", "-0.1e+5", "HTTP/1.1 200 OK\r\n",
        "Content-Length: 2\r\n", "Transfer-Encoding: chunked\r\n", "\r\n\r\n", "99999999999999999999",
    )
)  # fmt: skip


def seeds() -> list[bytes]:
    """Calls as runtimes make them, with agents that answer, refuse and are away."""
    found = []
    result, error = json.dumps(RESULT).encode(), b'{"cniVersion":"1.1.0","code":101,"msg":"no"}'
    answers = [b"", *(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (s, len(b), b) for s, b in (
        (b"200 OK", result), (b"200 OK", b""), (b"409 Conflict", error),
    ))]  # fmt: skip
    for command in COMMANDS:
        variables = f"CNI_COMMAND={command}\0CNI_CONTAINERID=c1\0CNI_NETNS=/run/netns/c1\0CNI_IFNAME=eth0\0"
        variables += "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=p\0CNI_PATH=/opt/cni/bin"
        body = {**CONFIGURATION, "prevResult": RESULT, "cni.dev/valid-attachments": []}
        found += [BETWEEN.join((variables.encode(), json.dumps(body).encode(), answer)) for answer in answers]
    return found


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """With its harness, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="rdmanet-fuzz-") as folder, _Harness(Path(folder)) as harness:
        yield Target("executable", seeds(), harness.run, TOKENS)


class _Harness:
    """The running harness."""

    def __init__(self, folder: Path):
        root = folder / "root"
        for inside in ("run/rdmanet", "var/lib/rdmanet"):
            (root / inside).mkdir(parents=True)
        self._queue = root / "var/lib/rdmanet/pending"
        places = folder / "places"
        places.write_bytes(bytes(PLACES))
        self._file = places.open("r+b")
        self._places = mmap.mmap(self._file.fileno(), PLACES)
        plugin, program = folder / "plugin.o", folder / "harness"
        covered = ("-fsanitize-coverage=trace-pc", "-Dmain=plugin_main")
        for argv in (
            ["gcc", *SANITIZED, *covered, "-c", "-o", str(plugin), str(SOURCE / "rdmanet.c")],
            ["gcc", *SANITIZED, "-o", str(program), str(HARNESS), str(plugin)],
        ):
            subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120)
        self._process = subprocess.Popen(
            [str(program), str(root), str(places)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"ASAN_OPTIONS": "exitcode=99:detect_leaks=0", "UBSAN_OPTIONS": "exitcode=99"},
        )

    def __enter__(self) -> _Harness:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._places.close()
        self._file.close()

    def run(self, data: bytes) -> Places:
        """Failure where it ends otherwise than the specification says, prints anything else, or is not done in time."""
        variables, _, rest = data.partition(BETWEEN)
        body, _, answer = rest.partition(BETWEEN)
        self._places[:] = bytes(PLACES)
        status, stdout, stderr = self._execute(variables, body, answer)
        shutil.rmtree(self._queue, ignore_errors=True)
        if stderr:
            raise Failure(f"standard error: {stderr[:300].decode(errors='replace')}")
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status) not in (0, 1):
            raise Failure(f"wait status {status}")
        self._judge(os.WEXITSTATUS(status), stdout, variables)
        return {at for at, reached in enumerate(self._places[:]) if reached}

    def _execute(self, *parts: bytes) -> tuple[int, bytes, bytes]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(struct.pack("=3I", *map(len, parts)) + b"".join(parts))
        stdin.flush()
        status, length = struct.unpack("=iI", stdout.read(8))
        printed = stdout.read(length)
        (length,) = struct.unpack("=I", stdout.read(4))
        return status, printed, stdout.read(length)

    def _judge(self, status: int, stdout: bytes, variables: bytes) -> None:
        if status == 0 and not stdout:
            return
        document = json.loads(stdout)
        if status == 0:
            if b"CNI_COMMAND=VERSION" in variables and "supportedVersions" in document:
                validate_version(document)
            return
        # An agent's own words are handed on as they are.
        if document.get("msg") != "no" and isinstance(document.get("code"), int) and document["code"] < 100:
            validate_error(document, document.get("cniVersion"))
