"""What a fork leaves in the child: copies of the parent's descriptors, which are let go of at once.

The kernel keeps a device's queue pairs for as long as anybody has its file open, and the broker a process' leases for
as long as anybody has its connection: with copies in a child, they would outlive the parent. And a child that destroyed
its copies of the parent's objects would destroy the parent's. So in the child the descriptors become /dev/null, the
objects are never freed, and whoever uses them is told. A child opens sessions of its own.

Nor are they freed when the interpreter ends: its last collection takes what a program has left open in any order, while
pyverbs' objects still use each other (pyverbs 56 with Python 3.13 ends in SIGSEGV). The kernel frees them with the
process.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from typing import Protocol

from rdmanet.errors import UnavailableError


class Forkable(Protocol):
    """What has descriptors that a child must not keep."""

    def forked(self) -> list[int]:
        """In the child: refuse all use from now on; the descriptors to let go of."""


_watched: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(thing: Forkable) -> None:
    """Call its ``forked`` in every child from now on, and never free it there, nor when the interpreter ends."""
    _watched.add(thing)


def error() -> UnavailableError:
    """What whoever uses the parent's objects is told."""
    return UnavailableError(
        "this was opened before the process forked and belongs to the parent; open a session in the child",
        operation="fork",
    )


def _keep(thing: Forkable) -> None:
    """With all that it refers to."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _at_exit() -> None:
    for thing in list(_watched):
        _keep(thing)


def _in_child() -> None:
    things = list(_watched)
    if not things:
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for thing in things:
        _keep(thing)
        for descriptor in thing.forked():
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)
    _watched.clear()


os.register_at_fork(after_in_child=_in_child)
atexit.register(_at_exit)
