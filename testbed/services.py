"""Services on a scratch host as their users have them: manifests through `rdmanet apply`, pods that serve under their
names, clients in pods, on the host and outside."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdmanet.errors import UnavailableError
from testbed.container import Completed
from testbed.host import Dump, Host
from testbed.outside import FAR_IPV4, FAR_IPV6, GATEWAY_IPV4, GATEWAY_IPV6, HOST_IPV4, HOST_IPV6
from testbed.paths import REPOSITORY
from testbed.peer import Peer
from testbed.pod import Pod

CALLER = Path(__file__).with_name("caller.py")
NETWORK: dict[str, Any] = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet"}
TARGET_PORT = 8080
KINDS = ("tcp", "udp")
FAMILIES = (4, 6)
CLUSTER_IP = {4: "10.96.0.10", 6: "fd96::10"}
#: No address of the host: the outside routes them there (RFC 5737, RFC 3849).
EXTERNAL_IP = {4: "192.0.2.10", 6: "2001:db8:300::10"}
NODE = {4: HOST_IPV4, 6: HOST_IPV6}
#: Clients outside: on the uplink's link, and behind it.
OUTSIDE = {4: (GATEWAY_IPV4, FAR_IPV4), 6: (GATEWAY_IPV6, FAR_IPV6)}
PORT, NODE_PORT = 80, 30080

Document = dict[str, Any]


def start_caller(host: Host, place: str, container: Any) -> Peer:
    """The program of caller.py in a container, the host or the outside."""
    return Peer.start(f"{host.name}-{place}-caller", container.popen, [sys.executable, "-I", "-S", "-E", str(CALLER)])


def service(name: str = "web", *, node_port: int | None = None, **spec: Any) -> Document:
    """A dual-stack Service of TCP and UDP on one port; `spec` is what it has besides."""
    ports = [
        {"name": kind, "protocol": kind.upper(), "port": PORT, "targetPort": TARGET_PORT}
        | ({"nodePort": node_port} if node_port else {})
        for kind in KINDS
    ]
    both = {"clusterIP": CLUSTER_IP[4], "clusterIPs": [CLUSTER_IP[4], CLUSTER_IP[6]], "ipFamilies": ["IPv4", "IPv6"]}
    basic = {"type": "NodePort" if node_port else "ClusterIP", "ipFamilyPolicy": "RequireDualStack", **both}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {**basic, "ports": ports, **spec},
    }


def slices(
    endpoints: Mapping[str, Mapping[int, str]], name: str = "web", **conditions: Mapping[str, bool]
) -> list[Document]:
    """The service's EndpointSlices, one of each family: pods' addresses by name and family, `conditions` by name."""
    return [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": f"{name}-ipv{version}", "labels": {"kubernetes.io/service-name": name}},
            "addressType": f"IPv{version}",
            "ports": [{"name": kind, "protocol": kind.upper(), "port": TARGET_PORT} for kind in KINDS],
            "endpoints": [
                {"addresses": [addresses[version]], "conditions": dict(conditions.get(pod, {"ready": True}))}
                for pod, addresses in endpoints.items()
            ],
        }
        for version in FAMILIES
    ]


TERMINATING = {"ready": False, "serving": True, "terminating": True}
DEAD = {"ready": False, "serving": False, "terminating": True}


@dataclass
class Scene:
    """A host with an agent and an outside, pods that serve, and callers in all of them."""

    host: Host
    pods: dict[str, Pod] = field(default_factory=dict)
    addresses: dict[str, dict[int, str]] = field(default_factory=dict)
    callers: dict[str, Peer] = field(default_factory=dict)
    before: Dump = field(default_factory=dict)  # the host without an agent

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, name: str, pods: Sequence[str], config: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Iterator[Scene]:
        """All of it, gone afterwards. A pod is in another namespace as `namespace/name`."""
        with Host.scratch(name) as host, contextlib.ExitStack() as stack:
            scene = cls(host)
            outside = host.connect_outside()
            outside.ip(*(f"route add {EXTERNAL_IP[version]} via {NODE[version]} dev eth0" for version in FAMILIES))
            scene.before = host.dump()
            host.start_agent(config)
            for place, container in (("host", host), ("outside", outside)):
                scene.callers[place] = stack.enter_context(start_caller(host, place, container))
            for pod in pods:
                namespace, _, name = pod.rpartition("/")
                scene.add(name, stack, namespace=namespace or "default")
            yield scene

    def add(
        self,
        name: str,
        stack: contextlib.ExitStack,
        *,
        namespace: str = "default",
        network: Mapping[str, Any] = NETWORK,
        args: str | None = None,
    ) -> None:
        """One more pod, gone with the stack; `args` is CNI_ARGS (by default its Kubernetes names)."""
        pod = self.pods[name] = stack.enter_context(Pod.create(self.host, name, namespace=namespace))
        outcome = self.host.cni("ADD", pod, network, args=args)
        if outcome.returncode != 0 or outcome.output is None:
            raise UnavailableError(f"ADD of {name}: {outcome.sentence}", subject=name)
        found = [ip["address"].split("/")[0] for ip in outcome.output["ips"]]
        self.addresses[name] = {6 if ":" in address else 4: address for address in found}
        pod.start()
        stack.callback(pod.stop)
        self.callers[name] = stack.enter_context(start_caller(self.host, name, pod.running))
        self.ask(name, "serve", name=name, port=TARGET_PORT)

    def ask(self, place: str, do: str, **request: Any) -> dict[str, Any]:
        """One request to a place's program."""
        return self.callers[place].ask(do, **request)

    def of(self, *names: str) -> dict[str, dict[int, str]]:
        """These pods' addresses."""
        return {name: self.addresses[name] for name in names}

    def command(self, *words: str, text: str | None = None) -> str:
        """A `rdmanet` command with the agent's configuration; what it prints."""
        return self.run(*words, text=text).stdout

    def run(self, *words: str, text: str | None = None, check: bool = True) -> Completed:
        """The same, with everything else that is known of it; without `check` it may fail."""
        argv = [sys.executable, "-m", "rdmanet", *words, "--config", self.host._config_file()]
        return self.host.exec(argv, cwd=str(REPOSITORY), input=text or "", check=check)

    def apply(self, *documents: Document) -> float:
        """`rdmanet apply`; when it has returned, in seconds of the monotonic clock."""
        self.command("apply", "-f", "-", text="\n---\n".join(map(json.dumps, documents)))
        return time.monotonic()

    def delete(self, *documents: Document) -> None:
        """`rdmanet delete` of what the documents name."""
        self.command("delete", "-f", "-", text="\n---\n".join(map(json.dumps, documents)))

    def put(self, *documents: Document) -> float:
        """The same through the agent's socket, without a process's start: where the time until a change bites counts.
        When it was asked for, in seconds of the monotonic clock."""
        begun = time.monotonic()
        self.host.api("PUT", "/v1/objects", {"documents": list(documents)})
        return begun

    def drops(self, reason: str, pod: str | None = None) -> int:
        """Packets, or sockets, of a pod (None: of no pod) that were dropped for a reason."""
        rows = self.host.api("GET", "/v1/status")["drops"]
        name = None if pod is None else f"default/{pod}"
        return sum(row["packets"] for row in rows if row["pod"] == name and row["reason"] == reason)


def shares(names: Mapping[str, int]) -> str:
    """Who answered how often, for a row's detail."""
    return ", ".join(f"{name} {times}" for name, times in sorted(names.items()))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> float:
    """Asks again and again, as fast as answers come; the seconds it took."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() > begun + timeout_s:
            raise UnavailableError(f"after {timeout_s:g} s still not: {what}")
    return time.monotonic() - begun
