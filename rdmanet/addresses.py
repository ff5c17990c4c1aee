"""The node's own addresses, as policy and services know them: read at the start and after every change.

Kubernetes' NetworkPolicy never stands between a pod and its node, and NodePorts are at the node's addresses, whichever
those are at the moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from concurrent.futures import Executor
from typing import Protocol

from rdmanet import background
from rdmanet.errors import RdmanetError
from rdmanet.model import address_key
from rdmanet.netlink import events
from rdmanet.netlink.route import RouteSocket

log = logging.getLogger(__name__)


class NodeAddressMap(Protocol):
    """What of ``rdmanet.datapath.policy.PolicyMaps`` is used."""

    def set_node_addresses(self, addresses: Collection[bytes]) -> None: ...


class NodeAddresses:
    """Keeps the datapath's map of them true; ``start``, then ``stop``."""

    def __init__(self, addresses: NodeAddressMap, executor: Executor):
        self._map = addresses
        self._executor = executor
        self._source: events.Source | None = None
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Watches first and reads then, so that nothing is missed in between. Raises KernelError, NetlinkError and
        BpfError."""
        loop = asyncio.get_running_loop()
        self._source = await loop.run_in_executor(self._executor, events.address_source)
        loop.add_reader(self._source.fileno(), self._heard)
        await loop.run_in_executor(self._executor, self._write)
        self._worker = background.begin(self._work(), "watch on the node's addresses")

    async def stop(self) -> None:
        """Ends what ``start`` began; the map stays. Idempotent."""
        if self._source is not None:
            asyncio.get_running_loop().remove_reader(self._source.fileno())
            self._source.close()
            self._source = None
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None

    def _heard(self) -> None:
        if self._source is None:
            return
        try:
            happened = self._source.read()
        except RdmanetError as error:
            log.error("the node's addresses are no longer watched: %s", error)
            asyncio.get_running_loop().remove_reader(self._source.fileno())
            return
        if happened:
            self._wake.set()

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await asyncio.get_running_loop().run_in_executor(self._executor, self._write)
            except RdmanetError as error:
                log.error("the node's addresses could not be written: %s", error)

    def _write(self) -> None:
        with RouteSocket.here() as route:
            found = {address for _, address, _ in route.addresses()}
        # Those mean something on one link or host alone: a pod's packet to one never gets as far as policy.
        self._map.set_node_addresses(
            {address_key(address) for address in found if not (address.is_loopback or address.is_link_local)}
        )
