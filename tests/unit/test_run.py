"""rdmanet.run without root: plans, verdicts, variables, lines, records, what the CNI executable says."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet.commands.run import user_of
from rdmanet.errors import ConflictError, InputError, KernelError, StateError, UnavailableError
from rdmanet.run import cgroups, plugin
from rdmanet.run.job import Ending, Plan, plan, verdict
from rdmanet.run.lines import LINE_MAX_BYTES, Lines, Printer
from rdmanet.run.records import Record, left
from rdmanet.run.variables import Member, environment, hosts_file

MEMBERS = [
    Member(f"train-{rank}", (ipaddress.ip_address(f"10.213.0.{rank + 2}"), ipaddress.ip_address(f"fd00::{rank + 2}")))
    for rank in range(3)
]


def planned(name: str = "train", pods: int = 2, **changes: Any) -> Plan:
    basic = {
        "rdma": True,
        "namespace": "default",
        "plugin": Path("/opt/cni/bin/rdmanet"),
        "socket": Path("/run/rdmanet/agent.sock"),
        "state_dir": Path("/var/lib/rdmanet"),
        "cgroup_root": Path("/sys/fs/cgroup"),
    }
    return plan(name, pods, **{**basic, **changes})


def test_a_plan_comes_back_from_its_record() -> None:
    for wanted in (planned(), planned(cgroup_root=None)):
        assert Plan.from_json(wanted.to_json(), "job.json") == wanted


def test_two_jobs_of_one_name_share_nothing_but_names_of_pods() -> None:
    one, two = planned(), planned()
    assert one.cgroup != two.cgroup
    assert not {pod.container_id for pod in one.pods} & {pod.container_id for pod in two.pods}
    assert planned("").name != planned("").name


def test_a_plan() -> None:
    found = planned(namespace="ml")
    assert [pod.name for pod in found.pods] == ["train-0", "train-1"]
    assert found.pods[1].netns == "/run/netns/rdmanet-train-1"
    assert found.pods[1].cni_args == "IgnoreUnknown=1;K8S_POD_NAMESPACE=ml;K8S_POD_NAME=train-1"
    group = found.cgroup_of(found.pods[1])
    assert group is not None
    assert found.network_for(found.pods[1])["runtimeConfig"] == {
        "cgroupPath": "/" + str(group.relative_to("/sys/fs/cgroup"))
    }
    assert "runtimeConfig" not in planned(cgroup_root=None).network_for(found.pods[1])


@pytest.mark.parametrize("name", ["Train", "-a", "a-", "a_b", "a/b", "a" * 49, "..", "a;RDMA=true"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError, match="cannot be called"):
        planned(name)
    with pytest.raises(InputError, match="namespace cannot be called"):
        planned(namespace=name)


@pytest.mark.parametrize("pods", [0, -1, 4097])
def test_numbers_of_pods_that_cannot_be(pods: int) -> None:
    with pytest.raises(InputError, match="from 1 to 4096 pods"):
        planned(pods=pods)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pods": [{"rank": 0}]}', '{"pods": [], "name": "a"}'])
def test_what_is_no_record(text: str) -> None:
    with pytest.raises(StateError, match="is no record of a job"):
        Plan.from_json(text, "job.json")


@pytest.mark.parametrize(
    ("statuses", "code", "words"),
    [
        ([(0, 0), (0, 1)], 0, "2 pods, all ended with status 0 after 1.5 s"),
        (
            [(1, 2), (3, 1)],
            3,
            "rank 1 (pod train-1) ended with status 3 after 1.5 s, the first to fail of 2 pods; 1 more",
        ),
        ([(0, 1), (-9, 2)], 137, "rank 1 (pod train-1) was ended by signal SIGKILL"),
        ([(-signal.SIGTERM, 2), (255, 1)], 255, "rank 1 (pod train-1) ended with status 255"),
        ([(-40, 1), (0, 2)], 168, "was ended by signal 40"),
    ],
)
def test_verdict(statuses: list[tuple[int, float]], code: int, words: str) -> None:
    endings = [Ending(rank, status, at_s) for rank, (status, at_s) in enumerate(statuses)]
    found, sentence = verdict(planned(), endings, 1.5)
    assert found == code
    assert words in sentence


def test_environment() -> None:
    inherited = {"PATH": "/bin", "PMI_FD": "3", "JOB_COMPLETION_INDEX": "9", "RANK": "9", "UCX_TLS": "tcp"}
    rdma = {"UCX_TLS": "rc,self", "NCCL_IB_HCA": "=rxe_rn1:1", "RDMANET_DEVICE": "rxe_rn1"}
    found = environment({**inherited, "RDMANET_DEVICE": "other"}, MEMBERS, 1, 1234, rdma)
    assert found == {
        "PATH": "/bin",
        "UCX_TLS": "tcp",
        "NCCL_IB_HCA": "=rxe_rn1:1",
        "RDMANET_DEVICE": "rxe_rn1",
        "RANK": "1",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "1",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_WORLD_SIZE": "3",
        "MASTER_ADDR": "train-0",
        "MASTER_PORT": "1234",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "PMI_RANK": "1",
        "PMI_SIZE": "3",
        "RDMANET_PEERS": "train-0,train-1,train-2",
        "RDMANET_PEER_ADDRESSES_IPV4": "10.213.0.2,10.213.0.3,10.213.0.4",
        "RDMANET_PEER_ADDRESSES_IPV6": "fd00::2,fd00::3,fd00::4",
    }
    only4 = [dataclasses.replace(member, addresses=member.addresses[:1]) for member in MEMBERS]
    assert "RDMANET_PEER_ADDRESSES_IPV6" not in environment({}, only4, 0, 1, {})


def test_hosts_file() -> None:
    lines = hosts_file(MEMBERS[:2], "train-1").splitlines()
    assert lines == [
        "127.0.0.1 localhost",
        "::1 localhost ip6-localhost ip6-loopback",
        "10.213.0.2 train-0",
        "fd00::2 train-0",
        "10.213.0.3 train-1",
        "fd00::3 train-1",
    ]
    assert "127.0.0.1 other" in hosts_file(MEMBERS, "other")


@given(st.lists(st.binary(max_size=40)), st.data())
def test_lines_do_not_depend_on_how_output_comes(lines: list[bytes], data: st.DataObject) -> None:
    text = b"\n".join(lines)
    whole = Lines(b"> ")
    wanted = whole.feed(text) + whole.end()
    cut, found, rest = Lines(b"> "), b"", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += cut.feed(rest[:size])
        rest = rest[size:]
    found += cut.end()
    assert found == wanted
    if b"\r" not in text:
        ends = text.split(b"\n")
        assert wanted == b"".join(b"> " + line + b"\n" for line in (ends if ends[-1] else ends[:-1]))


def test_lines_end_at_carriage_returns_and_at_their_length() -> None:
    lines = Lines(b"[1] ")
    assert lines.feed(b"1 %\r2 %\r") == b"[1] 1 %\n[1] 2 %\n"
    assert lines.feed(b"\nnext\r\n\n") == b"[1] next\n[1] \n"
    long = b"x" * (2 * LINE_MAX_BYTES + 1)
    assert lines.feed(long) == (b"[1] " + b"x" * LINE_MAX_BYTES + b"\n") * 2
    assert lines.end() == b"[1] x\n"
    assert lines.end() == b""


async def test_a_printer_that_nobody_reads() -> None:
    reader, writer = os.pipe()
    printer = Printer(writer)
    await printer.write(b"one")
    assert os.read(reader, 10) == b"one"
    stuck = printer.write(b"x" * (1 << 20))
    await asyncio.sleep(0)
    assert not stuck.done()  # and the loop goes on
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        await stuck
    os.close(writer)


def test_records(tmp_path: Path) -> None:
    jobs, wanted = tmp_path / "jobs", planned()
    record = Record.begin(jobs, wanted)
    assert record.plan() == wanted
    assert list(left(jobs)) == []  # its launcher lives
    with pytest.raises(ConflictError, match="There is a job train already"):
        Record.begin(jobs, planned())
    other = Record.begin(jobs, planned("other"))
    record.close()  # as the kernel does when a launcher ends
    (found,) = left(jobs)
    assert found.plan() == wanted
    assert list(left(jobs)) == []  # somebody takes it back
    with pytest.raises(ConflictError, match="is being taken back"):
        Record.begin(jobs, planned())
    found.wait_for_processes()
    found.forget()
    assert [path.name for path in jobs.iterdir()] == ["other"]
    other.forget()
    assert not jobs.exists()
    assert list(left(jobs)) == []
    assert not jobs.exists()


def test_a_launcher_that_ended_before_its_record_was_whole(tmp_path: Path) -> None:
    (tmp_path / "jobs/train").mkdir(parents=True)
    (found,) = left(tmp_path / "jobs")
    assert found.plan() is None
    found.forget()
    assert not (tmp_path / "jobs").exists()


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("")
    with pytest.raises(StateError, match="record cannot be written"):
        Record.begin(tmp_path / "jobs", planned())


def test_what_the_executable_says() -> None:
    pod = planned().pods[0]
    assert plugin.answer("DEL", pod, 0, b"") == {}
    with pytest.raises(plugin.PluginError, match=r"Pod train-0: No address is free \(more\)\. Trying again"):
        plugin.answer("ADD", pod, 1, b'{"code": 11, "msg": "No address is free.", "details": "more"}')
    with pytest.raises(plugin.PluginError, match="status 3"):
        plugin.answer("ADD", pod, 3, b"")
    with pytest.raises(plugin.PluginError, match="printed no JSON"):
        plugin.answer("ADD", pod, 0, b"hello")


def test_addresses_of_a_result() -> None:
    pod = planned().pods[0]
    result = {
        "interfaces": [{"name": "rn-1"}, {"name": "eth0", "sandbox": pod.netns}],
        "ips": [
            {"address": "fd00::2/128", "interface": 1},
            {"address": "10.0.0.1/32", "interface": 0},
            {"address": "10.0.0.2/32", "interface": 1},
        ],
    }
    assert [str(one) for one in plugin.addresses(pod, result)] == ["10.0.0.2", "fd00::2"]
    with pytest.raises(KernelError, match="no address"):
        plugin.addresses(pod, {})


def test_where_the_executable_is(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    executable = tmp_path / "two/rdmanet"
    executable.write_text("")
    path = {"CNI_PATH": f"{tmp_path}/one::{tmp_path}/two"}
    with pytest.raises(UnavailableError, match="There is no CNI executable at"):
        plugin.find(executable, {})
    executable.chmod(0o755)
    assert plugin.find(executable, {}) == plugin.find(None, path) == executable


def test_cgroup_root(tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    file.write_text("25 1 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n30 1 0:22 / /mnt rw - tmpfs none rw\n")
    assert cgroups.root(file) == Path("/sys/fs/cgroup")
    file.write_text("30 1 0:22 / /mnt rw - tmpfs none rw\n")
    assert cgroups.root(file) is None


def test_users() -> None:
    assert user_of("root")[:2] == (0, 0)
    assert user_of("0") == user_of("root")
    assert user_of("4000000000") == (4000000000, 4000000000, [])
    with pytest.raises(InputError, match="no user 'nobody-at-all'"):
        user_of("nobody-at-all")
