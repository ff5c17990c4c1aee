"""The agent's configuration: one TOML file, every key typed, documented and checked.

The tables below are the reference: ``docs/configuration.md`` is checked against them by a test. Unknown keys are
refused with the
nearest known one, because a typing error that is silently ignored costs more than a refused start.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import re
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path

from rdmanet.errors import ConfigError
from rdmanet.model import DEFAULT_MAX_LEASES, Backend, GuardMode, is_prime

DEFAULT_PATH = Path("/etc/rdmanet/rdmanet.toml")
DEFAULT_IPV4_RANGE = ipaddress.IPv4Network("10.213.0.0/20")
DEFAULT_IPV6_RANGE = ipaddress.IPv6Network("fd72:646d:616e::/64")
#: What kubelet's list of devices stays small with; a host's range of addresses holds more pods than that.
MAX_SLOTS = 4096
#: What is an extended resource for Kubernetes and vendor/class for CDI (specification 0.5, "kind").
_VENDOR = r"[a-z][a-z0-9-]*(\.[a-z0-9-]*[a-z0-9])+"
_CLASS = r"[A-Za-z]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_RESOURCE = re.compile(f"(?!requests\\.){_VENDOR}/{_CLASS}", re.ASCII)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """``[agent]``"""

    #: Unix socket of the agent's HTTP API, mode 0600.
    socket: Path = Path("/run/rdmanet/agent.sock")
    #: Database, queued DELs and lock. Not on a network file system.
    state_dir: Path = Path("/var/lib/rdmanet")
    #: Loopback TCP port for /metrics; 0 means none (metrics are always on the unix socket).
    metrics_port: int = 0
    #: Whether what somebody breaks is put right (`rdmanet status` shows it in any case).
    repair: bool = True
    #: debug, info, warning or error.
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """``[network]``"""

    #: This node's range of pod addresses; the first address is the pods' gateway.
    ipv4_range: ipaddress.IPv4Network = DEFAULT_IPV4_RANGE
    #: The same for IPv6.
    ipv6_range: ipaddress.IPv6Network = DEFAULT_IPV6_RANGE
    #: MTU of pods' interfaces; 0 means the smallest uplink's. 9000 gives RoCE between local pods a 4096-byte path MTU.
    mtu_bytes: int = 0
    #: Netdevs that lead outside; empty means those with a default route.
    uplinks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MasqueradeConfig:
    """``[masquerade]``"""

    #: Whether pods reach the outside behind the uplink's address.
    enabled: bool = True
    #: First port for masqueraded flows; keep the range above net.ipv4.ip_local_port_range.
    first_port: int = 61000
    #: Last port for masqueraded flows.
    last_port: int = 65535


@dataclass(frozen=True, slots=True)
class DatapathConfig:
    """``[datapath]``"""

    #: Where the compiled eBPF artifact lies (`rdmanet datapath build`).
    artifact_dir: Path = Path("/usr/lib/rdmanet/artifact")
    #: Directory for pins; the bpffs around it is mounted where it is missing.
    bpffs_dir: Path = Path("/sys/fs/bpf/rdmanet")


@dataclass(frozen=True, slots=True)
class RdmaConfig:
    """``[rdma]``"""

    #: Whether pods may have RDMA devices at all.
    enabled: bool = True
    #: Where pods' devices come from: rxe (each pod its own Soft-RoCE) or shared (one device of the host for all).
    backend: Backend = Backend.RXE
    #: Name of the host's device that pods share, as `rdma link` shows it.
    shared_device: str = ""
    #: What happens to RoCE packets of queue pairs without a lease: observe or enforce. A network configuration may
    #: override it.
    guard: GuardMode = GuardMode.OBSERVE
    #: Leases that one pod may hold at a time. A network configuration may override it.
    max_leases_per_pod: int = DEFAULT_MAX_LEASES
    #: Seconds within which pods claim their leases after the agent came back.
    claim_grace_s: float = 30.0
    #: Bandwidth class of pods' RoCE packets: their traffic class, its two lowest bits 0. A network configuration may
    #: override it.
    traffic_class: int = 0
    #: The same as InfiniBand's service level.
    service_level: int = 0
    #: Whether the agent may enable the RDMA controller in the cgroups above pods'.
    cgroup_controller: bool = False
    #: Device contexts that a pod may have open at a time; 0 means no limit.
    max_handles: int = 0
    #: Verbs objects (queue pairs, completion queues, regions, ...) that a pod may have at a time; 0 means no limit.
    max_objects: int = 0


@dataclass(frozen=True, slots=True)
class TrackingConfig:
    """``[tracking]``"""

    #: Entries of the table of flows; a translated flow takes two. A full table refuses new flows by name.
    max_flows: int = 131072
    #: Flows that one pod may have at a time; 0 means no limit.
    max_flows_per_pod: int = 32768
    #: Seconds from one look for idle flows to the next.
    interval_s: float = 15.0

    def map_sizes(self) -> dict[str, int]:
        """Entries of the maps, by name."""
        return {"flows": self.max_flows}


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """``[policy]``"""

    #: What all policies together come to: a set, a peer and a prefix of ports each.
    max_entries: int = 262144
    #: CIDRs that policies name, exceptions included.
    max_prefixes: int = 65536

    def map_sizes(self) -> dict[str, int]:
        """Entries of the maps, by name."""
        return {"policy": self.max_entries, "prefixes": self.max_prefixes}


@dataclass(frozen=True, slots=True)
class ServicesConfig:
    """``[services]``"""

    #: Places in the Maglev table of each node port or set of external addresses: a prime.
    maglev_size: int = 1021
    #: Addresses and ports of services, all together.
    max_services: int = 131072
    #: Backends of these, all together.
    max_backends: int = 262144
    #: Ports of services that have a node port or external addresses, for each family.
    max_outside_services: int = 256

    def map_sizes(self) -> dict[str, int]:
        """Entries of the maps, by name: twice what may be used, so that everything can be exchanged at once."""
        return {
            "services": 2 * self.max_services,
            "backends": 2 * self.max_backends,
            "members": 2 * self.max_backends,
            "maglev": 2 * self.max_outside_services * self.maglev_size,
        }


@dataclass(frozen=True, slots=True)
class KubernetesConfig:
    """``[kubernetes]``"""

    #: Slots that kubelet may give to containers, each the right to one RDMA device; 0: kubelet has nothing to do with
    #: devices.
    slots: int = 0
    #: Name of the resource that containers ask for; also the kind of the CDI devices.
    resource: str = "rdmanet.io/rdma"
    #: Kubelet's directory for sockets of device plugins.
    plugin_dir: Path = Path("/var/lib/kubelet/device-plugins")
    #: Whether an ADD asks kubelet which slot its pod has; false where Multus says it (deviceID).
    ask_kubelet: bool = True
    #: Kubelet's socket for that question.
    pod_resources: Path = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
    #: Seconds that an ADD waits for kubelet's answer.
    timeout_s: float = 5.0
    #: Whether the runtime reads CDI files (podman, CRI-O, containerd 1.7).
    cdi: bool = True
    #: Where it reads them.
    cdi_dir: Path = Path("/var/run/cdi")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file."""

    agent: AgentConfig = field(default_factory=AgentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    masquerade: MasqueradeConfig = field(default_factory=MasqueradeConfig)
    datapath: DatapathConfig = field(default_factory=DatapathConfig)
    rdma: RdmaConfig = field(default_factory=RdmaConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    services: ServicesConfig = field(default_factory=ServicesConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    @property
    def datapath_dir(self) -> Path:
        """Where the running artifact is kept, and the one before it."""
        return self.agent.state_dir / "datapath"

    def map_sizes(self) -> dict[str, int]:
        """Entries of the datapath's maps, by name."""
        return self.tracking.map_sizes() | self.policy.map_sizes() | self.services.map_sizes()


def load(path: Path | None) -> Config:
    """Reads a configuration file; without a path the default one where it exists, else the defaults.

    Raises ConfigError with a sentence that names the key.
    """
    if path is None:
        if not DEFAULT_PATH.exists():
            return Config()
        path = DEFAULT_PATH
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error}.", operation="read", subject=str(path)
        ) from error
    return parse(text, source=str(path))


def parse(text: str, source: str = "configuration") -> Config:
    """Checks the text of a configuration file."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}.", subject=source) from error
    sections = {f.name: f for f in dataclasses.fields(Config)}
    hints = typing.get_type_hints(Config)
    values: dict[str, object] = {}
    for name, table in document.items():
        if name not in sections:
            raise ConfigError(f"{source}: unknown section [{name}]{_nearest(name, sections)}.", subject=name)
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: [{name}] must be a section, not a value.", subject=name)
        values[name] = _section(hints[name], name, table, source)
    config = Config(**values)  # type: ignore[arg-type]
    _check(config, source)
    return config


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _section(kind: type, section: str, table: dict[str, object], source: str) -> object:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(
                f"{source}: unknown key {section}.{key}{_nearest(key, hints)}.", subject=f"{section}.{key}"
            )
        values[key] = _value(hints[key], f"{section}.{key}", value, source)
    return kind(**values)


def _value(kind: typing.Any, key: str, value: object, source: str) -> object:
    def wrong(wanted: str) -> ConfigError:
        return ConfigError(f"{source}: {key} must be {wanted}, not {value!r}.", subject=key)

    if kind is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("a whole number")
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong("a number")
        return float(value)
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise wrong("a list of texts")
        return tuple(value)
    if not isinstance(value, str):
        raise wrong("a text")
    if kind is str:
        return value
    if kind is Path:
        if not value.startswith("/") or "\0" in value:
            raise wrong("an absolute path")
        return Path(value)
    try:
        return kind(value)
    except ValueError as error:
        wanted = {
            ipaddress.IPv4Network: "an IPv4 range such as 10.213.0.0/20 (no bits set behind the prefix)",
            ipaddress.IPv6Network: "an IPv6 range such as fd72:646d:616e::/64 (no bits set behind the prefix)",
            GuardMode: "observe or enforce",
            Backend: "rxe or shared",
        }
        raise wrong(wanted[kind]) from error


def _check(config: Config, source: str) -> None:
    def refuse(key: str, sentence: str) -> typing.NoReturn:
        raise ConfigError(f"{source}: {key} {sentence}.", subject=key)

    if not 0 <= config.agent.metrics_port <= 65535:
        refuse("agent.metrics_port", "must be a port from 0 (none) to 65535")
    if config.agent.log_level not in ("debug", "info", "warning", "error"):
        refuse("agent.log_level", "must be debug, info, warning or error")
    if config.network.ipv4_range.prefixlen > 30:
        refuse("network.ipv4_range", "is too small: it needs room for a gateway and a pod (at most /30)")
    if config.network.ipv6_range.prefixlen > 126:
        refuse("network.ipv6_range", "is too small: it needs room for a gateway and a pod (at most /126)")
    if config.network.mtu_bytes and not 1280 <= config.network.mtu_bytes <= 65535:
        refuse("network.mtu_bytes", "must be 0 or from 1280 (the least that IPv6 allows, RFC 8200 5) to 65535")
    first, last = config.masquerade.first_port, config.masquerade.last_port
    if not 1024 <= first <= last <= 65535:
        refuse("masquerade.first_port", "and last_port must satisfy 1024 <= first_port <= last_port <= 65535")
    if (config.rdma.backend is Backend.SHARED) is not bool(config.rdma.shared_device):
        refuse("rdma.shared_device", 'names the device for rdma.backend = "shared", and for that alone')
    if not 1 <= config.rdma.max_leases_per_pod <= 65536:
        refuse("rdma.max_leases_per_pod", "must be from 1 to 65536")
    if not 1 <= config.rdma.claim_grace_s <= 3600:
        refuse("rdma.claim_grace_s", "must be from 1 to 3600 seconds")
    if config.rdma.traffic_class not in range(0, 256, 4):
        refuse("rdma.traffic_class", "must be from 0 to 252 and divisible by 4 (the two lowest bits are ECN's)")
    if config.rdma.service_level not in range(8):
        refuse("rdma.service_level", "must be from 0 to 7")
    for key in ("max_handles", "max_objects"):
        if getattr(config.rdma, key) not in range(2**31):
            refuse(f"rdma.{key}", "must be from 0 (no limit) to 2147483647")
    if not 1024 <= config.tracking.max_flows <= 2**24:
        refuse("tracking.max_flows", f"must be from 1024 to {2**24}")
    if not 0 <= config.tracking.max_flows_per_pod <= 2**24:
        refuse("tracking.max_flows_per_pod", f"must be from 0 (no limit) to {2**24}")
    if not 1 <= config.tracking.interval_s <= 60:
        refuse("tracking.interval_s", "must be from 1 to 60: the shortest time-out of a flow")
    for key in ("max_entries", "max_prefixes"):
        if not 16 <= getattr(config.policy, key) <= 2**22:
            refuse(f"policy.{key}", f"must be from 16 to {2**22}")
    services = config.services
    if not is_prime(services.maglev_size) or not 3 <= services.maglev_size <= 65537:
        refuse("services.maglev_size", "must be a prime from 3 to 65537, such as 251, 1021 or 4093")
    if not 1 <= services.max_services <= 2**22:
        refuse("services.max_services", f"must be from 1 to {2**22}")
    if not 4 <= services.max_backends <= 2**22:
        refuse("services.max_backends", f"must be from 4 to {2**22}")
    if not 1 <= services.max_outside_services <= 65536:
        refuse("services.max_outside_services", "must be from 1 to 65536")
    if services.map_sizes()["maglev"] > 2**27:
        refuse("services.max_outside_services", f"times maglev_size must be at most {2**26} (512 MiB of the kernel's)")
    if not 0 <= config.kubernetes.slots <= MAX_SLOTS:
        refuse("kubernetes.slots", f"must be from 0 (none) to {MAX_SLOTS}")
    vendor = config.kubernetes.resource.partition("/")[0]
    if not _RESOURCE.fullmatch(config.kubernetes.resource) or vendor.endswith("kubernetes.io"):
        refuse(
            "kubernetes.resource",
            "must be a domain and a name such as rdmanet.io/rdma, which both begin with a letter; domains that end in"
            " kubernetes.io are Kubernetes' own",
        )
    if not 0.1 <= config.kubernetes.timeout_s <= 60:
        refuse("kubernetes.timeout_s", "must be from 0.1 to 60 seconds")
