"""The table of flows, as tests see and change it."""

from __future__ import annotations

from dataclasses import dataclass

from rdmanet.datapath import bpf, tables
from testbed.bpf.bench import Bench

#: struct flow_entry.flags
ORIGIN_IS_HIGH, REPLIED, TRANSLATED, SERVICE, ALIAS = 0x01, 0x02, 0x04, 0x08, 0x10


@dataclass(frozen=True)
class Entry:
    """One half of a flow, as the map has it."""

    key: bytes
    fields: dict[str, int | bytes]

    @property
    def alias(self) -> bool:
        """Whether it is outside's half."""
        return bool(int(self.fields["flags"]) & ALIAS)

    def write(self, bench: Bench, **changed: int | bytes) -> None:
        """Puts the entry into the table again, with other values. Those below 0 are before the machine was up: times
        are compared modulo 2^64, as they are kept."""
        fields = {**self.fields, **changed}
        fields = {name: value % 2**64 if isinstance(value, int) else value for name, value in fields.items()}
        bpf.update(bench.map("flows"), self.key, tables.FLOW.pack(*fields.values()))
        bench.forget_known()


def entries(bench: Bench) -> list[Entry]:
    """Inside halves first."""
    names = [name for name, code in tables.FLOW.fields if not code.endswith("x")]
    found = []
    for key in bench.keys("flows"):
        value = bpf.lookup(bench.map("flows"), key, tables.FLOW.size)
        assert value is not None
        found.append(Entry(key, dict(zip(names, tables.FLOW.unpack(value), strict=True))))
    return sorted(found, key=lambda entry: entry.alias)
