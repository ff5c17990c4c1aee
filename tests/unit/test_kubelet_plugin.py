"""The device plugin against a kubelet that speaks the real protocol: what it tells, gives out, and survives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from rdmanet import agent, cli
from rdmanet.config import KubernetesConfig
from rdmanet.errors import NotFoundError, UnavailableError
from rdmanet.kubelet import rpc, watching
from rdmanet.kubelet.messages import device_plugin
from rdmanet.model import PodName
from testbed.kubelet import SLOW, AdmissionError
from testbed.topologies import MACHINES, lay_out
from tests.unit.kubelet_world import ALL, RESOURCE, World, world

TRAIN_0, TRAIN_1 = PodName("default", "train-0"), PodName("default", "train-1")


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that is away is away at once."""
    monkeypatch.setattr(watching, "GRACE_S", 0.0)


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path: those of sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rn-") as path:
        yield Path(path)


async def test_slots_are_told_and_given_as_cdi_devices(root: Path) -> None:
    async with world(root) as made:
        made.start_plugin()
        await made.healthy(*ALL)
        answer = await made.kubelet.admit(TRAIN_0, RESOURCE)
        assert [device.name for device in answer.cdi_devices] == ["rdmanet.io/rdma=slot-0"]
        assert not answer.devices
        assert not answer.envs
        answer = await made.kubelet.admit(TRAIN_1, RESOURCE, count=2)
        assert [device.name for device in answer.cdi_devices] == ["rdmanet.io/rdma=slot-1", "rdmanet.io/rdma=slot-2"]
        with pytest.raises(AdmissionError, match=r"requested 2 of rdmanet\.io/rdma, available 1"):
            await made.kubelet.admit(PodName("default", "train-2"), RESOURCE, count=2)
        made.kubelet.forget(TRAIN_0)
        await made.kubelet.admit(PodName("default", "train-2"), RESOURCE, count=2)


async def test_a_kubelet_that_starts_anew_has_it_again(root: Path) -> None:
    async with world(root) as made:
        made.start_plugin()
        await made.healthy(*ALL)
        await made.kubelet.admit(TRAIN_0, RESOURCE)
        for times in range(2, 22):
            await made.kubelet.restart()
            await made.registered(times)
            await made.healthy(*ALL)
            assert len(made.kubelet.registrations) == times, "one start, two registrations"
        await made.kubelet.admit(TRAIN_1, RESOURCE)
        assert made.kubelet.slot_of(TRAIN_1) == "slot-1"
        sockets = {path.name for path in made.kubelet.plugins.iterdir() if path.is_socket()}
        assert sockets == {"kubelet.sock", made.kubelet.registrations[-1]}


async def test_a_kubelet_that_comes_after_the_plugin(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(root) as made:
        await made.kubelet.stop()
        asked = asyncio.Event()
        watch = made.slots.watch

        def noticed() -> AsyncGenerator[dict[str, object], None]:
            asked.set()  # the plugin has asked the agent, and so watches kubelet's directory
            return watch()

        monkeypatch.setattr(made.slots, "watch", noticed)
        plugin = made.start_plugin()
        await asked.wait()
        assert not plugin.done()
        await made.kubelet.start()
        await made.healthy(*ALL)


async def test_a_socket_that_somebody_removes_is_made_anew(root: Path) -> None:
    async with world(root) as made:
        made.start_plugin()
        await made.healthy(*ALL)
        (made.kubelet.plugins / made.kubelet.registrations[-1]).unlink()
        await made.registered(2)
        await made.healthy(*ALL)


async def test_a_refused_registration_is_tried_again(root: Path) -> None:
    async with world(root) as made:
        made.kubelet.refusal = "the resource is another plugin's"
        made.start_plugin()
        await made.kubelet.until(lambda: made.kubelet.refused > 1, "a second try")
        made.kubelet.refusal = ""
        await made.healthy(*ALL)


async def test_what_a_killed_plugin_left_is_removed(root: Path) -> None:
    async with world(root) as made:
        other = made.kubelet.plugins / "nvidia-gpu.sock"
        made.start_plugin()
        await made.healthy(*ALL)
        left = made.kubelet.plugins / made.kubelet.registrations[-1].replace("-1.", "-7.")
        for path in (left, other):
            path.touch()
        made.start_plugin()
        await made.registered(2)
        await made.healthy(*ALL)
        assert not left.exists()
        assert other.exists()


async def test_without_kubelets_directory_there_is_a_sentence(root: Path) -> None:
    async with world(root) as made:
        await made.kubelet.stop()
        made.kubelet.plugins.rmdir()
        with pytest.raises(NotFoundError, match=r"no .*device-plugins: is kubelet's directory another"):
            await made.start_plugin()


async def test_a_directory_that_is_taken_away_ends_the_plugin(root: Path) -> None:
    async with world(root) as made:
        plugin = made.start_plugin()
        await made.healthy(*ALL)
        made.kubelet.plugins.rename(root / "elsewhere")
        with pytest.raises(UnavailableError, match="was removed or moved"):
            await plugin


async def test_nothing_is_healthy_without_the_agent(root: Path) -> None:
    async with world(root) as made:
        made.start_plugin()
        await made.healthy(*ALL)
        await made.stop_agent()
        await made.healthy()
        with pytest.raises(AdmissionError, match="available 0"):
            await made.kubelet.admit(TRAIN_0, RESOURCE)
        await made.start_agent()
        await made.healthy(*ALL)


async def test_an_agent_that_returns_in_time_is_not_missed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "GRACE_S", 3600.0)
    async with world(root) as made:
        made.start_plugin()
        await made.registered(1)
        await made.healthy(*ALL)
        lists = made.kubelet.endpoints[RESOURCE].lists
        await made.stop_agent()
        await made.start_agent()
        assert made.devices is not None
        made.devices.gone = "This host has no RDMA device mlx5_0 now."
        made.slots.changed()
        await made.healthy()
        assert made.kubelet.endpoints[RESOURCE].lists == lists + 1, "kubelet was told in between"


async def test_an_agent_that_hangs_is_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SILENCE_S", 0.2)
    async with world(root) as made:
        await made.stop_agent()

        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            line = json.dumps(await made.slots.document()).encode() + b"\n"
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head + f"{len(line):x}\r\n".encode() + line + b"\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()  # until the plugin has had enough
            writer.close()

        server = await asyncio.start_unix_server(mute, made.config.agent.socket)
        made.start_plugin()
        await made.healthy(*ALL)
        await made.healthy()
        server.close()


async def test_the_hosts_device_goes_and_comes(root: Path) -> None:
    machine = MACHINES[-1]  # one device for all
    lay_out(machine, root / "sys")
    async with world(root) as made:
        assert made.devices is not None
        made.devices.is_there()
        made.start_plugin()
        await made.healthy(*ALL)
        (node,) = made.kubelet.endpoints[RESOURCE].devices["slot-0"].topology.nodes
        assert node.ID == machine.nics[0].numa_node == 0
        made.devices.is_there(active=False)
        made.slots.heard()
        await made.healthy()
        made.devices.is_there()
        made.slots.heard()
        await made.healthy(*ALL)
        made.devices.gone = "This host has no RDMA device mlx5_0 now."
        made.slots.heard()
        await made.healthy()


async def test_devices_that_are_there_beforehand_need_no_cdi(root: Path) -> None:
    async with world(root, cdi=False) as made:
        assert made.devices is not None
        made.devices.is_there()
        made.start_plugin()
        await made.healthy(*ALL)
        answer = await made.kubelet.admit(TRAIN_0, RESOURCE)
        assert not answer.cdi_devices
        first = answer.devices[0]
        assert (first.container_path, first.host_path, first.permissions) == (*["/dev/infiniband/uverbs0"] * 2, "rw")
        assert answer.envs["NCCL_IB_HCA"] == "=mlx5_0:1"
        assert answer.envs["UCX_NET_DEVICES"] == "mlx5_0:1"


async def test_devices_that_are_made_later_need_cdi(root: Path) -> None:
    async with world(root, cdi=False) as made:
        made.start_plugin()
        await made.healthy(*ALL)
        with pytest.raises(AdmissionError, match=r"reach its container by CDI only: use a runtime") as refused:
            await made.kubelet.admit(TRAIN_0, RESOURCE)
        assert refused.value.operation == "FAILED_PRECONDITION"


async def allocate(made: World, *ids: str) -> rpc.Code | None:
    """Allocate without what kubelet knows; why it is refused."""
    endpoint = made.kubelet.endpoints[RESOURCE]
    wish = device_plugin("AllocateRequest")
    wish.container_requests.add(devices_ids=ids)
    try:
        await rpc.call(endpoint.channel, "v1beta1.DevicePlugin", "Allocate")(wish)
    except rpc.Refusal as error:
        code: rpc.Code = error.code()
        return code
    return None


async def test_allocate_while_the_device_goes(root: Path) -> None:
    """Whatever comes first: kubelet is never given what the plugin knows to be gone, and no call is left open."""
    async with world(root) as made:
        assert made.devices is not None
        made.devices.is_there()
        made.start_plugin()
        await made.healthy(*ALL)
        for _ in range(20):
            made.devices.gone = "This host has no RDMA device mlx5_0 now."
            made.slots.changed()
            outcomes = await asyncio.gather(*(allocate(made, "slot-0") for _ in range(10)))
            assert set(outcomes) <= {None, rpc.Code.FAILED_PRECONDITION}
            await made.healthy()
            assert await allocate(made, "slot-0") is rpc.Code.FAILED_PRECONDITION
            made.devices.gone = ""
            made.slots.changed()
            await made.healthy(*ALL)
            assert await allocate(made, "slot-0") is None


async def test_kubelets_other_calls(root: Path) -> None:
    async with world(root) as made:
        made.start_plugin()
        await made.healthy(*ALL)
        assert await allocate(made, "slot-9") is rpc.Code.NOT_FOUND
        assert await allocate(made) is None
        channel = made.kubelet.endpoints[RESOURCE].channel
        options = await rpc.call(channel, "v1beta1.DevicePlugin", "GetDevicePluginOptions")(device_plugin("Empty"))
        assert (options.pre_start_required, options.get_preferred_allocation_available) == (False, True)
        wish = device_plugin("PreStartContainerRequest", devices_ids=["slot-0"])
        await rpc.call(channel, "v1beta1.DevicePlugin", "PreStartContainer")(wish)
        wish = device_plugin("PreferredAllocationRequest")
        wish.container_requests.add(available_deviceIDs=ALL, must_include_deviceIDs=["slot-3"], allocation_size=2)
        answer = await rpc.call(channel, "v1beta1.DevicePlugin", "GetPreferredAllocation")(wish)
        assert list(answer.container_responses[0].deviceIDs) == ["slot-3", "slot-0"]


async def test_who_reads_slowly_gets_the_newest(root: Path) -> None:
    """A client that takes nothing for a hundred changes: the plugin keeps one list for it, not a hundred."""
    async with world(root, slots=2000) as made:
        assert made.devices is not None
        made.devices.is_there()
        plugin = made.start_plugin()
        everything = [f"slot-{number}" for number in range(2000)]
        await made.healthy(*everything)
        socket = made.kubelet.plugins / made.kubelet.registrations[-1]
        async with rpc.channel(socket, *SLOW) as channel:
            stream = rpc.call(channel, "v1beta1.DevicePlugin", "ListAndWatch")(device_plugin("Empty"))
            await stream.read()
            told = made.kubelet.endpoints[RESOURCE].lists
            for _ in range(50):
                made.devices.gone = "This host has no RDMA device mlx5_0 now."
                made.slots.changed()
                await made.healthy()  # the quick one has it
                made.devices.gone = ""
                made.slots.changed()
                await made.healthy(*everything)
            assert made.kubelet.endpoints[RESOURCE].lists >= told + 100
            made.devices.gone = "This host has no RDMA device mlx5_0 now."
            made.slots.changed()
            await made.healthy()
            lists = 0
            while True:
                answer = await stream.read()
                lists += 1
                if all(device.health == "Unhealthy" for device in answer.devices) and lists > 1:
                    break
            assert lists < 50, "every change was kept for it"
        assert not plugin.done()


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rdmanet.kubelet.plugin", None)
    monkeypatch.setitem(sys.modules, "rdmanet.kubelet.pod_resources", None)
    monkeypatch.delattr("rdmanet.kubelet.plugin")
    assert cli.main(["device-plugin"]) == 1
    assert "pip install 'rdmanet[kubernetes]'" in capsys.readouterr().err
    assert agent._kubelet(KubernetesConfig()) is None
    with pytest.raises(UnavailableError, match=r"kubernetes\.slots needs grpcio and protobuf .*pip install"):
        agent._kubelet(KubernetesConfig(slots=1))


def test_without_slots_there_is_no_plugin(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "empty.toml").touch()
    assert cli.main(["device-plugin", "--config", str(root / "empty.toml")]) == 1
    assert "kubernetes.slots is 0" in capsys.readouterr().err
