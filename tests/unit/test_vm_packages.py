"""Finding kernels, headers and QEMU in Debian's archives: the decisions, without an archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdmanet.errors import UnavailableError
from rdmanet.model import RdmaMode
from testbed.apt import Package, choose_archive, keyring_of, parse_package, parse_stanzas
from testbed.kernel import (
    MINIMUM_EXCLUSIVE,
    MINIMUM_SHARED,
    find_unpacked,
    kernel_packages,
    minimum_for,
    missing_for,
    namespace_mode,
    release_number,
)
from testbed.vm.qemu import parse_version

MIRROR = "http://mirror.invalid/debian/"


def test_stanzas_keep_first_lines_and_ignore_continuations() -> None:
    text = "Package: a\nDescription: one\n more: of it\n\n\nPackage: b\n"
    assert parse_stanzas(text) == [{"Package": "a", "Description": "one"}, {"Package": "b"}]


def test_dependencies_leave_out_alternatives_and_versions() -> None:
    stanza = {"Package": "linux-image-1", "Version": "1", "Depends": "kmod, a | b, linux-base-1 (= 1), c:any"}
    assert parse_package(stanza) == Package("linux-image-1", "1", ("kmod", "linux-base-1", "c"))


def target(release: str, component: str = "main") -> dict[str, str]:
    return {"Release": release, "Component": component, "Repo-URI": MIRROR}


@pytest.mark.parametrize(
    ("releases", "codename", "chosen"),
    [
        (["bookworm-security", "bookworm-updates", "bookworm"], "bookworm", "bookworm"),
        (["stable-security", "stable"], "trixie", "stable"),
        (["sid"], "", "sid"),
        (["bookworm-security"], "bookworm", None),
        (["stable", "trixie"], "trixie", "trixie"),
    ],
)
def test_archive_is_the_distribution_itself(releases: list[str], codename: str, chosen: str | None) -> None:
    found = choose_archive([target(r, "contrib") for r in releases] + [target(r) for r in releases], codename)
    assert (found["Release"] if found else None) == chosen
    assert found is None or found["Component"] == "main"


def test_keyring_of_a_deb822_source(tmp_path: Path) -> None:
    source = tmp_path / "debian.sources"
    source.write_text(
        "Types: deb\nURIs: http://other.invalid/debian\nSigned-By: /other.gpg\n\n"
        "Types: deb\nURIs: http://mirror.invalid/debian\nSuites: bookworm\nSigned-By: /own.gpg\n"
    )
    assert keyring_of(f"{source}:2", MIRROR) == Path("/own.gpg")


def test_keyring_of_a_one_line_source(tmp_path: Path) -> None:
    source = tmp_path / "debian.list"
    source.write_text(
        "deb [signed-by=/other.gpg] http://other.invalid/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/own.gpg] http://mirror.invalid/debian bookworm main\n"
    )
    assert keyring_of(f"{source}:2", MIRROR) == Path("/own.gpg")


@pytest.mark.parametrize(
    ("release", "number"),
    [("7.3.4+deb13-amd64", (7, 3)), ("7.3~rc7-1~exp1", (7, 3)), ("6.1.0-50-amd64", (6, 1)), ("weird", (0, 0))],
)
def test_release_numbers(release: str, number: tuple[int, int]) -> None:
    assert release_number(release) == number


@pytest.mark.parametrize(
    ("release", "rxe", "root", "words"),
    [
        ("6.18.44", True, True, "before 7.1"),
        ("7.1.0", False, True, "rdma_rxe"),
        ("7.1.0", True, False, "root"),
        ("7.1.0", True, True, ""),
    ],
)
def test_what_a_kernel_lacks_is_named(release: str, rxe: bool, root: bool, words: str) -> None:
    sentence = missing_for(MINIMUM_SHARED, release, rxe, root)
    assert words in sentence
    assert bool(sentence) == bool(words)


def test_exclusive_mode_needs_a_later_kernel() -> None:
    assert minimum_for(RdmaMode.EXCLUSIVE) == MINIMUM_EXCLUSIVE > minimum_for(RdmaMode.SHARED) == MINIMUM_SHARED
    assert "before 7.3" in missing_for(minimum_for(RdmaMode.EXCLUSIVE), "7.2.9", True, True)


@pytest.mark.parametrize(
    ("words", "mode"),
    [("netns exclusive copy-on-fork on\n", "exclusive"), ("netns shared \n", "shared"), ("", "unknown")],
)
def test_the_namespace_mode_is_read(words: str, mode: str) -> None:
    assert namespace_mode(words) == mode


def test_a_split_kernel_is_collected_in_one_version() -> None:
    v = "7.3.4-1~bpo13+1"
    archive = {
        "linux-image-amd64": [Package("linux-image-amd64", v, ("linux-image-7.3.4-amd64", "linux-base-amd64"))],
        "linux-image-7.3.4-amd64": [
            Package("linux-image-7.3.4-amd64", "7.3.4-2", ()),
            Package("linux-image-7.3.4-amd64", v, ("linux-binary-7.3.4-amd64", "linux-modules-7.3.4-amd64", "kmod")),
        ],
        "linux-binary-7.3.4-amd64": [Package("linux-binary-7.3.4-amd64", v, ("linux-base-7.3.4-amd64",))],
        "linux-modules-7.3.4-amd64": [Package("linux-modules-7.3.4-amd64", v, ("linux-base-7.3.4-amd64", "kmod"))],
        "linux-base-7.3.4-amd64": [Package("linux-base-7.3.4-amd64", v, ())],
    }
    found = kernel_packages(lambda name: archive.get(name, []), archive["linux-image-amd64"][0])
    assert {p.name.split("-")[1] for p in found} == {"image", "binary", "modules", "base"}
    assert {p.version for p in found} == {v}


@pytest.mark.parametrize("image", ["boot/vmlinuz-7.3", "usr/lib/modules/7.3/vmlinuz"])
def test_kernel_images_are_found_in_both_places(tmp_path: Path, image: str) -> None:
    (tmp_path / "usr/lib/modules/7.3/kernel").mkdir(parents=True)
    (tmp_path / image).parent.mkdir(exist_ok=True)
    (tmp_path / image).touch()
    found = find_unpacked(tmp_path)
    assert (found.release, found.image) == ("7.3", tmp_path / image)


def test_an_incomplete_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="remove the directory"):
        find_unpacked(tmp_path)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2)),
        ("1:10.0.2+ds-2+deb13u1~bpo12+1", (10, 0)),
        ("nothing", (0, 0)),
    ],
)
def test_qemu_versions(text: str, version: tuple[int, int]) -> None:
    assert parse_version(text) == version
