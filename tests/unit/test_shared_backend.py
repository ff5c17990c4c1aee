"""A device of the host that pods share: when addresses are lent and to what, and that a deleted pod gets nothing."""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest

from rdmanet.errors import ExhaustedError, NetlinkError, UnavailableError
from rdmanet.model import Attachment, Backend, Device, IPAddress, RdmaMode, address_key
from rdmanet.rdma import shared as module
from rdmanet.rdma.backend import Condition
from rdmanet.rdma.shared import SharedBackend, missing_gids
from tests.unit.test_store import wanted

DEVICE = Device(
    name="host0", backend=Backend.SHARED, mode=RdmaMode.SHARED, index=3, uverbs="uverbs0", major=231, minor=192
)
DESCRIPTOR = 99  # nothing of the pod is entered


@dataclass
class Named:
    index: int
    name: str


@dataclass
class Port:
    device: str
    active: bool
    netdev: str | None


@dataclass
class Node:
    name: str = "uverbs0"
    major: int = 231
    minor: int = 192


class Host:
    """RDMA netlink of the host, and the lending of addresses."""

    def __init__(self, gids: Path) -> None:
        self.ports = {3: Port("host0", True, "nic0")}
        self.node: Node | None = Node()
        self.lent: dict[str, set[IPAddress]] = {}
        self.recorded: list[str] = []
        self.gids = gids
        self.full = False
        self.refuses = False

    def here(self) -> Host:
        return self

    def inside(self, descriptor: int) -> Host:
        raise AssertionError("a pod was entered")

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def device(self, name: str) -> Named | None:
        return next((Named(index, port.device) for index, port in self.ports.items() if port.device == name), None)

    def port(self, index: int) -> Port | None:
        return self.ports.get(index)

    def character_device(self, index: int) -> Node:
        if self.node is None:
            raise NetlinkError("The kernel refused.", errno=errno.ENODATA)
        return self.node

    def readings(self, indexes: Sequence[int], descriptor: int | None = None) -> list[Named | None]:
        assert descriptor is None
        return [Named(index, "reading") if index in self.ports else None for index in indexes]

    def lend(self, netdev: str, addresses: Iterable[IPAddress]) -> None:
        assert self.recorded[-1] == netdev, "an effect that is not recorded"
        if self.refuses:
            raise NetlinkError("The kernel refused.")
        self.lent.setdefault(netdev, set()).update(addresses)
        if not self.full:
            for address in addresses:
                self.put_gid(address)

    def put_gid(self, address: IPAddress) -> None:
        place = str(len(list((self.gids / "gids").iterdir())))
        (self.gids / "gids" / place).write_text(ipaddress.IPv6Address(address_key(address)).exploded + "\n")
        (self.gids / "gid_attrs/types" / place).write_text("RoCE v2\n")

    def take_back(self, netdev: str, addresses: Iterable[IPAddress]) -> None:
        self.lent.get(netdev, set()).difference_update(addresses)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(module, "_INFINIBAND", tmp_path)
    gids = tmp_path / "host0/ports/1"
    (gids / "gids").mkdir(parents=True)
    (gids / "gid_attrs/types").mkdir(parents=True)
    return Host(gids)


@pytest.fixture
def backend(host: Host) -> SharedBackend:
    return SharedBackend(host, host, "host0", netdev=None, record=host.recorded.append)  # type: ignore[arg-type]


def pod(number: int) -> Attachment:
    return dataclasses.replace(wanted(number), id=number)


def test_given_and_taken_away(host: Host, backend: SharedBackend) -> None:
    one, two = pod(1), pod(2)
    assert backend.create(one, DESCRIPTOR) == backend.create(two, DESCRIPTOR) == DEVICE
    assert host.recorded == ["nic0"]
    assert host.lent == {"nic0": {*one.addresses, *two.addresses}}
    assert backend.netdev(one) == "nic0"
    backend.remove(one, None)
    backend.remove(one, DESCRIPTOR)
    assert host.lent == {"nic0": set(two.addresses)}


def test_one_that_is_being_deleted_gets_nothing_again(host: Host, backend: SharedBackend) -> None:
    one = pod(1)
    device = backend.create(one, DESCRIPTOR)
    backend.remove(one, DESCRIPTOR)
    assert backend.examine(one, device, DESCRIPTOR).problem is None
    assert host.lent == {"nic0": set()}


def test_what_was_lost_is_lent_again_and_another_netdev_recorded(host: Host, backend: SharedBackend) -> None:
    one = pod(1)
    device = backend.create(one, DESCRIPTOR)
    host.lent.clear()
    assert backend.examine(one, device, DESCRIPTOR) == Condition(device, None, port_active=True)
    assert host.lent == {"nic0": set(one.addresses)}
    host.ports = {4: Port("host0", True, "nic7")}
    found = backend.examine(one, device, DESCRIPTOR)
    assert (found.problem, found.device.index) == (None, 4)
    assert host.recorded == ["nic0", "nic7"]
    assert host.lent["nic7"] == set(one.addresses)


@pytest.mark.parametrize(
    ("port", "words"),
    [
        (None, "has no RDMA device host0 now"),
        (Port("host0", False, "nic0"), "is down; bring its netdev up"),
        (Port("host0", True, None), "has no netdev in the host's network namespace"),
    ],
)
def test_a_device_that_cannot_be_given(host: Host, backend: SharedBackend, port: Port | None, words: str) -> None:
    host.ports = {} if port is None else {3: port}
    with pytest.raises(UnavailableError, match=words):
        backend.create(pod(1), DESCRIPTOR)
    assert (host.lent, host.recorded) == ({}, [])


def test_a_full_table_and_a_refusal_leave_nothing(
    host: Host, backend: SharedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GID_TIMEOUT_S", 0.01)
    host.full = True
    with pytest.raises(ExhaustedError, match="its table is full"):
        backend.create(pod(1), DESCRIPTOR)
    assert host.lent == {"nic0": set()}
    host.refuses = True
    with pytest.raises(NetlinkError):
        backend.create(pod(2), DESCRIPTOR)
    assert host.lent == {"nic0": set()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ports": {}}, "its RDMA device host0 is missing"),
        ({"node": None}, "its RDMA device host0 is missing"),
        ({"ports": {5: Port("host0", True, "nic0")}, "node": Node("uverbs4", 231, 196)}, "has come back as uverbs4"),
    ],
)
def test_what_is_wrong_with_it(host: Host, backend: SharedBackend, changes: dict[str, object], words: str) -> None:
    one = pod(1)
    device = backend.create(one, DESCRIPTOR)
    for name, value in changes.items():
        setattr(host, name, value)
    found = backend.examine(one, device, DESCRIPTOR)
    assert words in (found.problem or "")
    assert found.device == device


def test_a_port_that_is_down_is_lent_nothing(host: Host, backend: SharedBackend) -> None:
    one = pod(1)
    device = backend.create(one, DESCRIPTOR)
    host.lent.clear()
    host.ports[3].active = False
    assert backend.examine(one, device, DESCRIPTOR) == Condition(device, None, port_active=False)
    assert host.lent == {}


@pytest.mark.parametrize(
    "device", [dataclasses.replace(DEVICE, name="mlx5_0"), dataclasses.replace(DEVICE, backend=Backend.RXE)]
)
def test_a_device_of_another_configuration(host: Host, backend: SharedBackend, device: Device) -> None:
    assert "the configuration no longer gives pods" in (backend.examine(pod(1), device, DESCRIPTOR).problem or "")
    assert host.lent == {}


def test_readings_are_of_the_device_for_all(host: Host, backend: SharedBackend) -> None:
    both = [dataclasses.replace(pod(number), device=DEVICE) for number in (1, 2)]
    found = backend.read(both, lambda one: pytest.fail("a pod was entered"))
    assert set(found) == {1, 2}
    assert found[1] is found[2]
    host.ports = {}
    assert backend.read(both, lambda one: pytest.fail("a pod was entered")) == {}


def test_only_roce_v2_counts_as_a_gid(host: Host) -> None:
    one = pod(1)
    keys = {address_key(address) for address in one.addresses}
    for address in one.addresses:
        host.put_gid(address)
    assert missing_gids("host0", keys) == set()
    (host.gids / "gid_attrs/types/0").write_text("IB/RoCE v1\n")
    assert len(missing_gids("host0", keys)) == 1
    assert missing_gids("gone", keys) == keys
