"""What the kernel keeps for us in the aliases of links (IFLA_IFALIAS): whose each is, and what was done to the host.

The alias of an attachment's host end names it, so that a lost database can be written anew (``rdmanet.rebuild``); that
of rdmanet0 has the effects on the host. People see both in ``ip link``. Pure.

An alias has 255 bytes. Container id, interface name and what is not the default always fit; then come, as far as there
is room, network, pod, the namespace's path and the pod's uid. What was left away is looked for: the namespace by its
number for the link, the others by a person.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from rdmanet.model import DEFAULT_MAX_LEASES, Attachment, PodName

MAX_BYTES = 255  # IFALIASZ - 1
_BEGINNING = "rdmanet:1"


@dataclass(frozen=True, slots=True)
class Described:
    """An attachment as an alias has it. None: not known, or too long."""

    container_id: str
    ifname: str
    wants_rdma: bool
    max_leases: int
    service_level: int
    network: str | None
    pod: PodName | None
    pod_uid: str | None
    netns: str | None


def of_attachment(attachment: Attachment) -> str:
    """The alias of its host end."""
    pod = attachment.pod
    named = f"{pod.namespace}/" + (pod.name if pod.name != attachment.container_id else "")
    beginning = [_BEGINNING, f"id={attachment.container_id}", f"if={attachment.ifname}"]
    if attachment.wants_rdma:
        beginning.append("rdma")
    if attachment.max_leases != DEFAULT_MAX_LEASES:
        beginning.append(f"leases={attachment.max_leases}")
    if attachment.service_level:
        beginning.append(f"sl={attachment.service_level}")
    left = MAX_BYTES - _length(beginning)
    fitting: dict[str, str] = {}
    for key, value in (
        ("net", attachment.network),
        ("pod", named),
        ("at", attachment.netns),
        ("uid", attachment.pod_uid),
    ):
        word = f"{key}={value}"
        if value is not None and len(word.encode()) + 1 <= left:
            fitting[key] = word
            left -= len(word.encode()) + 1
    # A path may have spaces: it comes last.
    path = fitting.pop("at", None)
    return " ".join([*beginning, *fitting.values(), *([path] if path else [])])


def _length(words: list[str]) -> int:
    return len(" ".join(words).encode())


def attachment(text: str) -> Described | None:
    """What an alias says; None where it is none of ours, or of a later version."""
    start, _, rest = text.partition(" ")
    if start != _BEGINNING:
        return None
    front, mark, path = rest.partition(" at=")
    found = dict(word.partition("=")[::2] for word in front.split(" "))
    try:
        container_id, ifname = found["id"], found["if"]
        namespace, slash, name = found.get("pod", "").partition("/")
        return Described(
            container_id=container_id,
            ifname=ifname,
            wants_rdma="rdma" in found,
            max_leases=int(found.get("leases", DEFAULT_MAX_LEASES)),
            service_level=int(found.get("sl", 0)),
            network=found.get("net"),
            pod=PodName(namespace, name or container_id) if slash else None,
            pod_uid=found.get("uid"),
            netns=path if mark else None,
        )
    except (KeyError, ValueError):
        return None


def of_effects(effects: Mapping[str, str]) -> str:
    """The alias of rdmanet0: what was done to the host, with details; the shortest ones where not all fit."""
    fitting = dict(effects)
    while len(text := f"{_BEGINNING} {json.dumps(fitting, separators=(',', ':'))}") > MAX_BYTES:
        del fitting[max(fitting, key=lambda name: len(name) + len(fitting[name]))]
    return text


def effects(text: str) -> dict[str, str]:
    """What the alias of rdmanet0 says; nothing where it is none of ours."""
    start, _, rest = text.partition(" ")
    if start != _BEGINNING:
        return {}
    try:
        found = json.loads(rest)
    except ValueError:
        return {}
    return {str(name): str(detail) for name, detail in found.items()} if isinstance(found, dict) else {}
