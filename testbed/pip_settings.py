"""pip's settings on this machine (index, certificates, directories of wheels), for builds that need the same."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Of them what leads to packages; the machine's constraints are on what is installed on the machine.
_KEPT = ("index-url", "extra-index-url", "find-links", "no-index", "cert", "proxy", "trusted-host", "default-timeout")


@dataclass(frozen=True, slots=True)
class Pip:
    """By keys; ``places`` are the directories of this machine that are named."""

    settings: Mapping[str, str]
    places: tuple[Path, ...]

    @classmethod
    def of_machine(cls) -> Pip:
        """From ``pip config list``: its files and its environment."""
        argv = [sys.executable, "-m", "pip", "config", "list"]
        return cls.parse(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)

    @classmethod
    def parse(cls, listing: str) -> Pip:
        """Lines such as ``global.cert='/a'``; later ones win."""
        settings: dict[str, str] = {}
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            key = name.rpartition(".")[2]
            if key in _KEPT:
                settings[key] = str(ast.literal_eval(value))
        words = [word for key in ("extra-index-url", "find-links") for word in settings.get(key, "").split()]
        paths = (Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///")))
        places = dict.fromkeys(_top(path) for path in paths if path.is_dir())
        return cls({key: " ".join(value.split()) for key, value in settings.items()}, tuple(places))

    @property
    def certificates(self) -> bytes:
        """Those that pip trusts here, where it is told to trust other ones than it would by itself; else nothing."""
        return Path(self.settings["cert"]).read_bytes() if "cert" in self.settings else b""

    def text(self, certificates: str) -> str:
        """A pip.conf for where the certificates have that path."""
        settings = {key: certificates if key == "cert" else value for key, value in self.settings.items()}
        return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())


def _top(path: Path) -> Path:
    """An index of files has its pages and the files side by side: /a/simple goes with the rest of /a."""
    return path.parent if path.name == "simple" else path
