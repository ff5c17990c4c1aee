"""Python's files as disks: an image is what the directory is now, made once, and only one is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.vm import trees

MKE2FS = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(MKE2FS is None, reason="mke2fs (package e2fsprogs) is not installed")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RDMANET_CACHE", str(tmp_path / "cache"))
    tree = tmp_path / "tree"
    (tree / "package").mkdir(parents=True)
    (tree / "package/module.py").write_text("x = 1\n" * 5000)
    (tree / "link").symlink_to("package")
    return tree


def image_of(directory: Path) -> Path:
    assert MKE2FS is not None
    made = trees._image(MKE2FS, directory)
    assert made is not None
    assert made.directory == directory
    return made.image


def test_the_image_holds_the_files(directory: Path) -> None:
    debugfs = shutil.which("debugfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert debugfs is not None  # of the same package
    shown = subprocess.run(
        [debugfs, "-R", "cat /package/module.py", str(image_of(directory))], capture_output=True, check=True
    )
    assert shown.stdout == (directory / "package/module.py").read_bytes()


def test_it_is_made_once_and_again_after_a_change(directory: Path) -> None:
    first = image_of(directory)
    assert image_of(directory) == first
    (directory / "package/module.py").write_text("x = 2\n" * 5000)
    os.utime(directory / "package/module.py", ns=(1, 1))
    second = image_of(directory)
    assert second != first
    assert list(first.parent.glob("*.ext4")) == [second]


def test_a_directory_of_empty_files_fits(directory: Path) -> None:
    for number in range(3000):
        (directory / f"empty-{number}").touch()
    assert image_of(directory).is_file()
