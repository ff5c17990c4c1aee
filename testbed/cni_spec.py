"""A strict validator of what a CNI plugin prints, from the specification's text and from nothing of rdmanet's.

Sections are those of CNI 1.1.0's SPEC.md ("Section 5: Result Types"); 0.3.1 and 0.4.0 say the same things under
"Result", "Well-known Structures" and "Well-known Error Codes". Stricter than the text in one way: keys that the
version does not define are violations, as a plugin under test has no reason to print them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection
from typing import TypeVar

#: The versions that this validator knows.
VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")

#: "Error": codes below 100 are reserved for these; STATUS has two more.
ERROR_CODES = frozenset({1, 2, 3, 4, 5, 6, 7, 11})
STATUS_ERROR_CODES = frozenset({50, 51})

_SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", re.ASCII)
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", re.ASCII)


_T = TypeVar("_T")


class SpecViolationError(AssertionError):
    """What was printed is not what the specification says; the message has the place and the rule."""


def validate_result(obj: object, version: str, *, ifname: str | None = None, netns: str | None = None) -> None:
    """Check what ADD printed (section 5 "Success") for a configuration of ``version``.

    With ``ifname`` and ``netns`` (what the runtime passed): there must be exactly that interface in that sandbox, and
    at least one address that points to it. Raises SpecViolationError.
    """
    _known_version(version)
    result = _keys("result", obj, {"cniVersion", "interfaces", "ips"}, {"routes", "dns"})
    # "cniVersion: The same version supplied on input"
    _need(result["cniVersion"] == version, "result.cniVersion", f"must be {version}, is {result['cniVersion']!r}")
    interfaces = _list("result.interfaces", result["interfaces"])
    for index, item in enumerate(interfaces):
        _interface(f"result.interfaces[{index}]", item, version)
    ips = _list("result.ips", result["ips"])
    for index, item in enumerate(ips):
        _ip(f"result.ips[{index}]", item, version, len(interfaces))
    for index, item in enumerate(_list("result.routes", result.get("routes", []))):
        _route(f"result.routes[{index}]", item, version)
    _dns("result.dns", result.get("dns", {}))
    if ifname is not None:
        _attachment(interfaces, ips, ifname, netns)


def validate_error(obj: object, version: str | None = None, *, command: str | None = None) -> None:
    """Check an error (section 5 "Error"); ``version`` is the configuration's, None where it had none.

    50 and 51 belong to STATUS (section 2 "STATUS: Check plugin status"). Raises SpecViolationError.
    """
    error = _keys("error", obj, {"cniVersion", "code", "msg"}, {"details"})
    given = _string("error.cniVersion", error["cniVersion"])
    # "cniVersion: The same value as provided by the configuration"
    if version is not None:
        _need(given == version, "error.cniVersion", f"must be {version}, is {given}")
    _need(_SEMVER.fullmatch(given) is not None, "error.cniVersion", f"{given!r} is not a semantic version")
    code = _integer("error.code", error["code"])
    allowed = ERROR_CODES | (STATUS_ERROR_CODES if command in (None, "STATUS") else frozenset())
    _need(code in allowed or code >= 100, "error.code", f"{code} is reserved and has no meaning here")
    _need(bool(_string("error.msg", error["msg"])), "error.msg", "is empty")
    if "details" in error:
        _string("error.details", error["details"])


def validate_version(obj: object, version: str | None = None) -> None:
    """Check a version answer (section 5 "Version"): ``version`` is the cniVersion on input, if there was one.

    Raises SpecViolationError.
    """
    answer = _keys("version", obj, {"cniVersion", "supportedVersions"}, set())
    given = _string("version.cniVersion", answer["cniVersion"])
    _need(_SEMVER.fullmatch(given) is not None, "version.cniVersion", f"{given!r} is not a semantic version")
    if version is not None:
        _need(given == version, "version.cniVersion", f"must be {version}, is {given}")
    supported = [
        _string("version.supportedVersions", v) for v in _list("version.supportedVersions", answer["supportedVersions"])
    ]
    _need(bool(supported), "version.supportedVersions", "is empty")
    for text in supported:
        _need(_SEMVER.fullmatch(text) is not None, "version.supportedVersions", f"{text!r} is not a semantic version")
    _need(len(set(supported)) == len(supported), "version.supportedVersions", "names a version twice")


def _interface(place: str, value: object, version: str) -> None:
    optional = {"mac", "sandbox"} | ({"mtu", "socketPath", "pciID"} if version == "1.1.0" else set())
    item = _keys(place, value, {"name"}, optional)
    name = _string(f"{place}.name", item["name"])
    # Section 2 "Parameters" by way of Linux: 1 to 15 bytes, no '/', ':' and whitespace.
    valid = 0 < len(name.encode()) < 16 and name not in (".", "..") and not re.search(r"[/:\s]", name)
    _need(valid, f"{place}.name", f"{name!r} is not an interface name")
    if "mac" in item:
        mac = _string(f"{place}.mac", item["mac"])
        _need(_MAC.fullmatch(mac) is not None, f"{place}.mac", f"{mac!r} is not a hardware address")
    if "sandbox" in item:
        _string(f"{place}.sandbox", item["sandbox"])
    if "mtu" in item:
        _need(_integer(f"{place}.mtu", item["mtu"]) > 0, f"{place}.mtu", "is not positive")
    if "socketPath" in item:
        path = _string(f"{place}.socketPath", item["socketPath"])
        _need(path.startswith("/"), f"{place}.socketPath", "is not absolute")
    if "pciID" in item:
        _string(f"{place}.pciID", item["pciID"])


def _ip(place: str, value: object, version: str, interface_count: int) -> None:
    # 0.3.1 and 0.4.0 "IPs": version is required there; 1.0.0 removed it.
    with_family = version in ("0.3.1", "0.4.0")
    item = _keys(place, value, {"address"} | ({"version"} if with_family else set()), {"gateway", "interface"})
    address = _parsed(f"{place}.address", item["address"], ipaddress.ip_interface)
    # "an IP address in CIDR notation"
    _need("/" in str(item["address"]), f"{place}.address", "has no prefix length")
    if with_family:
        expected = str(address.version)
        _need(item["version"] == expected, f"{place}.version", f"must be {expected!r}, is {item['version']!r}")
    if "gateway" in item:
        gateway = _parsed(f"{place}.gateway", item["gateway"], ipaddress.ip_address)
        _need(gateway.version == address.version, f"{place}.gateway", "is of the other family")
    if "interface" in item:
        index = _integer(f"{place}.interface", item["interface"])
        _need(0 <= index < interface_count, f"{place}.interface", f"{index} is not in interfaces")


def _route(place: str, value: object, version: str) -> None:
    optional = {"gw"} | ({"mtu", "advmss", "priority", "table", "scope"} if version == "1.1.0" else set())
    item = _keys(place, value, {"dst"}, optional)
    destination = _parsed(f"{place}.dst", item["dst"], ipaddress.ip_network)
    _need("/" in str(item["dst"]), f"{place}.dst", "has no prefix length")
    if "gw" in item:
        gateway = _parsed(f"{place}.gw", item["gw"], ipaddress.ip_address)
        # 0.4.0 "Routes": all addresses in an entry are of one family
        _need(gateway.version == destination.version, f"{place}.gw", "is of the other family")
    for key in ("mtu", "advmss", "priority", "table", "scope"):
        if key in item:
            _need(_integer(f"{place}.{key}", item[key]) >= 0, f"{place}.{key}", "is negative")
    if "scope" in item:
        # "scope: The scope of the destinations": global 0, link 253, host 254
        _need(item["scope"] in (0, 253, 254), f"{place}.scope", f"{item['scope']} has no meaning")


def _dns(place: str, value: object) -> None:
    item = _keys(place, value, set(), {"nameservers", "domain", "search", "options"})
    for server in _list(f"{place}.nameservers", item.get("nameservers", [])):
        _parsed(f"{place}.nameservers", server, ipaddress.ip_address)
    _string(f"{place}.domain", item.get("domain", ""))
    for key in ("search", "options"):
        for entry in _list(f"{place}.{key}", item.get(key, [])):
            _string(f"{place}.{key}", entry)


def _attachment(interfaces: list[object], ips: list[object], ifname: str, netns: str | None) -> None:
    """Section 5 "Success": the container's interface is there, in the sandbox that CNI_NETNS named, with an address."""
    found = [
        index
        for index, item in enumerate(interfaces)
        if isinstance(item, dict) and item["name"] == ifname and item.get("sandbox")
    ]
    _need(len(found) == 1, "result.interfaces", f"has {len(found)} entries for {ifname} in a sandbox, not one")
    interface = interfaces[found[0]]
    assert isinstance(interface, dict)
    if netns is not None:
        where = f"result.interfaces[{found[0]}].sandbox"
        _need(interface["sandbox"] == netns, where, f"must be {netns}, is {interface['sandbox']!r}")
    indexes = [item.get("interface") for item in ips if isinstance(item, dict)]
    _need(found[0] in indexes, "result.ips", f"no address points to {ifname}, index {found[0]}; they say {indexes}")


def _need(condition: bool, place: str, rule: str) -> None:
    if not condition:
        raise SpecViolationError(f"{place}: {rule}")


def _known_version(version: str) -> None:
    _need(version in VERSIONS, "version", f"{version!r} is not one that this validator knows")


def _keys(place: str, value: object, required: Collection[str], optional: Collection[str]) -> dict[str, object]:
    if not isinstance(value, dict):
        raise SpecViolationError(f"{place}: is not an object but {value!r}")
    missing = sorted(set(required) - set(value))
    unknown = sorted(set(value) - set(required) - set(optional))
    _need(not missing, place, f"lacks {', '.join(missing)}")
    _need(not unknown, place, f"has keys that this version does not define: {', '.join(map(str, unknown))}")
    return value


def _list(place: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise SpecViolationError(f"{place}: is not a list but {value!r}")
    return value


def _string(place: str, value: object) -> str:
    if not isinstance(value, str):
        raise SpecViolationError(f"{place}: is not a string but {value!r}")
    return value


def _integer(place: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecViolationError(f"{place}: is not a whole number but {value!r}")
    return value


def _parsed(place: str, value: object, parse: Callable[[str], _T]) -> _T:
    try:
        return parse(_string(place, value))
    except ValueError as error:
        raise SpecViolationError(f"{place}: {error}") from None
