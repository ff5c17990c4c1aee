"""CNI requests: the specification's variables and network configuration, checked and typed.

Specification 1.1.0, section 1 "Plugin configuration objects" and section 2 "Execution Protocol", and CONVENTIONS.md.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from rdmanet.cni import bandwidth
from rdmanet.cni.labels import labels_of
from rdmanet.cni.result import Dns, Result
from rdmanet.cni.values import (
    CniCode,
    CniError,
    Json,
    JsonObject,
    address_of_text,
    bool_of,
    config_error,
    environment_error,
    field_error,
    mac_of_text,
    nearest,
    number_of,
    object_of,
    path_of,
    shown,
    string_of,
    strings_of,
)
from rdmanet.model import DEFAULT_NAMESPACE, UNLIMITED, Bandwidth, GuardMode, IPAddress, PodName

SUPPORTED_VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")

#: Bounds, in bytes or characters; ``cni/rdmanet.c`` has the same for what it checks itself.
BODY_MAX_BYTES = 1024 * 1024
CONTAINER_ID_MAX = 200
DEPTH_MAX = 64
VALUE_MAX = 8000
ATTACHMENTS_MAX = 65536
#: IPv6 needs 1280 (RFC 8200 section 5); a veth device takes at most 65535.
MTU_RANGE_BYTES = range(1280, 65536)
MAX_LEASES_RANGE = range(1, 65537)
#: The two lowest bits are for congestion notification (RFC 3168 5).
TRAFFIC_CLASS_RANGE = range(0, 256, 4)
SERVICE_LEVEL_RANGE = range(8)

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*", re.ASCII)

#: Capabilities that rdmanet acts upon or may safely be told (CONVENTIONS.md "Dynamic Plugin specific fields").
CAPABILITIES = frozenset(
    {"mac", "ips", "dns", "bandwidth", "deviceID", "cgroupPath", "io.kubernetes.cri.pod-annotations"}
)


class Command(enum.StrEnum):
    """CNI_COMMAND, without VERSION, which the executable answers by itself."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"

    @property
    def since(self) -> str:
        """The oldest supported version of the specification that has the command."""
        return {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}.get(self.value, SUPPORTED_VERSIONS[0])


@dataclass(frozen=True, slots=True)
class Args:
    """CNI_ARGS ("FOO=BAR;ABC=123"), as Kubernetes and podman fill it, and RDMA of our own."""

    pod_namespace: str | None = None  # K8S_POD_NAMESPACE
    pod_name: str | None = None  # K8S_POD_NAME
    pod_uid: str | None = None  # K8S_POD_UID
    ips: tuple[IPAddress, ...] = ()  # IP, also a comma-separated list
    mac: str | None = None  # MAC, lower case
    rdma: bool | None = None  # RDMA=true|false

    @classmethod
    def parse(cls, text: str) -> Args:
        """Read CNI_ARGS. Unknown keys need IgnoreUnknown, as with the reference plugins.

        Raises CniError (4): the text is malformed, or has an unknown key or a bad value.
        """
        values: dict[str, str] = {}
        for pair in filter(None, text.split(";")):
            key, equals, value = pair.partition("=")
            if not equals or not key:
                raise _args_error(f"{shown(pair)} is not KEY=VALUE")
            values[key] = value
        ignore_unknown = values.pop("IgnoreUnknown", "").lower() in ("1", "t", "true")
        values.pop("K8S_POD_INFRA_CONTAINER_ID", None)
        found = cls(
            pod_namespace=_arg_name(values, "K8S_POD_NAMESPACE"),
            pod_name=_arg_name(values, "K8S_POD_NAME"),
            pod_uid=_arg_name(values, "K8S_POD_UID"),
            ips=tuple(address_of_text("IP", a, _args_error) for a in filter(None, values.pop("IP", "").split(","))),
            mac=mac_of_text("MAC", values.pop("MAC", ""), _args_error),
            rdma=_arg_bool(values, "RDMA"),
        )
        if values and not ignore_unknown:
            known = ["K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_UID", "IP", "MAC", "RDMA"]
            key = next(iter(values))
            raise _args_error(f"{shown(key)} is not known{nearest(key, known)}")
        return found


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """``runtimeConfig``: what the runtime fills in for the capabilities that the configuration asked for."""

    mac: str | None = None
    ips: tuple[IPAddress, ...] = ()
    device_id: str | None = None
    dns: Dns | None = None
    cgroup_path: str | None = None
    bandwidth: Bandwidth = UNLIMITED
    pod_annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: object) -> RuntimeConfig:
        """Read ``runtimeConfig``; keys in any letter case, as containerd and podman write them differently.

        Raises CniError (7): a value has the wrong type or form.
        """
        given = {key.lower(): item for key, item in object_of("runtimeConfig", value).items() if item is not None}
        annotations = object_of("runtimeConfig: pod-annotations", given.get("io.kubernetes.cri.pod-annotations"))
        return cls(
            mac=mac_of_text("runtimeConfig: mac", string_of("runtimeConfig: mac", given.get("mac", ""))),
            ips=tuple(
                address_of_text("runtimeConfig: ips", a) for a in strings_of("runtimeConfig: ips", given.get("ips"))
            ),
            device_id=string_of("runtimeConfig: deviceID", given.get("deviceid", "")) or None,
            dns=Dns.from_json(given["dns"]) if "dns" in given else None,
            cgroup_path=string_of("runtimeConfig: cgroupPath", given.get("cgrouppath", "")) or None,
            bandwidth=bandwidth.bandwidth_of("runtimeConfig: bandwidth", given.get("bandwidth")),
            pod_annotations={k: string_of(f"annotation {k}", v) for k, v in annotations.items()},
        )


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The network configuration of one call (specification section 1, "Plugin configuration objects")."""

    cni_version: str
    name: str
    type: str = "rdmanet"
    rdma: bool = False
    guard: GuardMode | None = None
    max_leases: int | None = None  # rdmaMaxLeases
    traffic_class: int | None = None  # rdmaTrafficClass
    service_level: int | None = None  # rdmaServiceLevel
    mtu_bytes: int | None = None
    socket: str | None = None
    state_dir: str | None = None
    device_id: str | None = None  # deviceID, as Multus writes it
    bandwidth: Bandwidth = UNLIMITED
    capabilities: frozenset[str] = frozenset()  # those that are true
    runtime_config: RuntimeConfig = field(default_factory=RuntimeConfig)
    args: Mapping[str, Json] = field(default_factory=dict)
    dns: Dns = field(default_factory=Dns)
    prev_result: Result | None = None
    valid_attachments: tuple[tuple[str, str], ...] | None = None  # (container id, interface name); GC

    @classmethod
    def parse(cls, document: JsonObject) -> NetworkConfig:
        """Check a whole network configuration.

        Raises CniError: 2 a key that rdmanet does not have or act upon, 6 and 1 the version, 7 a bad value.
        """
        version = parse_version(document)
        for key, item in document.items():
            if key not in _KNOWN_KEYS and not ("/" in key or "." in key):
                raise field_error(key, item, _HINTS.get(key) or nearest(key, _KNOWN_KEYS))
        if document.get("ipam"):
            raise field_error("ipam", document["ipam"], _HINTS["ipam"])
        capabilities = {k for k, v in object_of("capabilities", document.get("capabilities")).items() if v is True}
        for capability in sorted(capabilities - CAPABILITIES):
            hint = "; chain a plugin that does this after rdmanet" + nearest(capability, CAPABILITIES)
            raise field_error("capabilities", {capability: True}, hint)
        guard = document.get("guard")
        if guard is not None and guard not in tuple(GuardMode):
            raise config_error(f'"guard" is {shown(guard)}; write "observe" or "enforce"')
        return cls(
            cni_version=version,
            name=_network_name(document.get("name")),
            type=string_of("type", document.get("type", "")) or "rdmanet",
            rdma=bool(bool_of("rdma", document.get("rdma"))),
            guard=GuardMode(str(guard)) if guard is not None else None,
            max_leases=number_of("rdmaMaxLeases", document.get("rdmaMaxLeases"), MAX_LEASES_RANGE),
            traffic_class=number_of("rdmaTrafficClass", document.get("rdmaTrafficClass"), TRAFFIC_CLASS_RANGE),
            service_level=number_of("rdmaServiceLevel", document.get("rdmaServiceLevel"), SERVICE_LEVEL_RANGE),
            mtu_bytes=number_of("mtu", document.get("mtu"), MTU_RANGE_BYTES),
            socket=path_of("socket", document.get("socket")),
            state_dir=path_of("stateDir", document.get("stateDir")),
            device_id=string_of("deviceID", document.get("deviceID") or "") or None,
            bandwidth=bandwidth.bandwidth_of("", {key: document.get(key) for key in bandwidth.KEYS}),
            capabilities=frozenset(capabilities),
            runtime_config=RuntimeConfig.parse(document.get("runtimeConfig")),
            args=object_of("args", document.get("args")),
            dns=Dns.from_json(document.get("dns")),
            prev_result=Result.from_json(document["prevResult"]) if document.get("prevResult") else None,
            valid_attachments=_attachments(document),
        )

    @classmethod
    def parse_for_del(cls, document: JsonObject) -> NetworkConfig:
        """What DEL needs and no more: a configuration that went bad after ADD must not keep a pod from ending.

        Raises CniError: 6 and 1 the version, 7 the name.
        """
        return cls(cni_version=parse_version(document), name=_network_name(document.get("name")))


_KNOWN_KEYS = (
    *bandwidth.KEYS,
    "args",
    "capabilities",
    "cni.dev/attachments",
    "cni.dev/valid-attachments",
    "cniVersion",
    "deviceID",
    "dns",
    "guard",
    "ipam",
    "mtu",
    "name",
    "pciBusID",  # Multus writes the device's id under this name as well
    "prevResult",
    "rdma",
    "rdmaMaxLeases",
    "rdmaServiceLevel",
    "rdmaTrafficClass",
    "runtimeConfig",
    "socket",
    "stateDir",
    "type",
)

_HINTS = {
    "ipam": "; the agent assigns addresses from the ranges in its own configuration: leave ipam away",
    "ipMasq": "; the agent masquerades as its own configuration says: leave ipMasq away",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One CNI call. For GC and STATUS the container's fields are empty; for DEL netns may be."""

    command: Command
    config: NetworkConfig
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    args: Args = field(default_factory=Args)
    path: tuple[str, ...] = ()

    @classmethod
    def parse(cls, variables: Mapping[str, str], body: bytes) -> Request:
        """Read a call from the specification's environment variables (names as there) and its standard input.

        Raises CniError: 1 version, 2 unsupported key, 4 variables, 6 not JSON, 7 bad value.
        """
        document = parse_document(body)
        command = _command(variables.get("CNI_COMMAND", ""))
        version = parse_version(document)
        if _order(version) < _order(command.since):
            raise CniError(f"{command} needs cniVersion {command.since} or later, not {version}", CniCode.VERSION)
        long = [name for name, value in variables.items() if len(value) > VALUE_MAX or "\0" in value]
        if long:
            raise environment_error(", ".join(long), f"longer than {VALUE_MAX} characters, or with a NUL")
        path = tuple(filter(None, variables.get("CNI_PATH", "").split(":")))
        if command in (Command.GC, Command.STATUS):
            config = NetworkConfig.parse(document)
            if command is Command.GC and config.valid_attachments is None:
                raise config_error('"cni.dev/valid-attachments" is missing: GC needs the list of what to keep')
            return cls(command, config, path=path)
        needed = ["CNI_CONTAINERID", "CNI_IFNAME"] + ([] if command is Command.DEL else ["CNI_NETNS"])
        missing = [name for name in needed if not variables.get(name)]
        if missing:
            raise environment_error(", ".join(missing), f"missing; {command} needs it")
        container_id = check_container_id(variables["CNI_CONTAINERID"])
        ifname = check_ifname(variables["CNI_IFNAME"])
        if command is Command.DEL:
            netns = variables.get("CNI_NETNS", "")
            return cls(command, NetworkConfig.parse_for_del(document), container_id, netns, ifname, path=path)
        config = NetworkConfig.parse(document)
        if command is Command.CHECK and config.prev_result is None:
            raise config_error('"prevResult" is missing: CHECK compares with the result of ADD')
        args = Args.parse(variables.get("CNI_ARGS", ""))
        found = cls(command, config, container_id, _netns(variables["CNI_NETNS"]), ifname, args, path)
        # Asked for now, so that a bad value is refused here and not in the middle of an ADD.
        found.ips, found.mac, found.wants_rdma, found.labels  # noqa: B018
        return found

    @property
    def pod(self) -> PodName:
        """Kubernetes' name of the pod where CNI_ARGS has one, else the container id in the default namespace."""
        return PodName(self.args.pod_namespace or DEFAULT_NAMESPACE, self.args.pod_name or self.container_id)

    @property
    def wants_rdma(self) -> bool:
        """Whether the pod gets a device: CNI_ARGS, then ``args.cni.rdma``, then the network configuration."""
        if self.args.rdma is not None:
            return self.args.rdma
        asked = bool_of("args.cni.rdma", self._cni_args.get("rdma"))
        return self.config.rdma if asked is None else asked

    @property
    def ips(self) -> tuple[IPAddress, ...]:
        """Addresses asked for: ``runtimeConfig.ips``, else ``args.cni.ips``, else IP of CNI_ARGS."""
        listed = strings_of("args.cni.ips", self._cni_args.get("ips"))
        return (
            self.config.runtime_config.ips or tuple(address_of_text("args.cni.ips", a) for a in listed) or self.args.ips
        )

    @property
    def mac(self) -> str | None:
        """MAC asked for: ``runtimeConfig.mac``, else ``args.cni.mac``, else MAC of CNI_ARGS."""
        listed = string_of("args.cni.mac", self._cni_args.get("mac") or "")
        return self.config.runtime_config.mac or mac_of_text("args.cni.mac", listed) or self.args.mac

    @property
    def bandwidth(self) -> Bandwidth:
        """Limits: the lower one where both ``runtimeConfig`` and the network configuration have one."""
        return bandwidth.lesser(self.config.runtime_config.bandwidth, self.config.bandwidth)

    @property
    def labels(self) -> Mapping[str, str]:
        """The pod's labels where no Pod object has others: ``args.cni.labels``."""
        return labels_of(self._cni_args.get("labels"))

    @property
    def dns(self) -> Dns:
        """DNS for the result: ``runtimeConfig.dns`` where the runtime gave it, else the configuration's."""
        return self.config.runtime_config.dns or self.config.dns

    def answer(self, own: Result) -> dict[str, object]:
        """What ADD prints for ``own``: after ``prevResult`` where there is one, with DNS, in the version asked for."""
        if own.dns == Dns():
            own = dataclasses.replace(own, dns=self.dns)
        whole = self.config.prev_result.followed_by(own) if self.config.prev_result else own
        return whole.to_json(self.config.cni_version)

    @property
    def _cni_args(self) -> JsonObject:
        return object_of("args.cni", self.config.args.get("cni"))


def parse_document(body: bytes) -> JsonObject:
    """Standard input as a JSON object (RFC 8259), bounded in size and depth.

    Raises CniError (6).
    """
    if len(body) > BODY_MAX_BYTES:
        raise CniError("The network configuration has more than 1 MiB", CniCode.DECODE)
    try:
        document: Json = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise CniError("The network configuration is nested too deeply", CniCode.DECODE) from None
    except ValueError as error:
        raise CniError(f"The network configuration is not JSON: {error}", CniCode.DECODE) from None
    if not isinstance(document, dict):
        raise CniError("The network configuration is not a JSON object", CniCode.DECODE)
    _check_tree(document)
    return document


def parse_version(document: JsonObject) -> str:
    """The configuration's cniVersion. Raises CniError: 6 not a version, 1 not a supported one."""
    version = document.get("cniVersion", "")
    if not isinstance(version, str):
        raise CniError('"cniVersion" is not a string', CniCode.DECODE)
    if version not in SUPPORTED_VERSIONS:
        given = shown(version) if version else "missing"
        raise CniError(f"cniVersion is {given}; rdmanet has {', '.join(SUPPORTED_VERSIONS)}", CniCode.VERSION)
    return version


def check_container_id(text: str) -> str:
    """Section 2 "Parameters". Raises CniError (4)."""
    if not _NAME.fullmatch(text) or len(text) > CONTAINER_ID_MAX:
        raise environment_error(
            "CNI_CONTAINERID",
            f"{shown(text)} is not a letter or digit followed by at most 199 of those, '_', '.' and '-'",
        )
    return text


def check_ifname(text: str) -> str:
    """Section 2 "Parameters" and Linux's own rule (dev_valid_name), in ASCII. Raises CniError (4).

    Of a name with %d the kernel makes another one (dev_alloc_name in net/core/dev.c).
    """
    if text in (".", "..") or not re.fullmatch(r"[!-$&-.0-9;-~]{1,15}", text, re.ASCII):
        why = f"{shown(text)} is not 1 to 15 printable characters without '/', ':' and '%'"
        raise environment_error("CNI_IFNAME", why)
    return text


def _args_error(sentence: str) -> CniError:
    return environment_error("CNI_ARGS", sentence)


def _arg_name(values: dict[str, str], key: str) -> str | None:
    value = values.pop(key, "")
    if value and (not _NAME.fullmatch(value) or len(value) > 253):
        raise _args_error(f"{key} is {shown(value)}, not a name of letters, digits, '_', '.' and '-'")
    return value or None


def _arg_bool(values: dict[str, str], key: str) -> bool | None:
    value = values.pop(key, "").lower()
    if value not in ("", "true", "false"):
        raise _args_error(f"{key} is {shown(value)}; write true or false")
    return None if not value else value == "true"


def _command(text: str) -> Command:
    try:
        return Command(text)
    except ValueError:
        raise environment_error("CNI_COMMAND", f"{shown(text)} is not one of {', '.join(Command)}") from None


def _netns(path: str) -> str:
    normal = posixpath.normpath(path)
    if not path.startswith("/"):
        raise environment_error("CNI_NETNS", f"{shown(path)} is not an absolute path")
    if normal.lstrip("/").startswith(("proc/self/", "proc/thread-self/")):
        raise environment_error("CNI_NETNS", f"{shown(path)} means another process to the agent; give the pid")
    return path


def _network_name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or len(value) > 255:
        raise config_error(
            f'"name" is {shown(value)}; it must be a letter or digit followed by at most 254 of those, _ . and -'
        )
    return value


def _attachments(document: JsonObject) -> tuple[tuple[str, str], ...] | None:
    """Both keys' lists: libcni sends the second for an earlier draft's name. Go writes an empty list as null."""
    keys = [key for key in ("cni.dev/valid-attachments", "cni.dev/attachments") if key in document]
    if not keys:
        return None
    found: dict[tuple[str, str], None] = {}
    for key in keys:
        listed = document[key]
        if listed is not None and not isinstance(listed, list):
            raise config_error(f'"{key}" is not a list')
        if listed and len(listed) > ATTACHMENTS_MAX:
            raise config_error(f'"{key}" has more than {ATTACHMENTS_MAX} entries')
        for item in listed or ():
            if not isinstance(item, dict):
                raise config_error(f'"{key}" holds {shown(item)}, which is not an object')
            found[string_of("containerID", item.get("containerID")), string_of("ifname", item.get("ifname"))] = None
    return tuple(found)


def _order(version: str) -> int:
    return SUPPORTED_VERSIONS.index(version)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_tree(document: Json) -> None:
    """Depth as cni/json.h bounds it, and no half surrogates, which cannot be written as UTF-8 again."""
    level: list[Json] = [document]
    depth = 0
    while level:
        if depth >= DEPTH_MAX:
            raise CniError("The network configuration is nested too deeply", CniCode.DECODE)
        below: list[Json] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                below += item.keys()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and any("\ud800" <= c <= "\udfff" for c in item):
                raise CniError("The network configuration has half of a surrogate pair", CniCode.DECODE)
        level, depth = below, depth + 1
