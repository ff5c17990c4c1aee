"""Addresses from the node's ranges: a pure choice; what is taken is the store's knowledge."""

from __future__ import annotations

import ipaddress
from collections.abc import Container

from rdmanet.errors import ConflictError, ExhaustedError, RequestError
from rdmanet.model import IPAddress, address_key

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def gateway(network: IPNetwork) -> IPAddress:
    """The pods' gateway: the first address of the range after the network's own."""
    return network.network_address + 1


class Range:
    """One family's range. Hands out next-free, so that an address just released rests as long as possible."""

    def __init__(self, network: IPNetwork):
        self.network = network
        # Left out: the network's address (IPv6: subnet-router anycast, RFC 4291 2.6.1), the gateway, IPv4's broadcast.
        self._first = 2
        self._last = network.num_addresses - (2 if network.version == 4 else 1)
        self._next = self._first

    @property
    def size(self) -> int:
        """How many pods the range has room for."""
        return self._last - self._first + 1

    def resume_after(self, address: IPAddress) -> None:
        """Starts the search behind an address, after a restart."""
        if address in self.network:
            self._next = int(address) - int(self.network.network_address) + 1

    def choose(self, taken: Container[bytes]) -> IPAddress:
        """The next free address; ``taken`` holds address keys. Raises ExhaustedError when there is none."""
        # A range larger than what can be taken always has a free address within len(taken) + 1 steps.
        steps = self.size
        offset = self._next
        for _ in range(steps):
            if not self._first <= offset <= self._last:
                offset = self._first
            address = self.network.network_address + offset
            if address_key(address) not in taken:
                self._next = offset + 1
                return address
            offset += 1
        raise ExhaustedError(
            f"No address is free in {self.network} ({self.size} pods): delete pods, let the runtime call GC, or"
            f" configure a larger"
            f" network.ipv{self.network.version}_range.",
            operation="allocate",
            subject=str(self.network),
        )

    def request(self, address: IPAddress, taken: Container[bytes]) -> IPAddress:
        """A particular address, as the runtime asked. Raises RequestError or ConflictError."""
        offset = int(address) - int(self.network.network_address)
        if address not in self.network or not self._first <= offset <= self._last:
            raise RequestError(
                f"The address {address} cannot be given to a pod: it is not in {self.network}, or is its gateway or"
                f" broadcast address.",
                operation="allocate",
                subject=str(address),
            )
        if address_key(address) in taken:
            raise ConflictError(
                f"The address {address} is in use by another pod.", operation="allocate", subject=str(address)
            )
        return address
