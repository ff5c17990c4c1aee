"""rdmanet.datapath.slots."""

from __future__ import annotations

import pytest

from rdmanet.datapath.slots import Slots
from rdmanet.errors import ExhaustedError


def test_the_lowest_free_slot_is_given_once_to_each() -> None:
    slots = Slots(4, {70: 1})
    assert slots.of(70) == (1, False)
    assert slots.of(71) == (0, True)
    assert slots.of(71) == (0, False)
    assert slots.of(72) == (2, True)
    slots.give_back(71)
    slots.give_back(71)
    assert slots.find(71) is None
    assert slots.of(73) == (0, True)


def test_all_taken() -> None:
    slots = Slots(2, {1: 0})
    slots.of(2)
    with pytest.raises(ExhaustedError, match="2 attachments at most"):
        slots.of(3)
    slots.give_back(1)
    assert slots.of(3) == (0, True)
