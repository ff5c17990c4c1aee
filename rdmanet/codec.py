"""Values in JSON, parsed strictly.

Missing and unknown keys, wrong types and values out of bounds raise RequestError with a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

from rdmanet.errors import RequestError

Json = dict[str, object]


class Codec(NamedTuple):
    """How one value is read from JSON (raising RequestError that begins with ``what``) and written."""

    decode: Callable[[object, str], Any]
    encode: Callable[[Any], object] = lambda value: value


def integer(low: int, high: int) -> Codec:
    """From ``low`` to ``high``, both included."""

    def decode(value: object, what: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise RequestError(f"{what} must be an integer from {low} to {high}")
        return value

    return Codec(decode)


def text_like(pattern: str) -> Codec:
    """A string that matches the regular expression as a whole."""
    compiled = re.compile(pattern)

    def decode(value: object, what: str) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise RequestError(f"{what} must be a string that matches {pattern}")
        return value

    return Codec(decode)


def optional(codec: Codec) -> Codec:
    """``codec``'s, or null, which is None."""
    return Codec(
        lambda value, what: None if value is None else codec.decode(value, what),
        lambda value: None if value is None else codec.encode(value),
    )


def tuple_of(codec: Codec, most: int, least: int = 0) -> Codec:
    """A list of ``least`` to ``most`` items."""

    def decode(value: object, what: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise RequestError(f"{what} must be a list of {least} to {most}")
        return tuple(codec.decode(item, what) for item in value)

    return Codec(decode, lambda values: [codec.encode(value) for value in values])


def integers(low: int, high: int, most: int) -> Codec:
    """A list of 1 to ``most`` integers from ``low`` to ``high``; there are many in one message, so no call for each."""

    def decode(value: object, what: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise RequestError(f"{what} must be a list of 1 to {most}")
        if {*map(type, value)} != {int} or min(value) < low or max(value) > high:
            raise RequestError(f"{what} must be integers from {low} to {high}")
        return tuple(value)

    return Codec(decode, list)


def pair_of(kind: Callable[[Any, Any], tuple[Any, Any]], **fields: Codec) -> Codec:
    """A named tuple of two, written as a list: there are many of them in one message."""
    (first, first_codec), (second, second_codec) = fields.items()

    def decode(value: object, what: str) -> tuple[Any, Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise RequestError(f"an item of {what} must be [{first}, {second}]")
        return kind(first_codec.decode(value[0], first), second_codec.decode(value[1], second))

    return Codec(decode, lambda pair: [first_codec.encode(pair[0]), second_codec.encode(pair[1])])


_Fielded = TypeVar("_Fielded", bound="Fields")


class Fields:
    """A value whose attributes are read and written by the codecs in FIELDS."""

    TYPE: ClassVar[str]
    FIELDS: ClassVar[dict[str, Codec]]

    def to_json(self) -> Json:
        return {key: codec.encode(getattr(self, key)) for key, codec in self.FIELDS.items()}

    @classmethod
    def from_json(cls: type[_Fielded], value: object) -> _Fielded:
        """Raises RequestError unless ``value`` is an object with exactly the keys of FIELDS, all well formed."""
        if not isinstance(value, dict):
            raise RequestError(f"{cls.TYPE} must be a JSON object")
        missing = sorted(cls.FIELDS.keys() - value.keys())
        unknown = sorted(value.keys() - cls.FIELDS.keys())
        if missing:
            raise RequestError(f"{cls.TYPE} lacks {', '.join(map(repr, missing))}")
        if unknown:
            raise RequestError(f"{cls.TYPE} has unknown keys: {', '.join(map(repr, unknown))}"[:300])
        return cls(**{key: codec.decode(value[key], f"{key!r} of {cls.TYPE}") for key, codec in cls.FIELDS.items()})
