"""Executes cni/rdmanet as a runtime does, and serves its socket: what its tests share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from rdmanet.cni import BODY_MAX_BYTES, CniError, Request, variables_of_headers
from testbed.cni_spec import validate_error

SOURCE = Path(__file__).parents[1] / "cni"

#: The builds to test: as installed, and under the address and undefined-behaviour sanitizers.
BUILDS = ("static", "sanitized")


def missing_for(build: str) -> str | None:
    """What this machine lacks to make a build, as a sentence; None when nothing."""
    if build == "static":
        return None
    for library in ("libasan.so", "libubsan.so"):
        try:
            command = ["gcc", f"-print-file-name={library}"]
            path = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except FileNotFoundError:
            return "gcc is missing: the sanitized build of cni/rdmanet.c needs it"
        if "/" not in path:  # gcc prints the bare name of what it does not find
            return f"{library} is missing: the sanitized build of cni/rdmanet.c needs it"
    return None


def make(directory: Path, build: str) -> Path:
    """Compile a build into the directory; the path of the executable."""
    target = directory / ("rdmanet" if build == "static" else "rdmanet-sanitized")
    command = ["make", "-s", "-C", str(SOURCE), f"OUT={directory}", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return target


@dataclass
class Outcome:
    """What a runtime sees of one execution."""

    status: int
    stdout: bytes
    stderr: bytes

    def error(self, code: int, version: str | None = "1.1.0", command: str | None = None) -> str:
        assert self.status == 1, self
        document = json.loads(self.stdout)
        validate_error(document, version, command=command)
        assert document["code"] == code, document
        return f"{document['msg']} {document.get('details', '')}"

    def success(self) -> bytes:
        assert (self.status, self.stderr) == (0, b""), self
        return self.stdout


@dataclass
class Runtime:
    """Executes the plugin as libcni does; the socket and the state directory lie in the test's own folder."""

    executable: Path
    folder: Path
    timeout_s: int = 20
    config: dict[str, object] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.folder / "agent.sock"

    @property
    def pending(self) -> Path:
        return self.folder / "state" / "pending"

    @property
    def queued(self) -> list[str]:
        return sorted(p.name for p in self.pending.iterdir() if p.name != "lock")

    def body(self, **config: object) -> bytes:
        base = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet", "socket": str(self.socket)}
        merged = base | {"stateDir": str(self.folder / "state")} | self.config | config
        return json.dumps({key: value for key, value in merged.items() if value is not None}).encode()

    def environment(self, command: str, **variables: str | bytes | None) -> dict[str, str | bytes]:
        base: dict[str, str | bytes | None] = {
            "CNI_COMMAND": command,
            "RDMANET_CNI_TIMEOUT_S": str(self.timeout_s),
            "ASAN_OPTIONS": "exitcode=99",
            "UBSAN_OPTIONS": "exitcode=99",
        }
        if command in ("ADD", "CHECK", "DEL"):
            base |= {"CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/run/netns/c1"}
        return {key: value for key, value in (base | variables).items() if value is not None}

    async def run(self, command: str, body: bytes | None = None, **variables: str | bytes | None) -> Outcome:
        process = await asyncio.create_subprocess_exec(
            self.executable,
            env=self.environment(command, **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            stdout, stderr = await process.communicate(self.body() if body is None else body)
        assert process.returncode is not None
        return Outcome(process.returncode, stdout, stderr)

    def run_now(self, command: str, body: bytes, **variables: str | bytes | None) -> Outcome:
        environment = self.environment(command, **variables)
        done = subprocess.run([self.executable], env=environment, input=body, capture_output=True, timeout=60)
        return Outcome(done.returncode, done.stdout, done.stderr)


@contextlib.asynccontextmanager
async def agent(
    runtime: Runtime, answer: Callable[[Request], web.Response | Awaitable[web.Response]]
) -> AsyncIterator[list[Request]]:
    """A real HTTP server on the socket, which reads calls as the agent does."""
    calls: list[Request] = []

    async def handle(request: web.Request) -> web.Response:
        assert request.method == "POST"
        try:
            call = Request.parse(variables_of_headers(request.headers), await request.read())
        except CniError as error:
            return web.json_response({"cniVersion": "1.1.0", "code": error.code, "msg": error.sentence}, status=400)
        calls.append(call)
        answered = answer(call)
        return answered if isinstance(answered, web.Response) else await answered

    application = web.Application(client_max_size=2 * BODY_MAX_BYTES)
    application.router.add_post("/v1/cni", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.UnixSite(runner, str(runtime.socket)).start()
    try:
        yield calls
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def raw_server(runtime: Runtime, *answers: bytes | None) -> AsyncIterator[asyncio.Queue[bytes]]:
    """Sends each connection the next of the given bytes (the last one for ever) and closes; None: never answers."""
    heads: asyncio.Queue[bytes] = asyncio.Queue()
    over = asyncio.Event()
    left = list(answers)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = left.pop(0) if len(left) > 1 else left[0]
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            heads.put_nowait(await reader.readuntil(b"\r\n\r\n"))
            if mine is None:
                await over.wait()
            else:
                writer.write(mine)
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(handle, str(runtime.socket))
    try:
        yield heads
    finally:
        over.set()
        server.close()
        await server.wait_closed()


def empty(_: Request) -> web.Response:
    return web.Response()
