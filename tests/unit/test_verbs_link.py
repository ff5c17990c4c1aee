"""The library's connection to the broker, against a WebSocket server that does what each test says."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from rdmanet import lease as wire
from rdmanet.errors import LeaseRefusedError, UnavailableError
from rdmanet.model import PodName
from rdmanet.verbs.link import Link, LinkLostError

HELLO = wire.HelloReply(PodName("default", "train-0"), "rxe0", (), 8)
Script = Callable[["Broker", web.WebSocketResponse], Awaitable[None]]


class Broker:
    """Runs one script per connection, in order."""

    def __init__(self, path: Path):
        self.path = path
        self.scripts: asyncio.Queue[Script] = asyncio.Queue()
        self.runner: web.AppRunner | None = None

    async def start(self) -> None:
        application = web.Application()
        application.router.add_get(wire.HTTP_PATH, self.serve)
        self.runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.UnixSite(self.runner, str(self.path)).start()

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        script = await self.scripts.get()
        await script(self, socket)
        return socket

    async def heard(self, socket: web.WebSocketResponse) -> wire.Request:
        return wire.parse_request(await socket.receive_str())

    async def hello(self, socket: web.WebSocketResponse) -> None:
        request = await self.heard(socket)
        assert isinstance(request, wire.Hello)
        await self.say(socket, wire.Reply(request.id, HELLO.to_json()))

    async def say(self, socket: web.WebSocketResponse, message: wire.Answer) -> None:
        await socket.send_str(wire.dump(message))


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    made = Broker(tmp_path / "broker")
    await made.start()
    yield made
    await made.stop()


class Client:
    """A link and what it reported."""

    def __init__(self, path: Path):
        self.greetings: list[wire.HelloReply] = []
        self.pushed: asyncio.Queue[wire.Pushed] = asyncio.Queue()
        self.link = Link(self.greeted, self.pushed.put_nowait, str(path))

    async def greeted(self, hello: wire.HelloReply) -> None:
        self.greetings.append(hello)


@pytest.fixture
async def client(broker: Broker) -> AsyncIterator[Client]:
    made = Client(broker.path)
    made.link.start()
    yield made
    await made.link.close()


async def until_closed(broker: Broker, socket: web.WebSocketResponse) -> None:
    """Answer nothing until the client hangs up."""
    async for _ in socket:
        pass


async def test_greets_first_and_answers_go_to_whom_they_belong(broker: Broker, client: Client) -> None:
    async def script(broker: Broker, socket: web.WebSocketResponse) -> None:
        await broker.hello(socket)
        first, second = await broker.heard(socket), await broker.heard(socket)
        await broker.say(socket, wire.Reply(second.id, {"is": "second"}))
        await broker.say(socket, wire.Revoked((5,), "over"))
        await broker.say(socket, wire.Refusal(first.id, "limit", "too many"))
        await until_closed(broker, socket)

    broker.scripts.put_nowait(script)
    await client.link.up(30)
    assert client.greetings == [HELLO]
    listen = functools.partial(wire.Listen, service="a")
    first, second = await asyncio.gather(
        client.link.request(listen), client.link.request(listen), return_exceptions=True
    )
    assert isinstance(first, LeaseRefusedError)
    assert (first.sentence, first.operation) == ("too many", "limit")
    assert second == {"is": "second"}
    assert await client.pushed.get() == wire.Revoked((5,), "over")


async def test_a_greeting_is_handled_before_what_follows_it(broker: Broker, client: Client) -> None:
    """What it says of the device must not come after news of it."""
    seen: list[object] = []

    async def script(broker: Broker, socket: web.WebSocketResponse) -> None:
        await broker.hello(socket)
        await broker.say(socket, wire.DeviceState("gone"))
        await until_closed(broker, socket)

    def pushed(message: wire.Pushed) -> None:
        seen.append(message)
        done.set()

    done = asyncio.Event()
    link = Link(client.greeted, pushed, str(broker.path), hello=seen.append)
    await client.link.close()
    link.start()
    broker.scripts.put_nowait(script)
    await asyncio.wait_for(done.wait(), 30)
    await link.close()
    assert seen == [HELLO, wire.DeviceState("gone")]


async def test_an_answer_is_handled_before_what_follows_it(broker: Broker, client: Client) -> None:
    seen: list[str] = []

    async def script(broker: Broker, socket: web.WebSocketResponse) -> None:
        await broker.hello(socket)
        request = await broker.heard(socket)
        await broker.say(socket, wire.Reply(request.id))
        await broker.say(socket, wire.Revoked((5,), "over"))
        await until_closed(broker, socket)

    def pushed(message: wire.Pushed) -> None:
        seen.append("revoked")
        done.set()

    done = asyncio.Event()
    link = Link(client.greeted, pushed, str(broker.path))
    await client.link.close()
    link.start()
    broker.scripts.put_nowait(script)
    await link.up(30)
    await link.request(lambda number: wire.Listen(number, "a"), answered=lambda values: seen.append("answered"))
    await done.wait()
    assert seen == ["answered", "revoked"]
    await link.close()


@pytest.mark.parametrize("when", ["before the answer", "with the answer under way"])
async def test_the_answer_to_a_cancelled_request_is_not_lost(broker: Broker, client: Client, when: str) -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()
    late: asyncio.Queue[wire.Json] = asyncio.Queue()

    async def script(broker: Broker, socket: web.WebSocketResponse) -> None:
        await broker.hello(socket)
        request = await broker.heard(socket)
        asked.set()
        await may_answer.wait()
        await broker.say(socket, wire.Reply(request.id, {"lease": 1}))
        await until_closed(broker, socket)

    broker.scripts.put_nowait(script)
    await client.link.up(30)
    request = asyncio.create_task(
        client.link.request(
            lambda number: wire.Listen(number, "a"),
            answered=lambda values: pytest.fail("nobody waits for it"),
            too_late=late.put_nowait,
        )
    )
    await asked.wait()
    request.cancel()
    if when == "before the answer":
        with pytest.raises(asyncio.CancelledError):
            await request
    else:
        # The answer arrives between the cancellation and the turn in which the task notices it.
        client.link._received(wire.Reply(2, {"lease": 1}))
        with pytest.raises(asyncio.CancelledError):
            await request
        assert late.get_nowait() == {"lease": 1}
        return
    may_answer.set()
    assert await late.get() == {"lease": 1}


async def test_requests_of_a_lost_connection_are_told_and_it_comes_back(broker: Broker, client: Client) -> None:
    async def dies(broker: Broker, socket: web.WebSocketResponse) -> None:
        await broker.hello(socket)
        await broker.heard(socket)

    async def lives(broker: Broker, socket: web.WebSocketResponse) -> None:
        await broker.hello(socket)
        request = await broker.heard(socket)
        await broker.say(socket, wire.Reply(request.id))
        await until_closed(broker, socket)

    broker.scripts.put_nowait(dies)
    await client.link.up(30)
    with pytest.raises(LinkLostError):
        await client.link.request(lambda number: wire.Listen(number, "a"))
    with pytest.raises(LinkLostError):
        await client.link.request(lambda number: wire.Listen(number, "a"))
    broker.scripts.put_nowait(lives)
    await client.link.up(30)
    await client.link.request(lambda number: wire.Listen(number, "a"))
    assert client.greetings == [HELLO, HELLO]


async def test_a_broker_that_is_away_is_waited_for(broker: Broker, client: Client) -> None:
    await broker.stop()
    client = Client(broker.path)
    client.link.start()
    with pytest.raises(UnavailableError, match="no rdmanet agent serves this pod"):
        await client.link.up(0.2)
    await broker.start()
    broker.scripts.put_nowait(lambda broker, socket: broker.hello(socket))
    await client.link.up(30)
    await client.link.close()


async def test_why_the_broker_hung_up_is_in_the_sentence(broker: Broker, client: Client) -> None:
    async def dismisses(broker: Broker, socket: web.WebSocketResponse) -> None:
        await broker.say(socket, wire.Refusal(None, "limit", "train-0 has 64 connections to the agent"))
        dismissed.set()

    dismissed = asyncio.Event()
    broker.scripts.put_nowait(dismisses)
    await dismissed.wait()
    await until(lambda: "64 connections" in client.link._why_down)
    with pytest.raises(UnavailableError, match="train-0 has 64 connections to the agent"):
        await client.link.up(0)


async def test_a_refused_greeting_is_the_reason(broker: Broker, client: Client) -> None:
    async def refuses(broker: Broker, socket: web.WebSocketResponse) -> None:
        request = await broker.heard(socket)
        await broker.say(socket, wire.Refusal(request.id, "version", "install the same rdmanet on both sides"))
        await until_closed(broker, socket)

    broker.scripts.put_nowait(refuses)
    await until(lambda: "install the same" in client.link._why_down)


async def test_nonsense_ends_the_connection(broker: Broker, client: Client) -> None:
    async def babbles(broker: Broker, socket: web.WebSocketResponse) -> None:
        await broker.hello(socket)
        await socket.send_str("{}")
        await until_closed(broker, socket)

    broker.scripts.put_nowait(babbles)
    broker.scripts.put_nowait(lambda broker, socket: broker.hello(socket))
    await until(lambda: len(client.greetings) == 2)


async def until(reached: Callable[[], bool]) -> None:
    """Wait for something that the link does by itself, turn by turn of the loop."""
    async with asyncio.timeout(30):
        while not reached():  # noqa: ASYNC110 - what is waited for is a value, not an event
            await asyncio.sleep(0)
