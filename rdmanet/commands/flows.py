"""``rdmanet flows``: tracked connections and their NAT, printed while they are read."""

from __future__ import annotations

import argparse
import http.client
import json
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

from rdmanet import config
from rdmanet.client import answering
from rdmanet.commands.monitor import end
from rdmanet.commands.resources import age
from rdmanet.errors import UnavailableError

#: A page of the agent may take so long on a busy machine.
SILENCE_S = 60.0
HEADINGS = ("protocol", "from", "to", "nat", "state", "idle")
#: To begin with; what needs more makes its column wider from there on.
_WIDTHS = (8, 34, 34, 30, 11, 4)


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command; ``commands`` is what ``add_subparsers`` has returned."""
    flows = commands.add_parser("flows", parents=[common], help="list tracked connections and their NAT")
    flows.add_argument("--pod", metavar="NAME", help="one of the ends: a name, or NAMESPACE/NAME")
    flows.add_argument("-o", "--output", choices=("table", "json"), default="table")
    flows.set_defaults(run=_flows)


def _flows(chosen: argparse.Namespace) -> int:
    url = "/v1/flows" + (f"?{urlencode({'pod': chosen.pod})}" if chosen.pod is not None else "")
    with answering(config.load(chosen.config).agent.socket, url, timeout_s=SILENCE_S) as answer:
        pieces = as_json(answer) if chosen.output == "json" else as_table(answer)
        for piece in pieces:
            print(piece, end="")
    return 0


def as_table(lines: Iterator[bytes]) -> Iterator[str]:
    """The agent's lines for people; nobody waits for the last one to see the first."""
    widths = list(_WIDTHS)
    yield _row([heading.upper() for heading in HEADINGS], widths)
    for document in _documents(lines):
        if "max_entries" in document:
            entries, most = document["entries"], document["max_entries"]
            yield f"{document['flows']} flows; {entries} of {most} entries of the table are taken\n"
        else:
            yield _row(cells(document), widths)


def as_json(lines: Iterator[bytes]) -> Iterator[str]:
    """The same as one document: {"flows": [...], "entries": number, "max_entries": number}."""
    before = '{"flows": [\n'
    for document in _documents(lines):
        if "max_entries" in document:
            yield before if before[0] == "{" else "\n"
            yield f'], "entries": {document["entries"]}, "max_entries": {document["max_entries"]}}}\n'
        else:
            yield before + json.dumps(document)
            before = ",\n"


def cells(flow: dict[str, Any]) -> tuple[str, ...]:
    """A flow's columns; ``from`` is the end that began."""
    nat = "-"
    if flow["nat"]:
        word = "as" if flow["nat"] == "masquerade" else "called"
        nat = f"{word} {end(flow['translated'], flow['translated_port'], None)}"
    return (
        flow["protocol"],
        end(flow["source"], flow["source_port"], flow["pod"]),
        end(flow["destination"], flow["destination_port"], flow["peer"]),
        nat,
        flow["state"],
        age(flow["idle_s"]),
    )


def _documents(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """To the last line, which has the numbers. Raises UnavailableError for a list that is not whole."""
    while line := _line(lines):
        document: dict[str, Any] = json.loads(line)
        if "error" in document:
            raise UnavailableError(document["error"], operation="GET", subject="/v1/flows")
        yield document
        if "max_entries" in document:
            return
    raise _ended("it said nothing more")


def _line(lines: Iterator[bytes]) -> bytes:
    """The next one, or nothing."""
    try:
        return next(lines, b"")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _ended(str(error)) from error


def _ended(why: str) -> UnavailableError:
    return UnavailableError(
        f"The list of flows is not whole: the agent has ended, or is too busy ({why}).",
        operation="GET",
        subject="/v1/flows",
    )


def _row(texts: Sequence[str], widths: list[int]) -> str:
    widths[:] = [max(width, len(text)) for width, text in zip(widths, texts, strict=True)]
    return "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip() + "\n"
