"""cni/rdmanet, executed as a runtime does, against real servers on a unix socket. Needs no root.

Everything runs twice: the static executable as it is installed, and a build under the address and
undefined-behaviour sanitizers. The queue of DELs has its own file, test_cni_queue.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rdmanet.cni import CniError, Command, parse_document
from testbed.cni_executable import BUILDS, Outcome, Runtime, agent, empty, make, missing_for, raw_server
from testbed.cni_spec import validate_error, validate_version

MIB = 1024 * 1024
# On a fresh machine hypothesis makes its Unicode tables first; a fixture for all examples is what is wanted.
TOLERATED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module", params=BUILDS)
def executable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = missing_for(request.param)
    if missing:
        pytest.skip(missing)
    return make(tmp_path_factory.mktemp("cni"), request.param)


@pytest.fixture
def runtime(executable: Path, tmp_path: Path) -> Runtime:
    return Runtime(executable, tmp_path)


# What the agent gets, and what the runtime gets


async def test_add_hands_over_everything_and_prints_the_result(runtime: Runtime) -> None:
    result = b'{"cniVersion":"1.1.0","interfaces":[],"ips":[]}\n'
    body = runtime.body(rdma=True, args={"labels": {"ä": "\u2028"}})
    async with agent(runtime, lambda _: web.Response(body=result)) as calls:
        outcome = await runtime.run(
            "ADD", body, CNI_ARGS="IgnoreUnknown=1;X=ä %25\x7f;K8S_POD_NAME=p", CNI_PATH="/opt/cni/bin:/b in"
        )
    assert outcome.success() == result
    (call,) = calls
    assert (call.command, call.container_id, call.ifname, call.netns) == (Command.ADD, "c1", "eth0", "/run/netns/c1")
    assert call.path == ("/opt/cni/bin", "/b in")
    assert call.args.pod_name == "p"
    assert call.config.rdma
    assert call.config.args == {"labels": {"ä": "\u2028"}}


@pytest.mark.parametrize("command", ["DEL", "CHECK", "GC", "STATUS"])
async def test_the_other_commands_print_nothing_on_success(runtime: Runtime, command: str) -> None:
    extra: dict[str, object] = {"prevResult": {"ips": []}, "cni.dev/valid-attachments": []}
    body = runtime.body(**extra)
    async with agent(runtime, empty) as calls:
        outcome = await runtime.run(command, body)
    assert outcome.success() == b""
    assert [call.command for call in calls] == [command]


@pytest.mark.parametrize("command", list(Command))
async def test_an_error_of_the_agent_is_printed_as_it_is(runtime: Runtime, command: Command) -> None:
    error = b'{"cniVersion":"1.1.0","code":101,"msg":"no"}'
    async with agent(runtime, lambda _: web.Response(body=error, status=409)):
        extra: dict[str, object] = {"prevResult": {"ips": []}, "cni.dev/valid-attachments": []}
        body = runtime.body(**extra)
        outcome = await runtime.run(command, body)
    assert (outcome.status, outcome.stdout, outcome.stderr) == (1, error, b"")


async def test_a_body_and_an_answer_of_nearly_a_mebibyte_pass(runtime: Runtime) -> None:
    result = json.dumps({"x": "y" * (MIB - 100)}).encode()
    body = runtime.body(args={"x": "y" * (MIB - 400)})
    async with agent(runtime, lambda _: web.Response(body=result)) as calls:
        outcome = await runtime.run("ADD", body)
    assert outcome.success() == result
    assert calls


async def test_an_answer_in_small_pieces_is_put_together(runtime: Runtime) -> None:
    wire = b'HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length:  13\r\n\r\n{"ips": [1] }'

    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in wire:
            writer.write(bytes([byte]))
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(handle, str(runtime.socket))
    async with server:
        outcome = await runtime.run("ADD")
    assert outcome.success() == b'{"ips": [1] }'


# VERSION


@pytest.mark.parametrize("body", [b"", b" \n", b"{}"])
async def test_version_needs_neither_agent_nor_input(runtime: Runtime, body: bytes) -> None:
    validate_version(json.loads((await runtime.run("VERSION", body)).success()))


@pytest.mark.parametrize("version", ["0.3.1", "1.0.0", "1.1.0", "9.9.9", "1.0.0-rc.1+x"])
async def test_version_echoes_the_version_on_input(runtime: Runtime, version: str) -> None:
    body = json.dumps({"cniVersion": version}).encode()
    answer = json.loads((await runtime.run("VERSION", body)).success())
    validate_version(answer, version)
    assert answer["supportedVersions"] == ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]


async def test_podmans_dummy_environment(runtime: Runtime) -> None:
    outcome = await runtime.run(
        "VERSION", b'{"cniVersion":"1.0.0"}', CNI_NETNS="dummy", CNI_IFNAME="dummy", CNI_CONTAINERID="dummy"
    )
    validate_version(json.loads(outcome.success()), "1.0.0")


@pytest.mark.parametrize(
    "version",
    [1, None, "", "1", "1.1.000", "1.01.0", "01.0.0", '1.0.0"', "1.0", "v1.0.0", "1.0.0 ", "1.0.0-ä", "1" * 100],
)
async def test_what_is_no_version_cannot_be_decoded(runtime: Runtime, version: object) -> None:
    body = json.dumps({"cniVersion": version}).encode()
    (await runtime.run("VERSION", body)).error(6)


# Bad input, without an agent's help


@pytest.mark.parametrize("command", [None, "", "add", "ADD "])
async def test_an_unknown_command(runtime: Runtime, command: str | None) -> None:
    assert "CNI_COMMAND" in (await runtime.run("ADD", b"", CNI_COMMAND=command)).error(4)


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", ["CNI_CONTAINERID", "CNI_IFNAME"]),
    ],
)
async def test_every_missing_variable_is_named(runtime: Runtime, command: str, missing: list[str]) -> None:
    environment: dict[str, Any] = dict.fromkeys(["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"])
    sentence = (await runtime.run(command, **environment)).error(4)
    assert [name for name in environment if name in sentence] == missing


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CNI_CONTAINERID", v) for v in ("../x", "-a", "a b", b"\xff", "a" * 201, "a\n")]
    + [("CNI_IFNAME", v) for v in (".", "..", "a/b", "a:b", "a%d", "a b", "a\t", "a" * 16, b"\xe4")]
    + [("CNI_ARGS", v) for v in ("x" * 8001, "ä" * 2000)],
)  # fmt: skip
async def test_invalid_variables_are_named(runtime: Runtime, variable: str, value: str | bytes) -> None:
    variables: dict[str, Any] = {variable: value}
    assert variable in (await runtime.run("ADD", **variables)).error(4)


@pytest.mark.parametrize("command", list(Command))
@pytest.mark.parametrize("version", ["0.2.0", "1.2.0", None])
async def test_an_incompatible_version(runtime: Runtime, command: Command, version: str | None) -> None:
    body = runtime.body(cniVersion=version)
    (await runtime.run(command, body)).error(1, version)


@pytest.mark.parametrize(("command", "version"), [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "0.4.0")])
async def test_a_command_that_the_version_does_not_have(runtime: Runtime, command: str, version: str) -> None:
    body = runtime.body(cniVersion=version)
    assert command in (await runtime.run(command, body)).error(1, version)


@pytest.mark.parametrize("key", ["socket", "stateDir"])
@pytest.mark.parametrize("value", [5, "", "relative", "/x\0y", "/" + "x" * 4000, ["/x"]])
async def test_paths_must_be_absolute_and_fit(runtime: Runtime, key: str, value: object) -> None:
    assert key in (await runtime.run("ADD", runtime.body(**{key: value}))).error(7)


@pytest.mark.parametrize("command", ["ADD", "DEL", "STATUS"])
@pytest.mark.parametrize("body", [b"", b"x", b"[]", b'{"cniVersion":"1.1.0"', b"{}{}", b'{"a":"\xff"}'])
async def test_input_that_is_no_json_object(runtime: Runtime, command: str, body: bytes) -> None:
    assert "byte" in (await runtime.run(command, body)).error(6, None)


async def test_the_last_of_two_equal_keys_counts_and_keys_may_be_escaped(runtime: Runtime) -> None:
    body = b'{"socket":"/x","cniVersion":"1.0.0","\\u0073ocket":"\\/y\\u00e4\\ud83d\\ude00","a":{"socket":"/z"}}'
    sentence = (await runtime.run("ADD", body)).error(11, "1.0.0")
    assert "on /yä😀:" in sentence


async def test_too_much_input(runtime: Runtime) -> None:
    assert "1 MiB" in (await runtime.run("ADD", b" " * (MIB + 1))).error(5)


async def test_input_that_never_ends_is_waited_for_only_so_long(runtime: Runtime) -> None:
    runtime.timeout_s = 1
    read, write = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            runtime.executable, env=runtime.environment("ADD"), stdin=read, stdout=subprocess.PIPE
        )
        stdout, _ = await asyncio.wait_for(process.communicate(), 30)
    finally:
        os.close(read)
        os.close(write)
    assert process.returncode is not None
    Outcome(process.returncode, stdout, b"").error(5)


@pytest.mark.parametrize("value", ["0", "601", "x", "", "1s", "-1", " 5", "99999999999999999999"])
async def test_a_bad_time_out_is_named(runtime: Runtime, value: str) -> None:
    assert "RDMANET_CNI_TIMEOUT_S" in (await runtime.run("ADD", RDMANET_CNI_TIMEOUT_S=value)).error(4)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
async def test_closed_standard_descriptors_are_not_given_to_the_socket(runtime: Runtime, closed: str) -> None:
    async with agent(runtime, lambda _: web.json_response({"ips": []})) as calls:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", f'exec "$0" {closed}', runtime.executable, env=runtime.environment("ADD"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        stdout, stderr = await asyncio.wait_for(process.communicate(runtime.body()), 30)
    assert stderr == b""
    if "<&-" in closed:  # read as empty
        assert (process.returncode, calls) == (1, [])
    else:
        assert (process.returncode, len(calls), stdout) == (0, 1, b"")


# An agent that is away or broken


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)])
async def test_an_agent_that_is_away(runtime: Runtime, command: str, code: int) -> None:
    sentence = (await runtime.run(command)).error(code, command=command)
    assert str(runtime.socket) in sentence
    assert "No such file" in sentence
    assert "doctor" in sentence
    assert not (runtime.folder / "state").exists()


async def test_a_socket_that_nobody_listens_on(runtime: Runtime) -> None:
    async with agent(runtime, empty):
        os.link(runtime.socket, runtime.folder / "dead.sock")
    (runtime.folder / "dead.sock").rename(runtime.socket)
    assert "refused" in (await runtime.run("ADD")).error(11)


OK = b"HTTP/1.1 200 OK\r\n"
MALFORMED = [
    b"",
    b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n{}",
    b"HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 2x0 OK\r\nContent-Length: 2\r\n\r\n{}",
    OK + b"Content-Length: 3\r\n\r\n{}",
    OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    OK + b"Content-Length: -2\r\n\r\n{}",
    OK + b"Content-Length: \r\n\r\n{}",
    OK + b"Content-Length: 2x\r\n\r\n{}",
    OK + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    OK + b"Content-Length: 1048577\r\n\r\n" + b" " * 1048575 + b"{}",
    OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    OK + b"Content-Length: 2\r\n\r\n[]",
    OK + b"Content-Length: 2\r\n\r\n{x",
    OK + b"X: " + b"x" * 20000 + b"\r\nContent-Length: 2\r\n\r\n{}",
    OK + b"x" * 100000,
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 14\r\n\r\n404: Not Found",
    b'HTTP/1.1 500 X\r\nContent-Length: 8\r\n\r\n{"msg":1',
    b'HTTP/1.1 500 X\r\nContent-Length: 9\r\n\r\n{"msg":1}',
]


@pytest.mark.parametrize("answer", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_malformed_answer_is_an_error_of_the_specification(runtime: Runtime, answer: bytes) -> None:
    async with raw_server(runtime, answer):
        (await runtime.run("ADD")).error(11)
        (await runtime.run("STATUS")).error(50, command="STATUS")
        assert (await runtime.run("DEL")).success() == b""
    assert runtime.queued == ["c1@eth0"]


async def test_an_add_without_a_result_is_malformed(runtime: Runtime) -> None:
    async with agent(runtime, empty):
        assert "without a CNI result" in (await runtime.run("ADD")).error(11)


async def test_an_early_refusal_is_read_although_the_request_was_not(runtime: Runtime) -> None:
    error = b'{"cniVersion":"1.1.0","code":7,"msg":"no"}'
    head = b"HTTP/1.1 413 X\r\nContent-Length: %d\r\n\r\n" % len(error)
    async with raw_server(runtime, head + error):
        (await runtime.run("ADD", runtime.body(args={"x": "y" * 900_000}))).error(7)


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("STATUS", 50)])
async def test_an_agent_that_never_answers_is_waited_for_only_so_long(
    runtime: Runtime, command: str, code: int
) -> None:
    runtime.timeout_s = 1
    started = time.monotonic()
    async with raw_server(runtime, None) as heads:
        outcome = await runtime.run(command)
        assert heads.qsize() == 1
    assert "in time" in outcome.error(code, command=command)
    assert 0.9 < time.monotonic() - started < 10


async def test_an_agent_that_accepts_no_connection_is_waited_for_only_so_long(runtime: Runtime) -> None:
    """A full backlog; the executable waits two seconds for a place in it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(runtime.socket))
        listener.listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(runtime.socket))
        started = time.monotonic()
        assert "accept" in (await runtime.run("ADD")).error(11)
        assert 1.9 < time.monotonic() - started < 10


# Any bytes

TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"u0041", b"null", b"true", b"-0.1e+5", b"1", b" "]
TOKENS += [b'"cniVersion"', b'"1.0.0"', b'"socket"', b'"/x"', b"\xc3\xa4", b"\xff"]
VALUES = st.recursive(st.text() | st.floats() | st.none() | st.integers(), st.lists, max_leaves=5)
BYTES = st.one_of(
    st.binary(max_size=400),
    st.lists(st.sampled_from(TOKENS), max_size=40).map(b"".join),
    st.dictionaries(st.text(max_size=6), VALUES, max_size=4).map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.text(max_size=6), VALUES, max_size=4).map(
        lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=TOLERATED)
@given(BYTES)
@example(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}")
@example(b'{"a":' + b"[" * 64 + b"]" * 64 + b"}")
@example(b'{"a":"\\ud83d\\ude00\\ud83d"}')
@example(b'{"a":"\\ud83dx"}')
@example(b'{"a":-}')
@example(b'{"a":01}')
@example(b'{"a":1.e5}')
@example(b'{"a":"\xed\xa0\x80"}')
@example(b'{"a":"\xf4\x90\x80\x80"}')
@example(b'{"a":"\xe0\x80\x80"}')
@example(b'{"a":"\x1f"}')
def test_the_scanner_and_the_agent_agree_on_what_is_json(runtime: Runtime, body: bytes) -> None:
    outcome = runtime.run_now("VERSION", body)
    assert outcome.stderr == b""
    answer = json.loads(outcome.stdout)
    if outcome.status == 0:
        validate_version(answer)
        assert not body.strip(b" \t\r\n") or isinstance(parse_document(body), dict)
    else:
        validate_error(answer, None)
        assert answer["code"] == 6
        if "not a JSON object" in answer["msg"]:
            with pytest.raises(CniError):
                parse_document(body)


@settings(max_examples=150, deadline=None, suppress_health_check=TOLERATED)
@given(
    st.sampled_from([*Command, "VERSION"]),
    st.dictionaries(
        st.sampled_from(["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS", "CNI_PATH", "CNI_COMMAND"]),
        st.binary(max_size=100).map(lambda value: value.replace(b"\0", b"")),
    ),
)
def test_any_environment_gives_one_answer(runtime: Runtime, command: str, variables: dict[str, bytes]) -> None:
    outcome = runtime.run_now(command, runtime.body(), **variables)
    assert outcome.stderr == b""
    if outcome.status == 0:
        assert command in ("DEL", "VERSION")
    else:
        validate_error(json.loads(outcome.stdout))
