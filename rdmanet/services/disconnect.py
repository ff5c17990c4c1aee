"""Ends datagram sockets whose backend has gone, in the host's network namespace and in pods'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rdmanet.model import NetnsId
from rdmanet.netlink import diag, namespace


class Sockets:
    """``places`` says where pods' network namespaces are now. The caller is in the host's."""

    def __init__(self, places: Callable[[], Iterable[tuple[str, NetnsId]]]):
        self._places = places

    def __call__(self, wanted: Mapping[int, set[bytes]]) -> None:
        """Destroys those with these cookies, as far as they are still connected to these ends. Errors as
        ``diag.destroy_connected``."""
        left = len(wanted) - diag.destroy_connected(wanted)
        # Closed ones are never found: then all namespaces are looked at.
        if left > 0:
            namespace.visit(self._places(), lambda _: diag.destroy_connected(wanted))
