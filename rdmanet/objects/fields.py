"""Documents read field by field: what is unknown, of the wrong type or out of bounds is an error that names its path.

null means absent, as everywhere in Kubernetes' API.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from rdmanet.errors import RequestError
from rdmanet.model import IPAddress

#: Most entries of one list or mapping. Kubernetes' own bounds are lower where it has any (1,000 endpoints in a slice).
ENTRIES_MAX = 10_000

_NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})


@dataclass(frozen=True)
class Shape:
    """The fields of one kind of mapping, by name.

    ``read``: those that mean something here. ``accepted``: those of Kubernetes that do not concern the network.
    ``refused``: those that would change what the network does and are not supported, with a sentence's end; empty
    values (false, 0, "", [], {}) of them are accepted.
    """

    read: frozenset[str]
    accepted: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    harmless: frozenset[str] = field(init=False)  # read and accepted

    def __post_init__(self) -> None:
        object.__setattr__(self, "harmless", self.read | self.accepted)

    @classmethod
    def of(cls, read: str, accepted: str = "", refused: Mapping[str, str] | None = None) -> Shape:
        """From names with spaces between."""
        return cls(frozenset(read.split()), frozenset(accepted.split()), refused or {})

    @property
    def known(self) -> frozenset[str]:
        """Every name."""
        return self.harmless | self.refused.keys()


def shown(value: object) -> str:
    """A value for a sentence: as JSON in ASCII, at most 80 characters of it. Never costs more than what it shows."""
    if isinstance(value, str):
        value = value[:100]
    elif isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """``, did you mean X?`` where one is near, else nothing."""
    lowered = {name.lower(): name for name in sorted(known)}
    found = difflib.get_close_matches(word[:80].lower(), lowered, n=1)
    return f", did you mean {lowered[found[0]]}?" if found else ""


def wrong(path: str, sentence: str) -> NoReturn:
    """Raises RequestError: ``path: sentence``."""
    raise RequestError(f"{path}: {sentence}")


class Fields:
    """A mapping in a document, with its path there. Raises RequestError for what its shape does not have."""

    __slots__ = ("path", "values")

    def __init__(self, values: object, path: str, shape: Shape):
        if not isinstance(values, dict):
            wrong(path or "the document", f"is {shown(values)}, not a mapping")
        self.values: dict[str, object] = values
        self.path = path
        if not values.keys() <= shape.harmless:
            for name in sorted(values.keys() - shape.harmless, key=str):
                self._other(name, shape)

    def _other(self, name: object, shape: Shape) -> None:
        if not isinstance(name, str):
            wrong(self.path or "the document", f"has the key {shown(name)}, which is no text: put it in quotes")
        if name not in shape.refused:
            wrong(self.at(name[:80]), f"unknown{nearest(name, shape.known)}")
        if self.values[name] not in _NOTHING:
            wrong(self.at(name), f"not supported: {shape.refused[name]}")

    def at(self, name: str) -> str:
        """The path of one of its fields."""
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether the field is there, and not null."""
        return self.values.get(name) is not None

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            wrong(self.at(name), f"is {shown(value)}, not text{_quotes(value)}")
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        """One of some words."""
        value = self.text(name, default)
        if value not in choices:
            wrong(self.at(name), f"is {shown(value)}; it can be {', '.join(choices)}")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            wrong(self.at(name), f"is {shown(value)}, not true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """From ``low`` to ``high``, both included; None where it is absent."""
        value = self.values.get(name)
        return None if value is None else integer_of(value, self.at(name), low, high)

    def needed(self, name: str) -> object:
        """Whatever is there; its absence is an error."""
        value = self.values.get(name)
        if value is None:
            wrong(self.at(name), "is missing")
        return value

    def mapping(self, name: str, shape: Shape) -> Fields | None:
        """A mapping; None where it is absent."""
        value = self.values.get(name)
        return None if value is None else Fields(value, self.at(name), shape)

    def items(self, name: str) -> list[object]:
        """A list; empty where it is absent."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            wrong(self.at(name), f"is {shown(value)}, not a list")
        if len(value) > ENTRIES_MAX:
            wrong(self.at(name), f"has {len(value)} entries; {ENTRIES_MAX} at most are taken")
        return value

    def mappings(self, name: str, shape: Shape) -> list[Fields]:
        """A list of mappings."""
        return [Fields(item, f"{self.at(name)}[{number}]", shape) for number, item in enumerate(self.items(name))]

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        found: list[str] = []
        for number, item in enumerate(self.items(name)):
            if not isinstance(item, str):
                wrong(f"{self.at(name)}[{number}]", f"is {shown(item)}, not text{_quotes(item)}")
            found.append(item)
        return found

    def pairs(self, name: str, is_key: Callable[[str], bool], is_value: Callable[[str], bool]) -> dict[str, str]:
        """Labels or annotations."""
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            wrong(self.at(name), f"is {shown(value)}, not a mapping")
        if len(value) > ENTRIES_MAX:
            wrong(self.at(name), f"has {len(value)} entries; {ENTRIES_MAX} at most are taken")
        for key, text in value.items():
            if not isinstance(key, str) or not is_key(key):
                wrong(self.at(name), f"the key {shown(key)} is none such as app or example.com/app")
            if not isinstance(text, str):
                wrong(f"{self.at(name)}.{key}", f"is {shown(text)}, not text{_quotes(text)}")
            if not is_value(text):
                wrong(
                    f"{self.at(name)}.{key}",
                    f'is {shown(text)}, not at most 63 letters, digits, "-", "_" and "." with letters or digits at the'
                    " ends",
                )
        return dict(value)


def integer_of(value: object, path: str, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        number = "a number with too many digits" if isinstance(value, int) and abs(value) > 1 << 64 else shown(value)
        wrong(path, f"is {number}, not a whole number from {low} to {high}")
    return value


def address_of_text(text: str, path: str) -> IPAddress:
    """An address as the API takes it: no scope, and IPv4 never in IPv6 (a mapped one would be two spellings)."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        wrong(path, f"is {shown(text)}, not an IPv4 or IPv6 address")
    if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped is not None or address.scope_id is not None):
        wrong(path, f"is {shown(text)}: write IPv4 addresses as such, and no scope")
    return address


def reachable_address_of_text(text: str, path: str) -> IPAddress:
    """An address that others than its own host can have (the API's ValidateNonSpecialIP)."""
    address = address_of_text(text, path)
    for word, special in (
        ("the unspecified address", address.is_unspecified),
        ("a loopback address", address.is_loopback),
        ("a link-local address", address.is_link_local),
        ("a multicast address", address.is_multicast),
    ):
        if special:
            wrong(path, f"is {text}, {word}")
    return address


def _quotes(value: object) -> str:
    return ": put it in quotes" if isinstance(value, bool | int | float) else ""
