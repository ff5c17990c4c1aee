"""Ctrl-C while a program is still being imported.

Python raises KeyboardInterrupt wherever it is, and ignores it where it comes in a callback, as those of import locks
(importlib._bootstrap._get_module_lock): the program goes on as if nobody had asked it to end.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """SIGINT ends the process as SIGTERM does: for as long as nothing is begun. Ignored where it was ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
