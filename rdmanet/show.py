"""Tables for people: pure functions from the agent's JSON to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Of an attachment, what is a sentence where something is wrong. That its cgroup is not known yet is not.
PROBLEMS = ("degraded", "unhealthy", "not_limited")
#: Of those that were done lately.
SHOWN_REPAIRS = 10


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
    if agent.get("services_missing"):
        parts.append(f"no services: {agent['services_missing']}")
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
                        row["state"] + "".join(f" ({row[key]})" for key in PROBLEMS if row.get(key)),
                    )
                    for row in attachments
                ],
            )
        )
    else:
        parts.append("no pods")
    limited = [row for row in attachments if any((row.get("bandwidth") or {}).values())]
    if limited:
        parts.append(
            table(
                ("limited pod", "interface", "gets at most", "sends at most"),
                [
                    (row["pod"], row["ifname"], *(_rate(row["bandwidth"][way]) for way in ("ingress", "egress")))
                    for row in limited
                ],
            )
        )
    failing = document["releasing"]["failing"]
    if failing:
        parts.append(table(("link", "not removed yet, tried again"), failing.items()))
    parts += _repairs(document["repairs"])
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


def _repairs(repairs: Mapping[str, Any]) -> list[str]:
    """What is broken, what is left alone and what was done lately."""
    parts = []
    open_ = [(row["what"], row["kind"], row["sentence"]) for row in repairs["broken"]]
    if open_:
        parts.append(table(("broken", "kind", ""), open_))
    given_up = [(row["what"], row["kind"], row["sentence"]) for row in repairs["given_up"]]
    if given_up:
        parts.append(table(("left alone", "kind", "`rdmanet repair` asks for it again"), given_up))
    done = [
        (row["what"], row["kind"], row["sentence"], row["outcome"], f"{row['ago_s']:.0f} s ago")
        for row in repairs["done"][:SHOWN_REPAIRS]
    ]
    if done:
        parts.append(table(("repairs", "kind", "what was broken", "outcome", "when"), done))
    return parts


def rdma(document: Mapping[str, Any], before: Mapping[str, Any] | None = None, seconds: float = 1.0) -> str:
    """`rdmanet rdma`; with what the agent said so many seconds before also how much came in each."""
    agent = document["agent"]
    parts = [f"RDMA {agent['rdma_mode'] or 'none: ' + str(agent['rdma_missing'])}"]
    if agent["rdma_backend"] == "shared":
        parts[0] += "; pods share a device of the host: nothing but the broker keeps them apart, and no hook counts"
    if not document["devices"]:
        return "\n\n".join([*parts, "no devices"])
    parts.append(
        table(
            ("device", "of", "port", "counters"),
            [
                (
                    row["device"],
                    row["pods"][0] if len(row["pods"]) == 1 else f"{len(row['pods'])} pods",
                    row["port"] or "missing",
                    ", ".join(f"{name} {count}" for name, count in row["events"].items() if count) or "-",
                )
                for row in document["devices"]
            ],
        )
    )
    earlier = {(row["pod"], row["device"]): row for row in before["pods"]} if before else {}
    parts.append(
        table(
            ("pod", "device", "leases", "objects", "sent", "received", "health"),
            [
                (
                    row["pod"],
                    row["device"],
                    f"{row['leases']} of {row['max_leases']}",
                    _objects(row["resources"]),
                    *(
                        _traffic(row, way, earlier.get((row["pod"], row["device"])), seconds)
                        for way in ("sent", "received")
                    ),
                    row["unhealthy"] or "ok",
                )
                for row in document["pods"]
            ],
        )
    )
    if document["leases"]:
        parts.append(
            table(
                ("lease", "transport", "from", "to", "qpn", "packets there", "packets back", "state"),
                [
                    (
                        row["lease"],
                        row["transport"],
                        row["connector"]["pod"],
                        f"{row['listener']['pod']}:{row['service'] or '-'}",
                        f"{row['connector']['qpn']} - {row['listener']['qpn']}",
                        row["listener"]["received"]["packets"] if row["counted"] else "-",
                        row["connector"]["received"]["packets"] if row["counted"] else "-",
                        row["state"],
                    )
                    for row in document["leases"]
                ],
            )
        )
    else:
        parts.append("no leases")
    return "\n\n".join(parts)


def _objects(resources: Mapping[str, Any] | None) -> str:
    """Verbs objects that the pod has and may have, where the kernel's controller tells."""
    objects = (resources or {}).get("hca_object")
    if objects is None:
        return "-"
    return str(objects["used"]) + ("" if objects["limit"] is None else f" of {objects['limit']}")


def _traffic(row: Mapping[str, Any], way: str, before: Mapping[str, Any] | None, seconds: float) -> str:
    if not row["counted"]:
        return "-"
    packets, size = row[way]["packets"], row[way]["bytes"]
    if before is None:
        return f"{packets} packets, {_bytes(size)}"
    new, more = packets - before[way]["packets"], size - before[way]["bytes"]
    return f"{packets} packets, {new / seconds:.0f}/s, {_bytes(more / seconds)}/s"


def _rate(limit: Mapping[str, Any] | None) -> str:
    if limit is None:
        return "-"
    bits = float(limit["bits_per_s"])
    for unit in ("bit/s", "kbit/s", "Mbit/s", "Gbit/s"):
        if bits < 1000:
            return f"{bits:.4g} {unit}"
        bits /= 1000
    return f"{bits:.4g} Tbit/s"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
