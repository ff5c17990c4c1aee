"""Typed reading of untrusted JSON values for ``rdmanet.cni``, and the error that says what is wrong with one."""

from __future__ import annotations

import difflib
import enum
import ipaddress
import json
import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from rdmanet.errors import RequestError
from rdmanet.model import IPAddress

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
JsonObject: TypeAlias = dict[str, Json]

STRING_MAX = 4096
LIST_MAX = 1024

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)


class CniCode(enum.IntEnum):
    """Error codes of CNI 1.1.0: section 5 "Error", and section 2 "STATUS" for 50 and 51."""

    VERSION = 1  # incompatible CNI version
    FIELD = 2  # unsupported field in the network configuration; the sentence has its key and value
    UNKNOWN_CONTAINER = 3  # the runtime need not clean up
    ENVIRONMENT = 4  # invalid environment variables; the sentence has their names
    IO = 5
    DECODE = 6  # not JSON, or not a version
    CONFIG = 7  # invalid network configuration
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50  # STATUS: ADD cannot be served
    LIMITED_CONNECTIVITY = 51  # STATUS: as 50, and existing containers may suffer


class CniError(RequestError):
    """A CNI request that is not as the specification says; ``code`` is the number that the runtime gets."""

    def __init__(self, sentence: str, code: CniCode, *, subject: str = ""):
        super().__init__(sentence, subject=subject)
        self.code = code


def environment_error(names: str, why: str) -> CniError:
    """The error for environment variables; the specification wants their names in it."""
    return CniError(f"{names}: {why}", CniCode.ENVIRONMENT)


def config_error(sentence: str) -> CniError:
    """The error for a value of a known key of the network configuration."""
    return CniError(f"The network configuration is not valid: {sentence}", CniCode.CONFIG)


def field_error(key: str, value: object, hint: str) -> CniError:
    """The error for a key that rdmanet does not act upon; the specification wants its key and value in it."""
    return CniError(f'Unsupported field in the network configuration: "{key}": {shown(value)}{hint}', CniCode.FIELD)


def shown(value: object) -> str:
    """A value as JSON for a sentence, cut to 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean "known"?`` where one is near, else nothing."""
    lowered = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word[:80].lower(), lowered, n=1)
    return f'; did you mean "{lowered[found[0]]}"?' if found else ""


def object_of(name: str, value: object) -> JsonObject:
    """A JSON object; absent and null are an empty one. Raises CniError (7)."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise config_error(f'"{name}" is {shown(value)}, not an object')
    return value


def list_of(name: str, value: object) -> list[Json]:
    """A bounded list; absent and null are an empty one. Raises CniError (7)."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise config_error(f'"{name}" is {shown(value)}, not a list')
    if len(value) > LIST_MAX:
        raise config_error(f'"{name}" has more than {LIST_MAX} entries')
    return value


def string_of(name: str, value: object) -> str:
    """A bounded string without NUL; absent and null are an empty one. Raises CniError (7)."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise config_error(f'"{name}" is {shown(value)}, not a string')
    if len(value) > STRING_MAX or "\0" in value:
        raise config_error(f'"{name}" has more than {STRING_MAX} characters, or a NUL')
    return value


def strings_of(name: str, value: object) -> tuple[str, ...]:
    """A bounded list of strings; absent and null are an empty one. Raises CniError (7)."""
    return tuple(string_of(name, item) for item in list_of(name, value))


def number_of(name: str, value: object, allowed: range) -> int | None:
    """A whole number within a range; absent and null are None. Raises CniError (7)."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        divisible = f", divisible by {allowed.step}" if allowed.step > 1 else ""
        raise config_error(
            f'"{name}" is {shown(value)}; write a whole number from {allowed.start} to {allowed[-1]}{divisible}'
        )
    return value


def bool_of(name: str, value: object) -> bool | None:
    """true or false; absent and null are None. Raises CniError (7)."""
    if value is not None and not isinstance(value, bool):
        raise config_error(f'"{name}" is {shown(value)}; write true or false')
    return value


def path_of(name: str, value: object) -> str | None:
    """An absolute path; absent is None. Raises CniError (7)."""
    if value is not None and not string_of(name, value).startswith("/"):
        raise config_error(f'"{name}" is {shown(value)}; write an absolute path')
    return string_of(name, value) or None


def address_of_text(name: str, text: str, error: Callable[[str], CniError] = config_error) -> IPAddress:
    """An address; a prefix length after it is accepted, as some runtimes send one, and dropped."""
    try:
        address = ipaddress.ip_interface(text.strip()).ip
    except ValueError:
        raise error(f"{name} is {shown(text)}, not an IPv4 or IPv6 address") from None
    if "%" in text:
        raise error(f"{name} is {shown(text)}: an address with a scope cannot be given to a pod")
    return address


def mac_of_text(name: str, text: str, error: Callable[[str], CniError] = config_error) -> str | None:
    """A unicast MAC address in lower case; None for an empty text."""
    if not text:
        return None
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise error(f"{name} is {shown(text)}, not a unicast MAC address such as 0a:58:0a:00:00:05")
    return mac
