"""The pod's own RDMA device: opened by name, its GID found by address, its path MTU taken from the port."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from rdmanet.errors import UnavailableError, VerbsError
from rdmanet.model import address_key, address_of
from rdmanet.verbs import compat, forked, memory
from rdmanet.verbs.completions import CompletionQueues

#: RoCE devices have one port per device.
PORT = 1
#: ibv_mtu: IBV_MTU_256 is 1, each next one doubles.
_MTU_BYTES = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}
_IB_UVERBS = Path("/sys/class/infiniband_verbs")


class OpenDevice:
    """One opened device with one protection domain, shared by all queue pairs of a session."""

    def __init__(self, name: str):
        self.name = name
        try:
            with compat.call(f"the RDMA device {name} could not be opened", "ibv_open_device", name):
                self.context = compat.Context(name=name)
        except VerbsError as error:
            # Asked only now: to list the devices is most of what opening one costs.
            if name not in compat.device_names():
                raise UnavailableError(_why_absent(name), operation="open", subject=name) from error
            if error.errno in (errno.EPERM, errno.EACCES):
                raise UnavailableError(
                    f"this process may not open the RDMA device {name}: the container's device rules do not allow it",
                    operation=error.operation,
                    subject=name,
                    errno=error.errno,
                ) from error
            raise
        with compat.call(f"the RDMA device {name} gives no protection domain", "ibv_alloc_pd", name):
            self.pd = compat.PD(self.context)
        self.places = memory.PlacePool(self.pd)
        self._gid_indexes: dict[bytes, int] = {}
        attributes = self._query_device()
        self.max_wr = int(attributes.max_qp_wr)
        self.max_cqe = int(attributes.max_cqe)
        self.completions = CompletionQueues(self.context, name, self.max_cqe)
        self.max_read_atomic = int(attributes.max_qp_rd_atom)
        forked.watch(self)
        self.has_atomics = int(attributes.atomic_caps) != compat.enums.IBV_ATOMIC_NONE

    def _query_device(self) -> Any:
        with compat.call(f"the RDMA device {self.name} cannot be queried", "ibv_query_device", self.name):
            return self.context.query_device()

    def port(self) -> Any:
        """The port's attributes as they are now."""
        with compat.call(f"port {PORT} of {self.name} cannot be queried", "ibv_query_port", self.name):
            return self.context.query_port(PORT)

    @staticmethod
    def mtu_bytes(port: Any) -> int:
        """The path MTU that the port's network interface allows, by the port's attributes."""
        return _MTU_BYTES[int(port.active_mtu)]

    def gid_index(self, gid: bytes, port: Any) -> int:
        """The index of the RoCE v2 GID that is this address key. Never a guess: indexes differ from pod to pod."""
        known = self._gid_indexes.get(gid)
        if known is not None and self._gid_at(known) == gid:
            return known
        entries = int(port.gid_tbl_len)
        with compat.call(f"the GID table of {self.name} cannot be read", "ibv_query_gid_table", self.name):
            table = self.context.query_gid_table(entries)
        for entry in table:
            if (
                entry.port_num == PORT
                and entry.gid_type == compat.enums.IBV_GID_TYPE_ROCE_V2
                and address_key(entry.gid_str()) == gid
            ):
                self._gid_indexes[gid] = int(entry.gid_index)
                return self._gid_indexes[gid]
        raise UnavailableError(
            f"{self.name} has no RoCE v2 GID for {address_of(gid)}; is the address still on the pod's interface?",
            operation="ibv_query_gid_table",
            subject=self.name,
        )

    def _gid_at(self, index: int) -> bytes | None:
        """The GID at this index now; None where there is none."""
        try:
            return address_key(str(self.context.query_gid(PORT, index)))
        except (compat.PyverbsError, ValueError):
            return None

    def register(self, buffer: Any, **rights: bool) -> memory.MemoryRegion:
        """See rdmanet.verbs.memory.register."""
        return memory.register(self.pd, buffer, **rights)

    def forked(self) -> list[int]:
        """In a child of its process: see rdmanet.verbs.forked."""
        self.completions.forked()
        return [int(self.context.cmd_fd)]

    @property
    def idle(self) -> bool:
        """Whether no queue pair is there."""
        return self.completions.idle

    def close(self) -> None:
        """After everything that was made on it has been closed."""
        self.completions.close()
        self.places.close()
        with compat.destroyed("the protection domain could not be freed", "ibv_dealloc_pd", self.name):
            self.pd.close()
        with compat.destroyed("the RDMA device could not be closed", "ibv_close_device", self.name):
            self.context.close()


def _why_absent(name: str) -> str:
    """What a person can do about a device that the agent gave the pod and that libibverbs does not list."""
    for uverbs in sorted(_IB_UVERBS.glob("uverbs*")) if _IB_UVERBS.is_dir() else ():
        try:
            listed = (uverbs / "ibdev").read_text().strip()
        except OSError:
            continue  # went away meanwhile
        if listed == name:
            node = Path("/dev/infiniband") / uverbs.name
            if not node.exists():
                return (
                    f"this container does not have {node}, the node of its RDMA device {name}; "
                    "let the runtime pass that device in"
                )
            if not os.access(node, os.R_OK | os.W_OK):
                return f"this user may not open {node}, the node of its RDMA device {name}"
            return f"the RDMA device {name} is there, but libibverbs lacks its driver: install ibverbs-providers"
    return (
        f"the RDMA device {name} of this pod is not visible here: /sys of this container is not the pod's own, or the "
        "device has been removed"
    )
