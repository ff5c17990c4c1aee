"""Attachments: whose slot another pod may have."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rdmanet.attach import Attachments
from rdmanet.model import Attachment
from rdmanet.store import Store
from tests.unit.test_store import wanted


@pytest.mark.parametrize("there", [True, False])
def test_a_slot_is_taken_from_a_pod_that_is_gone_and_not_where_nobody_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """The folder of namespaces may be hidden from the agent, and its pods be alive."""
    released: list[int] = []

    def release(self: Attachments, attachment: Attachment) -> None:
        released.append(attachment.id)

    monkeypatch.setattr(Attachments, "release", release)
    folder = tmp_path / "netns"
    if there:
        folder.mkdir()
    ranges = {"ipv4_range": ipaddress.ip_network("10.213.0.0/20"), "ipv6_range": ipaddress.ip_network("fd00::/64")}
    with Store(tmp_path / "state.db") as store:
        parts = cast("Any", SimpleNamespace(store=store, network=SimpleNamespace(**ranges)))
        attachments = Attachments(parts, cast("Any", None), cast("Any", None))
        number = store.reserve(wanted(netns=str(folder / "pod"), slot="slot-1")).id
        store.set_ready(number, {})
        attachments.collect_ended(number)
    assert released == ([number] if there else [])
