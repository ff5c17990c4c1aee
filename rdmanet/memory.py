"""What the C library's allocator keeps for itself, in a process that lives for months (mallopt(3), malloc_trim(3)).

Python's small objects are in arenas of its own; larger ones, and what libraries allocate, are malloc's.
"""

from __future__ import annotations

import ctypes

#: malloc.h of glibc.
_M_ARENA_MAX = -8


def share_arena() -> None:
    """All threads allocate from one arena instead of one each: they hold Python's lock in turn anyway. Call it before
    there are any. Does nothing where the C library is another than glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Free memory, such as what a start has needed, goes back to the system. Does nothing where the C library is
    another than glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
