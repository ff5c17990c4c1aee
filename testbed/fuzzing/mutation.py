"""Changes inputs: bytes as such, and JSON by its parts. Without I/O; the same seed gives the same inputs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

#: What length, sign and depth checks are wrong about, where they are.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 256, 65535, 65536, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 1e308,
    "", " ", "\0", "a", "ä", "\u2028", "\ud800", "../..", "/", "%", "a" * 16, "a" * 300, "0", "-1", "1e3", "::",
    "1.2.3.4", 0.5, [], {}, [[]], {"": None}, [None] * 70,
)  # fmt: skip
LONGEST_BYTES = 1 << 16


class Mutator:
    """``tokens`` are words of the format that chance would not find."""

    def __init__(self, chance: random.Random, tokens: Sequence[bytes]):
        self._chance = chance
        self._tokens = (*tokens, b"\0", b"\xff", b"\xc3\xa4", b'"', b"{", b"[", b"%00", b"\r\n", b"0", b"-")

    def change(self, data: bytes, other: bytes) -> bytes:
        """Another input, from one and sometimes a second one."""
        for _ in range(self._chance.choice((1, 1, 2, 3, 6))):
            in_json = self._chance.random() < 0.3
            data = self._change_json(data) if in_json else self._change_bytes(data, other)
        return data[:LONGEST_BYTES]

    def _change_bytes(self, data: bytes, other: bytes) -> bytes:
        chance = self._chance
        at, end = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
        end = min(end, at + chance.choice((1, 2, 4, 16, 256)))
        match chance.randrange(8):
            case 0:  # a bit
                return (
                    data
                    if at == len(data)
                    else data[:at] + bytes((data[at] ^ 1 << chance.randrange(8),)) + data[at + 1 :]
                )
            case 1:  # a byte
                return data[:at] + bytes((chance.randrange(256),)) + data[at + 1 :]
            case 2:  # gone
                return data[:at] + data[end:]
            case 3:  # twice, or often
                return data[:at] + data[at:end] * chance.choice((2, 3, 50)) + data[end:]
            case 4:  # cut off
                return data[:at]
            case 5:  # the other's end
                return data[:at] + other[chance.randint(0, len(other)) :]
            case 6:  # a word instead
                return data[:at] + chance.choice(self._tokens) + data[end:]
            case _:  # a word between
                return data[:at] + chance.choice(self._tokens) + data[at:]

    def _change_json(self, data: bytes) -> bytes:
        begin = data.find(b"{")
        try:
            value, length = json.JSONDecoder().raw_decode(data[begin:].decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            return data
        text = data[begin:].decode("utf-8", "surrogateescape")
        changed = json.dumps(self._change_value(value), ensure_ascii=self._chance.random() < 0.5) + text[length:]
        return data[:begin] + changed.encode("utf-8", "surrogatepass")

    def _change_value(self, value: Any) -> Any:
        chance = self._chance
        if isinstance(value, dict) and value and chance.random() < 0.8:
            key = chance.choice(list(value))
            rest = {name: one for name, one in value.items() if name != key}
            match chance.randrange(6):
                case 0:
                    return rest
                case 1:
                    return {**value, str(chance.choice(VALUES)): value[key]}
                case _:
                    return {**value, key: self._change_value(value[key])}
        if isinstance(value, list) and value and chance.random() < 0.8:
            at = chance.randrange(len(value))
            match chance.randrange(4):
                case 0:
                    return value[:at] + value[at + 1 :]
                case 1:
                    return value + [value[at]] * chance.choice((1, 2, 100))
                case _:
                    return [*value[:at], self._change_value(value[at]), *value[at + 1 :]]
        if isinstance(value, str) and value and chance.random() < 0.5:
            changed = self._change_bytes(value.encode("utf-8", "surrogatepass"), value.encode("utf-8", "surrogatepass"))
            return changed.decode("utf-8", "replace")
        return chance.choice(VALUES)
