"""DELs that the executable queued on disk while the agent was away (``cni/queue.h`` is the other side)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from rdmanet.cni import parse_pending, pending_name
from rdmanet.errors import RdmanetError, StateError

log = logging.getLogger(__name__)

#: A CNI call from variables and standard input, with a question to ask when its turn has come; the HTTP status.
Call = Callable[[dict[str, str], bytes, Callable[[], bool]], Awaitable[int]]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the queue's lock; blocks while an executable writes its entry (milliseconds)."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StateError(
            f"The queue of DELs {directory} cannot be opened: {error}.", operation="open", subject=str(directory)
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def superseded(directory: Path, container_id: str, ifname: str) -> bool:
    """Removes the queued DEL of an attachment that is about to be added again; False when none was queued.

    A DEL whose answer was lost stays queued while the agent lives on. Carried out after the ADD it would take the new
    pod's network.
    """
    try:
        (directory / pending_name(container_id, ifname)).unlink()
    except FileNotFoundError:
        return False
    return True


def entries(directory: Path) -> list[tuple[Path, dict[str, str], bytes]]:
    """(file, environment variables, standard input) of every whole entry, oldest first.

    An entry that cannot be read can never be carried out: it is set aside under a name that begins with
    ``malformed-``, and logged. One that goes meanwhile has been superseded by an ADD.
    """
    found = []
    ages_ns: dict[Path, int] = {}
    for path in directory.iterdir():
        if "@" in path.name:
            with contextlib.suppress(FileNotFoundError):
                ages_ns[path] = path.stat().st_mtime_ns
    for path in sorted(ages_ns, key=ages_ns.__getitem__):
        try:
            variables, body = parse_pending(path.read_bytes())
        except FileNotFoundError:
            continue
        except RdmanetError as error:
            log.error("The queued DEL %s is malformed and set aside: %s", path, error)
            path.rename(path.with_name("malformed-" + path.name.replace("@", "-")))
            continue
        found.append((path, variables, body))
    return found


async def drain(directory: Path, call: Call) -> int:
    """Carries out every queued DEL; returns how many. What fails stays queued for the next start.

    The caller listens already: an executable that waits for the lock finds the agent there when it has it.
    """
    with contextlib.ExitStack() as stack:
        await asyncio.to_thread(stack.enter_context, locked(directory))
        done = 0
        for path, variables, body in entries(directory):
            status = await call(variables, body, path.exists)
            if status == 200:
                path.unlink(missing_ok=True)
                done += 1
            else:
                log.error("The queued DEL %s failed (HTTP %d) and stays queued", path, status)
    return done
