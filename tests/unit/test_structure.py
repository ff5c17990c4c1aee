"""The house's rules: who may import whom, how long a file may be, what is written once.

docs/design/first-way.md ("The parts and who may know whom") and ARCHITECTURE.md say the same in words.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from testbed.paths import REPOSITORY

PACKAGE = REPOSITORY / "rdmanet"
MAX_LINES = 500

NOUNS = {"errors", "model"}
#: Part → the other parts of rdmanet that it may import. A part is a module or a package directly below rdmanet.
MAY_KNOW: dict[str, set[str]] = {
    "errors": set(),
    "model": set(),
    "show": set(),
    "memlock": set(),
    "memory": set(),
    "interrupts": set(),
    "names": set(),
    "background": {"errors"},
    "alias": {"model"},
    "client": {"errors"},
    "codec": {"errors"},
    "lease": NOUNS | {"codec"},
    "config": NOUNS,
    "environment": NOUNS,
    "cdi": {"errors"},
    "kubelet": NOUNS | {"cdi", "config", "inotify"},
    "ipam": NOUNS,
    "database": {"errors"},
    "documents": {"database"},
    "store": NOUNS | {"database"},
    "cni": NOUNS | {"names"},
    "netlink": NOUNS,
    "datapath": NOUNS,
    "rdma": NOUNS,
    "broker": NOUNS | {"background", "lease"},
    "verbs": NOUNS | {"environment", "lease", "memlock"},
    "pending": {"cni", "errors"},
    "reserve": {"errors"},
    "notify": set(),
    "node": NOUNS | {"alias", "config", "ipam", "netlink", "store"},
    "devices": NOUNS | {"config", "node", "netlink", "rdma", "store"},
    "metrics": NOUNS | {"broker", "datapath", "limits", "numbers", "store"},
    "inotify": {"errors"},
    "policy": NOUNS | {"datapath", "objects"},
    "objects": NOUNS | {"documents", "names"},
    "services": NOUNS | {"datapath", "netlink", "objects"},
    "numbers": NOUNS | {"limits", "netlink", "rdma"},
    "health": NOUNS | {"background", "netlink", "numbers", "rdma"},
    "addresses": NOUNS | {"background", "netlink"},
    "limits": NOUNS | {"config", "datapath", "netlink", "rdma", "store"},
    "pods": NOUNS | {"broker", "lease", "netlink", "rdma"},
    "steps": NOUNS | {"alias", "datapath", "ipam", "netlink", "node", "policy", "rdma", "reserve", "store"},
    "slots": NOUNS | {"cdi", "cni", "config", "environment", "netlink", "pods", "rdma", "store"},
    "removal": NOUNS | {"netlink", "steps"},
    "adoption": NOUNS | {"alias", "datapath", "netlink", "steps"},
    "reconcile": NOUNS | {"datapath", "ipam", "node", "rdma", "steps"},
    "looking": NOUNS | {"netlink", "rdma", "reconcile", "steps"},
    "expected": NOUNS | {"cni", "ipam", "netlink", "steps"},
    "attach": NOUNS | {"adoption", "cni", "config", "expected", "ipam", "looking", "netlink", "removal", "steps"},
    "nodesetup": NOUNS | {"config", "datapath", "ipam", "netlink", "node", "reconcile", "store"},
    "repairs": NOUNS | {"attach", "looking", "netlink", "nodesetup", "reconcile", "steps"},
    "watch": NOUNS
    | {"background", "calls", "inotify", "netlink", "nodesetup", "reconcile", "repairs", "steps", "store"},
    "calls": set(),
    "api": NOUNS | {"attach", "calls", "cni", "pending"},
    "monitor": NOUNS | {"background", "datapath"},
    "tracking": NOUNS | {"background", "datapath"},
    "connections": NOUNS | {"datapath", "monitor", "tracking"},
    "routes": {"api", "connections", "errors", "monitor", "objects", "slots"},
    "status": NOUNS
    | {
        "broker",
        "datapath",
        "limits",
        "numbers",
        "objects",
        "pods",
        "policy",
        "reconcile",
        "removal",
        "services",
        "store",
    },
    "doctor": NOUNS | {"config", "datapath", "memlock", "netlink", "node", "rdma"},
    "rebuild": NOUNS
    | {
        "adoption",
        "alias",
        "cdi",
        "config",
        "database",
        "datapath",
        "devices",
        "documents",
        "netlink",
        "node",
        "rdma",
        "store",
    },
    "uninstall": NOUNS
    | {"adoption", "cdi", "config", "datapath", "devices", "documents", "limits", "netlink", "node"}
    | {"rdma", "rebuild", "removal", "reserve", "slots", "store"},
    "run": NOUNS | {"client", "config", "environment", "netlink"},
    "commands": NOUNS | {"client", "cni", "config", "interrupts", "objects", "rebuild", "run", "show"},
    "cli": NOUNS
    | {"agent", "client", "commands", "config", "datapath", "doctor", "kubelet", "run", "show", "uninstall"},
    "__main__": {"cli", "interrupts"},
}
#: The composition root: everything but what people type.
MAY_KNOW["agent"] = set(MAY_KNOW) - {
    "cli",
    "client",
    "commands",
    "show",
    "doctor",
    "interrupts",
    "memlock",
    "rebuild",
    "run",
    "uninstall",
    "verbs",
    "__main__",
}

#: Module from outside → where alone it may be imported, relative to rdmanet.
SOLE_IMPORTERS = {
    "bcc": ("datapath/compiler.py",),
    "pyverbs": ("verbs/",),
    "pyroute2": ("netlink/",),
    "yaml": ("commands/",),
    "sqlite3": ("database.py", "store.py"),
    "prometheus_client": ("metrics.py",),
    "aiohttp": ("agent.py", "api.py", "broker/server.py", "kubelet/watching.py", "routes.py", "verbs/"),
    "grpc": ("kubelet/rpc.py",),
    "google": ("kubelet/messages.py",),
}


def python_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    """The part that a file below rdmanet belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Absolute names of everything that a file imports, wherever in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def parts_known_by(path: Path) -> Iterator[str]:
    """The parts of rdmanet that a file imports; ``from rdmanet import x`` counts as x."""
    for name in imports(path):
        words = name.split(".")
        if words[0] == "rdmanet" and len(words) > 1 and words[1] != "__version__":
            yield words[1]


def test_every_part_is_in_the_table_and_the_table_has_no_other() -> None:
    parts = {part_of(path) for path in python_files(PACKAGE)} - {"__init__"}
    assert parts == set(MAY_KNOW)


@pytest.mark.parametrize("part", sorted(MAY_KNOW))
def test_imports_point_down(part: str) -> None:
    wrong = {
        f"{path.relative_to(REPOSITORY)} imports rdmanet.{known}"
        for path in python_files(PACKAGE)
        if part_of(path) == part
        for known in parts_known_by(path)
        if known != part and known not in MAY_KNOW[part]
    }
    assert not wrong


def test_no_two_parts_know_each_other() -> None:
    order: list[str] = []
    left = dict(MAY_KNOW)
    while left:
        ready = [part for part, known in left.items() if known <= set(order)]
        assert ready, f"a circle among {sorted(left)}"
        order += ready
        left = {part: known for part, known in left.items() if part not in ready}


@pytest.mark.parametrize("module", sorted(SOLE_IMPORTERS))
def test_sole_importers(module: str) -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in python_files(PACKAGE)
        if any(name.split(".")[0] == module for name in imports(path))
    }
    assert importers, f"nobody imports {module} any more: take it out of the table"
    assert {path for path in importers if not path.startswith(SOLE_IMPORTERS[module])} == set()


def test_rdmanet_never_imports_testbed_or_tests() -> None:
    wrong = {
        str(path) for path in python_files(PACKAGE) for n in imports(path) if n.split(".")[0] in ("testbed", "tests")
    }
    assert not wrong


def test_only_tests_import_tests() -> None:
    """What proofs and benchmarks share with tests is in testbed, which knows neither."""
    for folder, above in (("benchmarks", {"tests"}), ("testbed", {"benchmarks", "tests"})):
        files = python_files(REPOSITORY / folder)
        assert not {str(path) for path in files for name in imports(path) if name.split(".")[0] in above}


def test_verbs_needs_nothing_of_the_agents_packages() -> None:
    """Inside a container there is aiohttp and pyverbs, and no pyroute2 or prometheus_client (pyproject.toml)."""
    reached: set[str] = set()
    waiting = {"verbs"}
    while waiting:
        part = waiting.pop()
        reached.add(part)
        files = [path for path in python_files(PACKAGE) if part_of(path) == part]
        waiting |= {known for path in files for known in parts_known_by(path)} - reached
        foreign = {n.split(".")[0] for path in files for n in imports(path)} & {"pyroute2", "prometheus_client", "bcc"}
        assert not foreign, f"rdmanet.{part} imports {foreign}"
    assert reached <= {"verbs", "environment", "lease", "codec", "memlock", "model", "errors"}


def sources() -> list[Path]:
    """What people write: everything but what is built or hidden."""
    tops = [path for path in REPOSITORY.iterdir() if path.name != "build" and not path.name.startswith(".")]
    below = [path for top in tops if top.is_dir() for path in top.rglob("*") if "__pycache__" not in path.parts]
    return [path for path in (*tops, *below) if path.is_file()]


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for path in sources()
        if path.suffix in (".py", ".c", ".h", ".sh")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"more than {MAX_LINES} lines"


def test_no_module_is_called_utils() -> None:
    assert not [path for path in sources() if path.stem.lower() in ("util", "utils", "helpers", "common", "misc")]


def test_no_exception_is_swallowed() -> None:
    """``except Exception`` and bare ``except`` only where what was caught is raised again in another thread, or is what
    was looked for, and saved with its input."""
    finding = REPOSITORY / "testbed/fuzzing/search.py"
    wrong = []
    for path in [*python_files(PACKAGE), *python_files(REPOSITORY / "testbed")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = node.type.id if isinstance(node.type, ast.Name) else None
            ends_in_raise = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            carried = path == PACKAGE / "netlink/namespace.py"
            if (node.type is None or (caught == "Exception" and path != finding)) or (
                caught == "BaseException" and not ends_in_raise and not carried
            ):
                wrong.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert not wrong


def drop_reasons() -> list[str]:
    """DROP_ names of the one enum, without the prefix, in lower case."""
    text = (REPOSITORY / "bpf/drop.h").read_text(encoding="utf-8").partition("enum drop_reason {")[2].partition("}")[0]
    names = (line.split("=")[0].split(",")[0].strip() for line in text.splitlines())
    return [name.removeprefix("DROP_").lower() for name in names if name.startswith("DROP_")]


def test_drop_reasons_are_written_once() -> None:
    reasons = drop_reasons()
    assert len(reasons) > 15
    assert len(set(reasons)) == len(reasons)
    for path in python_files(PACKAGE):
        constants = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        # "no_device" and the like are the broker's; a drop reason's whole name is the datapath's alone.
        again = constants & set(reasons) - {"malformed"}
        assert not again, f"{path} writes drop reasons of bpf/drop.h again"
    for path in (REPOSITORY / "bpf").glob("*.[ch]"):
        if path.name != "drop.h":
            assert "enum drop_reason {" not in path.read_text()


def test_every_drop_reason_is_used() -> None:
    programs = "\n".join(p.read_text() for p in (REPOSITORY / "bpf").glob("*.[ch]") if p.name != "drop.h")
    assert not [reason for reason in drop_reasons() if f"DROP_{reason.upper()}" not in programs]
