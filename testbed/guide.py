"""Documents whose commands are tested: their fenced blocks, and where each one is carried out.

The first line of a block says its language and then the place, which a reader of the rendered page does not see:
``sh train-0`` (a pod), ``python train-0``, ``sh host``. With ``&`` behind the place it goes on running while the next
block is carried out. ``json host PATH``, ``toml host PATH`` and ``yaml host PATH`` are files. A ``text`` block is what
the block before it prints, where … stands for anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from rdmanet.errors import InputError

HOST = "host"
COMMANDS = {"sh", "python"}
FILES = {"json", "toml", "yaml"}
OUTPUT = "text"
_FENCE = "```"


@dataclass
class Block:
    """One block. `line` is where it begins in its document; `printed` what it is to print, if the document says so."""

    language: str
    place: str
    text: str
    line: int
    path: str = ""
    background: bool = False
    printed: str | None = field(default=None)

    @property
    def name(self) -> str:
        """For a test's name."""
        return f"line {self.line}: {self.language} {self.place}"

    def prints(self, output: str) -> bool:
        """Whether the output is what the document says."""
        if self.printed is None:
            return True
        pattern = ".*".join(re.escape(part) for part in " ".join(self.printed.split()).split("…"))
        return re.fullmatch(pattern, " ".join(output.split())) is not None


def blocks(document: Path) -> list[Block]:
    """All blocks, in their order. InputError for one that says no place, or is of another language."""
    found: list[Block] = []
    inside: Block | None = None
    indent = 0
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        bare = line.strip()
        if inside is None:
            if bare.startswith(_FENCE):
                inside = _begin(bare.removeprefix(_FENCE).split(), number, f"{document.name}:{number}")
                indent = len(line) - len(line.lstrip())  # inside a list
        elif bare != _FENCE:
            inside.text += line[indent:] + "\n"
        elif inside.language != OUTPUT:
            found.append(inside)
            inside = None
        elif found:
            found[-1].printed = inside.text
            inside = None
        else:
            raise InputError("output of no command", operation=f"{document.name}:{inside.line}")
    if inside is not None:
        raise InputError("a block without an end", operation=f"{document.name}:{inside.line}")
    return found


def _begin(words: list[str], number: int, where: str) -> Block:
    language, *rest = words or [""]
    background = rest[-1:] == ["&"]
    if background:
        rest.pop()
    if language == OUTPUT and not rest:
        return Block(language, "", "", number)
    if language in COMMANDS and len(rest) == 1:
        return Block(language, rest[0], "", number, background=background)
    if language in FILES and len(rest) == 2:
        place, path = rest
        return Block(language, place, "", number, path=path)
    raise InputError(
        f"a block of {' '.join(words) or 'nothing'!r} cannot be tested: say language and place", operation=where
    )
