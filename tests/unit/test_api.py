"""The agent's API: errors become the codes that docs/errors.md explains, and calls that must not overlap do not."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web

from rdmanet import api as module
from rdmanet import errors
from rdmanet.api import Api
from rdmanet.calls import Calls
from rdmanet.cni import HEADERS, CniCode, CniError, Interface, IpConfig, Request, Result, pending_name
from rdmanet.errors import NotFoundError, RdmanetError
from testbed.cni_spec import validate_error, validate_result
from testbed.paths import REPOSITORY

RESULT = Result(
    interfaces=(Interface("rn-1", "02:72:00:00:00:00"), Interface("eth0", "02:72:00:00:00:01", "/run/netns/c1")),
    ips=(IpConfig(ipaddress.ip_interface("10.213.0.2/32"), ipaddress.ip_address("10.213.0.1"), 1),),
)
NETWORK = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet"}
WAIT_S = 10.0


class Attached:
    """Attachments in memory: says who was called, and stops where a test wants it to."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.failure: Exception | None = None
        self.gates: dict[str, threading.Event] = {}
        self._started = threading.Condition()

    def _call(self, what: str) -> None:
        with self._started:
            self.events.append(f"{what} begins")
            self._started.notify_all()
        gate = self.gates.get(what)
        if gate is not None and not gate.wait(WAIT_S):
            raise AssertionError(f"{what} was never let go")
        self.events.append(f"{what} ends")
        if self.failure is not None:
            raise self.failure

    def ready(self) -> None:
        if self.failure is not None:
            raise self.failure

    def hold(self, what: str) -> threading.Event:
        return self.gates.setdefault(what, threading.Event())

    def wait_for(self, event: str) -> None:
        with self._started:
            if not self._started.wait_for(lambda: event in self.events, WAIT_S):
                raise AssertionError(f"{event!r} did not happen: {self.events}")

    def add(self, request: Request, slot: str | None) -> Result:
        self._call(f"add {request.container_id}{f' with {slot}' if slot else ''}")
        return RESULT

    def check(self, request: Request) -> None:
        self._call(f"check {request.container_id}")

    def delete(self, container_id: str, ifname: str) -> bool:
        self._call(f"delete {container_id}")
        return True

    def collect(self, network: str, valid: Iterable[tuple[str, str]]) -> list[Any]:
        self._call(f"collect {network} {sorted(valid)}")
        return []


class Observed:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def cni_call(self, command: str, code: int, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append((command, code))


@pytest.fixture
def attached() -> Attached:
    return Attached()


@pytest.fixture
def observed() -> Observed:
    return Observed()


@pytest.fixture
def pending_dir(tmp_path: Path) -> Path:
    (tmp_path / "pending").mkdir()
    return tmp_path / "pending"


@pytest.fixture
def removals() -> list[Future[None]]:
    """Everybody who waits until nothing is left to remove."""
    return []


@pytest.fixture
def api(attached: Attached, observed: Observed, pending_dir: Path, removals: list[Future[None]]) -> Iterator[Api]:
    async def status() -> dict[str, object]:
        return {"agent": {}}

    def settled() -> Future[None]:
        removals.append(Future())
        return removals[-1]

    async def slot(request: Request) -> str | None:
        return request.config.device_id

    with ThreadPoolExecutor(8) as executor:
        yield Api(
            attached,  # type: ignore[arg-type]
            executor,
            status=status,
            rdma=status,
            metrics=lambda: b"rdmanet_up 1\n",
            swap=lambda previous: {"pod": "previous" if previous else "offered"},
            observer=observed,
            pending_dir=pending_dir,
            settled=settled,
            calls=Calls(),
            slot=slot,
        )


@pytest.fixture
async def client(api: Api, tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a real server on a unix socket."""
    path = str(tmp_path / "agent.sock")
    runner = web.AppRunner(api.application())
    await runner.setup()
    await web.UnixSite(runner, path).start()
    async with aiohttp.ClientSession("http://agent", connector=aiohttp.UnixConnector(path)) as session:
        yield session
    await runner.cleanup()


def variables(command: str, container_id: str = "c1") -> dict[str, str]:
    values = {"CNI_COMMAND": command, "CNI_CONTAINERID": container_id, "CNI_IFNAME": "eth0"}
    return {**values, "CNI_NETNS": "/run/netns/c1", "CNI_PATH": "/opt/cni/bin"}


def body(**changes: object) -> bytes:
    return json.dumps({**NETWORK, **changes}).encode()


def headers(values: dict[str, str]) -> dict[str, str]:
    return {name: quote(values[variable]) for name, variable in HEADERS.items() if variable in values}


async def post(client: aiohttp.ClientSession, values: dict[str, str], data: bytes) -> tuple[int, dict[str, Any] | None]:
    async with client.post("/v1/cni", data=data, headers=headers(values)) as response:
        text = await response.text()
        return response.status, json.loads(text) if text else None


# Answers


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
async def test_add_answers_in_the_version_asked_for(client: aiohttp.ClientSession, version: str) -> None:
    status, document = await post(client, variables("ADD"), body(cniVersion=version))
    assert status == 200
    validate_result(document, version, ifname="eth0", netns="/run/netns/c1")


@pytest.mark.parametrize(
    ("command", "event"),
    [
        ("CHECK", ["check c1 begins", "check c1 ends"]),
        ("DEL", ["delete c1 begins", "delete c1 ends"]),
        ("GC", ["collect net [('c1', 'eth0')] begins", "collect net [('c1', 'eth0')] ends"]),
        ("STATUS", []),
    ],
)
async def test_the_others_answer_nothing(
    client: aiohttp.ClientSession, attached: Attached, observed: Observed, command: str, event: list[str]
) -> None:
    valid = [{"containerID": "c1", "ifname": "eth0"}]
    extra: dict[str, object] = {"prevResult": {"ips": []}, "cni.dev/valid-attachments": valid}
    assert await post(client, variables(command), body(**extra)) == (200, None)
    assert attached.events == event
    assert observed.calls == [(command, 0)]


async def test_status_and_metrics(client: aiohttp.ClientSession) -> None:
    async with client.get("/v1/status") as response:
        assert await response.json() == {"agent": {}}
    async with client.get("/metrics") as response:
        assert response.content_type == "text/plain"
        assert await response.text() == "rdmanet_up 1\n"
    async with client.get("/v2/status") as response:
        assert response.status == 404


async def test_the_metrics_application_has_metrics_alone(api: Api) -> None:
    paths = {route.resource.canonical for route in api.metrics_application().router.routes() if route.resource}
    assert paths == {"/metrics"}


# Errors

#: Class → (CNI code, HTTP status).
CODES: dict[type[RdmanetError], tuple[int, int]] = {
    errors.RdmanetError: (199, 500),
    errors.InputError: (7, 400),
    errors.ConfigError: (7, 400),
    errors.RequestError: (7, 400),
    errors.NotFoundError: (3, 404),
    errors.ConflictError: (100, 409),
    errors.ExhaustedError: (101, 507),
    errors.UnavailableError: (102, 503),
    errors.StateError: (104, 500),
    errors.DamagedError: (104, 500),
    errors.KernelError: (103, 500),
    errors.NetlinkError: (103, 500),
    errors.BpfError: (103, 500),
    errors.VerifierError: (103, 500),
    errors.VerbsError: (103, 500),
    errors.TimedOutError: (103, 500),
    errors.LeaseError: (199, 500),
    errors.LeaseRefusedError: (199, 500),
    errors.LeaseRevokedError: (199, 500),
}


def documented_codes() -> set[int]:
    text = (REPOSITORY / "docs/errors.md").read_text(encoding="utf-8")
    return {int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}


def test_the_table_has_every_class() -> None:
    classes = {item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, RdmanetError)}
    assert set(CODES) == classes


def test_every_code_is_documented() -> None:
    ours = {value for name, value in vars(module).items() if name.startswith("CODE_")}
    assert {code for code, _ in CODES.values()} | ours <= documented_codes()
    assert {code for code in documented_codes() if code >= 100} == ours
    assert {int(code) for code in CniCode} >= {code for code in documented_codes() if code < 100}


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("version", ["0.3.1", "1.1.0"])
async def test_each_error_has_its_code(
    client: aiohttp.ClientSession, attached: Attached, observed: Observed, kind: type[RdmanetError], version: str
) -> None:
    more = {"log": "R1 invalid mem access"} if kind is errors.VerifierError else {}
    attached.failure = kind("What happened; what to do.", operation="RTM_NEWLINK", subject="rn-1", errno=17, **more)
    code, http = CODES[kind]
    status, document = await post(client, variables("ADD"), body(cniVersion=version))
    assert status == http
    assert document == {
        "cniVersion": version,
        "code": code,
        "msg": "What happened; what to do.",
        "details": "RTM_NEWLINK rn-1 errno 17",
    }
    validate_error(document, version, command="ADD")
    assert observed.calls == [("ADD", code)]


async def test_an_error_without_details(client: aiohttp.ClientSession, attached: Attached) -> None:
    attached.failure = NotFoundError("Gone.")
    _, document = await post(client, variables("ADD"), body())
    assert document == {"cniVersion": "1.1.0", "code": 3, "msg": "Gone.", "details": ""}


@pytest.mark.parametrize(
    ("code", "http"), [(CniCode.TRY_AGAIN, 503), (CniCode.NOT_AVAILABLE, 503), (CniCode.FIELD, 400)]
)
def test_errors_of_the_specification_keep_their_code(code: CniCode, http: int) -> None:
    assert module.codes(CniError("x", code)) == (int(code), http)


@pytest.mark.parametrize(
    ("data", "version", "code"),
    [
        (b"{", "1.1.0", 6),
        (b"\xff\xfe", "1.1.0", 6),
        (b"[]", "1.1.0", 6),
        (b"[" * 100000, "1.1.0", 6),
        (b"{}", "1.1.0", 1),
        (body(cniVersion="0.2.0"), "0.2.0", 1),
        (body(cniVersion=5), "1.1.0", 6),
        (body(cniVersion="1.0.0", rdam=True), "1.0.0", 2),
        (body(cniVersion="0.4.0", mtu="9000"), "0.4.0", 7),
    ],
)
async def test_bad_input_echoes_the_version(
    client: aiohttp.ClientSession, observed: Observed, data: bytes, version: str, code: int
) -> None:
    status, document = await post(client, variables("ADD"), data)
    assert status == 400
    assert document is not None
    assert (document["cniVersion"], document["code"]) == (version, code)
    assert document["msg"]
    assert [number for _, number in observed.calls] == [code]


async def test_a_body_that_is_too_large(client: aiohttp.ClientSession, attached: Attached) -> None:
    status, document = await post(client, variables("ADD"), body(args={"a": "x" * (1 << 20)}))
    assert status == 400
    assert document is not None
    assert (document["code"], document["msg"]) == (6, "The network configuration has more than 1 MiB")
    assert attached.events == []


async def test_headers_that_are_not_utf8(client: aiohttp.ClientSession) -> None:
    async with client.post("/v1/cni", data=body(), headers={"CNI-Command": "ADD", "CNI-IfName": "%ff"}) as response:
        document = await response.json()
        assert (response.status, document["code"]) == (400, 4)
        assert "CNI_IFNAME" in document["msg"]


async def test_a_programming_mistake_is_not_counted_as_success(
    api: Api, attached: Attached, observed: Observed
) -> None:
    attached.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await api.call(variables("DEL"), body())
    assert observed.calls == [("DEL", module.CODE_OTHER)]
    attached.failure = None
    assert await api.call(variables("DEL"), body()) == (200, None), "its lock is free again"


# Order


async def settle() -> None:
    """Lets everything on the loop go as far as it can without a thread's help."""
    for _ in range(20):
        await asyncio.sleep(0)


async def reached(attached: Attached, event: str) -> None:
    await asyncio.to_thread(attached.wait_for, event)


async def test_calls_on_one_container_wait_for_each_other_and_others_do_not(api: Api, attached: Attached) -> None:
    gate = attached.hold("add c1")
    first = asyncio.create_task(api.call(variables("ADD"), body()))
    await reached(attached, "add c1 begins")
    second = asyncio.create_task(api.call(variables("DEL"), body()))
    await settle()
    assert (await api.call(variables("ADD", "c2"), body()))[0] == 200
    assert attached.events == ["add c1 begins", "add c2 begins", "add c2 ends"]
    gate.set()
    await asyncio.gather(first, second)
    assert attached.events[3:] == ["add c1 ends", "delete c1 begins", "delete c1 ends"]


async def test_a_failed_call_lets_the_next_one_in(api: Api, attached: Attached) -> None:
    attached.failure = NotFoundError("Gone.")
    calls = [api.call(variables("ADD"), body()) for _ in range(5)]
    assert [status for status, _ in await asyncio.gather(*calls)] == [404] * 5
    assert attached.events == ["add c1 begins", "add c1 ends"] * 5


def gc() -> bytes:
    return body(**{"cni.dev/valid-attachments": []})


async def test_gc_waits_for_calls_and_calls_wait_for_gc(api: Api, attached: Attached) -> None:
    add, collect = attached.hold("add c1"), attached.hold("collect net []")
    running = asyncio.create_task(api.call(variables("ADD"), body()))
    await reached(attached, "add c1 begins")
    collecting = asyncio.create_task(api.call(variables("GC"), gc()))
    await settle()
    late = asyncio.create_task(api.call(variables("ADD", "c2"), body()))
    await settle()
    assert attached.events == ["add c1 begins"], "GC began beside an ADD, or an ADD passed a waiting GC"
    add.set()
    await reached(attached, "collect net [] begins")
    await settle()
    assert "add c2 begins" not in attached.events
    assert (await api.call(variables("STATUS"), body()))[0] == 200, "STATUS waits for nobody"
    collect.set()
    await asyncio.gather(running, collecting, late)
    assert [event for event in attached.events if event.endswith("begins")] == [
        "add c1 begins",
        "collect net [] begins",
        "add c2 begins",
    ]


async def test_a_gc_that_is_given_up_lets_calls_in_again(api: Api, attached: Attached) -> None:
    gate = attached.hold("add c1")
    running = asyncio.create_task(api.call(variables("ADD"), body()))
    await reached(attached, "add c1 begins")
    collecting = asyncio.create_task(api.call(variables("GC"), gc()))
    await settle()
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert (await api.call(variables("ADD", "c2"), body()))[0] == 200
    gate.set()
    await running


# Queued DELs


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_an_add_supersedes_the_queued_del(api: Api, attached: Attached, pending_dir: Path) -> None:
    queued = pending_dir / pending_name("c1", "eth0")
    queued.write_bytes(b"")
    (pending_dir / pending_name("c2", "eth0")).write_bytes(b"")
    assert (await api.call(variables("ADD"), body()))[0] == 200
    assert attached.events == ["delete c1 begins", "delete c1 ends", "add c1 begins", "add c1 ends"]
    assert names(pending_dir) == ["c2@eth0"]


@pytest.mark.parametrize(("wanted", "events"), [(True, ["delete c1 begins", "delete c1 ends"]), (False, [])])
async def test_a_del_is_asked_about_when_its_turn_comes(
    api: Api, attached: Attached, wanted: bool, events: list[str]
) -> None:
    gate = attached.hold("add c1")
    running = asyncio.create_task(api.call(variables("ADD"), body()))
    await reached(attached, "add c1 begins")
    asked: list[list[str]] = []

    def still_wanted() -> bool:
        asked.append(list(attached.events))
        return wanted

    late: Callable[[], bool] = still_wanted
    replayed = asyncio.create_task(api.call(variables("DEL"), body(), late))
    await settle()
    assert asked == []
    gate.set()
    assert [status for status, _ in await asyncio.gather(running, replayed)] == [200, 200]
    assert asked == [["add c1 begins", "add c1 ends"]]
    assert attached.events[2:] == events


async def test_settled_answers_when_nothing_is_left(
    client: aiohttp.ClientSession, removals: list[Future[None]]
) -> None:
    async with client.get("/v1/settled", params={"timeout_s": "0.01"}) as answer:
        assert answer.status == 503
        assert "Links are still being removed after 0.01 s" in (await answer.json())["error"]
    (given_up,) = removals
    assert given_up.cancelled()
    async with client.get("/v1/settled", params={"timeout_s": "soon"}) as answer:
        assert answer.status == 400


async def test_settled_at_once(client: aiohttp.ClientSession, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    done: Future[None] = Future()
    done.set_result(None)
    monkeypatch.setattr(api, "_settled", lambda: done)
    async with client.get("/v1/settled") as answer:
        assert (answer.status, await answer.json()) == (200, {})
