"""RDMA netlink and the Soft-RoCE back end against the kernel, in both modes of the RDMA subsystem."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from rdmanet.devices import remove_link
from rdmanet.errors import ConflictError, NotFoundError
from rdmanet.model import Attachment, AttachmentState, NetnsId, PodName, RdmaMode
from rdmanet.netlink import namespace
from rdmanet.netlink.nldev import RdmaSocket
from rdmanet.netlink.route import RouteSocket
from rdmanet.rdma.rxe import RxeBackend

BOTH_MODES = pytest.mark.parametrize(
    "mode", [RdmaMode.SHARED, pytest.param(RdmaMode.EXCLUSIVE, marks=pytest.mark.exclusive)], ids=str
)


def wanted(path: Path, identity: NetnsId) -> Attachment:
    """An attachment whose veth pair the test makes by hand."""
    return Attachment(
        id=4001,
        container_id="rxe-test",
        ifname="eth0",
        network="test",
        netns=str(path),
        netns_id=identity,
        pod=PodName("default", "rxe-test"),
        state=AttachmentState.ADDING,
        mac="02:72:00:00:0f:a1",
        mtu_bytes=1500,
        ipv4=ipaddress.IPv4Address("10.213.9.2"),
        ipv6=None,
        wants_rdma=True,
    )


@dataclass
class Bench:
    """A namespace with eth0, up and addressed, and a back end in the host's mode."""

    descriptor: int
    attachment: Attachment
    backend: RxeBackend

    def inside(self) -> list[str]:
        """Names that the pod's namespace sees."""
        with RdmaSocket.inside(self.descriptor) as rdma:
            return [device.name for device in rdma.devices()]

    def host(self) -> list[str]:
        """Names that the host's namespace sees."""
        with RdmaSocket.here() as rdma:
            return [device.name for device in rdma.devices()]


def connect(descriptor: int, attachment: Attachment) -> None:
    """The veth pair that ADD would have made."""
    with RouteSocket.here() as host:
        host.add_veth(
            attachment.host_ifname,
            "02:72:00:00:00:00",
            1500,
            peer_name=attachment.ifname,
            peer_mac=attachment.mac,
            peer_namespace=descriptor,
        )
    with RouteSocket.inside(descriptor) as inside:
        link = inside.link(attachment.ifname)
        assert link is not None
        inside.set_up(link.index)
        assert attachment.ipv4 is not None
        inside.add_address(link.index, attachment.ipv4, 32)


@pytest.fixture
def bench(scratch_netns: Path, rdma_mode: RdmaMode, mode: RdmaMode) -> Iterator[Bench]:
    if rdma_mode is not mode:
        pytest.skip(f"the RDMA subsystem's namespace mode here is {rdma_mode}, not {mode}")
    with namespace.opened(str(scratch_netns)) as descriptor, RouteSocket.here() as host, RdmaSocket.here() as rdma:
        attachment = wanted(scratch_netns, namespace.identify(descriptor))
        connect(descriptor, attachment)
        backend = RxeBackend(RdmaSocket, rdma.mode(), remove_link)
        assert backend.mode is mode
        yield Bench(descriptor, attachment, backend)
        backend.remove(attachment, descriptor)
        host.delete_link(attachment.host_ifname)


@BOTH_MODES
def test_a_device_from_birth_to_end(bench: Bench) -> None:
    made, descriptor, backend = bench.attachment, bench.descriptor, bench.backend
    device = backend.create(made, descriptor)
    assert (device.name, device.backend, device.mode) == ("rxe_rn4001", "rxe", backend.mode)
    with RdmaSocket.inside(descriptor) as inside:
        listed = inside.device(device.name)
        assert listed is not None
        assert listed.index == device.index
        # The kernel's own, for connection management, which a moved device has lost (up to Linux 7.3 at least).
        own = {1: None} if backend.mode is RdmaMode.SHARED else {}
        assert {pair.qpn: pair.pid for pair in inside.queue_pairs(device.index)} == own
    number = f"{device.major}:{device.minor}"
    if backend.mode is RdmaMode.SHARED:
        assert Path("/sys/class/infiniband_verbs", device.uverbs, "dev").read_text().strip() == number
        assert device.name in bench.host(), "in shared mode every namespace sees every name"
    else:
        assert device.name not in bench.host()
    assert bench.inside().count(device.name) == 1
    found = backend.examine(made, device, descriptor)
    assert found.problem is None
    assert not found.port_active, "the host's end is not up"
    readings = backend.read([dataclasses.replace(made, device=device)], lambda one: contextlib.nullcontext(descriptor))
    assert not readings[made.id].port_active
    assert readings[made.id].events["sent_pkts"] == 0
    assert 0x1234 not in backend.holders(device, descriptor)
    backend.remove(made, descriptor)
    assert device.name not in bench.inside() + bench.host()
    assert backend.examine(made, device, descriptor).problem == f"its RDMA device {device.name} is missing"
    assert (
        backend.read([dataclasses.replace(made, device=device)], lambda one: contextlib.nullcontext(descriptor)) == {}
    )
    backend.remove(made, descriptor)  # idempotent
    backend.remove(made, None)


@BOTH_MODES
def test_a_second_device_on_one_interface_is_refused(bench: Bench) -> None:
    device = bench.backend.create(bench.attachment, bench.descriptor)
    with pytest.raises(ConflictError, match="exists already on this host, or eth0 has one"):
        bench.backend.create(bench.attachment, bench.descriptor)
    found = bench.backend.examine(bench.attachment, device, bench.descriptor)
    assert found.problem is None, "the refusal took the first one away"


@BOTH_MODES
def test_without_its_interface_there_is_no_device(bench: Bench) -> None:
    with RouteSocket.here() as host:
        host.delete_link(bench.attachment.host_ifname)
    with pytest.raises(NotFoundError):
        bench.backend.create(bench.attachment, bench.descriptor)
    assert bench.attachment.device_name not in bench.inside() + bench.host()


@BOTH_MODES
def test_the_device_goes_with_its_interface(bench: Bench) -> None:
    device = bench.backend.create(bench.attachment, bench.descriptor)
    with RouteSocket.here() as host:
        host.delete_link(bench.attachment.host_ifname)
    found = bench.backend.examine(bench.attachment, device, bench.descriptor)
    assert found.problem == f"its RDMA device {device.name} is missing"
    bench.backend.remove(bench.attachment, bench.descriptor)


@BOTH_MODES
def test_without_its_namespace_the_device_goes_by_its_interface(bench: Bench) -> None:
    """Deleting the device by itself would race with the kernel's end of the namespace."""
    device = bench.backend.create(bench.attachment, bench.descriptor)
    with RouteSocket.here() as host:
        for _ in range(2):
            bench.backend.remove(bench.attachment, None)
            assert host.link(bench.attachment.host_ifname) is None
            assert device.name not in bench.inside() + bench.host()


@BOTH_MODES
def test_many_at_once(bench: Bench) -> None:
    """The kernel's own set-up and tear-down race where they are not serialised; the back end's lock does that."""
    others = [
        dataclasses.replace(bench.attachment, id=4002 + number, ifname=f"net{number}", mac=f"02:72:00:00:0f:b{number}")
        for number in range(4)
    ]
    with ExitStack() as stack:
        for number, other in enumerate(others):
            address = ipaddress.IPv4Address("10.213.9.10") + number
            connect(bench.descriptor, dataclasses.replace(other, ipv4=address))

            def delete(name: str = other.host_ifname) -> None:
                with RouteSocket.here() as host:
                    host.delete_link(name)

            stack.callback(delete)
        with ThreadPoolExecutor(len(others)) as threads:
            for _ in range(2):
                devices = list(threads.map(lambda a: bench.backend.create(a, bench.descriptor), others))
                assert len({device.index for device in devices}) == len(others)
                assert len({(device.major, device.minor) for device in devices}) == len(others)
                list(threads.map(lambda a: bench.backend.remove(a, bench.descriptor), others))
        assert not {other.device_name for other in others} & {*bench.inside(), *bench.host()}
