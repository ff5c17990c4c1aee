"""The virtual machine itself: status, output, file systems, RDMA mode, and what a dead guest looks like."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from rdmanet.errors import UnavailableError
from rdmanet.model import RdmaMode
from testbed import kernel, vm
from testbed.paths import BUILD, REPOSITORY

if os.environ.get("RDMANET_IN_VM"):
    pytest.skip("no virtual machine inside the virtual machine", allow_module_level=True)

_PROBE = """
printf 'a\\0\\377\\r\\n'
echo again >/dev/stdout
echo aside >/dev/stderr
pwd >&2
echo written >build/vm/shared-file
touch here || exit 1
printf '{"mode": "%s", "links": "%s", "cgroup": "%s", "uid": %s, "release": "%s", "locked": "%s"}' \
    "$(rdma system)" "$(ls /sys/class/net | tr '\\n' ' ')" "$(stat -fc %T /sys/fs/cgroup)" \
    "$(id -u)" "$(uname -r)" "$(ulimit -l)" >build/vm/facts.json
sleep 1000 &
exit 67
"""


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    try:
        kernel.prepare(kernel.MINIMUM_EXCLUSIVE)
    except UnavailableError as error:
        pytest.skip(f"a virtual machine: {error.sentence}")


def test_a_command_runs_as_if_it_were_here() -> None:
    out, err = io.BytesIO(), io.BytesIO()
    shared, facts = BUILD / "vm/shared-file", BUILD / "vm/facts.json"
    shared.unlink(missing_ok=True)
    status = vm.run(["sh", "-c", _PROBE], rdma_mode="exclusive", timeout_s=120, stdout=out, stderr=err)
    assert status == 67, err.getvalue()
    assert out.getvalue() == b"a\0\xff\r\nagain\n"
    assert err.getvalue() == b"aside\n" + f"{REPOSITORY}\n".encode()
    assert shared.read_text() == "written\n"
    assert not Path(REPOSITORY, "here").exists()
    seen = json.loads(facts.read_text())
    assert kernel.namespace_mode(seen["mode"]) == RdmaMode.EXCLUSIVE.value
    assert seen["links"].split() == ["lo"]
    assert seen["cgroup"] == "cgroup2fs"
    assert seen["uid"] == 0
    assert seen["locked"] == "unlimited"
    assert kernel.release_number(seen["release"]) >= kernel.MINIMUM_EXCLUSIVE


def test_a_panic_is_told_with_the_end_of_the_console() -> None:
    out = io.BytesIO()
    with pytest.raises(vm.GuestFailure, match=r"Kernel panic - not syncing: sysrq triggered crash") as failure:
        vm.run(["sh", "-c", "echo before; echo c >/proc/sysrq-trigger"], timeout_s=120, stdout=out, stderr=out)
    assert failure.value.operation == "guest"
    assert out.getvalue() == b"before\n"
