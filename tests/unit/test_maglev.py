"""rdmanet.services.maglev."""

from __future__ import annotations

from collections import Counter

import pytest

from rdmanet.errors import InputError
from rdmanet.services.maglev import table

NAMES = sorted(f"backend {number}".encode() for number in range(10))


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_each_place_has_a_backend_and_each_backend_its_share(count: int) -> None:
    size = 1021
    places = Counter(table(NAMES[:count], size))
    assert set(places) == set(range(count))
    assert sum(places.values()) == size
    assert max(places.values()) - min(places.values()) <= size / count * 0.1 + 1


def test_the_same_names_give_the_same_table() -> None:
    assert table(NAMES, 251) == table(list(NAMES), 251)


def test_few_places_move_when_one_goes() -> None:
    size = 1021
    before = [NAMES[index] for index in table(NAMES, size)]
    left = NAMES[:4] + NAMES[5:]
    after = [left[index] for index in table(left, size)]
    moved = sum(one != other and one != NAMES[4] for one, other in zip(before, after, strict=True))
    assert NAMES[4] not in after
    assert moved < size * 0.05


def test_nobody_has_an_empty_table() -> None:
    assert table([], 7) == [-1] * 7


@pytest.mark.parametrize("size", [0, 1, 4, 1000])
def test_a_size_that_is_no_prime_is_refused(size: int) -> None:
    with pytest.raises(InputError, match="must be a prime"):
        table(NAMES[:1], size)


def test_more_backends_than_places_are_refused() -> None:
    with pytest.raises(InputError, match="no room for 10 backends"):
        table(NAMES, 7)
