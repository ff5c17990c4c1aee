"""Files of Kubernetes objects, YAML or JSON (which is YAML), to documents as JSON has them.

Read as kubectl reads them (sigs.k8s.io/yaml): dates and base-60 numbers are text, ``yes`` and ``on`` are true. Stricter
in one thing: a key that is there twice is refused wherever it is. Events, not nodes: depth costs no stack. JSON comes
first where a file begins like it: YAML's readers know neither its surrogate pairs nor one document behind the other.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import yaml

from rdmanet.errors import RequestError

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None

FILE_MAX_BYTES = 256 * 1024 * 1024
DEPTH_MAX = 64
#: Values that aliases may stand for in one document, together: a few lines can otherwise stand for billions.
ALIASED_MAX = 1_000_000
SUFFIXES = (".yaml", ".yml", ".json")
STANDARD_INPUT = "-"

_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "<<"
_TAG = "tag:yaml.org,2002:"

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
}
_INTEGER = re.compile(r"[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?\.(inf|Inf|INF))|\.(nan|NaN|NAN)")
#: Between JSON's documents; and what begins the escape of a surrogate.
_SPACE = re.compile(r"[ \t\r\n]*")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
#: Line breaks to YAML alone, and its byte order mark: safe where they can be escaped.
_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
#: Where numbers begin.
_NUMERIC = frozenset("+-.0123456789")


def documents(paths: list[str]) -> Iterator[Json]:
    """Every document of files, directories (their .yaml, .yml and .json files, by name) and standard input (``-``).

    Raises RequestError, which names file and line.
    """
    for path in paths:
        for file in _files(path):
            yield from parse(_content(file), file)


def _files(path: str) -> list[str]:
    if path == STANDARD_INPUT or not Path(path).is_dir():
        return [path]
    found = sorted(str(file) for file in Path(path).iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise RequestError(f"There is no file with {', '.join(SUFFIXES)} in {path}.")
    return found


def _content(path: str) -> bytes:
    try:
        if path == STANDARD_INPUT:
            content = sys.stdin.buffer.read(FILE_MAX_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > FILE_MAX_BYTES:
        raise RequestError(f"{path} has more than {FILE_MAX_BYTES // 1024 // 1024} MiB; split it.")
    return content


def parse(content: bytes, name: str) -> Iterator[Json]:
    """The documents of one file; ``name`` is for errors, which are RequestError. Empty documents are None."""
    found = _json_documents(content)
    if found is not None:
        yield from found
        return
    builder = _Builder(name)
    try:
        for event in yaml.parse(content, Loader=_LOADER):
            if builder.take(event):
                yield builder.document
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise RequestError(f"{name}{where}: {error.problem or error.context}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{name}: {' '.join(str(error).split())}.") from error


def _json_documents(content: bytes) -> list[Json] | None:
    """Mappings in JSON, with nothing but space between; None for what is not that: YAML's reader says what is wrong."""
    decoder = json.JSONDecoder(object_pairs_hook=_mapping, parse_constant=_no_number, parse_float=_finite)
    found: list[Json] = []
    try:
        text = content.decode("utf-8-sig")
        at = _SPACE.match(text).end()  # type: ignore[union-attr]  # it matches nothing as well
        while at < len(text):
            if text[at] != "{":
                return None
            document, at = decoder.raw_decode(text, at)
            found.append(document)
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if _HALF_PAIR.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # a half of a pair is no character
    except (ValueError, RecursionError):
        return None
    return found or None


def _mapping(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _is_text(text: str) -> bool:
    """Whether a plain scalar can be no word or number."""
    return text not in _WORDS and text[0] not in _NUMERIC


def dump(document: Json) -> str:
    """As YAML, which ``parse`` reads as the same."""
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes all text that could be read as something else: for PyYAML y is text, and 1e3."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    other = text in _WORDS or any(form.fullmatch(text) for form in (_INTEGER, _FLOAT, _NOT_FINITE))
    style = '"' if _BREAKS.search(text) else "'" if other else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _quoted)


class _Open:
    """A collection that has not ended."""

    __slots__ = ("anchor", "counted", "items", "key", "merged")

    def __init__(self, items: dict[str, Json] | list[Json], anchor: str | None, counted: int):
        self.items = items
        self.anchor = anchor
        self.key: str | None = None
        self.merged: list[Json] = []
        self.counted = counted


class _Builder:
    """Documents from their events."""

    def __init__(self, name: str):
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self.document: Json = None
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Json, int]] = {}  # value, and how many values it is
        self._counted = 0
        self._aliased = 0

    def take(self, event: yaml.Event) -> bool:
        """Whether the event ends a document."""
        kind = type(event)
        if kind is yaml.ScalarEvent:
            self._scalar(event)
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            self._start(event, {} if kind is yaml.MappingStartEvent else [])
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            self._end(event)
        elif kind is yaml.AliasEvent:
            self._alias(event)
        elif kind is yaml.DocumentStartEvent:
            self._begin()
        else:
            return kind is yaml.DocumentEndEvent
        return False

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        top = self._open[-1] if self._open else None
        if top is not None and top.key is None and type(top.items) is dict:
            self._key(event, top, top.items)
            return
        self._counted += 1
        value = self._value(event)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, 1)
        self._put(value, event)

    def _key(self, event: yaml.ScalarEvent, top: _Open, items: dict[str, Json]) -> None:
        key = event.value
        if key == _MERGE and event.implicit[0]:
            top.key = _MERGE
            return
        if not isinstance(self._value(event), str):
            self._refuse(event, f"the key {key[:80]!r} is no text: put it in quotes")
        if key in items:
            self._refuse(event, f"the key {key[:80]!r} is there twice")
        if event.anchor is not None:
            self._anchors[event.anchor] = (key, 1)
        items[key] = None  # so that the order is the file's
        top.key = key

    def _value(self, event: yaml.ScalarEvent) -> Json:
        text: str = event.value
        tag = event.tag
        if tag == f"{_TAG}str" or (tag is None and not event.implicit[0]):
            return text
        if tag is not None and tag not in ("!", *(f"{_TAG}{word}" for word in ("null", "bool", "int", "float"))):
            self._refuse(event, f"the tag {tag[:80]} means nothing here")
        if tag == "!" or _is_text(text):
            return text
        if text in _WORDS:
            return _WORDS[text]
        return self._number(event, text)

    def _number(self, event: yaml.ScalarEvent, text: str) -> Json:
        if _NOT_FINITE.fullmatch(text):
            self._refuse(event, f"{text} is no number that JSON has")
        if _INTEGER.fullmatch(text):
            digits = text.replace("_", "")
            sign, bare = (digits[0], digits[1:]) if digits[0] in "+-" else ("", digits)
            if len(bare) > 1 and bare[0] == "0" and bare[1].isdigit():
                bare = f"0o{bare[1:]}"
            try:
                return int(sign + bare, 0)
            except ValueError:
                self._refuse(event, "a number with too many digits, or none")
        if _FLOAT.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                self._refuse(event, f"{text[:40]} is no number that JSON has")
            return number
        return text

    def _start(self, event: yaml.CollectionStartEvent, items: dict[str, Json] | list[Json]) -> None:
        if len(self._open) >= DEPTH_MAX:
            self._refuse(event, f"nested more than {DEPTH_MAX} deep")
        if self._open and self._open[-1].key is None and isinstance(self._open[-1].items, dict):
            self._refuse(event, "a key is no text")
        if event.tag not in (None, "!", f"{_TAG}map", f"{_TAG}seq"):
            self._refuse(event, f"the tag {event.tag[:80]} means nothing here")
        self._open.append(_Open(items, event.anchor, self._counted))
        self._counted += 1

    def _end(self, event: yaml.Event) -> None:
        ended = self._open.pop()
        for merged in ended.merged:
            assert isinstance(ended.items, dict)
            for one in merged if isinstance(merged, list) else [merged]:
                if not isinstance(one, dict):
                    self._refuse(event, "<< is for mappings, and lists of them")
                for key, value in one.items():
                    ended.items.setdefault(key, value)
        if ended.anchor is not None:
            self._anchors[ended.anchor] = (ended.items, self._counted - ended.counted)
        self._put(ended.items, event)

    def _alias(self, event: yaml.AliasEvent) -> None:
        # An alias inside what it stands for finds nothing: anchors are known when their value has ended.
        if event.anchor not in self._anchors:
            self._refuse(event, f"the alias *{event.anchor[:80]} stands for nothing before it")
        value, count = self._anchors[event.anchor]
        self._counted += count
        self._aliased += count
        if self._aliased > ALIASED_MAX:
            self._refuse(event, f"aliases stand for more than {ALIASED_MAX} values")
        top = self._open[-1]
        if top.key is None and isinstance(top.items, dict):
            self._refuse(event, "a key is an alias")
        self._put(value, event)

    def _put(self, value: Json, event: yaml.Event) -> None:
        if not self._open:
            self.document = value
            return
        top = self._open[-1]
        items = top.items
        if type(items) is list:
            items.append(value)
        elif top.key == _MERGE and _MERGE not in items:
            top.merged.append(value)
            top.key = None
        else:
            assert isinstance(items, dict)
            assert top.key is not None
            items[top.key] = value
            top.key = None

    def _refuse(self, event: yaml.Event, sentence: str) -> NoReturn:
        raise RequestError(f"{self._name} line {event.start_mark.line + 1}: {sentence}.")
