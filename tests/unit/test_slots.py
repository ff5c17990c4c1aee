"""Slots on the agent's side: which one a pod has, by kubelet or by Multus, and what is told of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from rdmanet.cni import CniCode, CniError, Request
from rdmanet.errors import ConflictError, RequestError, UnavailableError
from rdmanet.model import AttachmentState, PodName
from rdmanet.netlink.namespace import Listening
from tests.unit.kubelet_world import ALL, HOST_DEVICE, RESOURCE, World, world
from tests.unit.test_store import wanted

TRAIN_0 = PodName("default", "train-0")
ARGS = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=train-0"


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path: those of sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rn-") as path:
        yield Path(path)


def request(args: str = ARGS, **config: object) -> Request:
    variables = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/run/netns/c1",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": args,
    }
    document = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet", **config}
    return Request.parse(variables, json.dumps(document).encode())


async def admitted(made: World, count: int = 1) -> None:
    made.start_plugin()
    await made.healthy(*ALL)
    await made.kubelet.admit(TRAIN_0, RESOURCE, count)


async def test_kubelet_says_which_slot_a_pod_has(root: Path) -> None:
    async with world(root) as made:
        await admitted(made)
        assert await made.slots.of(request()) == "rdmanet.io/rdma=slot-0"
        assert await made.slots.of(request(rdma=True)) == "rdmanet.io/rdma=slot-0"
        made.kubelet.forget(TRAIN_0)
        assert await made.slots.of(request()) is None


async def test_only_kubelets_pods_need_a_slot(root: Path) -> None:
    async with world(root) as made:
        assert await made.slots.of(request(rdma=True)) is None, "podman names its pods too"
        assert await made.slots.of(request(args="", rdma=True)) is None
        made.kubelet.run_without(TRAIN_0)
        assert await made.slots.of(request()) is None
        with pytest.raises(UnavailableError, match=r"default/train-0 asks for an RDMA device, .* no slot: let one"):
            await made.slots.of(request(rdma=True))


async def test_multus_says_it(root: Path) -> None:
    async with world(root) as made:
        made.kubelet.answering.clear()
        assert await made.slots.of(request(runtimeConfig={"deviceID": "slot-3"})) == "rdmanet.io/rdma=slot-3"
        assert await made.slots.of(request(deviceID="slot-2", pciBusID="slot-2")) == "rdmanet.io/rdma=slot-2"
        assert made.kubelet.asked == 0
        for identity in ("slot-4", "0000:3b:00.1"):
            with pytest.raises(RequestError, match=f"deviceID is {identity}, which is no slot of .* slot-0 to slot-3"):
                await made.slots.of(request(deviceID=identity))


async def test_a_pod_with_several(root: Path) -> None:
    async with world(root) as made:
        await admitted(made, count=2)
        with pytest.raises(RequestError, match=r"has 2 slots of rdmanet\.io/rdma \(slot-0, slot-1\)"):
            await made.slots.of(request())


async def test_without_slots_nobody_is_asked(root: Path) -> None:
    async with world(root, slots=0) as made:
        assert await made.slots.of(request(deviceID="0000:3b:00.1", rdma=True)) is None
        assert made.kubelet.asked == 0
    async with world(root, ask_kubelet=False) as made:
        assert await made.slots.of(request(rdma=True)) is None
        assert made.kubelet.asked == 0


async def test_a_kubelet_that_does_not_answer(root: Path) -> None:
    async with world(root, timeout_s=0.2) as made:
        made.kubelet.answering.clear()
        with pytest.raises(
            CniError, match=r"Kubelet does not say on .*kubelet\.sock which slot .* no network"
        ) as refused:
            await made.slots.of(request())
        assert refused.value.code is CniCode.TRY_AGAIN
        made.kubelet.answering.set()
        await made.kubelet.stop()
        with pytest.raises(CniError) as refused:
            await made.slots.of(request())
        assert refused.value.code is CniCode.TRY_AGAIN


async def test_the_loop_goes_on_while_kubelet_is_silent(root: Path) -> None:
    async with world(root) as made:
        await admitted(made)
        made.kubelet.answering.clear()
        asking = asyncio.create_task(made.slots.of(request()))
        while made.kubelet.asked == 0:
            await asyncio.wait([asking], timeout=0.01)
        connector = aiohttp.UnixConnector(str(made.config.agent.socket))
        async with aiohttp.ClientSession(connector=connector) as session:  # the agent answers others
            answer = await (await session.get("http://rdmanet/v1/slots")).json()
        assert [slot["id"] for slot in answer["slots"]] == list(ALL)
        assert not asking.done()
        made.kubelet.answering.set()
        assert await asking == "rdmanet.io/rdma=slot-0"


async def test_kubelets_limiter_and_restart_are_waited_for(root: Path) -> None:
    async with world(root) as made:
        await admitted(made)
        made.kubelet.limited = 2
        assert await made.slots.of(request()) == "rdmanet.io/rdma=slot-0"
        assert made.kubelet.asked == 3
        await made.kubelet.stop()
        asking = asyncio.create_task(made.slots.of(request()))
        await asyncio.sleep(0)
        await made.kubelet.start()
        assert await asking == "rdmanet.io/rdma=slot-0"


async def test_what_is_told(root: Path) -> None:
    async with world(root) as made:
        assert made.devices is not None
        attachment = made.store.reserve(wanted(wants_rdma=True, slot="rdmanet.io/rdma=slot-1"))
        document = await made.slots.document()
        assert document == {
            "resource": "rdmanet.io/rdma",
            "device": None,
            "nodes": [],
            "slots": [
                {"id": identity, "problem": None, "pod": "default/pod-1" if identity == "slot-1" else None}
                for identity in ALL
            ],
        }
        ready = dataclasses.replace(attachment, device=HOST_DEVICE, state=AttachmentState.READY)
        made.pods.open((ready, Listening()))
        assert made.pods.set_health(ready, "its RDMA device mlx5_0 is missing")
        document = await made.slots.document()
        slots = document["slots"]
        assert isinstance(slots, list)
        assert [one["problem"] for one in slots] == [None, "its RDMA device mlx5_0 is missing", None, None]
        made.slots.free(ready)
        document = await made.slots.document()
        slots = document["slots"]
        assert isinstance(slots, list)
        assert {one["problem"] for one in slots} == {one["pod"] for one in slots} == {None}


async def test_one_pods_device_is_one_unhealthy_slot(root: Path) -> None:
    async with world(root) as made:
        await admitted(made)
        slot = await made.slots.of(request())
        attachment = made.store.reserve(wanted(wants_rdma=True, slot=slot))
        ready = dataclasses.replace(attachment, device=HOST_DEVICE)
        made.pods.open((ready, Listening()))
        made.pods.set_health(ready, "its RDMA device rxe_rn1 is missing")
        await made.healthy(*ALL[1:])
        made.pods.set_health(ready, None)
        await made.healthy(*ALL)


async def test_a_slot_is_one_pods(root: Path) -> None:
    async with world(root) as made:
        first = made.store.reserve(wanted(1, wants_rdma=True, slot="rdmanet.io/rdma=slot-1"))
        with pytest.raises(
            ConflictError, match=r"slot rdmanet\.io/rdma=slot-1 is default/pod-1's still \(container c1\)"
        ):
            made.store.reserve(wanted(2, wants_rdma=True, slot="rdmanet.io/rdma=slot-1"))
        assert made.store.holder("rdmanet.io/rdma=slot-1") == first
        made.store.free_slot(first.id)
        assert made.store.holder("rdmanet.io/rdma=slot-1") is None
        made.store.reserve(wanted(2, wants_rdma=True, slot="rdmanet.io/rdma=slot-1"))


async def test_files_of_nobody_go_at_a_start(root: Path) -> None:
    async with world(root) as made:
        made.slots.prepare()
        stale = made.config.kubernetes.cdi_dir / "rdmanet.io-rdma-slot-2.json"
        other = made.config.kubernetes.cdi_dir / "nvidia.yaml"
        stale.touch()
        other.touch()
        made.slots.recover()
        assert not stale.exists()
        assert other.exists()
