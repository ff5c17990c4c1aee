"""The launcher's side of a pod's first process, by itself: its end while something is still to be heard."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from rdmanet.run.lines import Printer
from rdmanet.run.process import PodProcess

WAIT_S = 30.0


async def test_a_descriptor_of_the_same_number_is_heard_after_an_end() -> None:
    """When one rank refuses, the answers of others are awaited still; the calls that take the job back come next."""
    near, far = socket.socketpair()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    number = ours.fileno()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "pass", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123, ASYNC230
        pod = PodProcess(0, process, ours, (Printer(nowhere.fileno()), Printer(nowhere.fileno())))
        going = asyncio.create_task(pod.go())
        assert await asyncio.get_running_loop().run_in_executor(None, theirs.recv, 4096) == b'{"start": true}'
        await asyncio.sleep(0)
        await pod.close()
    theirs.close()
    with near, far:
        os.dup2(near.fileno(), number)
        with socket.socket(fileno=number) as later:
            later.setblocking(False)
            far.send(b"heard")
            async with asyncio.timeout(WAIT_S):
                # As a pipe of asyncio's: what is there already is not looked at first.
                heard = asyncio.Event()
                asyncio.get_running_loop().add_reader(later, heard.set)
                await heard.wait()
            asyncio.get_running_loop().remove_reader(later)
    assert going.done()
