"""``rdmanet install``: the CNI executable and the network's configuration into the host's directories, and out again.

A runtime may read both directories at any moment: each file appears whole, by a rename, and the configuration comes
after the executable that it names. Removing goes the other way round. Whatever ends it in between, calling it again
finishes it. Where rdmanet is a further network beside another one (by Multus), the executable comes alone.

A directory that is not there is made, and recorded before: a file beside the topmost one that was missing. Removing
takes what is recorded away again, as far as it is empty.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from rdmanet import config
from rdmanet.cni import SUPPORTED_VERSIONS
from rdmanet.errors import ConflictError, NotFoundError, StateError, UnavailableError

#: Where packages and the image have it.
EXECUTABLE = Path("/usr/lib/rdmanet/cni/rdmanet")
#: Kubernetes' and most runtimes' directories.
BIN_DIR, CONF_DIR = Path("/opt/cni/bin"), Path("/etc/cni/net.d")
#: Also the plugin's type: runtimes look for an executable of that name.
NAME = "rdmanet"
CONFLIST = f"10-{NAME}.conflist"
PORTMAP = "portmap"
#: What libcni reads as a network's configuration.
_CONFIGURATIONS = (".conf", ".conflist", ".json")

#: Called with a name after each effect; tests end the process there.
FaultPoint = Callable[[str], None]


def no_fault(name: str) -> None:
    """The fault point of every day."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    install = commands.add_parser(
        "install", parents=[common], help="put the CNI executable and the network's configuration where runtimes look"
    )
    install.add_argument("--bin-dir", type=Path, default=BIN_DIR, metavar="DIR", help=f"default {BIN_DIR}")
    install.add_argument("--conf-dir", type=Path, default=CONF_DIR, metavar="DIR", help=f"default {CONF_DIR}")
    install.add_argument(
        "--executable", type=Path, default=EXECUTABLE, metavar="FILE", help=f"what is copied (default {EXECUTABLE})"
    )
    install.add_argument("--network", default=NAME, metavar="NAME", help=f"the network's name (default {NAME})")
    install.add_argument(
        "--cni-version", choices=SUPPORTED_VERSIONS, default="1.0.0", help="1.1.0 needs containerd 2 or CRI-O 1.31"
    )
    install.add_argument(
        "--no-conflist",
        action="store_true",
        help="the executable alone, where another network is the pods' own (Multus); an earlier configuration goes",
    )
    install.add_argument("--portmap", action="store_true", help="chain portmap behind rdmanet, for host ports")
    install.add_argument("--remove", action="store_true", help="take both files away again")
    install.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    if chosen.remove:
        removed = remove(chosen.bin_dir, chosen.conf_dir)
        print("\n".join(f"removed {path}" for path in removed) or "nothing was installed")
        return 0
    settings = config.load(chosen.config)
    if chosen.no_conflist:
        install(chosen.executable, chosen.bin_dir, chosen.conf_dir, None)
        print(f"installed {chosen.bin_dir / NAME}, and no network")
        return 0
    if chosen.portmap and not (chosen.bin_dir / PORTMAP).exists():
        raise UnavailableError(
            f"{chosen.bin_dir} has no {PORTMAP}, and every ADD would fail: install the reference plugins, or leave"
            " --portmap away.",
            subject=str(chosen.bin_dir / PORTMAP),
        )
    content = conflist(settings, chosen.network, chosen.cni_version, portmap=chosen.portmap)
    install(chosen.executable, chosen.bin_dir, chosen.conf_dir, content)
    print(f"installed {chosen.bin_dir / NAME} and {chosen.conf_dir / CONFLIST}")
    for path in before_ours(chosen.conf_dir):
        print(f"{path} comes before {CONFLIST}: runtimes use that network for pods, unless it is removed or renamed")
    return 0


def conflist(settings: config.Config, network: str, version: str, *, portmap: bool = False) -> str:
    """The network configuration list that fits the agent's configuration, as text.

    Socket and state directory are named where they are not the executable's defaults; pods' annotations are asked for
    where kubelet gives slots.
    """
    capabilities = {"mac": True, "ips": True, "dns": True, "bandwidth": True}
    if settings.kubernetes.slots:
        capabilities["io.kubernetes.cri.pod-annotations"] = True
    plugin: dict[str, object] = {"type": NAME, "capabilities": capabilities}
    usual = config.AgentConfig()
    if settings.agent.socket != usual.socket:
        plugin["socket"] = str(settings.agent.socket)
    if settings.agent.state_dir != usual.state_dir:
        plugin["stateDir"] = str(settings.agent.state_dir)
    plugins = [plugin]
    if portmap:
        plugins.append({"type": PORTMAP, "capabilities": {"portMappings": True}})
    return json.dumps({"cniVersion": version, "name": network, "plugins": plugins}, indent=2) + "\n"


def install(
    executable: Path, bin_dir: Path, conf_dir: Path, content: str | None, fault_point: FaultPoint = no_fault
) -> None:
    """Executable first, configuration last; without a configuration (None) an earlier one of ours goes. Idempotent.

    Raises ConflictError where a file of that name is somebody else's, NotFoundError without an executable, StateError
    where a file cannot be written.
    """
    try:
        program = executable.read_bytes()
    except OSError as error:
        raise NotFoundError(
            f"The CNI executable {executable} cannot be read: {error}. Name it with --executable (make -C cni builds"
            " it).",
            operation="read",
            subject=str(executable),
            errno=error.errno,
        ) from error
    target = conf_dir / CONFLIST
    if target.exists() and not _is_ours(target):
        raise ConflictError(
            f"{target} is there and names no plugin {NAME}: somebody else wrote it. Move it aside.", subject=str(target)
        )
    if os.path.lexists(bin_dir / NAME) and not stat.S_ISREG((bin_dir / NAME).lstat().st_mode):
        raise ConflictError(
            f"{bin_dir / NAME} is there and is no plain file: somebody else made it. Move it aside.",
            subject=str(bin_dir / NAME),
        )
    if content is None:
        _unlink(target, fault_point)
    _place(bin_dir / NAME, program, 0o755, fault_point)
    if content is not None:
        _place(target, content.encode(), 0o644, fault_point)


def remove(bin_dir: Path, conf_dir: Path, fault_point: FaultPoint = no_fault) -> list[Path]:
    """Configuration first, executable last, and what an interrupted installation left; what was there. Idempotent.

    Raises ConflictError where the configuration is somebody else's, StateError where a file cannot be removed.
    """
    target = conf_dir / CONFLIST
    if target.exists() and not _is_ours(target):
        raise ConflictError(
            f"{target} names no plugin {NAME}: somebody else wrote it, and it stays. Nothing was removed.",
            subject=str(target),
        )
    files = (target, _beside(target), bin_dir / NAME, _beside(bin_dir / NAME))
    removed = [path for path in files if _unlink(path, fault_point)]
    return removed + _remove_directories(conf_dir, bin_dir)


def before_ours(conf_dir: Path) -> list[Path]:
    """Other networks' configurations that runtimes, which take the first by name, use instead of ours."""
    return sorted(p for p in conf_dir.iterdir() if p.suffix in _CONFIGURATIONS and p.name < CONFLIST)


def _is_ours(path: Path) -> bool:
    """Whether a configuration has our plugin in it, whatever else was changed. One that is no JSON is nobody's."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return any(plugin["type"] == NAME for plugin in json.loads(path.read_bytes())["plugins"])
    return False


def _unlink(path: Path, fault_point: FaultPoint) -> bool:
    """Whether it was there. Raises StateError."""
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StateError(
            f"{path} cannot be removed: {error.strerror}. Make {path.parent} writable and call again.",
            operation="unlink",
            subject=str(path),
            errno=error.errno,
        ) from error
    fault_point(f"removed {path.name}")
    return True


def _record(directory: Path) -> Path:
    """The file which says that a directory was made here, with what is below it on the way to ours."""
    return directory.with_name(f".{directory.name}.made-by-{NAME}")


def _make_directories(directory: Path, fault_point: FaultPoint) -> None:
    """Makes a directory with what is above it, recorded first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    if missing:
        _record(missing[-1]).touch(mode=0o644)
        fault_point(f"recorded {missing[-1].name}")
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)


def _recorded(directory: Path) -> list[Path]:
    """A directory and those above it, to the topmost that was made here; none where none was."""
    paths = [path for path in (directory, *directory.parents) if path.name]
    tops = [number for number, path in enumerate(paths) if _record(path).exists()]
    return paths[: tops[-1] + 1] if tops else []


def _remove_directories(*directories: Path) -> list[Path]:
    """Removes those that were made here and are empty. One that somebody uses is not ours any more. StateError."""
    made = {path for directory in directories for path in _recorded(directory)}
    removed = []
    for path in sorted(made, key=lambda path: (-len(path.parts), path)):
        try:
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()
                removed.append(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY, errno.ENOTDIR):
                raise StateError(
                    f"{path} cannot be removed: {error.strerror}. Make {path.parent} writable and call again.",
                    operation="rmdir",
                    subject=str(path),
                    errno=error.errno,
                ) from error
        _record(path).unlink(missing_ok=True)
    return removed


def _beside(path: Path) -> Path:
    """Where a file is written before it is there; no runtime reads such a name."""
    return path.with_name(f".{path.name}.new")


def _place(path: Path, content: bytes, mode: int, fault_point: FaultPoint) -> None:
    """Writes a file whole or not at all; it outlives a power failure from when this returns. Raises StateError."""
    beside = _beside(path)
    with _said(path, beside):
        _make_directories(path.parent, fault_point)
        fault_point(f"directory of {path.name}")
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()  # of an installation that was interrupted
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        fault_point(f"wrote {beside.name}")
        beside.replace(path)
        fault_point(f"renamed {path.name}")
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def _said(path: Path, beside: Path) -> Iterator[None]:
    """A failure as a sentence, when what was begun is taken away again."""
    there = path.parent.exists()
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError, StateError):
            beside.unlink(missing_ok=True)
            if not there:
                _remove_directories(path.parent)
        raise StateError(
            f"{path} cannot be written: {error.strerror}. Make {path.parent} a writable directory with free space and"
            " call again.",
            operation="write",
            subject=str(path),
            errno=error.errno,
        ) from error
