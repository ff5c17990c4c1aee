"""Which RDMA devices this host can give to pods: the one place where a back end is chosen."""

from __future__ import annotations

import platform

from rdmanet import node
from rdmanet.config import Config
from rdmanet.errors import UnavailableError
from rdmanet.netlink import nldev
from rdmanet.rdma.backend import DeviceBackend
from rdmanet.rdma.rxe import RxeBackend, wanted_release


def find_devices(config: Config) -> tuple[DeviceBackend | None, str | None]:
    """The back end for pods' RDMA devices, or None and why there is none."""
    if not config.rdma.enabled:
        return None, "switched off in the configuration (rdma.enabled)"
    try:
        with nldev.RdmaSocket.here() as rdma:
            mode = rdma.mode()
    except UnavailableError as error:
        return None, error.sentence
    wanted = wanted_release(mode)
    if node.kernel_release() < wanted:
        return None, (
            f"Soft-RoCE works in pods' namespaces from Linux {wanted[0]}.{wanted[1]} in {mode} mode; this is"
            f" {platform.release()}"
        )
    return RxeBackend(nldev.RdmaSocket, mode), None
