"""Which RDMA devices this host can give to pods: the one place where a back end is chosen, and undone."""

from __future__ import annotations

import ipaddress
import json
import platform

from rdmanet import node
from rdmanet.config import Config
from rdmanet.errors import UnavailableError
from rdmanet.model import Backend, RdmaMode
from rdmanet.netlink import messages, nldev
from rdmanet.netlink.batch import BatchSocket
from rdmanet.netlink.lent import LentAddresses
from rdmanet.rdma.backend import DeviceBackend
from rdmanet.rdma.rxe import RxeBackend, wanted_release
from rdmanet.rdma.shared import SharedBackend
from rdmanet.store import Store

#: The effect on the host that stands for rule, table and addresses on a shared device's netdev.
LENT = "lent-addresses"


def find_devices(config: Config, store: Store) -> tuple[DeviceBackend | None, str | None]:
    """The back end for pods' RDMA devices, or None and why there is none. Takes back what another configuration lent to
    a shared device."""
    if not _lends(config, store):
        undo(store)
    if not config.rdma.enabled:
        return None, "switched off in the configuration (rdma.enabled)"
    try:
        with nldev.RdmaSocket.here() as rdma:
            mode = rdma.mode()
    except UnavailableError as error:
        return None, error.sentence
    if config.rdma.backend is Backend.SHARED:
        return _shared(config, store, mode)
    wanted = wanted_release(mode)
    if node.kernel_release() < wanted:
        return None, (
            f"Soft-RoCE works in pods' namespaces from Linux {wanted[0]}.{wanted[1]} in {mode} mode; this is"
            f' {platform.release()}. rdma.backend = "shared" gives pods a device of the host on any kernel'
        )
    return RxeBackend(nldev.RdmaSocket, mode, remove_link), None


def _shared(config: Config, store: Store, mode: RdmaMode) -> tuple[DeviceBackend | None, str | None]:
    if mode is not RdmaMode.SHARED:
        return None, (
            f'rdma.backend is "shared", and the RDMA subsystem is in {mode} mode, where pods see no device of the host:'
            " boot with `rdma system set netns shared`"
        )
    lent = LentAddresses((config.network.ipv4_range, config.network.ipv6_range))

    def record(netdev: str) -> None:
        undo(store)
        store.record_effect(LENT, json.dumps({"netdev": netdev, "ranges": _ranges(config)}))

    recorded = store.effects().get(LENT)
    netdev = json.loads(recorded)["netdev"] if recorded else None
    return SharedBackend(nldev.RdmaSocket, lent, config.rdma.shared_device, netdev=netdev, record=record), None


def remove_link(name: str) -> None:
    """Removes a link of the host, if it is there; returns when it is gone."""
    with BatchSocket() as host:
        host.send([messages.delete_link(name)])


def _ranges(config: Config) -> list[str]:
    return [str(network) for network in (config.network.ipv4_range, config.network.ipv6_range)]


def _lends(config: Config, store: Store) -> bool:
    """Whether this configuration goes on with what was lent."""
    recorded = store.effects().get(LENT)
    shared = config.rdma.enabled and config.rdma.backend is Backend.SHARED
    return shared and (recorded is None or json.loads(recorded)["ranges"] == _ranges(config))


def undo(store: Store) -> None:
    """Takes back what a shared device's back end did to the host, addresses included. Idempotent."""
    recorded = store.effects().get(LENT)
    if recorded is None:
        return
    detail = json.loads(recorded)
    ranges = tuple(ipaddress.ip_network(text) for text in detail["ranges"])
    lent = LentAddresses(ranges)
    lent.undo(detail["netdev"])
    lent.close()
    store.forget_effect(LENT)
