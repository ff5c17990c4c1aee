"""rdmanet.verbs in a container: nothing is installed but rdmanet without extras, what that needs, and pyverbs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from testbed.paths import REPOSITORY

USE = """
import sys
sys.path[:] = [*{standard!r}, {directory!r}]
import rdmanet.verbs, rdmanet.verbs.sync, rdmanet.verbs.__main__
from rdmanet.verbs import Options, Pool, Session, compat
from rdmanet.verbs import QueuePair
loaded = {{name.split(".")[0] for name in sys.modules}}
print(sorted(loaded & {{"pyroute2", "prometheus_client", "numpy", "bcc", "sqlite3"}}))
print(Session().pod)
"""


def needed(name: str) -> set[str]:
    """A distribution and all that it needs without extras, by their names."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if current in found:
            continue
        try:
            requirements = metadata.requires(current) or []
        except metadata.PackageNotFoundError:  # of another platform or another Python
            continue
        found.add(current)
        wanted = [line for line in requirements if "extra ==" not in line.replace("'", '"')]
        waiting += [match[0] for line in wanted if (match := re.match(r"[A-Za-z0-9_.\-]+", line))]
    return found


def test_it_is_all_that_a_pod_needs(tmp_path: Path) -> None:
    pyverbs = importlib.util.find_spec("pyverbs")
    if pyverbs is None or pyverbs.origin is None:
        pytest.skip("needs pyverbs (python3-pyverbs)")
    names = needed("rdmanet")
    assert "aiohttp" in names
    assert not names & {"pyroute2", "prometheus-client", "numpy", "matplotlib", "pytest"}
    (tmp_path / "rdmanet").symlink_to(REPOSITORY / "rdmanet")
    (tmp_path / "pyverbs").symlink_to(Path(pyverbs.origin).parent)
    for name in names - {"rdmanet"}:
        for file in metadata.files(name) or []:
            top = file.parts[0]
            place = tmp_path / top
            if top not in ("..", "__pycache__") and not place.exists():
                place.symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    standard = [
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        f"{sysconfig.get_path('stdlib')}/lib-dynload",
    ]
    program = USE.format(standard=standard, directory=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "None"]
