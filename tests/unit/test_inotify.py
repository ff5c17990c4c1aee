"""rdmanet.inotify: what vanishes from folders, and what comes."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdmanet.inotify import Appeared, Folders, Lost, Vanished


@pytest.fixture
def folders() -> Iterator[Folders]:
    folders = Folders()
    yield folders
    folders.close()
    folders.close()


def read(folders: Folders) -> list[Vanished | Appeared | Lost]:
    """What has happened; waits for the first."""
    assert select.select([folders.fileno()], [], [], 10)[0], "nothing was heard"
    return folders.read()


def test_what_is_removed_or_moved_away(folders: Folders, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).touch()
    assert folders.watch(str(tmp_path))
    assert folders.watch(str(tmp_path))
    (tmp_path / "one").unlink()
    (tmp_path / "two").rename(tmp_path.parent / "two")
    (tmp_path / "three").write_text("is still there")
    assert read(folders) == [Vanished(str(tmp_path), "one"), Vanished(str(tmp_path), "two")]
    assert folders.read() == []


def test_what_comes_where_that_is_wanted(tmp_path: Path) -> None:
    with contextlib.closing(Folders(coming=True)) as folders:
        assert folders.watch(str(tmp_path))
        (tmp_path / "socket").touch()
        (tmp_path / "socket").unlink()
        (tmp_path.parent / "other").touch()
        (tmp_path.parent / "other").rename(tmp_path / "moved")
        here = str(tmp_path)
        assert read(folders) == [Appeared(here, "socket"), Vanished(here, "socket"), Appeared(here, "moved")]


def test_a_folder_that_goes_and_comes_back(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "netns"
    assert not folders.watch(str(folder))
    folder.mkdir()
    assert folders.watch(str(folder))
    (folder / "one").touch()
    (folder / "one").unlink()
    folder.rmdir()
    assert read(folders) == [Vanished(str(folder), "one"), Vanished(str(folder))]
    folder.mkdir()
    assert folders.watch(str(folder))
    (folder / "two").touch()
    (folder / "two").unlink()
    assert Vanished(str(folder), "two") in read(folders)


def test_two_paths_to_one_folder(folders: Folders, tmp_path: Path) -> None:
    folder, link = tmp_path / "run", tmp_path / "var-run"
    folder.mkdir()
    link.symlink_to(folder)
    assert folders.watch(str(folder))
    assert folders.watch(str(link))
    (folder / "pod").touch()
    (folder / "pod").unlink()
    assert set(read(folders)) == {Vanished(str(folder), "pod"), Vanished(str(link), "pod")}
    folders.forget(str(folder))
    (folder / "pod").touch()
    (folder / "pod").unlink()
    assert read(folders) == [Vanished(str(link), "pod")]
    folders.forget(str(link))
    folders.forget(str(link))
    (folder / "pod").touch()
    (folder / "pod").unlink()
    assert [one for one in folders.read() if isinstance(one, Vanished)] == []


def test_what_was_lost_is_said(folders: Folders, tmp_path: Path) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    (tmp_path / "one").touch()
    assert folders.watch(str(tmp_path))
    source, target = tmp_path / "one", tmp_path / "two"
    for _ in range(most + 2):  # two names by turns: the same event twice in a row counts once
        source.rename(target)
        source, target = target, source
    found: list[Vanished | Appeared | Lost] = []
    while some := folders.read():
        found += some
    assert isinstance(found[-1], Lost)
