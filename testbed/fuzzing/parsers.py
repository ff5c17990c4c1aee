"""Parsers of what others write: CNI calls, the pods' lease messages, the configuration, manifests and objects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from urllib.parse import quote_from_bytes

from rdmanet import config, lease
from rdmanet.cni import HEADERS, CniError, Request, variables_of_headers
from rdmanet.commands import manifests
from rdmanet.errors import ConfigError, RequestError
from rdmanet.objects import reading
from testbed.fuzzing import executable
from testbed.fuzzing.search import Places, Target, traced
from testbed.host import toml
from testbed.paths import REPOSITORY

_HEADER_OF = {variable: header for header, variable in HEADERS.items()}
MANIFESTS = (*sorted((REPOSITORY / "testbed/manifests").glob("*.yaml")), REPOSITORY / "testbed/semantics/cases.yaml")


def _refusable(work: Callable[[], object], refusal: type[Exception]) -> Places:
    """What a parser reaches; that it refuses an input is no finding."""

    def run() -> None:
        try:
            work()
        except refusal as error:
            str(error).encode("utf-8", "surrogatepass")

    return traced(run)


def _request(data: bytes) -> Places:
    variables, _, rest = data.partition(executable.BETWEEN)
    body = rest.partition(executable.BETWEEN)[0]
    headers = {}
    for one in variables.split(b"\0"):
        name, _, value = one.partition(b"=")
        header = _HEADER_OF.get(name.decode("latin-1"))
        if header is not None:
            headers[header] = quote_from_bytes(value)
    return _refusable(lambda: Request.parse(variables_of_headers(headers), body), CniError)


def _lease(data: bytes) -> Places:
    text = data.decode("utf-8", "replace")

    def parse() -> None:
        lease.request_id(text)
        message = lease.parse_request(text)
        assert lease.parse_request(lease.dump(message)) == message

    return _refusable(parse, RequestError)


def _configuration(data: bytes) -> Places:
    return _refusable(lambda: config.parse(data.decode("utf-8", "replace")), ConfigError)


def _manifest(data: bytes) -> Places:
    def read() -> None:
        for document in reading.unlisted(manifests.parse(data, "input")):
            json.loads(reading.read(document).text)

    return _refusable(read, RequestError)


def lease_messages() -> list[str]:
    """One of each kind."""
    ends = lease.Ends(bytes(range(16)), 1024, (17, 18), (1, 2))
    return [
        lease.dump(message)
        for message in (
            lease.Hello(1, lease.PROTOCOL_VERSION),
            lease.Listen(2, "service"),
            lease.Unlisten(3, "service"),
            lease.Connect(4, lease.Target(None, "pod", "service"), ends),
            lease.Accept(5, 1, ends),
            lease.Reject(6, 1, "no"),
            lease.Claim(7, (lease.ClaimItem(1, 17),)),
            lease.Release(8, (1,)),
        )
    ]


def _configuration_seeds() -> list[bytes]:
    """Each section with its defaults, and all of them."""
    sections = {}
    for one in dataclasses.fields(config.Config):
        values = dataclasses.asdict(getattr(config.Config(), one.name)).items()
        sections[one.name] = {key: _plain(value) for key, value in values if value is not None}
    return [toml({name: keys}).encode() for name, keys in sections.items()] + [toml(sections).encode()]


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)


def targets() -> list[Target]:
    """All of them."""
    words = [b"apiVersion", b"kind", b"metadata", b"namespace", b"labels", b"spec", b"selector", b"matchExpressions"]
    words += [b"podSelector", b"namespaceSelector", b"ipBlock", b"except", b"endPort", b"clusterIPs", b"nodePort"]
    words += [
        b"sessionAffinityConfig",
        b"\n---\n",
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!str ",
        b"- ",
        b": ",
        b"| ",
        b"\xef\xbb\xbf",
    ]
    pieces = [piece for path in MANIFESTS for piece in path.read_bytes().split(b"\n---")]
    return [
        Target("CNI calls", executable.seeds(), _request, executable.TOKENS),
        Target("lease messages", [text.encode() for text in lease_messages()], _lease, [b'"type"', b'"id"', b'"qkey"']),
        Target("configuration", _configuration_seeds(), _configuration, [b"[agent]\n", b"= ", b'"""', b"1e400", b"[["]),
        Target("manifests", pieces, _manifest, words),
    ]
