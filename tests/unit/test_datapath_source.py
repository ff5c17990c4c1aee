"""rdmanet.datapath.source: joining parts, and the names of drop reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdmanet.datapath import source
from rdmanet.errors import NotFoundError, StateError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in source.ENTRY_FILES:
        (tmp_path / name).write_text(f'#include <linux/types.h>\n#include "part.h"\nint {name[:-2]};\n')
    (tmp_path / "part.h").write_text('#include "deeper.h"\nint part;\n')
    (tmp_path / "deeper.h").write_text("int deeper;\n")
    return tmp_path


def test_parts_are_put_in_place_once_with_their_lines(directory: Path) -> None:
    lines = source.join(directory).splitlines()
    assert lines[:10] == [
        '#line 1 "pod.c"',
        "#include <linux/types.h>",
        '#line 1 "part.h"',
        '#line 1 "deeper.h"',
        "int deeper;",
        '#line 2 "part.h"',
        "int part;",
        '#line 3 "pod.c"',
        "int pod;",
        f'#line 1 "{source.ENTRY_FILES[1]}"',
    ]
    assert lines.count("int part;") == 1
    assert [line for line in lines if line.startswith("int ")][2:] == [
        f"int {name.removesuffix('.c')};" for name in source.ENTRY_FILES
    ]


def test_a_missing_part_is_named_with_its_includer(directory: Path) -> None:
    (directory / "deeper.h").unlink()
    with pytest.raises(NotFoundError, match=r"lacks deeper\.h, which part\.h names"):
        source.join(directory)


def test_reasons_in_lower_case_without_prefix() -> None:
    text = "enum drop_reason {\n DROP_ONE = 1, /* not DROP_TWO */\n DROP_THE_SECOND, // DROP_X\n};"
    assert source.drop_reasons(text) == ("one", "the_second")


@pytest.mark.parametrize(
    "text",
    ["", "enum drop_reason {};", "enum drop_reason { DROP_A = 0 };", "enum drop_reason { DROP_A = 1, DROP_B = 3 };"],
)
def test_reasons_that_would_be_read_wrongly(text: str) -> None:
    with pytest.raises(StateError):
        source.drop_reasons(text)


def test_the_real_source_has_the_designs_reasons() -> None:
    """The names are labels of metrics: changing one breaks people's dashboards."""
    assert source.drop_reasons(source.join(source.default_directory())) == (
        "malformed",
        "spoofed_mac",
        "spoofed_address",
        "not_ip",
        "multicast",
        "no_endpoint",
        "no_route",
        "not_uplink",
        "no_masquerade_address",
        "fragment",
        "nat_protocol",
        "nat_no_port",
        "roce_no_device",
        "roce_not_peer",
        "roce_revoked",
        "roce_unleased",
        "roce_nat",
        "no_attachment",
        "no_node",
        "no_program",
        "flow_table_full",
        "flow_limit",
        "fragment_unknown",
        "icmp_unrelated",
        "neighbour",
        "policy_egress",
        "policy_ingress",
        "no_backend",
        "service_conflict",
        "fragment_early",
        "bandwidth_egress",
        "bandwidth_ingress",
    )
