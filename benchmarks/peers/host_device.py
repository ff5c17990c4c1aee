"""An rxe device of the host for pods to share, on a netdev of its own: what a NIC beside the uplink would be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from testbed.host import Host

DEVICE, NETDEV = "host0", "nic0"
_PEER = "nic1"
#: The agent's configuration for it.
CONFIG = {"rdma": {"backend": "shared", "shared_device": DEVICE}}
#: RFC 5737 and RFC 3849.
_ADDRESSES = ("192.0.2.1/24", "2001:db8:9::1/64")


def make_device(host: Host) -> None:
    """The rxe device, on the netdev that is there."""
    host.exec(["rdma", "link", "add", DEVICE, "type", "rxe", "netdev", NETDEV])


def delete_device(host: Host) -> None:
    """As when its module is unloaded."""
    host.exec(["rdma", "link", "delete", DEVICE])


@contextlib.contextmanager
def host_device(host: Host) -> Iterator[None]:
    """The device with its netdev, for a while."""
    host.ip(
        f"link add {NETDEV} type veth peer name {_PEER}",
        *(f"link set {name} addrgenmode none" for name in (NETDEV, _PEER)),
        f"link set {_PEER} up",
        f"address add {_ADDRESSES[0]} dev {NETDEV}",
        f"address add {_ADDRESSES[1]} dev {NETDEV} nodad",
        f"link set {NETDEV} up",
    )
    # The netdev's own addresses are to be the same after it was down.
    host.exec(["sysctl", "-qw", f"net.ipv6.conf.{NETDEV}.keep_addr_on_down=1"])
    try:
        make_device(host)
        yield
    finally:
        host.exec(["rdma", "link", "delete", DEVICE], check=False)
        host.exec(["ip", "link", "delete", NETDEV], check=False)
