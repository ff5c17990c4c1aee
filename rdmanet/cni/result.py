"""CNI results and errors (specification 1.1.0, section 5 "Result Types"): one neutral form, and each version's JSON."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from rdmanet.cni.values import (
    config_error,
    list_of,
    number_of,
    object_of,
    shown,
    string_of,
    strings_of,
)
from rdmanet.model import IPAddress

IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

#: From 1.0.0 the family of ``ips`` follows from the address alone.
_WITH_IP_VERSION = ("0.3.1", "0.4.0")
#: 1.1.0 added mtu, socketPath and pciID to interfaces and all but dst and gw to routes.
_WITH_DETAILS = ("1.1.0",)
_U32 = range(2**32)


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of the attachment; ``sandbox`` is the namespace's path, empty for the host's."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu_bytes: int | None = None
    socket_path: str = ""
    pci_id: str = ""


@dataclass(frozen=True, slots=True)
class IpConfig:
    """An address with its prefix; ``interface`` is an index into the result's interfaces."""

    address: IPInterface
    gateway: IPAddress | None = None
    interface: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A route inside the pod."""

    destination: IPNetwork
    gateway: IPAddress | None = None
    mtu_bytes: int | None = None
    advmss_bytes: int | None = None
    priority: int | None = None
    table: int | None = None
    scope: int | None = None


@dataclass(frozen=True, slots=True)
class Dns:
    """What the runtime may write into the pod's resolv.conf."""

    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: object) -> Dns:
        """Read a ``dns`` object; keys in any letter case, as in runtimeConfig. Raises CniError (7)."""
        given = {key.lower(): item for key, item in object_of("dns", value).items()}
        # "servers" and "searches" are the names of the dns capability in CONVENTIONS.md.
        found = cls(
            nameservers=strings_of("dns.nameservers", given.get("nameservers") or given.get("servers")),
            domain=string_of("dns.domain", given.get("domain")),
            search=strings_of("dns.search", given.get("search") or given.get("searches")),
            options=strings_of("dns.options", given.get("options")),
        )
        for server in found.nameservers:
            _ip_address("dns.nameservers", server)
        return found

    def to_json(self) -> dict[str, object]:
        """Only what is set."""
        pairs: dict[str, object] = {
            "nameservers": list(self.nameservers),
            "domain": self.domain,
            "search": list(self.search),
            "options": list(self.options),
        }
        return {key: value for key, value in pairs.items() if value}


@dataclass(frozen=True, slots=True)
class Result:
    """A Success result without a version. Keys that no version of the specification has are not kept."""

    interfaces: tuple[Interface, ...] = ()
    ips: tuple[IpConfig, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()

    @classmethod
    def from_json(cls, value: object) -> Result:
        """Read a result of any supported version, ``prevResult`` included, where cniVersion may be missing.

        Raises CniError (7): a value has the wrong type or form, or an index points nowhere.
        """
        document = object_of("prevResult", value)
        interfaces = tuple(_interface(item) for item in list_of("interfaces", document.get("interfaces")))
        found = cls(
            interfaces=interfaces,
            ips=tuple(_ip_config(item) for item in list_of("ips", document.get("ips"))),
            routes=tuple(_route(item) for item in list_of("routes", document.get("routes"))),
            dns=Dns.from_json(document.get("dns")),
        )
        for ip in found.ips:
            if ip.interface is not None and ip.interface >= len(interfaces):
                raise config_error(f"ips: interface {ip.interface} of {ip.address} is not in interfaces")
        return found

    def to_json(self, version: str) -> dict[str, object]:
        """The result as ``version`` (a supported one) writes it."""
        return {
            "cniVersion": version,
            "interfaces": [_interface_json(i, version) for i in self.interfaces],
            "ips": [_ip_config_json(i, version) for i in self.ips],
            "routes": [_route_json(r, version) for r in self.routes],
            "dns": self.dns.to_json(),
        }

    def followed_by(self, own: Result) -> Result:
        """This result (a chain's ``prevResult``) with our own after it; our indexes move along."""
        shift = len(self.interfaces)
        moved = tuple(
            dataclasses.replace(ip, interface=None if ip.interface is None else ip.interface + shift) for ip in own.ips
        )
        return Result(
            interfaces=self.interfaces + own.interfaces,
            ips=self.ips + moved,
            routes=self.routes + own.routes,
            dns=own.dns if own.dns != Dns() else self.dns,
        )


def result(
    version: str,
    *,
    interfaces: Sequence[Interface],
    ips: Sequence[IpConfig],
    routes: Sequence[Route] = (),
    dns: Dns | None = None,
    previous: Result | None = None,
) -> dict[str, object]:
    """What ADD prints: our part, after ``previous`` where rdmanet is not the first in its chain."""
    own = Result(tuple(interfaces), tuple(ips), tuple(routes), dns or Dns())
    return (previous.followed_by(own) if previous else own).to_json(version)


def error_json(version: str, code: int, msg: str, details: str = "") -> dict[str, object]:
    """The specification's error object; ``version`` is the request's, or the newest where it had none."""
    return {"cniVersion": version, "code": int(code), "msg": msg, "details": details}


def _ip_address(name: str, value: object) -> IPAddress | None:
    text = string_of(name, value)
    try:
        return ipaddress.ip_address(text) if text else None
    except ValueError:
        raise config_error(f"{name}: {shown(text)} is not an address") from None


def _interface(value: object) -> Interface:
    given = object_of("interfaces", value)
    return Interface(
        name=string_of("interfaces.name", given.get("name")),
        mac=string_of("interfaces.mac", given.get("mac")),
        sandbox=string_of("interfaces.sandbox", given.get("sandbox")),
        mtu_bytes=number_of("interfaces.mtu", given.get("mtu"), _U32) or None,
        socket_path=string_of("interfaces.socketPath", given.get("socketPath")),
        pci_id=string_of("interfaces.pciID", given.get("pciID")),
    )


def _interface_json(interface: Interface, version: str) -> dict[str, object]:
    found: dict[str, object] = {"name": interface.name}
    optional: dict[str, object] = {"mac": interface.mac, "sandbox": interface.sandbox}
    if version in _WITH_DETAILS:
        optional |= {
            "mtu": interface.mtu_bytes,
            "socketPath": interface.socket_path,
            "pciID": interface.pci_id,
        }
    return found | {key: value for key, value in optional.items() if value}


def _ip_config(value: object) -> IpConfig:
    given = object_of("ips", value)
    text = string_of("ips.address", given.get("address"))
    try:
        address = ipaddress.ip_interface(text)
    except ValueError:
        raise config_error(f"ips.address: {shown(text)} is not an address with a prefix length") from None
    return IpConfig(
        address=address,
        gateway=_ip_address("ips.gateway", given.get("gateway")),
        interface=number_of("ips.interface", given.get("interface"), _U32),
    )


def _ip_config_json(ip: IpConfig, version: str) -> dict[str, object]:
    found: dict[str, object] = {"address": str(ip.address)}
    if version in _WITH_IP_VERSION:
        found["version"] = str(ip.address.version)
    if ip.gateway is not None:
        found["gateway"] = str(ip.gateway)
    if ip.interface is not None:
        found["interface"] = ip.interface
    return found


def _route(value: object) -> Route:
    given = object_of("routes", value)
    text = string_of("routes.dst", given.get("dst"))
    try:
        destination = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise config_error(f"routes.dst: {shown(text)} is not a network") from None
    return Route(
        destination=destination,
        gateway=_ip_address("routes.gw", given.get("gw")),
        mtu_bytes=number_of("routes.mtu", given.get("mtu"), _U32),
        advmss_bytes=number_of("routes.advmss", given.get("advmss"), _U32),
        priority=number_of("routes.priority", given.get("priority"), _U32),
        table=number_of("routes.table", given.get("table"), _U32),
        scope=number_of("routes.scope", given.get("scope"), range(256)),
    )


def _route_json(route: Route, version: str) -> dict[str, object]:
    found: dict[str, object] = {"dst": str(route.destination)}
    if route.gateway is not None:
        found["gw"] = str(route.gateway)
    if version in _WITH_DETAILS:
        details: dict[str, object] = {
            "mtu": route.mtu_bytes,
            "advmss": route.advmss_bytes,
            "priority": route.priority,
            "table": route.table,
            "scope": route.scope,
        }
        found |= {key: value for key, value in details.items() if value is not None}
    return found
