"""What `python -m rdmanet.verbs env` tells, from an agent's hello and a device's sysfs."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import shlex
from pathlib import Path

import pytest

from rdmanet.errors import LeaseRefusedError, UnavailableError
from rdmanet.lease import HelloReply
from rdmanet.memlock import Limit
from rdmanet.model import PodName
from rdmanet.verbs import environment as env

IPV4, IPV6 = ipaddress.ip_address("10.213.0.7"), ipaddress.ip_address("fd00:213::7")
HELLO = HelloReply(PodName("default", "train-0"), "rxe_rn1", (IPV4, IPV6), 512)
GIDS = {
    0: ("fe80:0000:0000:0000:0000:00ff:fe00:0001", "RoCE v2"),
    1: ("0000:0000:0000:0000:0000:ffff:0ad5:0007", "IB/RoCE v1"),
    10: ("0000:0000:0000:0000:0000:ffff:0ad5:0007", "RoCE v2"),
    9: ("fd00:0213:0000:0000:0000:0000:0000:0007", "RoCE v2"),
    11: ("0000:0000:0000:0000:0000:0000:0000:0000", None),
}


@pytest.fixture
def infiniband(tmp_path: Path) -> Path:
    port = tmp_path / "rxe_rn1/ports/1"
    for directory in (port / "gids", port / "gid_attrs/types"):
        directory.mkdir(parents=True)
    for index, (gid, kind) in GIDS.items():
        (port / "gids" / str(index)).write_text(gid + "\n")
        if kind is not None:
            (port / "gid_attrs/types" / str(index)).write_text(kind + "\n")
    (tmp_path / "rxe_rn1/parent").write_text("eth0\n")
    return tmp_path


def test_indexes_are_found_by_address_and_kind(infiniband: Path) -> None:
    assert env.environment(HELLO, infiniband).gid_indexes == {IPV4: 10, IPV6: 9}
    other = dataclasses.replace(HELLO, addresses=(ipaddress.ip_address("10.213.0.8"),))
    with pytest.raises(UnavailableError, match=r"no RoCE v2 GID for 10\.213\.0\.8"):
        env.environment(other, infiniband)


def test_without_a_device_there_is_a_sentence(infiniband: Path) -> None:
    with pytest.raises(LeaseRefusedError, match='train-0 has no RDMA device; ask for one with "rdma": true'):
        env.environment(dataclasses.replace(HELLO, device=None), infiniband)
    with pytest.raises(UnavailableError, match="rxe_rn2 of this pod is not visible here"):
        env.environment(dataclasses.replace(HELLO, device="rxe_rn2"), infiniband)


def test_variables_of_each_family(infiniband: Path) -> None:
    found = env.environment(HELLO, infiniband)
    four = found.variables()
    assert four == found.variables(4)
    assert four["NCCL_IB_HCA"] == "=rxe_rn1:1"
    assert (four["RDMANET_GID_INDEX"], four["NCCL_IB_GID_INDEX"], four["UCX_IB_GID_INDEX"]) == ("10", "10", "10")
    assert (four["RDMANET_GID_INDEX_IPV4"], four["RDMANET_GID_INDEX_IPV6"]) == ("10", "9")
    assert (four["UCX_NET_DEVICES"], four["UCX_UD_VERBS_ETH_DGID_CHECK"]) == ("rxe_rn1:1", "n")
    six = found.variables(6)
    assert (six["RDMANET_ADDRESS"], six["UCX_IB_GID_INDEX"]) == (str(IPV6), "9")
    assert "UCX_UD_VERBS_ETH_DGID_CHECK" not in six
    assert not [name for name in four if name.endswith(("_TC", "_SL", "TRAFFIC_CLASS"))]
    only_six = env.environment(dataclasses.replace(HELLO, addresses=(IPV6,)), infiniband)
    assert only_six.variables() == {k: v for k, v in six.items() if k != "RDMANET_GID_INDEX_IPV4"}
    with pytest.raises(UnavailableError, match="train-0 has no IPv4 address"):
        only_six.variables(4)


def test_hardware_and_a_bandwidth_class(infiniband: Path) -> None:
    (infiniband / "rxe_rn1/parent").unlink()
    hello = dataclasses.replace(HELLO, traffic_class=104, service_level=3)
    found = env.environment(hello, infiniband).variables()
    assert "UCX_UD_VERBS_ETH_DGID_CHECK" not in found
    assert (found["NCCL_IB_TC"], found["UCX_IB_TRAFFIC_CLASS"]) == ("104", "104")
    assert (found["NCCL_IB_SL"], found["UCX_IB_SL"]) == ("3", "3")


def test_what_a_shell_and_a_program_read(infiniband: Path) -> None:
    found = env.environment(HELLO, infiniband)
    lines = env.shell(found.variables(), Limit(None, None)).splitlines()
    assert dict(line.removeprefix("export ").split("=", 1) for line in lines).keys() == found.variables().keys()
    assert shlex.split(lines[0]) == ["export", "RDMANET_DEVICE=rxe_rn1"]
    assert env.shell({}, Limit(1 << 16, None)) == "\nulimit -l unlimited\n".lstrip()
    assert env.shell({}, Limit(1 << 16, 1 << 30)) == "ulimit -l 1048576\n"
    document = json.loads(env.document(found, found.variables(6), Limit(1, None), "raise it"))
    assert document["gid_indexes"] == {"10.213.0.7": 10, "fd00:213::7": 9}
    assert document["variables"]["RDMANET_GID_INDEX"] == "9"
    assert document["families"] == {"4": found.variables(4), "6": found.variables(6)}
    assert document["memlock"] == {"soft_bytes": 1, "hard_bytes": None, "advice": "raise it"}


@pytest.mark.parametrize(
    ("limit", "lifted", "words"),
    [
        (Limit(1 << 16, 1 << 16), True, None),
        (Limit(1 << 26, 1 << 26), False, None),
        (Limit(None, None), False, None),
        (Limit(1 << 23, None), False, "memlock is 8 MiB: `ulimit -l unlimited`"),
        (Limit(1 << 16, 1 << 27), False, "`ulimit -l 131072`"),
        (Limit(1 << 16, 1 << 16), False, "memlock is 64 KiB and cannot be raised in here"),
    ],
)
def test_memlock_advice(limit: Limit, lifted: bool, words: str | None) -> None:
    advice = env.memlock_advice(limit, lifted)
    assert (advice is None) if words is None else (advice is not None and words in advice)


def test_no_agent_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main(["env", "--timeout-s", "0.2"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no rdmanet agent serves this pod" in captured.err
