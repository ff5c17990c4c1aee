"""The testbed's pure parts: what a pod is made of, how dumps compare, how a configuration is written."""

from __future__ import annotations

import io
import threading
import tomllib
from pathlib import Path

import pytest

from rdmanet.errors import UnavailableError
from testbed.dump import rows, steady
from testbed.host import CniOutcome, diff, toml
from testbed.pod import DeviceNode, actions, hosts_file, rdma_cm_node
from testbed.progress import heartbeat


def test_actions_grant_only_the_nodes_asked_for() -> None:
    with_device = actions("a", [DeviceNode("infiniband/uverbs3", 231, 195)], {})
    made = {action[1]: action[3:] for action in with_device if action[0] == "mknod"}
    assert made["/dev/infiniband/uverbs3"] == (231, 195)
    assert [path for path in made if "infiniband" in path] == ["/dev/infiniband/uverbs3"]
    assert not [action for action in actions("a", [], {}) if "infiniband" in str(action)]


def test_actions_make_directories_before_what_goes_into_them() -> None:
    plan = actions("a", [DeviceNode("infiniband/uverbs0", 231, 192)], {})
    position = {action[:2]: number for number, action in enumerate(plan)}
    assert position["mkdir", "/dev/infiniband"] < position["mknod", "/dev/infiniband/uverbs0"]
    assert position["read_only", "/"] == 0  # whatever is mounted later stays writable


def test_hosts_file_names_the_pod_once() -> None:
    assert hosts_file("a", {"b": "10.0.0.2"}).splitlines()[2:] == ["10.0.0.2 b", "127.0.0.1 a"]
    assert hosts_file("a", {"a": "10.0.0.1"}).splitlines()[2:] == ["10.0.0.1 a"]


def test_rdma_cm_node(tmp_path: Path) -> None:
    (tmp_path / "dev").write_text("10:121\n")
    assert rdma_cm_node(tmp_path / "dev") == DeviceNode("infiniband/rdma_cm", 10, 121)
    with pytest.raises(UnavailableError, match="modprobe rdma_ucm"):
        rdma_cm_node(tmp_path / "none")


def test_steady_leaves_out_only_what_moves() -> None:
    link = {"ifname": "eth0", "stats64": {"rx": 1}, "linkinfo": {"info_kind": "veth", "used": 3}}
    assert steady([link]) == [{"ifname": "eth0", "linkinfo": {"info_kind": "veth"}}]
    assert rows([{"b": 1}, {"a": 1, "age": 7}]) == [{"a": 1}, {"b": 1}]


def test_diff_names_section_and_value() -> None:
    before = {"links": [{"ifname": "lo"}], "sysctls": {"net/a": "0", "net/b": "1"}, "nftables": []}
    after = {"links": [{"ifname": "lo"}, {"ifname": "rn-1"}], "sysctls": {"net/a": "1", "net/b": "1"}, "nftables": []}
    assert diff(before, before) == []
    assert diff(before, after) == [
        'links: + {"ifname": "rn-1"}',
        'sysctls: - net/a = "0"',
        'sysctls: + net/a = "1"',
    ]


def test_diff_sees_a_repeated_row() -> None:
    assert diff({"rules4": [1]}, {"rules4": [1, 1]}) == ["the dumps differ in order or number only"]


def test_toml_is_read_back() -> None:
    sections = {"agent": {"socket": "/run/a b.sock", "metrics_port": 0}, "network": {"uplinks": ["eth0"], "on": True}}
    assert tomllib.loads(toml(sections)) == sections


def test_cni_outcome_sentence() -> None:
    assert CniOutcome("ADD", 0, {"cniVersion": "1.1.0"}, "", 0.1).sentence == ""
    refused = CniOutcome("ADD", 1, {"code": 7, "msg": "no", "details": "why"}, "", 0.1)
    assert refused.sentence == "code 7: no (why)"


def test_a_heartbeat_says_that_work_goes_on_and_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        said = threading.Event()

        def write(self, text: str) -> int:
            self.said.set()
            return super().write(text)

    stream = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    with heartbeat("work", every_s=0.0):
        assert stream.said.wait(10)
    assert stream.getvalue().startswith("testbed: work: 0 s\n")
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
