"""The repository's own directories, and where downloads are kept between runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

#: The top of the checkout.
REPOSITORY = Path(__file__).resolve().parent.parent

#: Everything made by a run: results, logs, compiled things. Writable inside the virtual machine.
BUILD = REPOSITORY / "build"


def cache_directory() -> Path:
    """Where downloads stay between runs: ``RDMANET_CACHE`` from the environment, else ``build/cache``."""
    directory = Path(os.environ.get("RDMANET_CACHE") or BUILD / "cache").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock ``name``: two runs that need one download make it once."""
    with (cache_directory() / f"{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
