"""The world outside a host: a network namespace behind the host's uplink, with servers in it.

The host reaches it over a veth pair ``uplink0`` and has its default routes through it. The outside knows the link's own
two networks and nothing of pods: an answer to a pod's packet comes back only when it was masqueraded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.container import Completed, Container, Process, Specification

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.host import Host

UPLINK = "uplink0"
#: RFC 5737 and RFC 3849 addresses. The far ones are beyond the link, reached by the default routes only.
HOST_IPV4, HOST_IPV6 = "198.51.100.2", "2001:db8:100::2"
GATEWAY_IPV4, GATEWAY_IPV6 = "198.51.100.1", "2001:db8:100::1"
FAR_IPV4, FAR_IPV6 = "203.0.113.1", "2001:db8:200::1"
#: Behind a router and a link of its own: that link's two ends.
ROUTER_IPV4, ROUTER_IPV6 = "203.0.113.129", "2001:db8:201::1"
BEHIND_IPV4, BEHIND_IPV6 = "203.0.113.130", "2001:db8:201::2"


@dataclass
class Outside:
    """The namespace behind `host`'s uplink."""

    host: Host
    container: Container
    behind: Container | None = None

    @classmethod
    def connect(cls, host: Host, *, mtu_bytes: int = 1500) -> Outside:
        """Make the namespace, the veth pair, the addresses and the host's default routes."""
        container = Container.start(
            f"{host.name}-outside",
            Specification(
                unshare=("net", "mnt"),
                actions=(
                    ("umount", "/sys"),
                    ("mount", "sysfs", "/sys", "sysfs", 0, ""),
                ),
            ),
            inside=host.container,
        )
        outside = cls(host, container)
        try:
            # noprefixroute, nodad: nothing appears later by itself, so that dumps can be compared.
            host.ip(
                f"link add {UPLINK} mtu {mtu_bytes} type veth peer name eth0 netns {container.pid} mtu {mtu_bytes}",
                f"address add {HOST_IPV4}/24 dev {UPLINK}",
                f"address add {HOST_IPV6}/64 dev {UPLINK} nodad",
                f"link set {UPLINK} addrgenmode none",
                f"link set {UPLINK} up",
            )
            outside.ip(
                "link set lo up",
                f"address add {GATEWAY_IPV4}/24 dev eth0",
                f"address add {GATEWAY_IPV6}/64 dev eth0 nodad",
                "link set eth0 addrgenmode none",
                "link set eth0 up",
                # What the far address sends needs a source to ask for neighbours: Linux takes this one alone.
                "address add fe80::1/64 dev eth0 nodad",
                f"address add {FAR_IPV4}/32 dev lo",
                f"address add {FAR_IPV6}/128 dev lo nodad",
            )
            host.ip(
                f"route add default via {GATEWAY_IPV4} dev {UPLINK}",
                f"route add ::/0 via {GATEWAY_IPV6} dev {UPLINK}",
            )
        except BaseException:
            container.stop()
            raise
        return outside

    def extend(self, *, mtu_bytes: int) -> Container:
        """Another namespace, behind a link with an MTU of its own to which the outside is the router."""
        self.behind = Container.start(
            f"{self.host.name}-behind", Specification(unshare=("net", "mnt")), inside=self.host.container
        )
        # The names of the sysctls are those of the namespace that reads them.
        forward = ("ipv4/ip_forward", "ipv6/conf/all/forwarding")
        self.exec(["sh", "-c", " && ".join(f"echo 1 > /proc/sys/net/{name}" for name in forward)])
        self.ip(
            f"link add eth1 mtu {mtu_bytes} type veth peer name eth0 netns {self.behind.pid} mtu {mtu_bytes}",
            f"address add {ROUTER_IPV4}/30 dev eth1",
            f"address add {ROUTER_IPV6}/64 dev eth1 nodad",
            "link set eth1 up",
        )
        lines = (
            "link set lo up",
            f"address add {BEHIND_IPV4}/30 dev eth0",
            f"address add {BEHIND_IPV6}/64 dev eth0 nodad",
            "link set eth0 up",
            # As if its own link were as wide as others: who sends there learns the path's MTU from the router alone.
            f"route add default via {ROUTER_IPV4} dev eth0 advmss 1460",
            f"route add ::/0 via {ROUTER_IPV6} dev eth0 advmss 1440",
        )
        self.behind.exec(["ip", "-batch", "-"], input="\n".join(lines) + "\n")
        return self.behind

    def ip(self, *lines: str) -> None:
        """Run ip commands (``ip -batch``) outside."""
        self.container.exec(["ip", "-batch", "-"], input="\n".join(lines) + "\n")

    def exec(self, argv: Sequence[str], **options: Any) -> Completed:
        """Run a command outside to its end (testbed.container.Container.exec)."""
        return self.container.exec(argv, **options)

    def popen(self, argv: Sequence[str], **options: Any) -> Process:
        """Start a command outside (testbed.container.Container.popen)."""
        return self.container.popen(argv, **options)

    def disconnect(self) -> None:
        """Remove the uplink and the namespace; idempotent."""
        # The link goes first and by name: a namespace's own end takes its links down some time later.
        self.host.exec(["ip", "link", "delete", UPLINK], check=False)
        if self.behind is not None:
            self.behind.stop()
        self.container.stop()
