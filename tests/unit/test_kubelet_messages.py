"""Kubelet's messages on the wire: bytes as the published API numbers its fields, written here by hand."""

from __future__ import annotations

import pytest

from rdmanet.kubelet.messages import SERVICES, TABLES, device_plugin, message


def text(field: int, value: str) -> bytes:
    """A length-delimited field of at most 127 bytes (protobuf's encoding, wire type 2)."""
    return bytes([field << 3 | 2, len(value)]) + value.encode()


def nested(field: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes([field << 3 | 2, len(body)]) + body


def number(field: int, value: int) -> bytes:
    return bytes([field << 3, value])


def test_registration() -> None:
    request = device_plugin(
        "RegisterRequest",
        version="v1beta1",
        endpoint="a.sock",
        resource_name="rdmanet.io/rdma",
        options=device_plugin("DevicePluginOptions", pre_start_required=True, get_preferred_allocation_available=True),
    )
    options = nested(4, number(1, 1), number(2, 1))
    wire = text(1, "v1beta1") + text(2, "a.sock") + text(3, "rdmanet.io/rdma") + options
    assert request.SerializeToString(deterministic=True) == wire


def test_list_of_devices() -> None:
    answer = device_plugin("ListAndWatchResponse")
    device = answer.devices.add(ID="slot-0", health="Healthy")
    device.topology.nodes.add(ID=1)
    answer.devices.add(ID="slot-1", health="Unhealthy")
    wire = nested(1, text(1, "slot-0"), text(2, "Healthy"), nested(3, nested(1, number(1, 1))))
    assert answer.SerializeToString() == wire + nested(1, text(1, "slot-1"), text(2, "Unhealthy"))


def test_allocation() -> None:
    request = nested(1, text(1, "slot-0"), text(1, "slot-7"))
    read = message("v1beta1", "AllocateRequest").FromString(request)
    assert [list(one.devices_ids) for one in read.container_requests] == [["slot-0", "slot-7"]]
    answer = device_plugin("AllocateResponse")
    container = answer.container_responses.add(envs={"A": "b"}, annotations={"c": "d"})
    container.mounts.add(container_path="/in", host_path="/out", read_only=True)
    container.devices.add(container_path="/dev/a", host_path="/dev/b", permissions="rw")
    container.cdi_devices.add(name="rdmanet.io/rdma=slot-0")
    wire = nested(
        1,
        nested(1, text(1, "A"), text(2, "b")),
        nested(2, text(1, "/in"), text(2, "/out"), number(3, 1)),
        nested(3, text(1, "/dev/a"), text(2, "/dev/b"), text(3, "rw")),
        nested(4, text(1, "c"), text(2, "d")),
        nested(5, text(1, "rdmanet.io/rdma=slot-0")),
    )
    assert answer.SerializeToString(deterministic=True) == wire


def test_preferred_allocation() -> None:
    request = nested(1, text(1, "slot-0"), text(1, "slot-1"), text(2, "slot-1"), number(3, 2))
    (wanted,) = message("v1beta1", "PreferredAllocationRequest").FromString(request).container_requests
    assert (list(wanted.available_deviceIDs), list(wanted.must_include_deviceIDs)) == (["slot-0", "slot-1"], ["slot-1"])
    assert wanted.allocation_size == 2
    answer = device_plugin("PreferredAllocationResponse")
    answer.container_responses.add(deviceIDs=["slot-1"])
    assert answer.SerializeToString() == nested(1, text(1, "slot-1"))


def test_pod_resources_with_fields_that_are_not_read() -> None:
    devices = nested(2, text(1, "rdmanet.io/rdma"), text(2, "slot-3"), nested(3, nested(1, number(1, 0))))
    container = nested(3, text(1, "main"), devices, number(3, 5), nested(4, text(1, "hugepages"), number(2, 9)))
    answer = nested(1, text(1, "train-0"), text(2, "default"), container)
    (pod,) = message("v1", "ListPodResourcesResponse").FromString(answer).pod_resources
    assert (pod.name, pod.namespace) == ("train-0", "default")
    (found,) = pod.containers
    assert [(one.resource_name, list(one.device_ids)) for one in found.devices] == [("rdmanet.io/rdma", ["slot-3"])]


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_every_method_has_its_messages(service: str) -> None:
    for method in SERVICES[service].values():
        assert {method.request, method.response} <= TABLES[service.partition(".")[0]].keys()


def test_numbers_are_given_once() -> None:
    for tables in TABLES.values():
        for name, fields in tables.items():
            assert [field.number for field in fields] == sorted({field.number for field in fields}), name
