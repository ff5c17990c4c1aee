"""rdmanet.rdma.quota: the RDMA controller's lines, and who hands it down, on plain files."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdmanet.errors import UnavailableError
from rdmanet.rdma import quota
from rdmanet.rdma.quota import Quota


@pytest.mark.parametrize(
    ("wanted", "before", "line"),
    [
        (Quota(4, 100), {}, "rxe0 hca_handle=4 hca_object=100"),
        (Quota(0, 100), {"hca_handle": "max", "hca_object": "max"}, "rxe0 hca_handle=max hca_object=100"),
        (Quota(4, 0), {}, "rxe0 hca_handle=4 hca_object=max"),
        # What a runtime has set stays where it is lower.
        (Quota(4, 100), {"hca_handle": "2", "hca_object": "500"}, "rxe0 hca_handle=2 hca_object=100"),
        (Quota(0, 0), {"hca_handle": "2", "hca_object": "max"}, "rxe0 hca_handle=2 hca_object=max"),
    ],
)
def test_what_is_written(wanted: Quota, before: dict[str, str], line: str) -> None:
    assert wanted.line("rxe0", before) == line


def test_no_limit_is_no_quota() -> None:
    assert not Quota()
    assert Quota(1)
    assert Quota(max_objects=1)


def test_files_of_the_controller() -> None:
    assert quota.parse("rxe0 hca_handle=1 hca_object=max \nmlx5_0 hca_handle=max hca_object=max \n\n"[:-1]) == {
        "rxe0": {"hca_handle": "1", "hca_object": "max"},
        "mlx5_0": {"hca_handle": "max", "hca_object": "max"},
    }
    events = "rxe0 hca_handle.max=1 hca_handle.alloc_fail=1 hca_object.max=2 hca_object.alloc_fail=3\n"
    assert quota.refused(events) == {("rxe0", "hca_handle"): 1, ("rxe0", "hca_object"): 3}
    assert quota.refused("") == {}


def test_which_cgroups_hand_it_down() -> None:
    assert list(quota.above("/a/b/c")) == ["/", "/a", "/a/b"]
    assert list(quota.above("/a")) == ["/"]


def made(root: Path, *paths: str, controllers: str = "cpu rdma") -> None:
    root.mkdir()
    (root / "cgroup.controllers").write_text(controllers)
    for path in paths:
        (root / path.removeprefix("/")).mkdir(parents=True, exist_ok=True)
        (root / path.removeprefix("/") / "cgroup.subtree_control").write_text("cpu\n")


def test_enabled_from_above_and_recorded_first(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    made(root, "/", "/a", "/a/b", "/a/b/c")
    (root / "a/cgroup.subtree_control").write_text("cpu rdma\n")
    recorded: list[tuple[str, str]] = []

    def record(path: str) -> None:
        recorded.append((path, (root / path.removeprefix("/") / "cgroup.subtree_control").read_text()))

    quota.enable(root, "/a/b/c", record)
    # As it was when it was recorded; /a has it already and is nobody's to take back.
    assert recorded == [("/", "cpu\n"), ("/a/b", "cpu\n")]
    assert (root / "a/b/cgroup.subtree_control").read_text() == "+rdma"
    assert (root / "a/b/c/cgroup.subtree_control").read_text() == "cpu\n"
    for path in ("/a/b", "/"):
        assert quota.disable(root, path)
    assert (root / "cgroup.subtree_control").read_text() == "-rdma"
    assert quota.disable(root, "/gone")


def test_a_kernel_without_it(tmp_path: Path) -> None:
    made(tmp_path / "cgroup", "/", "/a", controllers="cpu memory")
    with pytest.raises(UnavailableError, match="CONFIG_CGROUP_RDMA"):
        quota.enable(tmp_path / "cgroup", "/a", lambda path: None)


def test_limits_where_the_controller_is_not_enabled(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"rdma\.cgroup_controller = true"):
        quota.write_limits(tmp_path, "rxe0 hca_handle=1 hca_object=1")
    assert quota.limits_of(tmp_path, "rxe0") == {}
    quota.restore_limits(tmp_path, "rxe0", {})  # nothing to restore
    assert not (tmp_path / "rdma.max").exists()


def test_limits_are_restored_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "rdma.max").write_text("rxe0 hca_handle=7 hca_object=max\n")
    before = quota.limits_of(tmp_path, "rxe0")
    quota.write_limits(tmp_path, Quota(2, 5).line("rxe0", before))
    assert quota.limits_of(tmp_path, "rxe0") == {"hca_handle": "2", "hca_object": "5"}
    quota.restore_limits(tmp_path, "rxe0", before)
    assert quota.limits_of(tmp_path, "rxe0") == before
    quota.restore_limits(tmp_path, "rxe9", before)  # a device that is gone
    assert "rxe9" not in (tmp_path / "rdma.max").read_text()
