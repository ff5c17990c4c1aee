"""A cgroup2 hierarchy and a /proc of plain files, for tests of what is decided from them."""

from __future__ import annotations

from pathlib import Path

from rdmanet.model import NetnsId
from rdmanet.rdma.cgroup import Cgroups


class Tree:
    """A hierarchy and a /proc of plain files; processes are this test's own."""

    def __init__(self, directory: Path):
        self.root, self.proc, self.spaces = (directory / name for name in ("cgroup", "proc", "netns"))
        for made in (self.root, self.proc / "self", self.spaces):
            made.mkdir(parents=True)
        self.own("/system.slice/rdmanet.service")
        self.cgroups = Cgroups(self.root, self.proc)

    def own(self, path: str) -> None:
        (self.proc / "self/cgroup").write_text(f"0::{path}\n")

    def netns(self, name: str) -> NetnsId:
        (self.spaces / name).touch()
        status = (self.spaces / name).stat()
        return NetnsId(status.st_dev, status.st_ino)

    def process(self, pid: int, path: str, netns: str) -> None:
        self.netns(netns)
        (self.proc / str(pid) / "ns").mkdir(parents=True)
        (self.proc / str(pid) / "ns/net").symlink_to(self.spaces / netns)
        (self.proc / str(pid) / "cgroup").write_text(f"0::{path}\n")
        directory = self.root / path.removeprefix("/")
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "cgroup.procs").open("a") as procs:
            procs.write(f"{pid}\n")
