"""The datapath on the virtual machine's kernel: every program passes this verifier too, with maps of every size."""

from __future__ import annotations

import pytest

from tests.bpf import test_options


@pytest.mark.parametrize("size", test_options.SIZES)
def test_every_program_loads(size: str) -> None:
    test_options.test_every_program_loads_with_maps_of_every_size(size)
