"""What the rows about real programs read from what those print."""

from __future__ import annotations

from benchmarks.accept.rdma import mpi, perftest, rdma_core_tests

PRINTED = """test_create_ah (tests.test_addr.AHTest.test_create_ah)
Test ibv_create_ah. ... ok
test_dm (tests.test_mr.DMTest.test_dm) ... skipped 'Device memory is not "supported"'
test_bad (tests.test_qp.QPTest.test_bad)
Checks ... something ... noise from the device
FAIL
test_old (test_pd.PDTest) ... ERROR
test_cut (tests.test_pd.PDTest.test_cut) ...
======================================================================
FAIL: test_bad (tests.test_qp.QPTest.test_bad)
----------------------------------------------------------------------
ok
----------------------------------------------------------------------
Ran 5 tests in 0.1s
"""


def test_outcomes_of_unittest() -> None:
    found = rdma_core_tests.outcomes(PRINTED)
    assert found == {
        "test_addr.AHTest.test_create_ah": "ok",
        "test_mr.DMTest.test_dm": "skipped 'Device memory is not \"supported\"'",
        "test_qp.QPTest.test_bad": "FAIL",
        "test_pd.PDTest.test_old": "ERROR",
        "test_pd.PDTest.test_cut": "ERROR",
    }
    assert rdma_core_tests.counts(found) == {"passed": 1, "failed": 3, "skipped": 1}


def test_differences_and_which_are_worse() -> None:
    ours = {"a": "ok", "b": "FAIL", "c": "skipped 'one'", "d": "ok", "e": "ERROR"}
    other = {"a": "ok", "b": "ok", "c": "skipped 'two'", "d": "FAIL"}
    found = rdma_core_tests.differences(ours, other)
    assert found == {
        "b": {"pod": "FAIL", "hand-made": "ok"},
        "d": {"pod": "ok", "hand-made": "FAIL"},
        "e": {"pod": "ERROR", "hand-made": "not run"},
    }
    assert [name for name in found if rdma_core_tests.worse(found[name])] == ["b"]


def test_every_tool_has_every_transport_once() -> None:
    cases = list(perftest.cases())
    assert len(set(cases)) == len(cases)
    for tool, transports in perftest.TRANSPORTS.items():
        for transport in transports:
            ways = {(case.family, case.way) for case in cases if (case.tool, case.transport) == (tool, transport)}
            assert {(4, ""), (6, "")} <= ways
            assert ((4, "-R") in ways) is (transport != "UC")
            assert ((4, "-e") in ways) is ("write" not in tool)


def test_the_least_that_an_all_reduce_sends() -> None:
    assert mpi.least_bytes(2, 1000, 1) == 2 * 8000  # each sends half and gets half, twice
    assert mpi.least_bytes(4, 1000, 2) == 2 * 6 * 8000
