"""docs/operations.md, block by block, as somebody on call would type it; `systemctl` does here what systemd does with
the one unit: it starts the agent and ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rdmanet.cni import CniCode
from testbed.guide import Block, blocks
from testbed.host import Host
from testbed.limited import granted, service
from testbed.paths import REPOSITORY
from tests.kernel.test_guide import Reader

PAGE = REPOSITORY / "docs/operations.md"
BLOCKS = blocks(PAGE)
#: Lines of the unit that need no explanation.
PLAIN = {"NotifyAccess", "ExecStart", "Environment", "TimeoutStartSec", "TimeoutStopSec", "UMask"}


class Operator(Reader):
    """Somebody who may also start and stop the service."""

    def take(self, block: Block) -> None:
        words = block.text.split()
        if words[0] != "systemctl":
            super().take(block)
            return
        _, what, unit = words
        assert unit == "rdmanet"
        if what in ("stop", "restart"):
            assert self.host.stop_agent() == 0
        if what in ("start", "restart"):
            self.host.start_agent()


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    with Host.scratch("operations") as host:
        operator = Operator(host, tmp_path_factory.mktemp("tools"))
        yield operator
        operator.close()


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_block(operator: Operator, block: Block) -> None:
    """In the page's order."""
    operator.take(block)


def test_the_page_explains_every_line_of_the_unit() -> None:
    text = PAGE.read_text(encoding="utf-8")
    keys = {key.removesuffix("Mode") for key in service()["Service"]} - PLAIN
    assert [key for key in sorted(keys) if f"`{key}" not in text] == []
    for name in granted():
        assert f"| `CAP_{name}` |" in text


def test_every_error_code_has_its_row() -> None:
    """Of the specification all, also those that only a later version might use; ours are compared in test_api."""
    rows = Path(REPOSITORY / "docs/errors.md").read_text(encoding="utf-8").splitlines()
    numbers = [row.split("|")[1].strip() for row in rows if row.startswith("| ")]
    assert {int(number) for number in numbers if number.isdigit()} >= {int(code) for code in CniCode}
