"""rdmanet.cni: results in each version, against the independent validator."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet.cni import (
    SUPPORTED_VERSIONS,
    CniCode,
    Dns,
    Interface,
    IpConfig,
    Request,
    Result,
    Route,
    error_json,
    result,
)
from testbed.cni_spec import VERSIONS, SpecViolationError, validate_error, validate_result, validate_version

NETNS = "/run/netns/a"
OURS = Result(
    interfaces=(
        Interface("rn-1", mac="0a:00:00:00:00:01", mtu_bytes=1500),
        Interface("eth0", mac="0a:00:00:00:00:02", sandbox=NETNS, mtu_bytes=1500),
    ),
    ips=(
        IpConfig(ipaddress.ip_interface("10.1.0.5/32"), ipaddress.ip_address("10.1.0.1"), 1),
        IpConfig(ipaddress.ip_interface("fd00::5/128"), ipaddress.ip_address("fd00::1"), 1),
    ),
    routes=(
        Route(ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_address("10.1.0.1"), priority=0),
        Route(ipaddress.ip_network("::/0"), ipaddress.ip_address("fd00::1"), mtu_bytes=1400),
    ),
    dns=Dns(nameservers=("10.1.0.1",), search=("a.example",)),
)


def test_both_sides_know_the_same_versions() -> None:
    assert SUPPORTED_VERSIONS == VERSIONS


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_every_version_is_written_as_the_specification_says(version: str) -> None:
    written = json.loads(json.dumps(OURS.to_json(version)))
    validate_result(written, version, ifname="eth0", netns=NETNS)
    assert [ip.get("version") for ip in written["ips"]] == (["4", "6"] if version < "1" else [None, None])
    assert ("mtu" in written["interfaces"][0]) == (version == "1.1.0")
    assert "sandbox" not in written["interfaces"][0]


def test_a_result_read_again_is_the_same() -> None:
    assert Result.from_json(json.loads(json.dumps(OURS.to_json("1.1.0")))) == OURS


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_a_chain_keeps_the_earlier_result_and_moves_our_indexes(version: str) -> None:
    earlier = {
        "interfaces": [{"name": "lo", "sandbox": NETNS}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}, {"address": "10.9.9.9/32"}],
        "routes": [{"dst": "10.9.0.0/16"}],
        "dns": {"domain": "b.example"},
    }
    written: Any = result(
        version, interfaces=OURS.interfaces, ips=OURS.ips, routes=OURS.routes, previous=Result.from_json(earlier)
    )
    validate_result(written, version, ifname="eth0", netns=NETNS)
    assert [i["name"] for i in written["interfaces"]] == ["lo", "rn-1", "eth0"]
    assert [ip.get("interface") for ip in written["ips"]] == [0, None, 2, 2]
    assert written["dns"] == {"domain": "b.example"}


def test_a_request_answers_in_its_version_with_its_dns() -> None:
    body = {"cniVersion": "0.4.0", "name": "n", "type": "rdmanet", "dns": {"nameservers": ["fd00::53"]}}
    variables = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_NETNS": NETNS, "CNI_IFNAME": "eth0"}
    request = Request.parse(variables, json.dumps(body).encode())
    written: Any = request.answer(Result(OURS.interfaces, OURS.ips, OURS.routes))
    validate_result(written, "0.4.0", ifname="eth0", netns=NETNS)
    assert written["dns"] == {"nameservers": ["fd00::53"]}


@given(st.sampled_from(SUPPORTED_VERSIONS), st.integers(1, 200), st.text(min_size=1), st.text())
def test_errors_are_as_the_specification_says(version: str, code: int, msg: str, details: str) -> None:
    error = json.loads(json.dumps(error_json(version, code, msg, details)))
    if code in set(CniCode) or code >= 100:
        validate_error(error, version)
    else:
        with pytest.raises(SpecViolationError):
            validate_error(error, version)


# The validator itself: each rule refuses what breaks it. A path, and what to put there ("gone" takes it away).
BROKEN: list[tuple[str, str, object]] = [
    ("1.1.0", "cniVersion", "1.0.0"),
    ("1.1.0", "interfaces", "gone"),
    ("1.1.0", "ips", "gone"),
    ("1.1.0", "extra", 1),
    ("1.1.0", "interfaces.0.name", ""),
    ("1.1.0", "interfaces.0.name", "a" * 16),
    ("1.1.0", "interfaces.0.name", "a b"),
    ("1.1.0", "interfaces.0.mac", "0a:00"),
    ("1.1.0", "interfaces.0.mtu", "1500"),
    ("1.1.0", "interfaces.0.socketPath", "x"),
    ("1.0.0", "interfaces.0.mtu", 1500),
    ("1.1.0", "interfaces.1.name", "eth1"),
    ("1.1.0", "interfaces.1.sandbox", "gone"),
    ("1.1.0", "interfaces.1.sandbox", "/run/netns/b"),
    ("1.1.0", "ips.0.address", "10.1.0.5"),
    ("1.1.0", "ips.0.address", "10.1.0.5/33"),
    ("1.1.0", "ips.0.gateway", "fd00::1"),
    ("1.1.0", "ips.0.interface", 2),
    ("1.1.0", "ips.0.interface", -1),
    ("1.1.0", "ips.0.interface", True),
    ("1.1.0", "ips.0.version", "4"),
    ("1.1.0", "ips", []),
    ("0.4.0", "ips.0.version", "gone"),
    ("0.4.0", "ips.0.version", 4),
    ("0.3.1", "ips.0.version", "6"),
    ("1.1.0", "routes.0.dst", "10.0.0.1/8"),
    ("1.1.0", "routes.0.gw", "fd00::1"),
    ("1.0.0", "routes.0.mtu", 1),
    ("1.1.0", "routes.0.scope", 7),
    ("1.1.0", "routes.0.priority", -1),
    ("1.1.0", "dns", None),
    ("1.1.0", "dns.nameservers", ["x"]),
    ("1.1.0", "dns.search", "x"),
    ("1.1.0", "dns.more", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "path", "value"), BROKEN)
def test_the_validator_refuses_a_broken_result(version: str, path: str, value: object) -> None:
    written: Any = json.loads(json.dumps(OURS.to_json(version)))
    *steps, last = (int(s) if s.isdigit() else s for s in path.split("."))
    place = written
    for step in steps:
        place = place[step]
    if value == "gone":
        del place[last]
    else:
        place[last] = value
    with pytest.raises(SpecViolationError, match="result"):
        validate_result(written, version, ifname="eth0", netns=NETNS)


GOOD_ERROR = {"cniVersion": "1.0.0", "code": 7, "msg": "x", "details": "y"}
GOOD_VERSION = {"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}


BROKEN_ERRORS: list[dict[str, object]] = [
    {"cniVersion": "0.4.0"},
    {"code": 12},
    {"code": "7"},
    {"msg": ""},
    {"msg": None},
    {"details": 5},
    {"more": 1},
]
BROKEN_VERSIONS: list[dict[str, object]] = [
    {"cniVersion": "2.0.0"},
    {"supportedVersions": []},
    {"supportedVersions": ["1"]},
    {"supportedVersions": ["1.0.0", "1.0.0"]},
    {"more": 1},
]


@pytest.mark.parametrize(
    ("validate", "good", "change"),
    [(validate_error, GOOD_ERROR, change) for change in BROKEN_ERRORS]
    + [(validate_version, GOOD_VERSION, change) for change in BROKEN_VERSIONS],
)
def test_the_validator_refuses_broken_errors_and_versions(
    validate: Callable[[object, str], None], good: dict[str, object], change: dict[str, object]
) -> None:
    validate(good, "1.0.0")
    with pytest.raises(SpecViolationError):
        validate(good | change, "1.0.0")


def test_status_codes_belong_to_status() -> None:
    error = GOOD_ERROR | {"code": 50}
    validate_error(error, command="STATUS")
    with pytest.raises(SpecViolationError, match=re.escape("error.code: 50")):
        validate_error(error, command="ADD")
