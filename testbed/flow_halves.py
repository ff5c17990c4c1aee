"""Which half of a translated flow belongs to which, as bpf/nat.h enters them."""

from __future__ import annotations

from rdmanet.datapath.flows import SERVICE, TRANSLATED, Flow, echo_answerer, key_of

_ICMPS = (1, 58)


def alias_key(flow: Flow) -> bytes | None:
    """The key of outside's half of a translated flow; None where it is not translated."""
    if not flow.flags & TRANSLATED:
        return None
    return _other_half(flow, (flow.translated, flow.translated_port), _pods_end(flow))


def inside_key(alias: Flow) -> bytes:
    """The key of the pod's half."""
    return _other_half(alias, (alias.translated, alias.translated_port), _own_end(alias))


def _other_half(flow: Flow, end: tuple[bytes, bytes], instead_of: tuple[bytes, bytes]) -> bytes:
    ends = [(flow.low, flow.low_port), (flow.high, flow.high_port)]
    ends.remove(instead_of)
    address, port = ends[0]
    # Who answers an echo has a port that follows from the identifier.
    return key_of(end, (address, echo_answerer(end[1]) if flow.protocol in _ICMPS else port), flow.protocol)


def _pods_end(flow: Flow) -> tuple[bytes, bytes]:
    return flow.aimed_at if flow.flags & SERVICE else flow.begun_by


def _own_end(alias: Flow) -> tuple[bytes, bytes]:
    """What outside sees of the pod: the end that began, or, of a service's flow, the one that it was aimed at."""
    return alias.aimed_at if alias.flags & SERVICE else alias.begun_by
