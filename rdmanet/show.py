"""Tables for people: pure functions from the agent's JSON to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Left-aligned columns, two blanks apart, as wide as they need."""
    texts = [[str(cell) for cell in row] for row in rows]
    lines = [[heading.upper() for heading in headings], *texts]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def status(document: Mapping[str, Any]) -> str:
    """`rdmanet status`."""
    agent = document["agent"]
    parts = [
        f"agent {agent['version']} ready for {agent['ready_s']:.0f} s, Linux {agent['kernel']},"
        f" RDMA {agent['rdma_mode'] or 'none: ' + str(agent['rdma_missing'])}"
    ]
    attachments = document["attachments"]
    if attachments:
        parts.append(
            table(
                ("pod", "interface", "ipv4", "ipv6", "device", "state"),
                [
                    (
                        row["pod"],
                        row["ifname"],
                        row["ipv4"] or "-",
                        row["ipv6"] or "-",
                        row["device"]["name"] if row["device"] else "-",
                        row["state"] + (f" ({row['degraded']})" if row["degraded"] else ""),
                    )
                    for row in attachments
                ],
            )
        )
    else:
        parts.append("no pods")
    failing = document["releasing"]["failing"]
    if failing:
        parts.append(table(("link", "not removed yet, tried again"), failing.items()))
    leases = document["leases"]
    if leases:
        parts.append(
            table(
                ("lease", "from", "to", "service", "qpn", "state", "packets"),
                [
                    (
                        row["lease"],
                        row["connector"]["pod"],
                        row["listener"]["pod"],
                        row["service"] or "-",
                        f"{row['connector']['qpn']} - {row['listener']['qpn']}",
                        row["state"],
                        row["packets"],
                    )
                    for row in leases
                ],
            )
        )
    else:
        parts.append("no leases")
    drops = [(row["pod"] or "-", row["reason"], row["packets"]) for row in document["drops"]]
    if drops:
        parts.append(table(("pod", "drop reason", "packets"), drops))
    return "\n\n".join(parts)
