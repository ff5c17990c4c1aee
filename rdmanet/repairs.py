"""Looks at one place, an attachment or the node, and puts right what is broken: with the steps of ADD, or of a start.

Synchronous; called from worker threads, one call at a time (``rdmanet.watch``), and for an attachment while no CNI call
of its container is under way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rdmanet import looking, reconcile, steps
from rdmanet.attach import Attachments
from rdmanet.errors import NotFoundError, RdmanetError
from rdmanet.model import Attachment, AttachmentState, Backend, address_key
from rdmanet.netlink import namespace
from rdmanet.nodesetup import NodeSetup
from rdmanet.reconcile import NODE, Broken, Kind, Outcome, Record

log = logging.getLogger(__name__)

#: What the node is called for people.
NODE_NAME = "the node"


@dataclass(frozen=True, slots=True)
class Result:
    """What is left. ``again``: it is to be looked at again, though nothing may be heard of it. ``gone``: there is no
    such attachment any more. ``peer_namespace`` is our number for the pod's namespace, where it was seen.
    ``device_made``: there is another device of the same name."""

    left: tuple[Broken, ...] = ()
    again: bool = False
    gone: bool = False
    peer_namespace: int | None = None
    device_made: bool = False


class Repairs:
    """``record`` says what was done; without ``enabled`` nothing is, and what is broken is shown alone."""

    def __init__(
        self,
        parts: steps.Parts,
        attachments: Attachments,
        setup: NodeSetup,
        record: Record,
        *,
        enabled: bool,
        fault_point: steps.FaultPoint = steps.no_fault,
    ):
        self._parts = parts
        self._attachments = attachments
        self._setup = setup
        self._record = record
        self._enabled = enabled
        self._fault_point = fault_point

    # Pods

    def pod(self, attachment_id: int) -> Result:
        """Looks at an attachment. What cannot be looked at is left as it was known."""
        attachment = self._parts.store.get(attachment_id)
        if attachment is None:
            self._record.forget(attachment_id)
            return Result(gone=True)
        if attachment.state is not AttachmentState.READY:
            try:
                self._attachments.finish(attachment_id)
            except RdmanetError as error:
                log.error("%s is left half-made still: %s", attachment.host_ifname, error)
            # Its row goes after its link, which is the last that is announced: who watches it must forget it then.
            return Result(again=True)
        name = f"{attachment.pod} {attachment.ifname}"
        started = time.monotonic()
        found = self._look(attachment)
        broken = list(found.broken())
        if broken and all(one.kind is Kind.ENTRY for one in broken):
            # Policy may have been writing them.
            found = self._look(attachment)
            broken = list(found.broken())
        wanted = self._wanted(attachment_id, name, broken)
        if not wanted:
            return Result(tuple(broken), any(one.waits for one in broken), peer_namespace=found.peer_namespace)
        try:
            if any(one.kind is Kind.NAMESPACE for one in wanted):
                self._attachments.release(attachment)
                self._ended(attachment_id, name, wanted, Outcome.COLLECTED, started)
                self._record.forget(attachment_id)
                return Result(gone=True)
            self._apply(attachment, found, reconcile.plan(wanted))
            found = self._look(attachment)
        except RdmanetError as error:
            self._failed(attachment_id, name, wanted, error, started)
            return Result(tuple(wanted), again=True)
        left = tuple(found.broken())
        self._judge(attachment_id, name, wanted, left, started)
        made = any(one.kind is Kind.DEVICE for one in wanted)
        return Result(left, bool(left), peer_namespace=found.peer_namespace, device_made=made)

    def _look(self, attachment: Attachment) -> looking.Look:
        return looking.look(self._parts, attachment)

    def _apply(self, attachment: Attachment, found: looking.Look, names: frozenset[str]) -> None:
        parts = self._parts
        with namespace.entered(attachment.netns, attachment.netns_id) as descriptor:
            if descriptor is None:
                raise NotFoundError(f"The network namespace {attachment.netns} has gone.", subject=attachment.netns)
            before = parts.host_ends.get(attachment.id)
            making = steps.Making(
                descriptor,
                lambda: False,
                host_ifindex=found.host_ifindex,
                pod_ifindex=found.pod_end.index if found.pod_end else 0,
                netns_cookie=found.cookie,
            )
            try:
                for step in steps.STEPS:
                    if step.name in names:
                        self._fault_point(f"repair {step.name}")
                        self._step(step, attachment, making)
            finally:
                making.listening.close()
            if before is not None and before != making.host_ifindex:
                parts.datapath.delete_attachment(before)

    def _step(self, step: steps.Step, attachment: Attachment, making: steps.Making) -> None:
        devices = self._parts.devices
        if not isinstance(step, steps.DeviceStep):
            step.apply(self._parts, attachment, making)
        elif devices is not None and devices.name is Backend.RXE:
            # Not remembered here: the pod can use it only where it has the node that the pod knows, which is looked at
            # when the kernel announces it (rdmanet.health).
            devices.create(attachment, making.descriptor)

    def glance(self) -> list[int]:
        """Places whose entries in the datapath are not as they should be: of these nobody announces anything."""
        parts, found = self._parts, []
        if parts.datapath.node() is None or parts.datapath.pins.empty_slots():
            found.append(NODE)
        attachments = [one for one in parts.store.attachments() if one.state is AttachmentState.READY]
        own, endpoints = parts.datapath.attachments(), parts.datapath.endpoints()
        for attachment in attachments:
            ifindex = parts.host_ends.get(attachment.id)
            if ifindex is None:
                continue
            wanted, endpoint = steps.entries(attachment, ifindex, parts.policy.of(attachment.id))
            present = [endpoints.get(address_key(address)) for address in attachment.addresses]
            limits = parts.datapath.bandwidth(attachment.id)
            if (own.get(ifindex), limits) != (wanted, attachment.bandwidth) or any(one != endpoint for one in present):
                found.append(attachment.id)
        return found

    # The node

    def node(self) -> Result:
        """Looks at what the node has once, whatever the number of pods."""
        started = time.monotonic()
        broken = self._look_at_node()
        wanted = self._wanted(NODE, NODE_NAME, broken)
        if not wanted:
            return Result(tuple(broken))
        kinds = {one.kind for one in wanted}
        try:
            if Kind.PIN in kinds:
                self._fault_point("repair pins")
                self._setup.restore_pins()
            if Kind.PROGRAM in kinds:
                self._fault_point("repair programs")
                self._parts.datapath.pins.fill_slots()
            if kinds - {Kind.PIN, Kind.PROGRAM}:
                self._fault_point("repair node")
                self._parts.network = self._setup.repair()
            left = tuple(self._look_at_node())
        except RdmanetError as error:
            self._failed(NODE, NODE_NAME, wanted, error, started)
            return Result(tuple(wanted), again=True)
        self._judge(NODE, NODE_NAME, wanted, left, started)
        return Result(left, bool(left))

    def _look_at_node(self) -> list[Broken]:
        return list(reconcile.broken_node(*self._setup.facts()))

    # What came of it

    def _wanted(self, place: int, name: str, broken: Sequence[Broken]) -> list[Broken]:
        if not broken or not self._enabled:
            self._record.found(place, name, broken)
            return []
        before = self._record.given_up()
        wanted = self._record.broke(place, name, broken)
        for _, kind in self._record.given_up() - before:
            words = _words([one for one in broken if one.kind is kind])
            log.error("%s: %s, again and again: it is left alone until `rdmanet repair` asks for it", name, words)
        return wanted

    def _judge(self, place: int, name: str, wanted: Sequence[Broken], left: Sequence[Broken], started: float) -> None:
        still = {one.kind for one in left}
        for kind in dict.fromkeys(one.kind for one in wanted):
            of_kind = [one for one in wanted if one.kind is kind]
            outcome = Outcome.FOLLOWED if kind is Kind.UPLINK else Outcome.REPAIRED
            if kind in still:
                outcome = Outcome.FAILED
            self._ended(place, name, of_kind, outcome, started)
        self._record.found(place, name, left)

    def _ended(self, place: int, name: str, wanted: Sequence[Broken], outcome: Outcome, started: float) -> None:
        took_s = time.monotonic() - started
        self._record.ended(place, name, wanted, outcome, took_s)
        log.warning("%s: %s: %s after %.0f ms", name, _words(wanted), outcome, took_s * 1000)

    def _failed(self, place: int, name: str, wanted: Sequence[Broken], error: RdmanetError, started: float) -> None:
        self._record.ended(place, name, wanted, Outcome.FAILED, time.monotonic() - started)
        log.error("%s: %s, and could not be put right: %s", name, _words(wanted), error)


def _words(broken: Sequence[Broken]) -> str:
    return "; ".join(dict.fromkeys(one.sentence for one in broken))
