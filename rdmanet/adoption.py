"""What a start finds of ready attachments: looked at all together, put right only where something differs.

One question of each kind for all of them, as there may be a thousand: 1,000 pods take about half a second.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Mapping, Sequence

from rdmanet import alias, steps
from rdmanet.datapath.layout import AttachmentEntry, EndpointEntry
from rdmanet.errors import DamagedError, NotFoundError
from rdmanet.model import GATEWAY_MAC, Attachment, NetnsId, address_key
from rdmanet.netlink import messages, namespace
from rdmanet.netlink.batch import BatchSocket, accepted
from rdmanet.netlink.namespace import Listening

log = logging.getLogger(__name__)

#: The kernel's answers to so many are held in memory at a time.
AT_ONCE = 100
#: ``Attachment.host_ifname``.
HOST_END = re.compile(r"rn-([1-9][0-9]*)", re.ASCII)


def strangers(attachments: Sequence[Attachment]) -> list[messages.Link]:
    """Host ends of ours that belong to none of these attachments: rows are committed before links are made, and
    forgotten after they are gone."""
    known = {one.host_ifname for one in attachments}
    names = [name for _, name in socket.if_nameindex() if HOST_END.fullmatch(name) and name not in known]
    if not names:
        return []
    with BatchSocket() as host:
        replies = host.exchange([messages.get_link(name) for name in names])
    links = [messages.link(reply.payloads[0]) for reply in replies if not reply.errno]
    return [link for link in links if link.kind == "veth" and link.mac == GATEWAY_MAC]


def refuse_strangers(attachments: Sequence[Attachment], database: str) -> None:
    """Raises DamagedError where pods have network that the rows know nothing of: their addresses would be given to
    others."""
    unknown = strangers(attachments)
    if unknown:
        names = ", ".join(link.name for link in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise DamagedError(
            f"The agent's database {database} has lost rows: this host has {len(unknown)} attachment(s) that it does"
            f" not know ({names}). `rdmanet repair --database` writes them from the kernel's state.",
            operation="open",
            subject=database,
        )


def adopt(parts: steps.Parts, attachments: Sequence[Attachment]) -> set[int]:
    """Opens listeners, puts filters and map entries right; returns the ids of those whose pods are there.

    A link that somebody has deleted is made again as under a running agent (``rdmanet.watch`` looks at all of them).
    Raises KernelError where the kernel refuses what is needed for all of them.
    """
    own, endpoints = parts.datapath.attachments(), parts.datapath.endpoints()
    adopted: set[int] = set()
    for start in range(0, len(attachments), AT_ONCE):
        adopted |= _adopt(parts, attachments[start : start + AT_ONCE], own, endpoints)
    return adopted


def _adopt(
    parts: steps.Parts,
    attachments: Sequence[Attachment],
    own: Mapping[int, AttachmentEntry],
    endpoints: Mapping[bytes, EndpointEntry],
) -> set[int]:
    made: dict[NetnsId, Listening] = {}

    def listen(netns: NetnsId) -> int:
        # A pod's attachments share its socket.
        if netns not in made:
            made[netns] = parts.listeners.listen(netns)
        return namespace.own_cookie()

    try:
        found = namespace.visit([(one.netns, one.netns_id) for one in attachments], listen)
        cookies = {one.id: cookie for one, cookie in zip(attachments, found, strict=True) if cookie is not None}
        there = [one for one in attachments if one.id in cookies]
        links = _links(parts, there)
        _filters(parts, there, links)
        for attachment in there:
            parts.datapath.enter_namespace(cookies[attachment.id], attachment.id)
            link = links.get(attachment.id)
            if link is None:
                log.warning("%s is gone, and its pod is not", attachment.host_ifname)
            else:
                _entries(parts, attachment, link, own, endpoints)
        parts.limits.adopt(there)
        parts.listeners.open(*[(one, made.pop(one.netns_id, Listening())) for one in there])
    finally:
        for listening in made.values():
            listening.close()
    return {one.id for one in there}


def _links(parts: steps.Parts, attachments: Sequence[Attachment]) -> dict[int, messages.Link]:
    """The host's ends that are there, by attachment id."""
    replies = parts.host.exchange([messages.get_link(one.host_ifname) for one in attachments])
    found, unnamed = {}, []
    for attachment, reply in zip(attachments, replies, strict=True):
        if not reply.errno:
            found[attachment.id] = link = messages.link(reply.payloads[0])
            parts.host_ends.set(attachment.id, link.index)
            wanted = alias.of_attachment(attachment)
            if link.alias != wanted:  # an older version's
                unnamed.append(messages.set_alias(attachment.host_ifname, wanted))
    if unnamed:
        parts.host.send(unnamed)
    return found


def _filters(parts: steps.Parts, attachments: Sequence[Attachment], links: dict[int, messages.Link]) -> None:
    """Puts the dispatcher where it is not; a link that vanishes meanwhile leaves ``links``."""
    linked = [one for one in attachments if one.id in links]
    replies = parts.host.exchange([messages.get_ingress_filter(links[one.id].index) for one in linked])
    # A filter of ours may be of pins that are gone (a bpffs that went with the agent's container), with maps that
    # nobody writes any more: it must be this very program.
    program = parts.datapath.dispatcher_id("pod")
    for attachment, reply in zip(linked, replies, strict=True):
        link = links[attachment.id]
        filters = [messages.bpf_filter(payload) for payload in reply.payloads]
        if link.up and [found.program_id for found in filters] == [program]:
            continue
        if not filters:
            log.warning("%s: the filter was missing and is put back", attachment.host_ifname)
        batch = steps.filter_messages(parts.datapath, link.index)
        try:
            accepted(batch, parts.host.exchange(batch))
        except NotFoundError:
            del links[attachment.id]


def _entries(
    parts: steps.Parts,
    attachment: Attachment,
    link: messages.Link,
    own: Mapping[int, AttachmentEntry],
    endpoints: Mapping[bytes, EndpointEntry],
) -> None:
    """Writes the map entries where they differ."""
    policy = parts.policy.of(attachment.id)
    wanted, endpoint = steps.entries(attachment, link.index, policy)
    present = [endpoints.get(address_key(address)) for address in attachment.addresses]
    limits = parts.datapath.bandwidth(attachment.id)
    if (own.get(link.index), limits) != (wanted, attachment.bandwidth) or any(found != endpoint for found in present):
        log.warning("%s: datapath entries differed and are written again", attachment.host_ifname)
        steps.set_entries(parts.datapath, attachment, link.index, policy)
