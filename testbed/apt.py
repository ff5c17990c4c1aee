"""Debian packages without touching the machine: a private apt root that reads the machine's own configuration.

The mirror, its keyring and proxies come from the machine's apt; lists, downloads and state live in the cache.
Signatures are verified as apt always does. See apt.conf(5), apt-get(8) "indextargets".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rdmanet.errors import UnavailableError
from testbed.paths import cache_directory
from testbed.progress import Ticker, say

_DEBIAN_KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
_SUITE_NAMES = frozenset({"oldoldstable", "oldstable", "stable", "testing", "unstable", "sid"})


@dataclass(frozen=True, slots=True)
class Archive:
    """The Debian archive that this machine's apt uses: its address, its own suite, and the keyring for it."""

    uri: str
    suite: str
    keyring: Path | None  # None: apt's own trusted keys


@dataclass(frozen=True, slots=True)
class Package:
    """One version of a binary package; ``depends`` are the names of its dependencies, alternatives left out."""

    name: str
    version: str
    depends: tuple[str, ...]


def parse_stanzas(text: str) -> list[dict[str, str]]:
    """The stanzas of a control file (Debian policy 5.1), first line of each field only; later ones win."""
    stanzas: list[dict[str, str]] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        stanza: dict[str, str] = {}
        for line in block.splitlines():
            name, separator, value = line.partition(":")
            if separator and not line[0].isspace():
                stanza[name] = value.strip()
        if stanza:
            stanzas.append(stanza)
    return stanzas


def parse_package(stanza: dict[str, str]) -> Package:
    """A stanza of ``apt-cache show`` as a package."""
    names = []
    for dependency in filter(None, stanza.get("Depends", "").split(",")):
        if "|" not in dependency:
            names.append(dependency.strip().split()[0].partition(":")[0])
    return Package(stanza["Package"], stanza["Version"], tuple(names))


def choose_archive(targets: list[dict[str, str]], codename: str) -> dict[str, str] | None:
    """The index target of the distribution itself: not security, not updates, component main."""
    wanted = [codename] if codename else []
    for names in (wanted, sorted(_SUITE_NAMES)):
        for target in targets:
            if target.get("Component") == "main" and target.get("Release") in names:
                return target
    return None


def keyring_of(entry: str, uri: str) -> Path | None:
    """The keyring that a source names for ``uri``; ``entry`` is apt's ``Sourcesentry`` (FILE:LINE).

    Looks at ``Signed-By:`` in deb822 files and ``[signed-by=…]`` in one-line files (sources.list(5)).
    """
    path = Path(entry.rpartition(":")[0])
    text = path.read_text() if path.is_file() else ""
    if path.suffix == ".sources":
        for stanza in parse_stanzas(text):
            if uri.rstrip("/") in stanza.get("URIs", "").replace("/ ", " ").rstrip("/").split():
                named = stanza.get("Signed-By", "")
                if named.startswith("/"):
                    return Path(named.split()[0])
    else:
        for line in text.splitlines():
            match = re.match(r"deb\s+\[[^\]]*signed-by=([^\s\]]+)[^\]]*\]\s+(\S+)", line.strip())
            if match and match[2].rstrip("/") == uri.rstrip("/"):
                return Path(match[1])
    return next((keyring for keyring in _DEBIAN_KEYRINGS if keyring.is_file()), None)


def _run(argv: list[str], **environment: str) -> str:
    env = {**os.environ, "LC_ALL": "C.UTF-8", **environment}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        raise UnavailableError(
            f"{' '.join(argv[:2])} failed: {done.stderr.strip() or done.stdout.strip()}", operation=argv[0]
        )
    return done.stdout


def machine_archive() -> Archive:
    """The Debian archive from this machine's own apt configuration."""
    if shutil.which("apt-get") is None:
        raise UnavailableError(
            "There is no apt-get here: the test kernel can only be fetched on Debian. "
            "Run on a kernel of 7.1 or later with rdma_rxe, or on Debian 12 or 13."
        )
    targets = parse_stanzas(_run(["apt-get", "indextargets", "--no-release-info", "Created-By: Packages"]))
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    target = choose_archive(targets, release.get("VERSION_CODENAME", "").strip('"'))
    if target is None:
        raise UnavailableError(
            "apt on this machine names no Debian archive (a source with a Debian suite and component main): "
            "add one, or run on a kernel of 7.1 or later with rdma_rxe."
        )
    uri = target["Repo-URI"]
    return Archive(uri, target["Release"], keyring_of(target.get("Sourcesentry", ""), uri))


def machine_settings() -> list[str]:
    """The machine's settings (proxies, certificates, retries) as lines of apt.conf; not its hooks and directories."""
    return [
        line
        for line in _run(["apt-config", "dump"]).splitlines()
        if not re.match(r"(Dir\b|DPkg\b|APT::(Update|NeverAutoRemove|Periodic)\b|.*-Invoke)", line)
    ]


class PrivateApt:
    """An apt root of its own under the cache, for ``suites`` of ``archive``."""

    def __init__(self, archive: Archive, suites: tuple[str, ...]):
        self.archive = archive
        self.suites = suites
        self.root = cache_directory() / "apt" / "+".join(suites)
        for directory in ("lists/partial", "archives/partial", "preferences.d"):
            (self.root / directory).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        options = f"[signed-by={archive.keyring}] " if archive.keyring else ""
        sources = [f"deb {options}{archive.uri} {suite} main\n" for suite in suites]
        (self.root / "sources.list").write_text("".join(sources))
        keep = machine_settings()
        own = {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": self.root / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": self.root / "preferences.d",
            "Dir::State": self.root,
            "Dir::State::lists": self.root / "lists",
            "Dir::State::status": self.root / "status",
            "Dir::Cache": self.root,
            "Dir::Cache::archives": self.root / "archives",
            "APT::Sandbox::User": "root",  # the cache may lie where the user _apt cannot look
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        keep += [f'{name} "{value}";' for name, value in own.items()]
        self._configuration = self.root / "apt.conf"
        self._configuration.write_text("\n".join(keep) + "\n")

    def update(self) -> None:
        """Fetch the package lists; signatures are verified by apt."""
        ticker = Ticker(f"package lists of {', '.join(self.suites)}")
        _run(["apt-get", "-q", "update", "-o", "APT::Update::Error-Mode=any"], APT_CONFIG=str(self._configuration))
        origins = {
            match[1].strip()
            for release in (self.root / "lists").glob("*Release")
            if (match := re.search(r"^Origin:(.*)$", release.read_text(errors="replace"), re.MULTILINE))
        }
        if not origins or not all(origin.startswith("Debian") for origin in origins):
            raise UnavailableError(
                f"{self.archive.uri} is not a Debian archive: it calls itself {origins or 'nothing'}"
            )
        ticker.done()

    def codename(self, suite: str) -> str:
        """The codename behind a suite's alias (``stable-backports`` → ``trixie-backports``)."""
        for release in (self.root / "lists").glob(f"*_dists_{suite}_*Release"):
            match = re.search(r"^Codename:\s*(\S+)", release.read_text(errors="replace"), re.MULTILINE)
            if match:
                return match[1]
        return suite

    def versions(self, name: str) -> list[Package]:
        """Every version of ``name`` in the suites, newest first."""
        environment = {"APT_CONFIG": str(self._configuration)}
        shown = subprocess.run(
            ["apt-cache", "show", name],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            check=False,
        )
        packages = [parse_package(s) for s in parse_stanzas(shown.stdout) if s.get("Package") == name]
        return sorted(packages, key=_VersionKey, reverse=True)

    def unpack(self, packages: list[Package], into: Path) -> None:
        """Download (with a progress line) and unpack; the .deb files are removed afterwards."""
        downloads = self.root / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir()
        names = [f"{package.name}={package.version}" for package in packages]
        say(f"downloading {', '.join(names)}")
        ticker = Ticker("download", every_s=5.0)
        with subprocess.Popen(
            ["apt-get", "-q", "download", *names],
            cwd=downloads,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "LC_ALL": "C.UTF-8", "APT_CONFIG": str(self._configuration)},
        ) as apt:
            while True:
                try:
                    output, _ = apt.communicate(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    ticker.tick(f"{_mebibytes(downloads):.0f} MiB")
        if apt.returncode != 0:
            raise UnavailableError(f"The download failed: {output.strip()[-600:]}", operation="apt-get download")
        ticker.done(f"{_mebibytes(downloads):.0f} MiB")
        ticker = Ticker("unpack")
        into.mkdir(parents=True, exist_ok=True)
        for deb in sorted(downloads.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(deb), str(into)])
        ticker.done()
        shutil.rmtree(downloads)


def _mebibytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 2**20


class _VersionKey:
    """Orders packages by Debian's version order (deb-version(7)), as dpkg decides it."""

    def __init__(self, package: Package):
        self.version = package.version

    def __lt__(self, other: _VersionKey) -> bool:
        argv = ["dpkg", "--compare-versions", self.version, "lt", other.version]
        return subprocess.run(argv, check=False).returncode == 0
