"""A strict validator of CDI files, from the specification 0.5.0 and its JSON schema and from nothing of rdmanet's.

SPEC.md ("CDI JSON Specification"), schema/schema.json and schema/defs.json of the Container Device Interface; what
runtimes' own reader refuses beyond them (unknown keys, device nodes without a type's numbers) is refused here too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VERSION = "0.5.0"
_VENDOR = re.compile(r"[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?", re.ASCII)
_CLASS = re.compile(r"[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?", re.ASCII)
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.ASCII)
_NODE = {"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"}


class CdiViolationError(AssertionError):
    """A CDI file is not what the specification says; the message has the place and the rule."""


def _need(condition: bool, place: str, rule: str) -> None:
    if not condition:
        raise CdiViolationError(f"{place}: {rule}")


def _keys(place: str, value: Any, required: set[str], optional: set[str]) -> Mapping[str, Any]:
    _need(isinstance(value, dict), place, "must be an object")
    found: Mapping[str, Any] = value
    _need(required <= found.keys(), place, f"lacks {sorted(required - found.keys())}")
    _need(found.keys() <= required | optional, place, f"has unknown {sorted(found.keys() - required - optional)}")
    return found


def validate(document: Any) -> None:
    """Checks a whole file. Raises CdiViolationError."""
    file = _keys("file", document, {"cdiVersion", "kind", "devices"}, {"annotations", "containerEdits"})
    _need(file["cdiVersion"] == VERSION, "cdiVersion", f"must be {VERSION}")
    vendor, slash, kind = str(file["kind"]).partition("/")
    _need(bool(slash), "kind", "must be vendor/class")
    _need(_VENDOR.fullmatch(vendor) is not None, "kind", f"{vendor!r} is no vendor")
    _need(_CLASS.fullmatch(kind) is not None, "kind", f"{kind!r} is no class")
    _need(isinstance(file["devices"], list) and bool(file["devices"]), "devices", "must be a list with a device")
    names = []
    for index, item in enumerate(file["devices"]):
        place = f"devices[{index}]"
        device = _keys(place, item, {"name", "containerEdits"}, {"annotations"})
        _need(_NAME.fullmatch(str(device["name"])) is not None, place, f"{device['name']!r} is no name")
        names.append(device["name"])
        _edits(f"{place}.containerEdits", device["containerEdits"])
    _need(len(set(names)) == len(names), "devices", "has a name twice")


def _edits(place: str, value: Any) -> None:
    edits = _keys(place, value, set(), {"env", "deviceNodes", "mounts", "hooks"})
    _need(bool(edits), place, "must change something")
    for text in edits.get("env", []):
        _need(isinstance(text, str) and _ENV.fullmatch(text) is not None, f"{place}.env", f"{text!r} is not NAME=VALUE")
    for index, item in enumerate(edits.get("deviceNodes", [])):
        _device_node(f"{place}.deviceNodes[{index}]", item)


def _device_node(place: str, value: Any) -> None:
    node = _keys(place, value, {"path"}, _NODE - {"path"})
    _need(isinstance(node["path"], str) and node["path"].startswith("/"), place, "path must be absolute")
    if "type" in node:
        _need(node["type"] in ("b", "c", "u", "p"), place, f"there is no type {node['type']!r}")
        for number in ("major", "minor"):
            _need(type(node.get(number)) is int and node[number] >= 0, place, f"{number} must be a number")
    if "fileMode" in node:
        _need(type(node["fileMode"]) is int and 0 <= node["fileMode"] <= 0o7777, place, "fileMode must be a mode")
    permissions = node.get("permissions", "rwm")
    _need(isinstance(permissions, str) and set(permissions) <= set("rwm"), place, "permissions are of r, w and m")
