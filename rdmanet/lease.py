"""The messages that the pod-side library and the broker exchange about leases.

One JSON object per WebSocket text message, at most :data:`MAX_MESSAGE_BYTES` bytes (docs/verbs.md, "The
protocol"). A request carries ``id`` and is answered by ``reply`` or ``error`` with the same id; ``incoming``,
``revoked`` and ``device`` are pushed. Every message is a frozen dataclass whose FIELDS say how each attribute is read
and written; the JSON keys are the attributes' names.

Leases are asked for in batches of 1 to :data:`MAX_BATCH` queue pairs. ``lease`` of a batch's messages is its first
lease; the others follow it without a gap, in the order of the queue pairs. A UD queue pair is leased alone, and again
for each peer.

Parsing is strict: unknown or repeated keys, wrong types and values out of bounds raise RequestError with a
sentence. Lease ids are written as 16 hexadecimal digits, since JSON numbers above 2**53 are not safe everywhere;
GIDs as 32, being address keys. Only the standard library is needed: a pod needs nothing of the agent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from rdmanet.codec import Codec, Fields, integer, integers, optional, pair_of, text_like, tuple_of
from rdmanet.codec import Json as Json
from rdmanet.errors import RequestError
from rdmanet.model import DEFAULT_NAMESPACE, IPAddress, PodName, Transport, address_key, address_of

#: Version of this protocol; a broker refuses a ``hello`` with another one.
PROTOCOL_VERSION = 3
#: Longest message either side sends or reads.
MAX_MESSAGE_BYTES = 4096
#: Most queue pairs in one ``connect``, and leases in one ``claim``, ``release`` or ``revoked``; more need several.
MAX_BATCH = 64
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


def _decode_transport(value: object, what: str) -> Transport:
    if not isinstance(value, str) or value not in tuple(Transport):
        raise RequestError(f"{what} must be one of {', '.join(Transport)}")
    return Transport(value)


_ID = integer(0, 2**53 - 1)
#: QPN 0 and 1 are management, 0xffffff is multicast (InfiniBand 3.5.10).
QPNS = (2, 2**24 - 2)
_QPN = integer(*QPNS)
#: The kernel keeps the upper half for privileged users.
QKEYS = (0, 2**31 - 1)
_LEASE = Codec(_decode_lease, lease_text)
_LEASES = tuple_of(_LEASE, MAX_BATCH, 1)
_SENTENCE = Codec(_decode_sentence, sentence_of)
_POD = Codec(_decode_pod, str)
_NAME = text_like(_SERVICE.pattern)
_ADDRESS = Codec(_decode_address, str)
_GID_TEXT = text_like(r"[0-9a-f]{32}")
_TRANSPORT = Codec(_decode_transport, str)
_GID = Codec(lambda value, what: bytes.fromhex(_GID_TEXT.decode(value, what)), lambda gid: gid.hex())


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


def _decode_mtu(value: object, what: str) -> object:
    if not isinstance(value, int) or value not in MTUS_BYTES:
        raise RequestError(f"{what} must be one of {', '.join(map(str, MTUS_BYTES))}")
    return value


@dataclass(frozen=True)
class Ends(Fields):
    """One side of a batch of leases: what the other needs to reach these queue pairs."""

    TYPE = "ends"
    FIELDS: ClassVar = {
        "gid": _GID,
        "mtu_bytes": Codec(_decode_mtu),
        "qpns": integers(*QPNS, MAX_BATCH),
        "psns": integers(0, 2**24 - 1, MAX_BATCH),
        "transport": _TRANSPORT,
        "qkey": optional(integer(*QKEYS)),
    }
    gid: bytes  # 16 bytes: the pod's address key, which is its RoCE GID
    mtu_bytes: int  # largest path MTU of this side; the smaller of both is used
    qpns: tuple[int, ...]  # one per lease
    psns: tuple[int, ...]  # of each the first packet sequence number that it sends
    transport: Transport = Transport.RC
    qkey: int | None = None  # of a UD queue pair: who sends to it must name this (InfiniBand 3.5.3)

    @classmethod
    def from_json(cls, value: object) -> Ends:
        ends = super().from_json(value)
        if len(ends.qpns) != len(ends.psns) or len(set(ends.qpns)) != len(ends.qpns):
            raise RequestError("'qpns' and 'psns' of ends must be as many, and 'qpns' all different")
        if (ends.qkey is None) is (ends.transport is Transport.UD):
            raise RequestError("'qkey' of ends is for transport ud, and must be there for it")
        if ends.transport is Transport.UD and len(ends.qpns) != 1:
            raise RequestError(f"'qpns' of ends with transport ud must be one, not {len(ends.qpns)}")
        return ends

    @property
    def keys(self) -> tuple[tuple[bytes, int], ...]:
        """(address key, QPN) of each."""
        return tuple([(self.gid, qpn) for qpn in self.qpns])


_ENDS = Codec(lambda value, _: Ends.from_json(value), Ends.to_json)


@dataclass(frozen=True)
class Hello(Fields):
    """First message on a connection; answered with HelloReply."""

    TYPE = "hello"
    FIELDS: ClassVar = {"id": _ID, "version": integer(0, 2**31 - 1)}
    id: int
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class Listen(Fields):
    """Let others connect to ``service`` of this pod with queue pairs of this transport."""

    TYPE = "listen"
    FIELDS: ClassVar = {"id": _ID, "service": _NAME, "transport": _TRANSPORT}
    id: int
    service: str
    transport: Transport = Transport.RC


@dataclass(frozen=True)
class Unlisten(Fields):
    """Take a Listen back; leases made through it live on."""

    TYPE = "unlisten"
    FIELDS: ClassVar = {"id": _ID, "service": _NAME}
    id: int
    service: str


@dataclass(frozen=True)
class Connect(Fields):
    """Ask for a lease per queue pair to ``target``, all or none; answered with ConnectReply when its listener has
    accepted."""

    TYPE = "connect"
    FIELDS: ClassVar = {"id": _ID, "target": Codec(_decode_target, str), "ends": _ENDS}
    id: int
    target: Target
    ends: Ends


@dataclass(frozen=True)
class Accept(Fields):
    """Answer to Incoming: these ends, as many as were asked for, are ready to receive."""

    TYPE = "accept"
    FIELDS: ClassVar = {"id": _ID, "lease": _LEASE, "ends": _ENDS}
    id: int
    lease: int
    ends: Ends


@dataclass(frozen=True)
class Reject(Fields):
    """Answer to Incoming: no, and why."""

    TYPE = "reject"
    FIELDS: ClassVar = {"id": _ID, "lease": _LEASE, "sentence": _SENTENCE}
    id: int
    lease: int
    sentence: str


class ClaimItem(NamedTuple):
    """A lease and the QPN of the claimer's queue pair."""

    lease: int
    qpn: int


@dataclass(frozen=True)
class Claim(Fields):
    """After the agent came back: these leases are mine. Answered with ClaimReply."""

    TYPE = "claim"
    FIELDS: ClassVar = {"id": _ID, "leases": tuple_of(pair_of(ClaimItem, lease=_LEASE, qpn=_QPN), MAX_BATCH)}
    id: int
    leases: tuple[ClaimItem, ...]


@dataclass(frozen=True)
class Release(Fields):
    """Give leases back; their peers are told that they are revoked. Those that have ended already are passed over."""

    TYPE = "release"
    FIELDS: ClassVar = {"id": _ID, "leases": _LEASES}
    id: int
    leases: tuple[int, ...]


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
class Refusal(Fields):
    """The request ``id`` was refused. ``id`` None: the message was too malformed to know which."""

    TYPE = "error"
    FIELDS: ClassVar = {"id": optional(_ID), "kind": text_like(r"[a-z_]{1,32}"), "sentence": _SENTENCE}
    id: int | None
    kind: str  # a rdmanet.broker.core.Reason; also the metric's label
    sentence: str


@dataclass(frozen=True)
class Incoming(Fields):
    """Pushed: somebody connects to ``service``; answer with Accept or Reject."""

    TYPE = "incoming"
    FIELDS: ClassVar = {"lease": _LEASE, "peer": _POD, "service": _NAME, "ends": _ENDS}
    lease: int
    peer: PodName
    service: str
    ends: Ends


@dataclass(frozen=True)
class Revoked(Fields):
    """Pushed: these leases are over and their packets are dropped."""

    TYPE = "revoked"
    FIELDS: ClassVar = {"leases": _LEASES, "sentence": _SENTENCE}
    leases: tuple[int, ...]
    sentence: str


@dataclass(frozen=True)
class DeviceState(Fields):
    """Pushed: the pod's device cannot be used any more, and why; or, without a sentence, it can be used again. Leases
    that it had are over."""

    TYPE = "device"
    FIELDS: ClassVar = {"sentence": optional(_SENTENCE)}
    sentence: str | None


Pushed = Incoming | Revoked | DeviceState
Answer = Reply | Refusal | Pushed


@dataclass(frozen=True)
class HelloReply(Fields):
    """Who the caller is and what it may use."""

    TYPE = "reply to hello"
    FIELDS: ClassVar = {
        "pod": _POD,
        "device": optional(text_like(r"[A-Za-z0-9_.\-]{1,63}")),
        "addresses": tuple_of(_ADDRESS, 16),
        "max_leases": integer(0, 2**31 - 1),
        "traffic_class": integer(0, 255),
        "service_level": integer(0, 7),
        "unhealthy": optional(_SENTENCE),
    }
    pod: PodName
    device: str | None  # name of its RDMA device
    addresses: tuple[IPAddress, ...]  # the pod's own, IPv4 first: look the GID index up by one of these
    max_leases: int
    traffic_class: int = 0  # for the address vectors of its queue pairs (InfiniBand 8.2.2): its bandwidth class
    service_level: int = 0
    unhealthy: str | None = None  # why its device cannot be used now


@dataclass(frozen=True)
class ConnectReply(Fields):
    """The leases are granted; ``ends`` are the peer's."""

    TYPE = "reply to connect"
    FIELDS: ClassVar = {"lease": _LEASE, "ends": _ENDS, "peer": _POD}
    lease: int
    ends: Ends
    peer: PodName


@dataclass(frozen=True)
class ClaimReply(Fields):
    """Which leases live on, and which are gone."""

    TYPE = "reply to claim"
    FIELDS: ClassVar = {"claimed": tuple_of(_LEASE, MAX_BATCH), "lost": tuple_of(_LEASE, MAX_BATCH)}
    claimed: tuple[int, ...]
    lost: tuple[int, ...]


_REQUESTS = {m.TYPE: m for m in (Hello, Listen, Unlisten, Connect, Accept, Reject, Claim, Release)}
_ANSWERS = {m.TYPE: m for m in (Reply, Refusal, Incoming, Revoked, DeviceState)}


def dump(message: Request | Answer) -> str:
    """The JSON text of a message. Not in ASCII: escaped, the longest sentence would not fit."""
    return _ENCODE({"type": message.TYPE, **message.to_json()})


def parse_request(text: str) -> Request:
    """What a pod sent. Raises RequestError."""
    request: Request = _parse(text, _REQUESTS)
    if isinstance(request, Claim) and len(set(request.leases)) != len(request.leases):
        raise RequestError("'leases' of claim names a queue pair twice")
    return request


def request_id(text: str) -> int | None:
    """The id in a message that parse_request refused, where there is a usable one: errors carry it back."""
    try:
        return int(_ID.decode(_load(text).get("id"), "'id'"))
    except RequestError:
        return None


def parse_answer(text: str) -> Answer:
    """What the broker sent. Raises RequestError."""
    answer: Answer = _parse(text, _ANSWERS)
    return answer


def _parse(text: str, kinds: Mapping[str, Any]) -> Any:
    value = _load(text)
    kind = value.pop("type", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise RequestError(f"'type' must be one of {', '.join(sorted(kinds))}")
    return kinds[kind].from_json(value)


def _load(text: str) -> Json:
    if len(text) > MAX_MESSAGE_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_MESSAGE_BYTES:
        raise RequestError(f"a message has at most {MAX_MESSAGE_BYTES} bytes")
    try:
        value = _DECODE(text)
    # A message of 4,000 brackets is deeper than the interpreter's stack allows.
    except (ValueError, RecursionError) as error:
        raise RequestError(f"a message must be JSON: {error}"[:200]) from error
    if not isinstance(value, dict):
        raise RequestError("a message must be a JSON object")
    return value


def _no_repeated_keys(pairs: list[tuple[str, object]]) -> Json:
    if len(value := dict(pairs)) != len(pairs):
        raise RequestError("a message repeats a key")
    return value


def _no_constant(name: str) -> object:
    raise RequestError(f"a message must not contain {name}")


# json.dumps and json.loads would make these anew for every message.
_ENCODE = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_DECODE = json.JSONDecoder(object_pairs_hook=_no_repeated_keys, parse_constant=_no_constant).decode
