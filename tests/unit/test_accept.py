"""benchmarks.accept: which rows are carried out where, and how those of several places become one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accept import __main__ as accept
from benchmarks.accept.proof import Claim, Place, merged, verdict
from rdmanet.errors import InputError, KernelError
from testbed.rows import Figure, Row, read

BOTH = (Place.SHARED, Place.EXCLUSIVE)


def shown() -> Figure:
    return Figure(1.5, "µs", "as asked", {"cases": 3})


def lost() -> Figure:
    raise KernelError("the device is gone", operation="ibv_post_send", subject="rxe0")


def test_names_in_the_proofs_order() -> None:
    assert accept.chosen("ucx, pool", ["library", "pool", "ucx"], "row") == ["pool", "ucx"]
    assert accept.chosen("", ["library", "pool"], "row") == ["library", "pool"]
    with pytest.raises(InputError, match="no row mpi; known are library, pool"):
        accept.chosen("pool,mpi", ["library", "pool"], "row")


def test_rows_of_all_places_become_one() -> None:
    rows = {mode: Row("modes", True, 2.0, "devices", f"in {mode}", {"kernel": "7.3"}) for mode in BOTH}
    row = merged("modes", Claim(shown, BOTH), rows)
    assert row.ok
    assert row.detail == "shared mode: in shared; exclusive mode: in exclusive"
    assert row.more == {"shared": {"kernel": "7.3"}, "exclusive": {"kernel": "7.3"}}
    half = merged("modes", Claim(shown, BOTH), {Place.SHARED: rows[Place.SHARED]})
    assert not half.ok
    assert "exclusive mode: not carried out" in half.detail


def test_file_has_what_was_shown_before_a_row_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept, "RESULTS", tmp_path)
    monkeypatch.setattr(accept, "end_session", lambda: None)
    proof = {"pool": Claim(shown), "ucx": Claim(lost), "mpi": Claim(shown)}
    monkeypatch.setattr(accept, "load", lambda title: proof)
    accept.carry_out("rdma", ["pool", "ucx"], Place.SHARED)
    rows = accept.collected("rdma", proof, list(proof))
    assert [(row.step, row.ok) for row in rows] == [("pool", True), ("ucx", False), ("mpi", False)]
    assert rows[0].more == {"cases": 3}
    assert "the device is gone" in rows[1].detail
    assert rows[2].detail == "not carried out"
    assert read(tmp_path / "rdma.json") == rows
    assert verdict("rdma", rows) == "accept: rdma: 1 of 3 rows; not: ucx, mpi"


def test_a_row_of_the_distributions_kernel_says_so() -> None:
    row = Row("modes", True, 2.0, "devices", "leased")
    shown_there = merged("modes", Claim(shown, tuple(Place)), dict.fromkeys(Place, row))
    assert shown_there.detail.endswith("shared mode on the distribution's kernel: leased")
