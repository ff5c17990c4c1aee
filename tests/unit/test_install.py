"""`rdmanet install`: what is written, in which order, whatever ends it in between, and whose files stay."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rdmanet import cli
from rdmanet.cni import NetworkConfig
from rdmanet.commands import install
from rdmanet.config import AgentConfig, Config, KubernetesConfig
from rdmanet.errors import ConflictError, NotFoundError, StateError
from testbed.paths import REPOSITORY

PROGRAM = b"\x7fELF" + bytes(range(256)) * 300
CONTENT = install.conflist(Config(), "rdmanet", "1.0.0")
#: Ends itself by SIGKILL at the fault point whose number it is told; at none, 0.
KILLED = """
import os, signal, sys
from pathlib import Path
from rdmanet.commands import install
what, number, executable, bin_dir, conf_dir, content = sys.argv[1:]
left = int(number)
def fault_point(name):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
if what == "install":
    install.install(Path(executable), Path(bin_dir), Path(conf_dir), content, fault_point)
else:
    install.remove(Path(bin_dir), Path(conf_dir), fault_point)
"""


class Place:
    """Two directories that a runtime reads, and an executable to copy."""

    def __init__(self, root: Path, *, made: bool = True):
        self.executable, self.bin_dir, self.conf_dir = root / "built", root / "opt/cni/bin", root / "etc/cni/net.d"
        self.executable.write_bytes(PROGRAM)
        if made:
            for directory in (self.bin_dir, self.conf_dir):
                directory.mkdir(parents=True)
        self.program, self.conflist = self.bin_dir / install.NAME, self.conf_dir / install.CONFLIST

    def install(self, content: str = CONTENT) -> None:
        install.install(self.executable, self.bin_dir, self.conf_dir, content)

    def remove(self) -> list[Path]:
        return install.remove(self.bin_dir, self.conf_dir)

    def directories(self) -> list[str]:
        """What is there beside the executable to copy."""
        root = self.executable.parent
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path != self.executable)

    def killed(self, what: str, number: int) -> bool:
        """Whether it came to that fault point; else it ended by itself."""
        words = [what, str(number), str(self.executable), str(self.bin_dir), str(self.conf_dir), CONTENT]
        done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=REPOSITORY, check=False)
        assert done.returncode in (0, -9)
        return done.returncode == -9

    def files(self) -> list[str]:
        return sorted(p.name for d in (self.bin_dir, self.conf_dir) if d.is_dir() for p in d.iterdir())

    def sound(self) -> bool:
        """Whether a runtime that reads now finds nothing, or a network whose executable is there; whole files only."""
        if self.program.exists():
            assert self.program.read_bytes() == PROGRAM
            assert self.program.stat().st_mode & 0o7777 == 0o755
        if self.conflist.exists():
            assert self.conflist.read_text() == CONTENT
            assert self.conflist.stat().st_mode & 0o7777 == 0o644
        return self.program.exists() or not self.conflist.exists()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_both_files_come_and_go(place: Place) -> None:
    place.install()
    assert place.files() == ["10-rdmanet.conflist", "rdmanet"]
    assert place.sound()
    place.install()
    assert place.files() == ["10-rdmanet.conflist", "rdmanet"]
    assert place.remove() == [place.conflist, place.program]
    assert place.files() == []
    assert place.remove() == []


def test_what_is_there_is_replaced(place: Place) -> None:
    place.install(install.conflist(Config(), "older", "0.4.0", portmap=True))
    place.program.write_bytes(b"older")
    place.install()
    assert place.sound()


def test_other_networks_and_plugins_stay(place: Place) -> None:
    place.install()
    others = [place.bin_dir / "portmap", place.conf_dir / "05-other.conflist", place.conf_dir / "20-other.conf"]
    for path in others:
        path.write_text("theirs")
    place.install()
    assert install.before_ours(place.conf_dir) == [others[1]]
    place.remove()
    assert [path.read_text() for path in others] == ["theirs"] * 3


def test_directories_that_were_made_go(tmp_path: Path) -> None:
    place = Place(tmp_path, made=False)
    place.install()
    place.install()
    removed = place.remove()
    assert removed[:2] == [place.conflist, place.program]
    assert {str(path.relative_to(tmp_path)) for path in removed[2:]} == {
        *("etc", "etc/cni", "etc/cni/net.d", "opt", "opt/cni", "opt/cni/bin")
    }
    assert place.directories() == []
    assert place.remove() == []


def test_directories_that_were_there_stay(tmp_path: Path) -> None:
    place = Place(tmp_path, made=False)
    (tmp_path / "opt").mkdir()
    place.conf_dir.mkdir(parents=True)
    place.install()
    place.remove()
    assert place.directories() == ["etc", "etc/cni", "etc/cni/net.d", "opt"]


def test_directories_that_somebody_uses_meanwhile_stay(tmp_path: Path) -> None:
    place = Place(tmp_path, made=False)
    place.install()
    (place.bin_dir / "portmap").write_text("theirs")
    place.remove()
    assert place.directories() == ["opt", "opt/cni", "opt/cni/bin", "opt/cni/bin/portmap"]
    (place.bin_dir / "portmap").unlink()
    place.remove()
    assert place.directories() == ["opt", "opt/cni", "opt/cni/bin"]  # theirs from then on


def test_directories_below_one_that_was_made_go_with_it(tmp_path: Path) -> None:
    place = Place(tmp_path, made=False)
    place.bin_dir, place.conf_dir = tmp_path / "both/bin", tmp_path / "both/net.d"
    place.install()
    place.remove()
    assert place.directories() == []


def test_without_a_network_an_earlier_one_goes(place: Place) -> None:
    place.install()
    install.install(place.executable, place.bin_dir, place.conf_dir, None)
    assert place.files() == ["rdmanet"]
    assert place.sound()
    assert place.remove() == [place.program]


@pytest.mark.parametrize("theirs", ['{"name": "net", "plugins": [{"type": "bridge"}]}', "[]", "not JSON", ""])
def test_somebody_elses_file_of_our_name_is_neither_replaced_nor_removed(place: Place, theirs: str) -> None:
    place.conflist.write_text(theirs)
    for call in (place.install, place.remove):
        with pytest.raises(ConflictError, match="somebody else wrote it"):
            call()
    assert place.files() == [install.CONFLIST]
    assert place.conflist.read_text() == theirs


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_an_executable_that_is_no_plain_file_stays(place: Place, make: Callable[[Path], None]) -> None:
    make(place.program)
    with pytest.raises(ConflictError, match="is no plain file"):
        place.install()
    assert place.files() == ["rdmanet"]


def test_killed_anywhere_it_can_be_finished_and_taken_back(tmp_path: Path) -> None:
    number, points = 1, 0
    while True:
        root = tmp_path / str(number)
        root.mkdir()
        place = Place(root, made=False)
        if not place.killed("install", number):
            break
        assert place.sound(), f"at fault point {number}"
        taken_back = number % 2 == 0
        place.remove() if taken_back else place.install()
        assert place.files() == ([] if taken_back else ["10-rdmanet.conflist", "rdmanet"])
        place.remove()
        assert place.directories() == []
        number, points = number + 1, points + 1
    assert points == 8  # recorded, directory, written, renamed; of each


def test_killed_while_it_removes(place: Place) -> None:
    place.install()
    assert place.killed("remove", 1)
    assert place.files() == ["rdmanet"]  # a runtime has no network, rather than one without executable
    assert place.killed("remove", 1)
    assert place.files() == []


def test_a_directory_that_is_none_is_a_sentence(place: Place) -> None:
    place.conf_dir.rmdir()
    place.conf_dir.write_text("a file")
    with pytest.raises(StateError, match=r"10-rdmanet\.conflist cannot be written: .*Make .* a writable directory"):
        place.install()


def test_without_an_executable_nothing_is_written(place: Place) -> None:
    place.executable.unlink()
    with pytest.raises(NotFoundError, match="Name it with --executable"):
        place.install()
    assert place.files() == []


# The configuration


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (Config(), {}),
        (
            Config(agent=AgentConfig(socket=Path("/run/else.sock"), state_dir=Path("/srv/state"))),
            {"socket": "/run/else.sock", "stateDir": "/srv/state"},
        ),
    ],
)
def test_the_network_is_the_agents(settings: Config, more: dict[str, str]) -> None:
    document = json.loads(install.conflist(settings, "pods", "1.1.0"))
    (plugin,) = document.pop("plugins")
    assert document == {"cniVersion": "1.1.0", "name": "pods"}
    assert {key: plugin.get(key) for key in ("socket", "stateDir") if key in plugin} == more
    # As libcni derives what the plugin gets.
    parsed = NetworkConfig.parse({**document, **plugin})
    assert (parsed.name, parsed.type, parsed.socket) == ("pods", "rdmanet", more.get("socket"))


def test_annotations_are_asked_for_where_kubelet_gives_slots() -> None:
    def capabilities(slots: int) -> dict[str, bool]:
        text = install.conflist(Config(kubernetes=KubernetesConfig(slots=slots)), "rdmanet", "1.0.0", portmap=True)
        plugins = json.loads(text)["plugins"]
        assert plugins[1] == {"type": "portmap", "capabilities": {"portMappings": True}}
        found: dict[str, bool] = plugins[0]["capabilities"]
        return found

    assert set(capabilities(4)) - set(capabilities(0)) == {"io.kubernetes.cri.pod-annotations"}


# The command


def words(place: Place, *more: str) -> list[str]:
    empty = place.executable.with_name("rdmanet.toml")
    empty.touch()
    directories = ["--bin-dir", str(place.bin_dir), "--conf-dir", str(place.conf_dir)]
    return ["install", "--config", str(empty), "--executable", str(place.executable), *directories, *more]


def test_the_command(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(place)) == 0
    assert capsys.readouterr().out == f"installed {place.program} and {place.conflist}\n"
    assert place.sound()
    (place.conf_dir / "00-other.conf").touch()
    assert cli.main(words(place)) == 0
    assert "00-other.conf comes before 10-rdmanet.conflist" in capsys.readouterr().out
    assert cli.main(words(place, "--remove")) == 0
    assert capsys.readouterr().out == f"removed {place.conflist}\nremoved {place.program}\n"
    assert cli.main(words(place, "--remove")) == 0
    assert capsys.readouterr().out == "nothing was installed\n"


def test_the_command_without_a_network(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(place)) == 0
    capsys.readouterr()
    assert cli.main(words(place, "--no-conflist")) == 0
    assert capsys.readouterr().out == f"installed {place.program}, and no network\n"
    assert place.files() == ["rdmanet"]


def test_portmap_must_be_there(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(place, "--portmap")) == 1
    assert "has no portmap, and every ADD would fail" in capsys.readouterr().err
    assert place.files() == []
    (place.bin_dir / "portmap").touch()
    assert cli.main(words(place, "--portmap")) == 0
    assert [p["type"] for p in json.loads(place.conflist.read_text())["plugins"]] == ["rdmanet", "portmap"]
