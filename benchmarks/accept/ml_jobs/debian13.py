"""Row `debian13`: the whole suite in a Debian 13 user space (its Python, bcc and pyverbs), on this machine's kernel.

The user space is made with mmdebstrap and starts with nothing but apt in it: `make setup` installs the rest, from a
copy of this checkout. What needs RDMA runs in a virtual machine that is started in it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from testbed.debian import UserSpace
from testbed.paths import BUILD, cache_directory
from testbed.rows import Figure, need

CHECKOUT = "/rdmanet"
SETUP_TIMEOUT_S = 3600.0
SUITE_TIMEOUT_S = 10800.0
#: What must be newer there than in Debian 12, by what its package's version begins with.
PACKAGES = {"python3": "3.13", "python3-bpfcc": "0.31", "python3-pyverbs": "56"}
SUMMARY = re.compile(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", re.MULTILINE)


def measure() -> Figure:
    """Tests that passed in it; none may fail."""
    log = BUILD / "accept" / "debian13.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    with UserSpace.prepare() as space:
        space.copy_checkout(CHECKOUT)
        _lend_kernels(space.root / CHECKOUT.lstrip("/"))
        _run(space, log, ["./make.sh", "setup"], SETUP_TIMEOUT_S)
        versions = _versions(space)
        status = _run(space, log, [".venv/bin/python", "-m", "testbed.suite"], SUITE_TIMEOUT_S, check=False)
    text = log.read_text(errors="replace")
    counted = SUMMARY.findall(text)
    need(bool(counted), f"the suite did not come to its end (status {status}): {log}")
    passed, failed, skipped = (int(number) for number in counted[-1])
    failures = re.findall(r"^failed: (.+)$", text, re.MULTILINE)
    need(failed == 0 and status == 0, f"{failed} failed of {passed + failed}: {', '.join(failures[:5])}; {log}")
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Figure(passed, "tests", f"passed, {failed} failed, {skipped} skipped; {shown}", {"skipped": skipped})


def _lend_kernels(checkout: Path) -> None:
    """Kernels for the virtual machine do not depend on the user space: they are linked, not fetched again."""
    cache = checkout / "build" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for kernel in cache_directory().glob("kernel-*/"):
        if not (cache / kernel.name).exists():
            subprocess.run(["cp", "-al", str(kernel), str(cache)], check=True)


def _versions(space: UserSpace) -> dict[str, str]:
    found = {}
    for name, wanted in PACKAGES.items():
        asked = space.run(["dpkg-query", "-W", "-f", "${Version}", name], timeout_s=60, output=subprocess.PIPE)
        found[name] = asked.stdout.decode()
        need(found[name].startswith(wanted), f"{name} is {found[name]}, not {wanted}")
    return found


def _run(space: UserSpace, log: Path, argv: list[str], timeout_s: float, *, check: bool = True) -> int:
    """Its exit status; the output is added to the log."""
    with log.open("ab") as handle:
        status = space.run(argv, directory=CHECKOUT, timeout_s=timeout_s, output=handle).returncode
    need(not check or status == 0, f"{' '.join(argv)} ended with status {status}: {log}")
    return status
