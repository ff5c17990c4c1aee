"""What a rule of the CNI specification is, and where the tests are that hold us to it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

UNIT_REQUEST = "tests/unit/test_cni_request.py::"
UNIT_RESULT = "tests/unit/test_cni_result.py::"
UNIT_API = "tests/unit/test_api.py::"
EXECUTABLE = "tests/kernel/test_cni_executable.py::"
QUEUE = "tests/kernel/test_cni_queue.py::"
AGENT = "tests/kernel/test_agent.py::"
BAD = "tests/kernel/test_bad_input.py::"
CHAIN = "tests/kernel/test_chain.py::"
SPEC = "tests/kernel/test_cni_spec.py::"
PODMAN = "tests/kernel/test_podman.py::"
CONTAINERD = "tests/kernel/test_containerd.py::"

BOTH_RUNTIMES = (f"{PODMAN}test_containers_talk", f"{CONTAINERD}test_pods_talk")


class Whom(enum.StrEnum):
    """Who is obliged. Of what runtimes must do we test that we work with runtimes that do it, and the real ones."""

    PLUGIN = "plugin"
    RUNTIME = "runtime"
    DELEGATED = "delegated"  # to or by plugins that another plugin calls: we call none, and say so


@dataclass(frozen=True, slots=True)
class Rule:
    """One sentence."""

    section: str
    text: str
    tests: tuple[str, ...]
    whom: Whom = Whom.PLUGIN


def plugin(section: str, text: str, *tests: str) -> Rule:
    """Plugins must."""
    return Rule(section, text, tests)


def runtime(section: str, text: str, *tests: str) -> Rule:
    """Runtimes must."""
    return Rule(section, text, tests, Whom.RUNTIME)


def delegated(section: str, text: str) -> Rule:
    """Plugins that call others, or are called by them, must."""
    tests = (f"{SPEC}test_nothing_is_delegated", f"{UNIT_REQUEST}test_ipam_must_be_absent_or_empty")
    return Rule(section, text, tests, Whom.DELEGATED)
