"""The messages that the pod-side library and the broker exchange about leases.

One JSON object per WebSocket text message, at most :data:`MAX_MESSAGE_BYTES` bytes (docs/verbs.md, "The
protocol"). A request carries ``id`` and is answered by ``reply`` or ``error`` with the same id; ``incoming`` and
``revoked`` are pushed. Every message is a frozen dataclass whose FIELDS say how each attribute is read and
written; the JSON keys are the attributes' names.

Parsing is strict: unknown or repeated keys, wrong types and values out of bounds raise RequestError with a
sentence. Lease ids are written as 16 hexadecimal digits, since JSON numbers above 2**53 are not safe everywhere;
GIDs as 32, being address keys. Only the standard library is needed: a pod needs nothing of the agent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

from rdmanet.errors import RequestError
from rdmanet.model import DEFAULT_NAMESPACE, IPAddress, PodName, address_key, address_of

#: Version of this protocol; a broker refuses a ``hello`` with another one.
PROTOCOL_VERSION = 1
#: Longest message either side sends or reads.
MAX_MESSAGE_BYTES = 4096
#: Most leases in one ``claim``; a library with more sends several.
MAX_CLAIMS = 64
#: Longest sentence in a message, in characters.
MAX_SENTENCE = 512
#: The socket's name: abstract, so it exists per network namespace and nowhere in a file system (unix(7)).
SOCKET_NAME = "\0rdmanet"
#: Where on that socket the WebSocket is.
HTTP_PATH = "/v1/leases"
#: Path MTUs that a queue pair can have, in bytes (InfiniBand 9.4.3; ibv_mtu).
MTUS_BYTES = (256, 512, 1024, 2048, 4096)

_POD_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,252}")
_SERVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}")
_LEASE_ID = re.compile(r"[0-7][0-9a-f]{15}")

Json = dict[str, object]


def sentence_of(text: str) -> str:
    """``text`` as one printable line of 1 to MAX_SENTENCE characters."""
    line = "".join(c if c.isprintable() else " " for c in text) or "no reason was given"
    return line if len(line) <= MAX_SENTENCE else line[: MAX_SENTENCE - 1] + "…"


def lease_text(lease: int) -> str:
    """A lease id as messages, logs and tables write it."""
    return f"{lease:016x}"


def service_name(text: str) -> str:
    """``text`` when it is a service's name, else RequestError."""
    if not _SERVICE.fullmatch(text):
        raise RequestError(
            f"a service's name has 1 to 63 letters, digits, dots, dashes or underscores, not {text[:80]!r}"
        )
    return text


def pod_text(name: PodName) -> str:
    """A pod's name for people: without the namespace where that is the default one."""
    return name.name if name.namespace == DEFAULT_NAMESPACE else str(name)


def no_device(name: PodName) -> str:
    """What to say about a pod without an RDMA device; the library and the broker say the same."""
    return (
        f'{pod_text(name)} has no RDMA device; ask for one with "rdma": true in its network configuration '
        "(or RDMA=true in CNI_ARGS) and create the pod again"
    )


class _Codec(NamedTuple):
    """How one value is read from JSON (raising RequestError that begins with ``what``) and written."""

    decode: Callable[[object, str], Any]
    encode: Callable[[Any], object] = lambda value: value


def _integer(low: int, high: int) -> _Codec:
    def decode(value: object, what: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise RequestError(f"{what} must be an integer from {low} to {high}")
        return value

    return _Codec(decode)


def _text(pattern: str) -> _Codec:
    compiled = re.compile(pattern)

    def decode(value: object, what: str) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise RequestError(f"{what} must be a string that matches {pattern}")
        return value

    return _Codec(decode)


def _optional(codec: _Codec) -> _Codec:
    return _Codec(
        lambda value, what: None if value is None else codec.decode(value, what),
        lambda value: None if value is None else codec.encode(value),
    )


def _tuple_of(codec: _Codec, most: int) -> _Codec:
    def decode(value: object, what: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise RequestError(f"{what} must be a list of at most {most}")
        return tuple(codec.decode(item, f"an item of {what}") for item in value)

    return _Codec(decode, lambda values: [codec.encode(value) for value in values])


def _decode_sentence(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= MAX_SENTENCE:
        raise RequestError(f"{what} must be one printable line of 1 to {MAX_SENTENCE} characters")
    return value


def _decode_lease(value: object, what: str) -> int:
    if not isinstance(value, str) or not _LEASE_ID.fullmatch(value) or int(value, 16) == 0:
        raise RequestError(f"{what} must be a lease id: 16 hexadecimal digits, below 2**63 and not 0")
    return int(value, 16)


def _decode_pod(value: object, what: str) -> PodName:
    namespace, _, name = value.partition("/") if isinstance(value, str) else ("", "", "")
    if not _POD_PART.fullmatch(namespace) or not _POD_PART.fullmatch(name):
        raise RequestError(f"{what} must be a pod's full name, as in default/train-1")
    return PodName(namespace, name)


def _decode_address(value: object, what: str) -> IPAddress:
    try:
        # Through the key, so that a mapped IPv4 address and a plain one are the same value.
        return address_of(address_key(str(value)))
    except ValueError as error:
        raise RequestError(f"{what} must be an IP address: {error}"[:200]) from error


_ID = _integer(0, 2**53 - 1)
#: QPN 0 and 1 are management, 0xffffff is multicast (InfiniBand 3.5.10).
_QPN = _integer(2, 2**24 - 2)
_LEASE = _Codec(_decode_lease, lease_text)
_SENTENCE = _Codec(_decode_sentence, sentence_of)
_POD = _Codec(_decode_pod, str)
_NAME = _text(_SERVICE.pattern)
_ADDRESS = _Codec(_decode_address, str)
_GID = _Codec(lambda value, what: bytes.fromhex(_text(r"[0-9a-f]{32}").decode(value, what)), lambda gid: gid.hex())

_Fielded = TypeVar("_Fielded", bound="_Fields")


class _Fields:
    """A value whose attributes are read and written by the codecs in FIELDS."""

    TYPE: ClassVar[str]
    FIELDS: ClassVar[dict[str, _Codec]]

    def to_json(self) -> Json:
        return {key: codec.encode(getattr(self, key)) for key, codec in self.FIELDS.items()}

    @classmethod
    def from_json(cls: type[_Fielded], value: object) -> _Fielded:
        """Raises RequestError unless ``value`` is an object with exactly the keys of FIELDS, all well formed."""
        if not isinstance(value, dict):
            raise RequestError(f"{cls.TYPE} must be a JSON object")
        missing = sorted(cls.FIELDS.keys() - value.keys())
        unknown = sorted(value.keys() - cls.FIELDS.keys())
        if missing:
            raise RequestError(f"{cls.TYPE} lacks {', '.join(map(repr, missing))}")
        if unknown:
            raise RequestError(f"{cls.TYPE} has unknown keys: {', '.join(map(repr, unknown))}"[:300])
        return cls(**{key: codec.decode(value[key], f"{key!r} of {cls.TYPE}") for key, codec in cls.FIELDS.items()})


@dataclass(frozen=True)
class Target:
    """What a pod connects to: [namespace/]pod:service. Without a namespace it is the caller's own."""

    namespace: str | None
    pod: str
    service: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises RequestError when ``text`` is not [namespace/]pod:service."""
        place, colon, service = text.partition(":")
        namespace, slash, pod = place.rpartition("/")
        if not colon or not _POD_PART.fullmatch(pod) or (slash and not _POD_PART.fullmatch(namespace)):
            raise RequestError(f"a target is [namespace/]pod:service, as in train-1:params, not {text[:80]!r}")
        return cls(namespace if slash else None, pod, service_name(service))

    def pod_name(self, caller: PodName) -> PodName:
        """The pod's full name as ``caller`` means it."""
        return PodName(caller.namespace if self.namespace is None else self.namespace, self.pod)

    def __str__(self) -> str:
        place = self.pod if self.namespace is None else f"{self.namespace}/{self.pod}"
        return f"{place}:{self.service}"


def _decode_target(value: object, what: str) -> Target:
    if not isinstance(value, str):
        raise RequestError(f"{what} must be a string, [namespace/]pod:service")
    return Target.parse(value)


@dataclass(frozen=True)
class End(_Fields):
    """One end of a lease: what the other end needs to reach this queue pair."""

    TYPE = "end"
    FIELDS: ClassVar = {
        "gid": _GID,
        "qpn": _QPN,
        "psn": _integer(0, 2**24 - 1),
        "mtu_bytes": _integer(MTUS_BYTES[0], MTUS_BYTES[-1]),
    }
    gid: bytes  # 16 bytes: the pod's address key, which is its RoCE GID
    qpn: int
    psn: int  # first packet sequence number that this end sends
    mtu_bytes: int  # largest path MTU of this end; the smaller of both is used

    @classmethod
    def from_json(cls, value: object) -> End:
        end = super().from_json(value)
        if end.mtu_bytes not in MTUS_BYTES:
            raise RequestError(f"'mtu_bytes' of end must be one of {', '.join(map(str, MTUS_BYTES))}")
        return end


_END = _Codec(lambda value, _: End.from_json(value), End.to_json)


@dataclass(frozen=True)
class Hello(_Fields):
    """First message on a connection; answered with HelloReply."""

    TYPE = "hello"
    FIELDS: ClassVar = {"id": _ID, "version": _integer(0, 2**31 - 1)}
    id: int
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class Listen(_Fields):
    """Let others connect to ``service`` of this pod."""

    TYPE = "listen"
    FIELDS: ClassVar = {"id": _ID, "service": _NAME}
    id: int
    service: str


@dataclass(frozen=True)
class Unlisten(Listen):
    """Take a Listen back; leases made through it live on."""

    TYPE = "unlisten"


@dataclass(frozen=True)
class Connect(_Fields):
    """Ask for a lease to ``target``; answered with ConnectReply when its listener has accepted."""

    TYPE = "connect"
    FIELDS: ClassVar = {"id": _ID, "target": _Codec(_decode_target, str), "end": _END}
    id: int
    target: Target
    end: End


@dataclass(frozen=True)
class Accept(_Fields):
    """Answer to Incoming: this end is ready to receive."""

    TYPE = "accept"
    FIELDS: ClassVar = {"id": _ID, "lease": _LEASE, "end": _END}
    id: int
    lease: int
    end: End


@dataclass(frozen=True)
class Reject(_Fields):
    """Answer to Incoming: no, and why."""

    TYPE = "reject"
    FIELDS: ClassVar = {"id": _ID, "lease": _LEASE, "sentence": _SENTENCE}
    id: int
    lease: int
    sentence: str


@dataclass(frozen=True)
class ClaimItem(_Fields):
    """A lease and the QPN of the claimer's queue pair."""

    TYPE = "a lease of claim"
    FIELDS: ClassVar = {"lease": _LEASE, "qpn": _QPN}
    lease: int
    qpn: int


@dataclass(frozen=True)
class Claim(_Fields):
    """After the agent came back: these leases are mine. Answered with ClaimReply."""

    TYPE = "claim"
    FIELDS: ClassVar = {
        "id": _ID,
        "leases": _tuple_of(_Codec(lambda v, _: ClaimItem.from_json(v), ClaimItem.to_json), MAX_CLAIMS),
    }
    id: int
    leases: tuple[ClaimItem, ...]


@dataclass(frozen=True)
class Release(_Fields):
    """Give a lease back; the peer is told that it is revoked."""

    TYPE = "release"
    FIELDS: ClassVar = {"id": _ID, "lease": _LEASE}
    id: int
    lease: int


Request = Hello | Listen | Unlisten | Connect | Accept | Reject | Claim | Release


@dataclass(frozen=True)
class Reply:
    """Answer to the request ``id``; ``values`` are what HelloReply, ConnectReply or ClaimReply reads."""

    TYPE = "reply"
    id: int
    values: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        return {"id": self.id, **self.values}

    @classmethod
    def from_json(cls, value: object) -> Reply:
        assert isinstance(value, dict)
        return cls(_ID.decode(value.pop("id", None), "'id' of reply"), value)


@dataclass(frozen=True)
class Refusal(_Fields):
    """The request ``id`` was refused. ``id`` None: the message was too malformed to know which."""

    TYPE = "error"
    FIELDS: ClassVar = {"id": _optional(_ID), "kind": _text(r"[a-z_]{1,32}"), "sentence": _SENTENCE}
    id: int | None
    kind: str  # a rdmanet.broker.core.Reason; also the metric's label
    sentence: str


@dataclass(frozen=True)
class Incoming(_Fields):
    """Pushed: somebody connects to ``service``; answer with Accept or Reject."""

    TYPE = "incoming"
    FIELDS: ClassVar = {"lease": _LEASE, "peer": _POD, "service": _NAME, "end": _END}
    lease: int
    peer: PodName
    service: str
    end: End


@dataclass(frozen=True)
class Revoked(_Fields):
    """Pushed: the lease is over and its packets are dropped."""

    TYPE = "revoked"
    FIELDS: ClassVar = {"lease": _LEASE, "sentence": _SENTENCE}
    lease: int
    sentence: str


Answer = Reply | Refusal | Incoming | Revoked


@dataclass(frozen=True)
class HelloReply(_Fields):
    """Who the caller is and what it may use."""

    TYPE = "reply to hello"
    FIELDS: ClassVar = {
        "pod": _POD,
        "device": _optional(_text(r"[A-Za-z0-9_.\-]{1,63}")),
        "addresses": _tuple_of(_ADDRESS, 16),
        "max_leases": _integer(0, 2**31 - 1),
    }
    pod: PodName
    device: str | None  # name of its RDMA device
    addresses: tuple[IPAddress, ...]  # the pod's own, IPv4 first: look the GID index up by one of these
    max_leases: int


@dataclass(frozen=True)
class ConnectReply(_Fields):
    """The lease is granted; ``end`` is the peer's."""

    TYPE = "reply to connect"
    FIELDS: ClassVar = {"lease": _LEASE, "end": _END, "peer": _POD}
    lease: int
    end: End
    peer: PodName


@dataclass(frozen=True)
class ClaimReply(_Fields):
    """Which leases live on, and which are gone."""

    TYPE = "reply to claim"
    FIELDS: ClassVar = {"claimed": _tuple_of(_LEASE, MAX_CLAIMS), "lost": _tuple_of(_LEASE, MAX_CLAIMS)}
    claimed: tuple[int, ...]
    lost: tuple[int, ...]


_REQUESTS = {m.TYPE: m for m in (Hello, Listen, Unlisten, Connect, Accept, Reject, Claim, Release)}
_ANSWERS = {m.TYPE: m for m in (Reply, Refusal, Incoming, Revoked)}


def dump(message: Request | Answer) -> str:
    """The JSON text of a message: ASCII only, hence as many bytes as characters."""
    return json.dumps({"type": message.TYPE, **message.to_json()}, separators=(",", ":"))


def parse_request(text: str) -> Request:
    """What a pod sent. Raises RequestError."""
    value = _load(text)
    kind = value.pop("type", None)
    if not isinstance(kind, str) or kind not in _REQUESTS:
        raise RequestError(f"'type' must be one of {', '.join(sorted(_REQUESTS))}")
    request: Request = _REQUESTS[kind].from_json(value)
    if isinstance(request, Claim) and len(set(request.leases)) != len(request.leases):
        raise RequestError("'leases' of claim names a queue pair twice")
    return request


def request_id(text: str) -> int | None:
    """The id in a message that parse_request refused, where there is a usable one: errors carry it back."""
    try:
        number: int = _ID.decode(_load(text).get("id"), "'id'")
    except RequestError:
        return None
    return number


def parse_answer(text: str) -> Answer:
    """What the broker sent. Raises RequestError."""
    value = _load(text)
    kind = value.pop("type", None)
    if not isinstance(kind, str) or kind not in _ANSWERS:
        raise RequestError(f"'type' must be one of {', '.join(sorted(_ANSWERS))}")
    answer: Answer = _ANSWERS[kind].from_json(value)
    return answer


def _load(text: str) -> Json:
    if len(text) > MAX_MESSAGE_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_MESSAGE_BYTES:
        raise RequestError(f"a message has at most {MAX_MESSAGE_BYTES} bytes")
    try:
        value = json.loads(text, object_pairs_hook=_no_repeated_keys, parse_constant=_no_constant)
    # A message of 4,000 brackets is deeper than the interpreter's stack allows.
    except (ValueError, RecursionError) as error:
        raise RequestError(f"a message must be JSON: {error}"[:200]) from error
    if not isinstance(value, dict):
        raise RequestError("a message must be a JSON object")
    return value


def _no_repeated_keys(pairs: list[tuple[str, object]]) -> Json:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise RequestError("a message repeats a key")
    return value


def _no_constant(name: str) -> object:
    raise RequestError(f"a message must not contain {name}")
