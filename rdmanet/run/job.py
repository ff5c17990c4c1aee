"""A job as plain values: its pods by name, what is recorded of it before anything is done, how it ended."""

from __future__ import annotations

import json
import re
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rdmanet.errors import InputError, StateError

#: Pods of one job; a host's range of addresses is the bound that is met first.
MAX_PODS = 4096
#: The CNI network that jobs' pods are in: no runtime's GC is about it.
NETWORK = "rdmanet-run"
IFNAME = "eth0"
CNI_VERSION = "1.1.0"
#: Where `ip netns` and container runtimes have namespaces, and where an agent in a container sees them.
NETNS_DIR = Path("/run/netns")
#: The name becomes pods' names and host names: job-0 to job-4095.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class PodPlan:
    """What a pod will be; known before it is made."""

    rank: int
    name: str
    namespace: str
    container_id: str
    netns: str

    @property
    def cni_args(self) -> str:
        """CNI_ARGS as the kubelet's runtimes send them."""
        return f"IgnoreUnknown=1;K8S_POD_NAMESPACE={self.namespace};K8S_POD_NAME={self.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a job will have on the host, as its record says it: enough to take it all back."""

    name: str
    plugin: str
    network: Mapping[str, Any]
    cgroup: str | None  # directory, with one below it for each rank; None: this host has no cgroup2 to make them in
    cgroup_root: str
    pods: tuple[PodPlan, ...]

    def to_json(self) -> str:
        """For the record."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Plan:
        """Raises StateError where that is no record."""
        try:
            document = json.loads(text)
            pods = tuple(PodPlan(**pod) for pod in document.pop("pods"))
            return cls(**document, pods=pods)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise StateError(f"{source} is no record of a job: {error}.", operation="read", subject=source) from error

    def cgroup_of(self, pod: PodPlan) -> Path | None:
        """A pod's own directory."""
        return None if self.cgroup is None else Path(self.cgroup, str(pod.rank))

    def network_for(self, pod: PodPlan) -> dict[str, Any]:
        """The network configuration that CNI calls for a pod have."""
        group = self.cgroup_of(pod)
        if group is None:
            return dict(self.network)
        return {**self.network, "runtimeConfig": {"cgroupPath": f"/{group.relative_to(self.cgroup_root)}"}}


def plan(
    name: str,
    pods: int,
    *,
    rdma: bool,
    namespace: str,
    plugin: Path,
    socket: Path,
    state_dir: Path,
    cgroup_root: Path | None,
) -> Plan:
    """A job of that name, or of a made-up one where it is empty. Raises InputError for a name or a number of pods that
    cannot be."""
    identity = secrets.token_hex(4)
    name = name or f"job-{identity}"
    if not _NAME.fullmatch(name):
        raise InputError(f"A job cannot be called {name!r}: at most 48 small letters, digits and '-' inside.")
    if not _NAME.fullmatch(namespace):
        raise InputError(f"A namespace cannot be called {namespace!r}: small letters, digits and '-' inside.")
    if not 1 <= pods <= MAX_PODS:
        raise InputError(f"A job has from 1 to {MAX_PODS} pods, not {pods}.")
    network = {
        "cniVersion": CNI_VERSION,
        "name": NETWORK,
        "type": "rdmanet",
        "socket": str(socket),
        "stateDir": str(state_dir),
        "rdma": rdma,
        "capabilities": {"cgroupPath": True},
    }
    return Plan(
        name=name,
        plugin=str(plugin),
        network=network,
        cgroup=None if cgroup_root is None else str(cgroup_root / NETWORK / f"{name}-{identity}"),
        cgroup_root=str(cgroup_root or ""),
        pods=tuple(
            PodPlan(rank, f"{name}-{rank}", namespace, f"{identity}-{rank}", str(NETNS_DIR / f"rdmanet-{name}-{rank}"))
            for rank in range(pods)
        ),
    )


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rank's command ended: its exit status, negative for a signal, and when (any clock)."""

    rank: int
    status: int
    at_s: float

    @property
    def code(self) -> int:
        """As shells count: 128 and the signal's number for a signal."""
        return self.status if self.status >= 0 else 128 - self.status

    @property
    def words(self) -> str:
        """For people."""
        if self.status >= 0:
            return f"ended with status {self.status}"
        try:
            name = signal.Signals(-self.status).name
        except ValueError:
            name = str(-self.status)
        return f"was ended by signal {name}"


def verdict(plan: Plan, endings: Sequence[Ending], elapsed_s: float) -> tuple[int, str]:
    """Exit code and sentence: those of the rank that was the first to fail, else 0."""
    failed = sorted((one for one in endings if one.status != 0), key=lambda one: one.at_s)
    many = "1 pod" if len(plan.pods) == 1 else f"{len(plan.pods)} pods"
    if not failed:
        return 0, f"job {plan.name}: {many}, all ended with status 0 after {elapsed_s:.1f} s"
    first = failed[0]
    rest = "" if len(failed) == 1 else f"; {len(failed) - 1} more did not end with status 0"
    sentence = f"job {plan.name}: rank {first.rank} (pod {plan.pods[first.rank].name}) {first.words}"
    return first.code, f"{sentence} after {elapsed_s:.1f} s, the first to fail of {many}{rest}"
