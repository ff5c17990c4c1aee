"""Choosing addresses: bounds, exhaustion, order, requests; never one that is taken."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet.errors import ConflictError, ExhaustedError, RequestError
from rdmanet.ipam import IPNetwork, Range, gateway
from rdmanet.model import IPAddress, address_key


def network(text: str) -> IPNetwork:
    return ipaddress.ip_network(text)


def address(text: str) -> IPAddress:
    return ipaddress.ip_address(text)


def fill(space: Range, taken: set[bytes]) -> list[str]:
    """Everything that can still be handed out, in order."""
    found: list[str] = []
    while True:
        try:
            chosen = space.choose(taken)
        except ExhaustedError:
            return found
        taken.add(address_key(chosen))
        found.append(str(chosen))


@pytest.mark.parametrize(
    ("text", "first", "size", "last"),
    [
        ("10.213.0.0/20", "10.213.0.1", 4093, "10.213.15.254"),
        ("10.0.0.0/29", "10.0.0.1", 5, "10.0.0.6"),
        ("10.0.0.0/30", "10.0.0.1", 1, "10.0.0.2"),
        ("fd00::/125", "fd00::1", 6, "fd00::7"),
        ("fd00::/126", "fd00::1", 2, "fd00::3"),
    ],
)
def test_a_range_hands_out_all_but_network_gateway_and_broadcast(text: str, first: str, size: int, last: str) -> None:
    space = Range(network(text))
    assert str(gateway(space.network)) == first
    assert space.size == size
    found = fill(space, set())
    assert len(found) == len(set(found)) == size
    assert found[0] == str(gateway(space.network) + 1)
    assert found[-1] == last


def test_a_full_range_says_what_to_do() -> None:
    space = Range(network("10.0.0.0/30"))
    taken = {address_key(space.choose(set()))}
    with pytest.raises(ExhaustedError) as caught:
        space.choose(taken)
    assert caught.value.sentence == (
        "No address is free in 10.0.0.0/30 (1 pods): delete pods, let the runtime call GC, or configure a larger"
        " network.ipv4_range."
    )


def test_addresses_rest_before_they_are_used_again() -> None:
    space = Range(network("10.0.0.0/29"))
    assert str(space.choose(set())) == "10.0.0.2"
    assert str(space.choose(set())) == "10.0.0.3", "released at once, and still not the next"
    for _ in range(3):
        space.choose(set())
    assert str(space.choose(set())) == "10.0.0.2", "after the last comes the first"


def test_wrap_around_finds_the_only_gap() -> None:
    space = Range(network("10.0.0.0/29"))
    taken: set[bytes] = set()
    fill(space, taken)
    for gap in ("10.0.0.4", "10.0.0.2", "10.0.0.6"):
        taken.remove(address_key(gap))
        assert str(space.choose(taken)) == gap
        taken.add(address_key(gap))


def test_after_a_restart_the_search_goes_on() -> None:
    space = Range(network("10.0.0.0/29"))
    space.resume_after(address("10.0.0.4"))
    assert str(space.choose(set())) == "10.0.0.5"
    space.resume_after(address("10.0.0.6"))
    assert str(space.choose(set())) == "10.0.0.2"
    space.resume_after(address("192.0.2.1"))  # of an earlier configuration
    assert str(space.choose(set())) == "10.0.0.3"


@pytest.mark.parametrize("text", ["10.0.0.0", "10.0.0.1", "10.0.0.7", "10.0.0.8", "9.255.255.255", "fd00::2"])
def test_requests_for_what_no_pod_may_have(text: str) -> None:
    with pytest.raises(RequestError, match=f"The address {text} cannot be given to a pod"):
        Range(network("10.0.0.0/29")).request(address(text), set())


@pytest.mark.parametrize(("space", "text"), [("10.0.0.0/29", "10.0.0.6"), ("fd00::/64", "fd00::ffff:ffff:ffff:ffff")])
def test_requests_for_what_is_free_and_taken(space: str, text: str) -> None:
    asked = address(text)
    assert Range(network(space)).request(asked, {address_key("10.0.0.2")}) == asked
    with pytest.raises(ConflictError, match=f"The address {text} is in use by another pod"):
        Range(network(space)).request(asked, {address_key(asked)})


NETWORKS = st.one_of(
    st.builds(lambda p: network(f"10.0.0.0/{p}"), st.integers(24, 30)),
    st.builds(lambda p: network(f"fd00::/{p}"), st.integers(119, 126)),
)


@given(NETWORKS, st.data())
def test_a_taken_address_is_never_handed_out(space: IPNetwork, data: st.DataObject) -> None:
    addresses = [space.network_address + offset for offset in range(space.num_addresses)]
    taken = {address_key(a) for a in data.draw(st.sets(st.sampled_from(addresses)))}
    chooser = Range(space)
    if data.draw(st.booleans()):
        chooser.resume_after(data.draw(st.sampled_from(addresses)))
    before = set(taken)
    found = fill(chooser, taken)
    reserved = {str(space.network_address), str(gateway(space))}
    reserved |= {str(space.broadcast_address)} if space.version == 4 else set()
    assert {address_key(text) for text in found}.isdisjoint(before)
    assert reserved.isdisjoint(found)
    assert all(ipaddress.ip_address(text) in space for text in found)
    assert set(found) == {str(a) for a in addresses if address_key(a) not in before} - reserved, "none is left over"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=60))
def test_any_order_of_taking_and_releasing(moves: list[tuple[bool, int]]) -> None:
    space = Range(network("10.0.0.0/29"))
    held: list[IPAddress] = []
    for take, which in moves:
        if take and len(held) < space.size:
            chosen = space.choose({address_key(a) for a in held})
            assert chosen not in held
            held.append(chosen)
        elif take:
            with pytest.raises(ExhaustedError):
                space.choose({address_key(a) for a in held})
        elif held:
            held.pop(which % len(held))
