"""Unmodified programs in pods, a few of each kind; `make accept ONLY=rdma` runs them all (benchmarks/accept/rdma)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from benchmarks.accept.rdma import mpi, perftest, rdma_core_tests, ucx
from benchmarks.accept.rdma.perftest import Case
from benchmarks.peers import namespaces, programs
from benchmarks.peers.namespaces import End, Pair
from rdmanet.model import RdmaMode
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.pod import Pod

ENV = [sys.executable, "-m", "rdmanet.verbs", "env"]
FAMILIES = (4, 6)


@dataclass
class Stage:
    """Two pods with devices, one without."""

    host: Host
    pair: Pair
    plain: Pod
    told: dict[int, list[dict[str, str]]]  # by family: the server's and the client's

    @property
    def ends(self) -> list[End]:
        """The pods with devices."""
        return [self.pair.server, self.pair.client]


@pytest.fixture(scope="module")
def stage(rdma_mode: RdmaMode) -> Iterator[Stage]:
    if rdma_mode is not RdmaMode.SHARED:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not shared")
    configuration = {"cniVersion": "1.1.0", "name": "plain", "type": "rdmanet"}
    with (
        namespaces.agent_host("programs") as host,
        namespaces.ours(host, "prog", 9000) as pair,
        Pod.create(host, "plain") as plain,
    ):
        assert host.cni("ADD", plain, configuration).returncode == 0
        plain.start()
        yield Stage(host, pair, plain, programs.told_all((pair.server, pair.client)))
        plain.stop()
        host.cni("DEL", plain, configuration)


# The environment


@pytest.mark.parametrize("family", FAMILIES)
def test_the_environment_names_what_is_there(stage: Stage, family: int) -> None:
    for end, variables in zip(stage.ends, stage.told[family], strict=True):
        assert variables["RDMANET_DEVICE"] == end.device
        assert variables["RDMANET_ADDRESS"] == end.addresses[family]
        assert variables["NCCL_IB_HCA"] == f"={end.device}:1"
        indexes = {name: variables[name] for name in variables if name.endswith("GID_INDEX")}
        assert set(indexes.values()) == {str(end.gid_index(family))}
        assert set(indexes) == {"RDMANET_GID_INDEX", "NCCL_IB_GID_INDEX", "UCX_IB_GID_INDEX"}
        assert [int(variables[f"RDMANET_GID_INDEX_IPV{v}"]) for v in FAMILIES] == [end.gid_index(v) for v in FAMILIES]
        assert ("UCX_UD_VERBS_ETH_DGID_CHECK" in variables) is (family == 4)


def test_a_shell_can_use_it_and_memlock_is_mentioned(stage: Stage) -> None:
    limited = ["prlimit", "--memlock=65536:65536"]
    line = f'eval "$({" ".join(ENV)} --family 6)" && ibv_devinfo -d "$RDMANET_DEVICE" && echo "$RDMANET_ADDRESS"'
    done = stage.pair.client.pod.exec([*limited, "sh", "-c", line], cwd=str(REPOSITORY), timeout_s=120)
    assert f"hca_id:\t{stage.pair.client.device}" in done.stdout
    assert done.stdout.rstrip().endswith(f"\n{stage.pair.client.addresses[6]}")
    assert "memlock is 64 KiB and cannot be raised in here" in done.stderr


def test_a_pod_without_a_device_is_told_so(stage: Stage) -> None:
    done = stage.plain.exec(ENV, cwd=str(REPOSITORY), timeout_s=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert 'plain has no RDMA device; ask for one with "rdma": true' in done.stderr


# Programs


@pytest.mark.parametrize(
    "case",
    [Case("ib_send_lat", "UD", 6), Case("ib_atomic_bw", "RC", 4, "-R"), Case("ib_write_bw", "UC", 4)],
    ids=lambda case: f"{case.tool}-{case.transport}-{case.name}",
)
def test_perftest(stage: Stage, case: Case) -> None:
    done = perftest.carried(stage.host, stage.pair, lambda: perftest.run(stage.pair, case), case.iterations)
    assert done["figures"]


@pytest.mark.parametrize(("name", "family"), [("udaddy", 6), ("ucmatose", 4), ("ibv_srq_pingpong", 6)])
def test_examples_of_rdma_core(stage: Stage, name: str, family: int) -> None:
    perftest.carried(stage.host, stage.pair, lambda: perftest.example(stage.pair, name, family), 10)


@pytest.mark.parametrize(("test", "family"), [("tag_lat", 4), ("ucp_put_bw", 6)])
def test_ucx(stage: Stage, test: str, family: int) -> None:
    (case,) = [case for case in ucx.CASES if case.test == test]
    assert ucx.run(stage.host, stage.pair, case, stage.told[family])["figures"]


def test_mpi(stage: Stage) -> None:
    mpi.introduce(stage.ends)
    result = mpi.over_roce(stage.host, stage.ends, stage.told[4], mpi.COUNT, 1)
    assert result["sums"] == 2 * mpi.COUNT


def test_rdma_core(stage: Stage) -> None:
    """A few of its own tests; that they do no worse than on another rxe is the acceptance row's."""
    with rdma_core_tests.unpacked() as directory:
        found = rdma_core_tests.run(stage.pair.client, directory, ["test_pd", "test_mr.MRTest"])
    assert rdma_core_tests.counts(found)["failed"] == 0, found
    assert rdma_core_tests.counts(found)["passed"] > 0


def test_nothing_of_it_was_dropped(stage: Stage) -> None:
    assert programs.roce_drops(stage.host) == {}
