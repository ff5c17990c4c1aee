"""The parts of the verbs library that need no device."""

from __future__ import annotations

import array
import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet.errors import InputError
from rdmanet.verbs import Options, RemoteRegion
from rdmanet.verbs.memory import allocate, message_bytes


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_remote_regions_travel(address: int, rkey: int, length: int) -> None:
    region = RemoteRegion(address, rkey, length)
    assert len(region.to_bytes()) == 20
    assert RemoteRegion.from_bytes(region.to_bytes()) == region


@pytest.mark.parametrize("size", [0, 19, 21])
def test_a_remote_region_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"20 bytes, not {size}"):
        RemoteRegion.from_bytes(bytes(size))


@pytest.mark.parametrize("name", ["window", "chunk_bytes", "messages", "message_bytes"])
def test_options_are_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"Options.{name} must be at least 1"):
        Options(**{name: cast("Any", 0)})


def test_allocated_memory_is_zero_and_of_the_length_asked_for() -> None:
    view = allocate(5000)
    assert (view.nbytes, bytes(view), view.readonly) == (5000, bytes(5000), False)
    with pytest.raises(InputError):
        allocate(0)


@pytest.mark.parametrize(
    "message",
    [
        b"abcd",
        bytearray(b"abcd"),
        memoryview(b"a-b-c-d-")[::2],
        array.array("H", b"abcd"),
        (ctypes.c_ubyte * 4)(*b"abcd"),
    ],
)
def test_any_buffer_is_a_message(message: Any) -> None:
    assert bytes(message_bytes(message)) == b"abcd"


def test_what_has_no_bytes_is_no_message() -> None:
    with pytest.raises(InputError, match="a message is bytes"):
        message_bytes("text")


def run(program: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_importing_needs_nothing_of_the_agent_and_no_pyverbs() -> None:
    unwanted = ["pyroute2", "prometheus_client", "pyverbs", "bcc", "sqlite3"]
    program = f"import sys; import rdmanet.verbs; print([name for name in {unwanted} if name in sys.modules])"
    assert run(program) == "[]\n"


def test_pyverbs_does_not_configure_logging() -> None:
    pytest.importorskip("pyverbs", reason="needs pyverbs (python3-pyverbs)")
    program = (
        "import logging; from rdmanet.verbs import compat; root = logging.getLogger(); "
        "print(root.handlers, root.level == logging.WARNING)"
    )
    assert run(program) == "[] True\n"


def test_without_pyverbs_there_is_a_sentence() -> None:
    program = (
        "import sys; sys.modules['pyverbs'] = None\n"
        "from rdmanet.errors import UnavailableError\n"
        "try:\n import rdmanet.verbs.compat\n"
        "except UnavailableError as error:\n print(error)\n"
    )
    assert "install the distribution's python3-pyverbs" in run(program)


def test_every_constant_is_found() -> None:
    pytest.importorskip("pyverbs", reason="needs pyverbs (python3-pyverbs)")
    from rdmanet.verbs import compat

    # As infiniband/verbs.h numbers them.
    assert vars(compat.enums) == {
        "IBV_ACCESS_LOCAL_WRITE": 1,
        "IBV_ACCESS_REMOTE_ATOMIC": 8,
        "IBV_ACCESS_REMOTE_READ": 4,
        "IBV_ACCESS_REMOTE_WRITE": 2,
        "IBV_ATOMIC_NONE": 0,
        "IBV_GID_TYPE_ROCE_V2": 2,
        "IBV_QPS_ERR": 6,
        "IBV_QPS_INIT": 1,
        "IBV_QPS_RTR": 2,
        "IBV_QPS_RTS": 3,
        "IBV_QPT_RC": 2,
        "IBV_QPT_UD": 4,
        "IBV_QP_ACCESS_FLAGS": 1 << 3,
        "IBV_QP_AV": 1 << 7,
        "IBV_QP_DEST_QPN": 1 << 20,
        "IBV_QP_MAX_DEST_RD_ATOMIC": 1 << 17,
        "IBV_QP_MAX_QP_RD_ATOMIC": 1 << 13,
        "IBV_QP_MIN_RNR_TIMER": 1 << 15,
        "IBV_QP_PATH_MTU": 1 << 8,
        "IBV_QP_PKEY_INDEX": 1 << 4,
        "IBV_QP_PORT": 1 << 5,
        "IBV_QP_QKEY": 1 << 6,
        "IBV_QP_RETRY_CNT": 1 << 10,
        "IBV_QP_RNR_RETRY": 1 << 11,
        "IBV_QP_RQ_PSN": 1 << 12,
        "IBV_QP_SQ_PSN": 1 << 16,
        "IBV_QP_STATE": 1 << 0,
        "IBV_QP_TIMEOUT": 1 << 9,
        "IBV_WR_ATOMIC_CMP_AND_SWP": 5,
        "IBV_WR_ATOMIC_FETCH_AND_ADD": 6,
        "IBV_WR_RDMA_READ": 4,
        "IBV_WR_RDMA_WRITE": 0,
        "IBV_WR_SEND": 2,
    }


def test_a_gid_is_written_as_pyverbs_reads_it() -> None:
    pytest.importorskip("pyverbs", reason="needs pyverbs (python3-pyverbs)")
    from rdmanet.model import address_key
    from rdmanet.verbs import compat
    from rdmanet.verbs.batch import gid_text

    text = gid_text(address_key("10.0.0.2"))
    assert text == "0000:0000:0000:0000:0000:ffff:0a00:0002"
    assert compat.GID(text).gid == text


def test_the_only_descriptor_that_listing_adds_is_left_out() -> None:
    pytest.importorskip("pyverbs", reason="needs pyverbs (python3-pyverbs)")
    import os

    from rdmanet.verbs import compat

    before = compat._descriptors()
    new = os.open(os.devnull, os.O_RDONLY)
    try:
        assert compat._descriptors() - before == {str(new)}
    finally:
        os.close(new)


def test_where_descriptors_cannot_be_listed_there_is_no_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyverbs", reason="needs pyverbs (python3-pyverbs)")
    from rdmanet.verbs import compat

    class Channel:
        """Of pyverbs before 57: it does not say its descriptor."""

    monkeypatch.setattr(compat, "CompChannel", Channel)
    monkeypatch.setattr(compat, "_OWN_DESCRIPTORS", tmp_path / "proc is not mounted")
    assert compat.completion_channel(None) is None
