"""Some of the table of policies with live pods; the row `policy` tries all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.policy_table import Outcome, PolicyTable
from testbed.semantics.cases import Case, cases

EVERY = 8


@pytest.fixture(scope="module")
def table() -> Iterator[PolicyTable]:
    with PolicyTable.start("policy-cases") as table:
        yield table


@pytest.mark.parametrize("case", cases()[1::EVERY], ids=lambda case: case.name)
def test_live_pods_do_what_the_table_says(table: PolicyTable, case: Case) -> None:
    outcome = Outcome()
    table.carry_out(case, outcome)
    assert outcome.wrong == []
    assert outcome.judgements.total() > 100
