"""The lease protocol's messages: what is written is read back, and nothing else is."""

from __future__ import annotations

import contextlib
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet import lease as wire
from rdmanet.errors import RequestError
from rdmanet.model import PodName, Transport, address_key, address_of

ids = st.integers(0, 2**53 - 1)
leases = st.integers(1, 2**63 - 1)
first = st.sampled_from(string.ascii_letters + string.digits)
rest = st.text(string.ascii_letters + string.digits + "._-", max_size=30)
names = st.builds(str.__add__, first, rest)
pods = st.builds(PodName, names, names)
sentences = st.text(min_size=1, max_size=600).map(wire.sentence_of)
pairs = st.tuples(st.integers(2, 2**24 - 2), st.integers(0, 2**24 - 1))
gids = st.binary(min_size=16, max_size=16)
mtus = st.sampled_from(wire.MTUS_BYTES)
transports = st.sampled_from(Transport)
connected = st.builds(
    lambda gid, mtu_bytes, found: wire.Ends(gid, mtu_bytes, tuple(q for q, _ in found), tuple(p for _, p in found)),
    gids,
    mtus,
    st.lists(pairs, min_size=1, max_size=64, unique_by=lambda pair: pair[0]),
)
datagrams = st.builds(
    lambda gid, mtu_bytes, pair, qkey: wire.Ends(gid, mtu_bytes, pair[:1], pair[1:], Transport.UD, qkey),
    gids,
    mtus,
    pairs,
    st.integers(*wire.QKEYS),
)
ends = connected | datagrams
batches = st.lists(leases, min_size=1, max_size=64).map(tuple)
targets = st.builds(wire.Target, st.none() | names, names, names)
requests = st.one_of(
    st.builds(wire.Hello, ids, st.integers(0, 2**31 - 1)),
    st.builds(wire.Listen, ids, names, transports),
    st.builds(wire.Unlisten, ids, names),
    st.builds(wire.Connect, ids, targets, ends),
    st.builds(wire.Accept, ids, leases, ends),
    st.builds(wire.Reject, ids, leases, sentences),
    st.builds(
        wire.Claim,
        ids,
        st.lists(st.builds(wire.ClaimItem, leases, st.integers(2, 2**24 - 2)), max_size=64, unique=True).map(tuple),
    ),
    st.builds(wire.Release, ids, batches),
)
answers = st.one_of(
    st.builds(wire.Refusal, st.none() | ids, st.text("abc_", min_size=1, max_size=32), sentences),
    st.builds(wire.Incoming, leases, pods, names, ends),
    st.builds(wire.Revoked, batches, sentences),
    st.builds(wire.DeviceState, st.none() | sentences),
)
ENDS = wire.Ends(address_key("10.0.0.2"), 1024, (17,), (5,))
#: As long as messages get: 64 queue pairs with the largest numbers.
MOST = wire.Ends(b"\xff" * 16, 4096, tuple(range(2**24 - 65, 2**24 - 1)), (2**24 - 1,) * 64)
LONG_NAME = PodName("n" * 253, "p" * 253)


@given(requests)
def test_requests_are_read_as_written_and_fit(request: wire.Request) -> None:
    text = wire.dump(request)
    assert len(text.encode()) <= wire.MAX_MESSAGE_BYTES
    assert wire.parse_request(text) == request
    assert wire.request_id(text) == request.id


@given(answers)
def test_answers_are_read_as_written_and_fit(answer: wire.Answer) -> None:
    text = wire.dump(answer)
    assert len(text.encode()) <= wire.MAX_MESSAGE_BYTES
    assert wire.parse_answer(text) == answer


@given(
    st.one_of(
        st.builds(wire.ConnectReply, leases, ends, pods),
        st.builds(
            wire.HelloReply,
            pods,
            st.none() | st.text("abc_0", min_size=1, max_size=63),
            st.lists(st.ip_addresses(), max_size=16)
            .map(lambda found: [address_of(address_key(a)) for a in found])
            .map(tuple),
            st.integers(0, 2**31 - 1),
            st.integers(0, 255),
            st.integers(0, 7),
            st.none() | sentences,
        ),
        st.builds(
            wire.ClaimReply,
            st.lists(leases, max_size=64).map(tuple),
            st.lists(leases, max_size=64).map(tuple),
        ),
    ),
    ids,
)
def test_replies_are_read_as_written_and_fit(
    reply: wire.ConnectReply | wire.HelloReply | wire.ClaimReply, number: int
) -> None:
    text = wire.dump(wire.Reply(number, reply.to_json()))
    assert len(text.encode()) <= wire.MAX_MESSAGE_BYTES
    answer = wire.parse_answer(text)
    assert isinstance(answer, wire.Reply)
    assert answer.id == number
    assert type(reply).from_json(answer.values) == reply


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (wire.parse_request, wire.parse_answer):
        with contextlib.suppress(RequestError):  # and nothing else
            parse(text)
    wire.request_id(text)


@given(requests, st.data())
def test_a_changed_message_is_read_or_refused(request: wire.Request, data: st.DataObject) -> None:
    text = wire.dump(request)
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.text(max_size=3)) + text[place + data.draw(st.integers(0, 3)) :]
    try:
        read = wire.parse_request(changed)
    except RequestError:
        return
    assert wire.parse_request(wire.dump(read)) == read


GOOD = {"type": "connect", "id": 1, "target": "train-1:params", "ends": ENDS.to_json()}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"type": "shout"}, "'type' must be one of"),
        ({"type": ["connect"]}, "'type' must be one of"),
        ({"id": -1}, "'id' of connect must be an integer"),
        ({"id": True}, "'id' of connect must be an integer"),
        ({"id": 1.0}, "'id' of connect must be an integer"),
        ({"id": 2**53}, "'id' of connect must be an integer"),
        ({"target": "train-1"}, "a target is"),
        ({"target": "a/b/c:d"}, "a target is"),
        ({"target": "train-1:"}, "service's name"),
        ({"target": "train 1:x"}, "a target is"),
        ({"target": ":x"}, "a target is"),
        ({"target": "/a:x"}, "a target is"),
        ({"target": 5}, "must be a string"),
        ({"extra": 1}, "unknown keys: 'extra'"),
        ({"ends": {**ENDS.to_json(), "qpns": [1]}}, "'qpns' of ends must be integers from 2 to 16777214"),
        ({"ends": {**ENDS.to_json(), "qpns": [2**24 - 1]}}, "'qpns' of ends must be integers from 2"),
        ({"ends": {**ENDS.to_json(), "psns": [2**24]}}, "'psns' of ends must be integers from 0 to 16777215"),
        ({"ends": {**ENDS.to_json(), "psns": [True]}}, "'psns' of ends must be integers"),
        ({"ends": {**ENDS.to_json(), "qpns": [17.0]}}, "'qpns' of ends must be integers"),
        ({"ends": {**ENDS.to_json(), "qpns": 17}}, "'qpns' of ends must be a list of 1 to 64"),
        ({"ends": {**ENDS.to_json(), "qpns": []}}, "'qpns' of ends must be a list of 1 to 64"),
        ({"ends": {**ENDS.to_json(), "qpns": [*range(17, 82)]}}, "must be a list of 1 to 64"),
        ({"ends": {**ENDS.to_json(), "qpns": [17, 18]}}, "must be as many"),
        ({"ends": {**ENDS.to_json(), "qpns": [17, 17], "psns": [0, 1]}}, "all different"),
        ({"ends": {**ENDS.to_json(), "mtu_bytes": 1500}}, "'mtu_bytes' of ends must be one of 256"),
        ({"ends": {**ENDS.to_json(), "mtu_bytes": [256]}}, "'mtu_bytes' of ends must be one of 256"),
        ({"ends": {**ENDS.to_json(), "gid": "00"}}, "'gid' of ends"),
        ({"ends": {**ENDS.to_json(), "gid": ENDS.gid.hex().upper()}}, "'gid' of ends"),
        ({"ends": None}, "ends must be a JSON object"),
        ({"ends": {"gid": ENDS.gid.hex()}}, "ends lacks 'mtu_bytes', 'psns', 'qkey', 'qpns', 'transport'"),
        ({"ends": {**ENDS.to_json(), "transport": "uc"}}, "'transport' of ends must be one of rc, ud"),
        ({"ends": {**ENDS.to_json(), "transport": "ud"}}, "'qkey' of ends"),
        ({"ends": {**ENDS.to_json(), "qkey": 7}}, "'qkey' of ends"),
        ({"ends": {**ENDS.to_json(), "transport": "ud", "qkey": 1 << 31}}, "'qkey' of ends"),
        (
            {"ends": {**ENDS.to_json(), "transport": "ud", "qkey": 7, "qpns": [17, 18], "psns": [1, 2]}},
            "'qpns' of ends with transport ud must be one, not 2",
        ),
    ],
)
def test_refusals_name_what_is_wrong(change: dict[str, object], part: str) -> None:
    with pytest.raises(RequestError) as caught:
        wire.parse_request(json.dumps({**GOOD, **change}))
    assert part in caught.value.sentence


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "must be JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 4000, "must be JSON"),
        ('{"type":"hello","id":NaN,"version":1}', "must not contain NaN"),
        ('{"type":"hello","id":1,"id":2,"version":1}', "repeats a key"),
        ('{"type":"hello","id":1,"version":1}' + " " * 4096, "at most 4096 bytes"),
        ('"' + "é" * 2100 + '"', "at most 4096 bytes"),
        ('{"type":"release","id":1,"leases":["0000000000000000"]}', "must be a lease id"),
        ('{"type":"release","id":1,"leases":["8000000000000000"]}', "must be a lease id"),
        ('{"type":"release","id":1,"leases":[17]}', "must be a lease id"),
        ('{"type":"reject","id":1,"lease":"0000000000000001","sentence":"a\\nb"}', "one printable line"),
        ('{"type":"reject","id":1,"lease":"0000000000000001","sentence":"\\ud800"}', "one printable line"),
        (
            '{"type":"claim","id":1,"leases":[["0000000000000001",17],["0000000000000001",17]]}',
            "names a queue pair twice",
        ),
        ('{"type":"claim","id":1,"leases":{}}', "must be a list of 0 to 64"),
        ('{"type":"release","id":1,"leases":[]}', "must be a list of 1 to 64"),
    ],
)
def test_malformed_texts_are_refused(text: str, part: str) -> None:
    with pytest.raises(RequestError) as caught:
        wire.parse_request(text)
    assert part in caught.value.sentence


def test_a_target_means_the_callers_namespace_unless_it_says_otherwise() -> None:
    caller = PodName("jobs", "train-0")
    assert wire.Target.parse("train-1:params").pod_name(caller) == PodName("jobs", "train-1")
    assert wire.Target.parse("other/train-1:params").pod_name(caller) == PodName("other", "train-1")


def test_sentences_fit_and_are_one_line() -> None:
    assert wire.sentence_of("a\nb") == "a b"
    assert len(wire.sentence_of("x" * 5000)) == wire.MAX_SENTENCE
    assert wire.sentence_of("") != ""


def test_pods_are_called_by_their_short_names_in_the_default_namespace() -> None:
    assert wire.pod_text(PodName("default", "web-0")) == "web-0"
    assert wire.pod_text(PodName("jobs", "web-0")) == "jobs/web-0"


@pytest.mark.parametrize(
    "message",
    [
        wire.Connect(2**53 - 1, wire.Target("n" * 253, "p" * 253, "s" * 63), MOST),
        wire.Accept(2**53 - 1, 2**63 - 1, MOST),
        wire.Release(2**53 - 1, tuple(range(2**63 - 64, 2**63))),
        wire.Claim(2**53 - 1, tuple(wire.ClaimItem(2**63 - 1 - number, 2**24 - 2) for number in range(64))),
        wire.Incoming(2**63 - 1, LONG_NAME, "s" * 63, MOST),
        wire.Revoked(tuple(range(2**63 - 64, 2**63)), "\U0001f600" * 512),
        wire.Revoked(tuple(range(2**63 - 64, 2**63)), '"' * 512),
        wire.Reply(2**53 - 1, wire.ConnectReply(2**63 - 1, MOST, LONG_NAME).to_json()),
    ],
    ids=lambda message: message.TYPE,
)
def test_the_longest_messages_fit(message: wire.Request | wire.Answer) -> None:
    assert len(wire.dump(message).encode()) <= wire.MAX_MESSAGE_BYTES
