"""A Ctrl-C while modules are imported ends the command, also where Python would ignore it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rdmanet.interrupts import end_at_once

#: SIGINT in a finalizer, whose exceptions Python ignores, when a module of that name is looked for.
INTERRUPTED = """
import os, signal, sys
where = sys.argv.pop(1)
# What a shell that has put the tests into the background left to be ignored counts for nothing.
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv.pop(1) == "ignored" else signal.default_int_handler)
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            Lost()
sys.meta_path.insert(0, Finder())
from rdmanet.__main__ import main
sys.exit(main())
"""
#: The command line, and what `rdmanet run` imports later.
MODULES = ("rdmanet.cli", "rdmanet.run.launch")


def interrupted(where: str, disposition: str) -> subprocess.CompletedProcess[str]:
    """`rdmanet run` of a command that is not there, which ends with status 125 before anything is begun."""
    words = ["run", "--config", "/dev/null", "--", "/no/such/command"]
    argv = [sys.executable, "-c", INTERRUPTED, where, disposition, *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("where", MODULES)
def test_it_ends(where: str) -> None:
    done = interrupted(where, "default")
    assert done.returncode == -signal.SIGINT, done.stderr


@pytest.mark.parametrize("where", MODULES)
def test_it_goes_on_where_the_signal_was_ignored_before(where: str) -> None:
    """As shells start commands in the background."""
    assert interrupted(where, "ignored").returncode == 125


@pytest.fixture
def sigint() -> Iterator[None]:
    """What a test does to SIGINT is taken back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_afterwards_a_signal_is_what_it_was() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with end_at_once():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("sigint")
def test_a_handler_of_its_own_stays() -> None:
    def handler(number: int, frame: object) -> None:
        """Somebody's."""

    signal.signal(signal.SIGINT, handler)
    with end_at_once():
        assert signal.getsignal(signal.SIGINT) is handler
