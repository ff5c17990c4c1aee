"""Watch: what it remembers of an attachment goes with the attachment, whenever it was looked at."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from rdmanet.calls import Calls
from rdmanet.model import AttachmentState
from rdmanet.reconcile import Record
from rdmanet.repairs import Repairs
from rdmanet.steps import HostEnds
from rdmanet.store import Store
from rdmanet.watch import Watch
from tests.unit.test_store import wanted

WITHIN_S = 30.0


async def test_a_row_that_is_looked_at_between_its_link_and_itself_is_forgotten(tmp_path: Path) -> None:
    """The link's end is the last that is announced, and the row goes after it."""
    record, nobody = Record(), cast("Any", None)
    with contextlib.closing(Store(tmp_path / "state.db")) as store, ThreadPoolExecutor(1) as executor:
        number = store.reserve(wanted()).id
        store.set_state(number, AttachmentState.RELEASING)
        parts = cast("Any", SimpleNamespace(store=store))
        nothing_unfinished = cast("Any", SimpleNamespace(finish=lambda _: None))
        repairs = Repairs(parts, nothing_unfinished, nobody, record, enabled=True)
        watch = Watch(repairs, nobody, record, store, HostEnds(), Calls(), executor, lambda _: None)
        watch.look_at(number)
        async with asyncio.timeout(WITHIN_S):
            while number not in watch._known:  # noqa: ASYNC110  it has been looked at
                await asyncio.sleep(0.01)
            store.forget(number)
            while watch._known or watch._looked:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await watch.stop()
