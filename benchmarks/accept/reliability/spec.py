"""Row `spec`: every sentence of the CNI specification that obliges with "must", and the tests that hold us to it."""

from __future__ import annotations

from collections import Counter

from benchmarks.accept.reliability.tested import passed
from testbed.cni_rule import Whom
from testbed.cni_rules import RULES
from testbed.rows import Figure


def measure() -> Figure:
    """All of them, once: the table itself, then each test that it names."""
    named = list(dict.fromkeys(test for rule in RULES for test in rule.tests))
    tests = passed(["tests/kernel/test_cni_spec.py", *(t for t in named if "test_cni_spec.py" not in t)])
    whom = Counter(rule.whom for rule in RULES)
    detail = (
        f"{len(RULES)} rules of CNI 0.3.1 to 1.1.0 ({whom[Whom.PLUGIN]} for plugins, {whom[Whom.RUNTIME]} for runtimes,"
        f" {whom[Whom.DELEGATED]} about delegation), {len(named)} tests named, {tests} with parameters, all passed"
    )
    more = {"rules": len(RULES), "tests": tests, "named": len(named), **{str(k): v for k, v in whom.items()}}
    return Figure(len(RULES), "rules", detail, more)
