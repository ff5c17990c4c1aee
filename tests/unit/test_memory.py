"""rdmanet.memory against the C library's allocator, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

ARENAS = """
import ctypes, sys, tempfile, threading
from rdmanet import memory
if sys.argv[1] == "shared":
    memory.share_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
barrier = threading.Barrier(5)
def allocate():
    barrier.wait()
    libc.malloc(5000)
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
barrier.wait()
with tempfile.NamedTemporaryFile() as file:
    stream = libc.fopen(file.name.encode(), b"w")
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
barrier.wait()
"""
FREE = """
from pathlib import Path
from rdmanet import memory
def resident_kib():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
blocks = [bytes(4000) for _ in range(10_000)]
last = bytes(4000)
del blocks
before = resident_kib()
memory.give_back()
print(before - resident_kib())
"""


def run(program: str, *arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize(("how", "arenas"), [("shared", range(1, 2)), ("as it comes", range(2, 6))])
def test_threads_share_one_arena(how: str, arenas: range) -> None:
    assert run(ARENAS, how) in arenas


def test_free_memory_goes_back() -> None:
    assert run(FREE) > 30_000, "of 40,000 KiB"
