"""The library's connection to the broker: requests and answers, and coming back after the agent was away."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from rdmanet import lease as wire
from rdmanet.errors import LeaseRefusedError, RdmanetError, RequestError, UnavailableError
from rdmanet.verbs import forked

_log = logging.getLogger(__name__)

#: Between attempts to reach an agent that is away.
_FIRST_RETRY_S = 0.05
_LONGEST_RETRY_S = 1.0
#: How long a farewell may take.
_COURTESY_S = 5.0


class LinkLostError(UnavailableError):
    """The agent went away before it answered; the request can be made again when it is back."""


def refused(refusal: wire.Refusal, subject: str = "") -> LeaseRefusedError:
    """The broker's refusal as an exception."""
    return LeaseRefusedError(refusal.sentence, operation=refusal.kind, subject=subject)


@dataclass(slots=True)
class _Waiting:
    """A request that has not been answered. Its future is cancelled with whoever waits for it."""

    future: asyncio.Future[wire.Json]
    answered: Callable[[wire.Json], None] | None
    too_late: Callable[[wire.Json], None] | None


class Link:
    """One WebSocket to the broker at a time. After each (re)connection ``greeted`` is called before anybody else's
    requests go out; ``pushed`` gets what the broker sends unasked. Both belong to the session."""

    def __init__(
        self,
        greeted: Callable[[wire.HelloReply], Awaitable[None]],
        pushed: Callable[[wire.Pushed], None],
        path: str = wire.SOCKET_NAME,
        *,
        hello: Callable[[wire.HelloReply], None] = lambda reply: None,
    ):
        """``hello`` gets what greeted gets, before any later message is handled."""
        self._path = path
        self._greeted = greeted
        self._hello = hello
        self._pushed = pushed
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._up = asyncio.Event()
        self._was_up = self._forked = False
        self._why_down = "not connected yet"
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        forked.watch(self)
        connector = aiohttp.UnixConnector(path=self._path)
        self._http = aiohttp.ClientSession(connector=connector)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="rdmanet broker link")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    def forked(self) -> list[int]:
        """In a child of its process: see rdmanet.verbs.forked."""
        socket, self._socket, self._forked = self._socket, None, True
        plain = None if socket is None else socket.get_extra_info("socket")
        return [] if plain is None or plain.fileno() < 0 else [plain.fileno()]

    async def up(self, timeout_s: float | None) -> None:
        """Wait until the broker is reachable and has been greeted; UnavailableError after ``timeout_s``."""
        if self._forked:
            raise forked.error()
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError as error:
            raise UnavailableError(
                f"no rdmanet agent serves this pod ({self._why_down}); is the agent running, and did rdmanet give this "
                "pod its network?",
                operation="connect",
                subject=self._path.replace("\0", "@"),
            ) from error

    async def request(
        self,
        make: Callable[[int], wire.Request],
        *,
        answered: Callable[[wire.Json], None] | None = None,
        too_late: Callable[[wire.Json], None] | None = None,
    ) -> wire.Json:
        """Ask the broker and wait for its answer.

        ``answered`` is called with the answer before any later message is handled. When the caller is cancelled
        first, ``too_late`` is called with the answer once it comes. Raises LeaseRefusedError and LinkLostError.
        """
        socket = self._socket
        if socket is None:
            raise LinkLostError("the agent is away")
        number = next(self._numbers)
        waiting = _Waiting(asyncio.get_running_loop().create_future(), answered, too_late)
        self._waiting[number] = waiting
        try:
            await socket.send_str(wire.dump(make(number)))
        except (ConnectionError, aiohttp.ClientError) as error:
            self._waiting.pop(number, None)
            raise LinkLostError(f"the agent went away: {error}") from error
        except BaseException:
            waiting.future.cancel()  # half of it may be on its way
            raise
        return await waiting.future

    async def tell(self, make: Callable[[int], wire.Request]) -> None:
        """A request that is a courtesy: the lease or the listener may have ended by itself, and the agent may be away,
        in which case nobody will claim it."""
        try:
            async with asyncio.timeout(_COURTESY_S):
                await self.request(make)
        except (LeaseRefusedError, LinkLostError, TimeoutError) as error:
            _log.debug("not needed any more: %s", error)

    async def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                await self._serve_once()
            except (OSError, aiohttp.ClientError, RdmanetError) as error:
                self._why_down = error.sentence if isinstance(error, RdmanetError) else str(error)
            retry_s = _FIRST_RETRY_S if self._was_up else min(2 * retry_s, _LONGEST_RETRY_S)
            self._was_up = False
            await asyncio.sleep(retry_s)

    async def _serve_once(self) -> None:
        """One connection, from its handshake to its end."""
        assert self._http is not None
        loop = asyncio.get_running_loop()
        async with self._http.ws_connect(
            f"http://rdmanet{wire.HTTP_PATH}", max_msg_size=2 * wire.MAX_MESSAGE_BYTES, compress=0
        ) as socket:
            self._socket = socket
            reading = loop.create_task(self._read(socket))
            greeting = loop.create_task(self._greet())
            try:
                await asyncio.wait({reading, greeting}, return_when=asyncio.FIRST_COMPLETED)
                if greeting.done():
                    greeting.result()
                    self._was_up = True
                    self._up.set()
                await reading
            finally:
                self._down()
                reading.cancel()
                greeting.cancel()
                await asyncio.gather(reading, greeting, return_exceptions=True)

    async def _greet(self) -> None:
        values = await self.request(
            lambda number: wire.Hello(number), answered=lambda found: self._hello(wire.HelloReply.from_json(found))
        )
        await self._greeted(wire.HelloReply.from_json(values))

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                self._received(wire.parse_answer(message.data))
        raise LinkLostError("the agent closed the connection")

    def _received(self, answer: wire.Answer) -> None:
        match answer:
            case wire.Reply(number, values):
                waiting = self._waiting.pop(number, None)
                if waiting is None:
                    raise RequestError("the agent answered what nobody asked")
                if waiting.future.cancelled():
                    if waiting.too_late is not None:
                        waiting.too_late(values)
                    return
                if waiting.answered is not None:
                    waiting.answered(values)
                waiting.future.set_result(values)
            case wire.Refusal(None, _, sentence):
                raise RequestError(sentence)
            case wire.Refusal(int(number)):
                waiting = self._waiting.pop(number, None)
                if waiting is not None and not waiting.future.cancelled():
                    waiting.future.set_exception(refused(answer))
            case wire.Incoming() | wire.Revoked() | wire.DeviceState():
                self._pushed(answer)

    def _down(self) -> None:
        self._up.clear()
        self._socket = None
        lost, self._waiting = self._waiting, {}
        for waiting in lost.values():
            if not waiting.future.cancelled():
                waiting.future.set_exception(LinkLostError("the agent went away"))
                waiting.future.exception()  # whoever asked may be just about to be cancelled
