"""Kernel headers for bcc: a merged tree under the cache, nothing installed on the machine.

``python -m testbed.headers`` prints the directory to name in BCC_KERNEL_SOURCE. Any recent headers do for
programs on UAPI types; those of the machine's own Debian release suit its clang.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rdmanet.errors import RdmanetError, UnavailableError
from testbed.apt import PrivateApt, machine_archive
from testbed.paths import cache_directory, locked
from testbed.progress import say


def prepare() -> Path:
    """The merged tree of headers for all and for amd64: named by the environment, cached, or fetched."""
    named = os.environ.get("BCC_KERNEL_SOURCE")
    if named:
        return Path(named)
    with locked("headers"):
        cached = sorted(marker.parent for marker in cache_directory().glob("headers-*/complete"))
        if cached:
            return cached[-1]
        archive = machine_archive()
        apt = PrivateApt(archive, (archive.suite,))
        apt.update()
        meta = apt.versions("linux-headers-amd64")
        names = [d for d in meta[0].depends if re.fullmatch(r"linux-headers-\d\S*-amd64", d)] if meta else []
        if not names:
            raise UnavailableError(f"{archive.uri} {archive.suite} has no package linux-headers-amd64")
        flavour = apt.versions(names[0])[0]
        common_name = next(d for d in flavour.depends if d.endswith("-common"))
        common = apt.versions(common_name)[0]
        raw = cache_directory() / "headers.unpacked"
        shutil.rmtree(raw, ignore_errors=True)
        apt.unpack([flavour, common], raw)
        tree = cache_directory() / f"headers-{flavour.version}"
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir()
        for package in (common, flavour):  # the flavour's generated files win
            subprocess.run(["cp", "-a", f"{raw}/usr/src/{package.name}/.", str(tree)], check=True)
        shutil.rmtree(raw)
        (tree / "complete").touch()
        say(f"kernel headers are ready in {tree}")
        return tree


def main() -> int:
    """Prepare the headers and print their directory."""
    try:
        print(prepare())
    except RdmanetError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
