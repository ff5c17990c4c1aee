"""rdmanet.cni: requests, pure."""

from __future__ import annotations

import ipaddress
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet.cni import (
    CniCode,
    CniError,
    Command,
    Request,
    parse_document,
    parse_pending,
    pending_name,
    variables_of_headers,
)
from rdmanet.model import UNLIMITED, Bandwidth, GuardMode, Limit, PodName

VARIABLES = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/c1",
    "CNI_IFNAME": "eth0",
}
CONFIG: dict[str, object] = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet"}
RESULT: dict[str, object] = {"interfaces": [{"name": "eth0", "sandbox": "/n"}], "ips": [], "dns": {}}


def request(variables: dict[str, str] | None = None, **config: object) -> Request:
    return Request.parse(VARIABLES | (variables or {}), json.dumps(CONFIG | config).encode())


def refused(code: int, *words: str, variables: dict[str, str] | None = None, **config: object) -> None:
    with pytest.raises(CniError) as caught:
        request(variables, **config)
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in caught.value.sentence


def code_of(parse: Callable[..., object], *arguments: object) -> CniCode | None:
    try:
        parse(*arguments)
    except CniError as error:
        return error.code
    return None


def test_add_as_kubelet_and_containerd_send_it() -> None:
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=train;K8S_POD_NAME=train-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1"
    found = request({"CNI_ARGS": args, "CNI_PATH": "/opt/cni/bin:/usr/lib/cni"}, rdma=True, guard="enforce", mtu=9000)
    assert found.command is Command.ADD
    assert (found.container_id, found.netns, found.ifname) == ("c1", "/run/netns/c1", "eth0")
    assert found.pod == PodName("train", "train-0")
    assert found.args.pod_uid == "u-1"
    assert found.path == ("/opt/cni/bin", "/usr/lib/cni")
    assert found.wants_rdma
    assert found.config.guard is GuardMode.ENFORCE
    assert found.config.mtu_bytes == 9000
    assert found.ips == ()
    assert found.mac is None


def test_pod_without_kubernetes_is_named_after_the_container() -> None:
    assert request().pod == PodName("default", "c1")
    assert not request().wants_rdma


@pytest.mark.parametrize(
    ("args", "rdma", "cni", "expected"),
    [
        ("RDMA=true", False, {}, True),
        ("RDMA=false", True, {"rdma": True}, False),
        ("", False, {"rdma": True}, True),
        ("", True, {"rdma": False}, False),
        ("", True, {}, True),
    ],
)
def test_the_nearest_wish_for_rdma_counts(args: str, rdma: bool, cni: dict[str, object], expected: bool) -> None:
    assert request({"CNI_ARGS": args}, rdma=rdma, args={"cni": cni}).wants_rdma is expected


def test_addresses_and_mac_as_podman_sends_them() -> None:
    found = request({"CNI_ARGS": "IP=10.1.2.3,fd00::3;MAC=0A-58-0A-00-00-05"})
    assert found.ips == (ipaddress.ip_address("10.1.2.3"), ipaddress.ip_address("fd00::3"))
    assert found.mac == "0a:58:0a:00:00:05"


def test_runtime_config_wins_and_its_keys_are_read_in_any_case() -> None:
    found = request(
        {"CNI_ARGS": "IP=10.1.2.3;MAC=0a:58:0a:00:00:05"},
        args={"cni": {"ips": ["10.9.9.9"], "mac": "0a:58:0a:00:00:07"}},
        capabilities={"mac": True, "ips": True},
        runtimeConfig={
            "Mac": "0a:58:0a:00:00:06",
            "IPs": ["10.7.7.7/24", "fd00::7/64"],
            "DNS": {"Servers": ["10.0.0.2"]},
        },
    )
    assert found.ips == (ipaddress.ip_address("10.7.7.7"), ipaddress.ip_address("fd00::7"))
    assert found.mac == "0a:58:0a:00:00:06"
    assert found.dns.nameservers == ("10.0.0.2",)


M = 10**6
QUARTER_OF_A_SECOND = 31_250_000  # bytes, at 1 Gbit/s


@pytest.mark.parametrize(
    ("static", "dynamic", "expected"),
    [
        ({}, {}, UNLIMITED),
        ({}, {"ingressRate": 0, "ingressBurst": 0, "egressRate": None}, UNLIMITED),
        ({"ingressRate": 8 * M, "ingressBurst": 1 << 20}, {}, Bandwidth(ingress=Limit(8 * M, 1 << 17))),
        ({}, {"EgressRate": 8 * M, "EgressBurst": 1 << 22}, Bandwidth(egress=Limit(8 * M, 1 << 19))),
        # No burst, or what runtimes write then: a quarter of a second, and room for some frames.
        ({"egressRate": 1000 * M}, {}, Bandwidth(egress=Limit(1000 * M, QUARTER_OF_A_SECOND))),
        ({}, {"IngressRate": 1000 * M, "IngressBurst": 2**32 - 1}, Bandwidth(Limit(1000 * M, QUARTER_OF_A_SECOND))),
        ({}, {"ingressRate": 1000 * M, "ingressBurst": 2**35 - 9}, Bandwidth(Limit(1000 * M, QUARTER_OF_A_SECOND))),
        ({"ingressRate": M}, {}, Bandwidth(Limit(M, 1 << 18))),
        # Of two limits for a direction the lower rate, with its burst.
        (
            {"ingressRate": 3 * M, "ingressBurst": 1 << 20, "egressRate": 9 * M, "egressBurst": 1 << 21},
            {"ingressRate": 4 * M, "ingressBurst": 1 << 22, "egressRate": 5 * M, "egressBurst": 1 << 23},
            Bandwidth(Limit(3 * M, 1 << 17), Limit(5 * M, 1 << 20)),
        ),
        ({}, {"ingressRate": 1000, "egressRate": 10**15}, Bandwidth(Limit(1000, 1 << 18), Limit(10**15, 10**15 // 32))),
    ],
)
def test_bandwidth(static: dict[str, Any], dynamic: dict[str, Any], expected: Bandwidth) -> None:
    runtime: dict[str, Any] = {"bandwidth": dynamic} if dynamic else {}
    found = request(capabilities={"bandwidth": True}, runtimeConfig=runtime, **static)
    assert found.bandwidth == expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ingressRate", 999, "write a whole number from 1000 to 1000000000000000"),
        ("egressRate", 10**15 + 1, "write a whole number from 1000 to"),
        ("egressRate", "8M", "write a whole number"),
        ("ingressRate", -1, "write a whole number"),
        ("ingressRate", 1e6, "write a whole number"),
        ("ingressBurst", 1 << 21, 'has no "ingressRate" beside it'),
        ("egressBurst", (1 << 20) - 1, "write 1048576 (128 KiB) or more"),
        ("egressBurst", -5, "write a whole number"),
    ],
)
def test_bandwidth_that_cannot_be(name: str, value: object, words: str) -> None:
    dynamic: dict[str, Any] = {name: value} | ({"egressRate": 8 * M} if name == "egressBurst" else {})
    refused(CniCode.CONFIG, f'"{name}"', words, **dynamic)
    refused(CniCode.CONFIG, f'"runtimeConfig: bandwidth: {name}"', words, runtimeConfig={"bandwidth": dynamic})


def test_an_unknown_key_is_refused_with_key_value_and_the_nearest_known_one() -> None:
    refused(CniCode.FIELD, '"rmda": true', 'did you mean "rdma"?', rmda=True)
    refused(CniCode.FIELD, '"statedir": "/x"', '"stateDir"', statedir="/x")
    refused(CniCode.FIELD, '"zzzzzz": 1', zzzzzz=1)


def test_namespaced_keys_are_not_ours_to_refuse() -> None:
    keys: dict[str, Any] = {"cni.dev/attachments": None, "example.org/x": 1, "io.kubernetes.cri": {}}
    request(**keys)


def test_ipam_must_be_absent_or_empty() -> None:
    refused(CniCode.FIELD, '"ipam"', "host-local", "ranges", ipam={"type": "host-local"})
    request(ipam={})
    request(ipam=None)


def test_capabilities_that_nobody_would_serve_are_refused() -> None:
    refused(CniCode.FIELD, "portMappings", "chain", capabilities={"portMappings": True})
    request(capabilities={"portMappings": False})


@pytest.mark.parametrize(
    "config",
    [
        {"name": None},
        {"name": ""},
        {"name": "-x"},
        {"name": "a/b"},
        {"rdma": "true"},
        {"guard": "off"},
        {"guard": ["observe"]},
        {"rdmaMaxLeases": 0},
        {"rdmaMaxLeases": 65537},
        {"rdmaMaxLeases": "7"},
        {"rdmaTrafficClass": 3},
        {"rdmaTrafficClass": 256},
        {"rdmaTrafficClass": -4},
        {"rdmaServiceLevel": 8},
        {"rdmaServiceLevel": True},
        {"mtu": 1279},
        {"mtu": 65536},
        {"mtu": 1500.0},
        {"mtu": True},
        {"mtu": "1500"},
        {"socket": "agent.sock"},
        {"socket": 5},
        {"stateDir": "x\0"},
        {"args": []},
        {"args": {"cni": {"ips": ["10.0.0.256"]}}},
        {"args": {"cni": {"ips": ["fe80::1%eth0"]}}},
        {"args": {"cni": {"rdma": 1}}},
        {"dns": {"nameservers": ["dns.example"]}},
        {"dns": []},
        {"capabilities": ["mac"]},
        {"runtimeConfig": {"mac": "01:00:5e:00:00:01"}},
        {"runtimeConfig": {"mac": "0a:58"}},
        {"runtimeConfig": {"ips": "10.0.0.1"}},
        {"runtimeConfig": []},
        {"runtimeConfig": {"bandwidth": 5}},
        {"prevResult": {"ips": [{"address": "10.0.0.1/24", "interface": 0}]}},
        {"prevResult": {"ips": [{"address": "x"}]}},
        {"prevResult": {"routes": [{"dst": "x"}]}},
        {"prevResult": {"interfaces": 5}},
        {"type": 5},
    ],
)
def test_a_bad_value_is_an_invalid_configuration(config: dict[str, Any]) -> None:
    refused(CniCode.CONFIG, next(iter(config)) if "prevResult" not in config else "", **config)


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"CNI_COMMAND": ""}, "CNI_COMMAND"),
        ({"CNI_COMMAND": "add"}, "CNI_COMMAND"),
        ({"CNI_CONTAINERID": ""}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "../x"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "a" * 201}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "ä"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "a\n"}, "CNI_CONTAINERID"),
        ({"CNI_IFNAME": ""}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "."}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "eth%d"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": ".."}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a/b"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a:b"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a b"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a" * 16}, "CNI_IFNAME"),
        ({"CNI_NETNS": ""}, "CNI_NETNS"),
        ({"CNI_NETNS": "netns/x"}, "CNI_NETNS"),
        ({"CNI_NETNS": "/proc/self/ns/net"}, "CNI_NETNS"),
        ({"CNI_NETNS": "//proc/1/../thread-self/ns/net"}, "CNI_NETNS"),
        ({"CNI_ARGS": "x" * 8001}, "CNI_ARGS"),
        ({"CNI_ARGS": "RDMA"}, "CNI_ARGS"),
        ({"CNI_ARGS": "RDMA=maybe"}, "RDMA"),
        ({"CNI_ARGS": "IP=10.0.0.x"}, "IP"),
        ({"CNI_ARGS": "MAC=1"}, "MAC"),
        ({"CNI_ARGS": "K8S_POD_NAME=../x"}, "K8S_POD_NAME"),
        ({"CNI_ARGS": "RDNA=true"}, 'did you mean "RDMA"?'),
    ],
)
def test_bad_variables_are_named(variables: dict[str, str], word: str) -> None:
    refused(CniCode.ENVIRONMENT, word, variables=variables)


def test_proc_paths_of_a_pid_are_fine() -> None:
    assert request({"CNI_NETNS": "/proc/4711/fd/5"}).netns == "/proc/4711/fd/5"


@pytest.mark.parametrize("version", [None, "", "0.2.0", "1.2.0", "1.0", "x"])
def test_unsupported_versions(version: str | None) -> None:
    document = {k: v for k, v in (CONFIG | {"cniVersion": version}).items() if v is not None}
    with pytest.raises(CniError) as caught:
        Request.parse(VARIABLES, json.dumps(document).encode())
    assert caught.value.code == CniCode.VERSION
    assert "1.1.0" in caught.value.sentence


def test_a_version_that_is_no_string_cannot_be_decoded() -> None:
    refused(CniCode.DECODE, "cniVersion", cniVersion=1.0)


@pytest.mark.parametrize(
    ("command", "version", "fits"),
    [("CHECK", "0.3.1", False), ("CHECK", "0.4.0", True), ("GC", "1.0.0", False), ("GC", "1.1.0", True),
     ("STATUS", "1.0.0", False), ("STATUS", "1.1.0", True), ("ADD", "0.3.1", True), ("DEL", "0.3.1", True)],
)  # fmt: skip
def test_commands_exist_from_a_version_on(command: str, version: str, fits: bool) -> None:
    extra: dict[str, object] = {"prevResult": RESULT, "cni.dev/valid-attachments": []}
    if fits:
        assert request({"CNI_COMMAND": command}, cniVersion=version, **extra).command == command
    else:
        refused(CniCode.VERSION, command, variables={"CNI_COMMAND": command}, cniVersion=version, **extra)


def test_check_needs_the_result_of_add() -> None:
    refused(CniCode.CONFIG, "prevResult", variables={"CNI_COMMAND": "CHECK"})


def test_del_needs_neither_namespace_nor_a_good_configuration() -> None:
    variables = {"CNI_COMMAND": "DEL", "CNI_NETNS": "", "CNI_ARGS": "broken"}
    found = request(variables, rmda=True, ipam={"type": "x"}, prevResult=5, runtimeConfig=7)
    assert (found.container_id, found.ifname, found.netns, found.config.name) == ("c1", "eth0", "", "net")
    refused(CniCode.ENVIRONMENT, "CNI_IFNAME", variables={"CNI_COMMAND": "DEL", "CNI_IFNAME": ""})


def test_gc_reads_what_to_keep_under_both_names() -> None:
    variables = {"CNI_COMMAND": "GC", "CNI_CONTAINERID": "", "CNI_IFNAME": "", "CNI_NETNS": ""}
    one = {"containerID": "c1", "ifname": "eth0"}
    two = {"containerID": "c2", "ifname": "eth0"}
    found = request(variables, **{"cni.dev/valid-attachments": [one], "cni.dev/attachments": [one, two]})
    assert found.config.valid_attachments == (("c1", "eth0"), ("c2", "eth0"))
    # Go writes an empty list as null: nothing is valid, everything goes
    assert request(variables, **{"cni.dev/valid-attachments": None}).config.valid_attachments == ()
    # but a list that is not there at all must not mean that
    refused(CniCode.CONFIG, "valid-attachments", variables=variables)
    refused(CniCode.CONFIG, variables=variables, **{"cni.dev/valid-attachments": ["c1"]})
    refused(CniCode.CONFIG, variables=variables, **{"cni.dev/valid-attachments": {"c1": "eth0"}})


@pytest.mark.parametrize(
    "body",
    [
        b"", b"  ", b"[]", b"null", b'"x"', b"{", b'{"a":1,}', b'{"a":NaN}', b'{"a":1}{', b"\xff\xfe{\x00}\x00",
        b'\xef\xbb\xbf{}', b'{"a":"\xff"}', b'{"a":"\\ud800"}', b'{"\\udc00":1}', b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
        b" " * (1024 * 1024 + 1),
    ],
)  # fmt: skip
def test_what_is_not_a_json_object_cannot_be_decoded(body: bytes) -> None:
    with pytest.raises(CniError) as caught:
        Request.parse(VARIABLES, body)
    assert caught.value.code == CniCode.DECODE


def test_headers_carry_any_text() -> None:
    headers = {"cni-command": "ADD", "CNI-Args": quote("K=ä;B=\r\n%"), "CNI-PATH": "", "Host": "x"}
    assert variables_of_headers(headers) == {"CNI_COMMAND": "ADD", "CNI_ARGS": "K=ä;B=\r\n%"}
    for other in ("%ff", "\udcff", "a\ud800%41"):  # escaped, and as aiohttp reads what is not
        with pytest.raises(CniError) as caught:
            variables_of_headers({"CNI-Args": other})
        assert caught.value.code == CniCode.ENVIRONMENT


def test_queue_entries_are_requests() -> None:
    body = json.dumps(CONFIG).encode()
    head = f"POST /v1/cni HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += "CNI-Command: DEL\r\nCNI-IfName: e%25\r\n\r\n"
    variables, found = parse_pending(head.encode() + body)
    assert variables == {"CNI_COMMAND": "DEL", "CNI_IFNAME": "e%"}
    assert found == body
    assert pending_name("c1", "e%") == "c1@e%25"


@given(st.binary(max_size=300))
def test_any_queue_entry_is_read_or_refused(entry: bytes) -> None:
    for data in (entry, b"POST /v1/cni HTTP/1.1\r\n" + entry):
        assert code_of(parse_pending, data) in (None, CniCode.DECODE, CniCode.ENVIRONMENT)


SCALARS = st.none() | st.booleans() | st.integers(-2, 70000) | st.floats() | st.text(max_size=8)
LISTS = st.lists(SCALARS, max_size=3)
OBJECTS = st.dictionaries(
    st.sampled_from(["mac", "ips", "cni", "dns", "interfaces", "name", "address"]), SCALARS | LISTS
)
JSON_VALUES = SCALARS | LISTS | OBJECTS | st.lists(OBJECTS, max_size=2)
KEYS = st.sampled_from(
    ["args", "capabilities", "cni.dev/valid-attachments", "dns", "guard", "ipam", "mtu", "name", "prevResult", "rdma",
     "runtimeConfig", "socket", "stateDir", "type", "cniVersion", "cni.dev/attachments"]
)  # fmt: skip


@given(
    st.sampled_from(list(Command)),
    st.dictionaries(KEYS, JSON_VALUES, max_size=4),
    st.text(string.printable, max_size=60),
)
def test_any_request_is_read_or_refused_with_a_code_of_the_specification(
    command: Command, config: dict[str, object], args: str
) -> None:
    variables = VARIABLES | {"CNI_COMMAND": command.value, "CNI_ARGS": args}
    assert code_of(Request.parse, variables, json.dumps(CONFIG | config).encode()) in (None, 1, 2, 4, 6, 7)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document_or_refused(body: bytes) -> None:
    assert code_of(parse_document, body) in (None, CniCode.DECODE)


def test_the_example_configuration_is_accepted() -> None:
    path = Path(__file__).parents[2] / "cni" / "10-rdmanet.conflist"
    network = json.loads(path.read_text())
    for plugin in network["plugins"]:
        request(**plugin, name=network["name"], cniVersion=network["cniVersion"])


def test_a_networks_own_limits_and_class() -> None:
    config = request(rdmaMaxLeases=3, rdmaTrafficClass=104, rdmaServiceLevel=0).config
    assert (config.max_leases, config.traffic_class, config.service_level) == (3, 104, 0)
    config = request().config
    assert (config.max_leases, config.traffic_class, config.service_level) == (None, None, None)
    refused(CniCode.CONFIG, "0 to 252, divisible by 4", rdmaTrafficClass=7)
    refused(CniCode.FIELD, 'did you mean "rdmaMaxLeases"?', rdmaMaxLease=7)


def test_labels_come_with_the_network_configuration() -> None:
    labels = [{"key": "app", "value": "web"}, {"key": "example.com/tier", "value": ""}]
    assert request(args={"cni": {"labels": labels}}).labels == {"app": "web", "example.com/tier": ""}
    assert request().labels == {}


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        ({"app": "web"}, "not a list"),
        ([{"key": "app"}], '"key": "app", "value": "web"'),
        ([{"key": "app", "value": "web", "more": 1}], '"value": "web"'),
        ([{"key": "-app", "value": "web"}], "not a label key"),
        ([{"key": "a" * 64, "value": "web"}], "not a label key"),
        ([{"key": "app", "value": "web!"}], "the value of app"),
        ([{"key": "app", "value": 7}], "the value of app"),
        ([{"key": "app", "value": "a"}, {"key": "app", "value": "b"}], "twice"),
    ],
)
def test_what_is_no_label_is_refused(labels: object, word: str) -> None:
    refused(7, "args.cni.labels", word, args={"cni": {"labels": labels}})
