"""Messages of kubelet's protocols, made from tables that mirror the published API: device plugin v1beta1 and
PodResources v1.

Names and numbers of fields are the wire format (k8s.io/kubelet, pkg/apis/deviceplugin/v1beta1/api.proto and
pkg/apis/podresources/v1/api.proto). Fields that nobody here reads are left out; those that a newer kubelet sends are
kept as unknown. No code is generated: the protobuf library makes classes of the tables when this is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

#: What a plugin says at its registration (constants.go).
DEVICE_PLUGIN_VERSION = "v1beta1"
HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"
#: Longest id of a device (api.proto, Device).
DEVICE_ID_MAX = 63
#: What a Go client or server of kubelet's takes at most (pkg/kubelet/apis/podresources/client.go).
MESSAGE_MAX_BYTES = 16 * 1024 * 1024


class Field(NamedTuple):
    """One field; ``kind`` is a scalar of protobuf, the name of a message beside it, or ``map`` of texts."""

    number: int
    name: str
    kind: str
    repeated: bool = False


def _many(number: int, name: str, kind: str) -> Field:
    return Field(number, name, kind, repeated=True)


#: Package → message → its fields.
TABLES: dict[str, dict[str, tuple[Field, ...]]] = {
    "v1beta1": {
        "DevicePluginOptions": (
            Field(1, "pre_start_required", "bool"),
            Field(2, "get_preferred_allocation_available", "bool"),
        ),
        "RegisterRequest": (
            Field(1, "version", "string"),
            Field(2, "endpoint", "string"),
            Field(3, "resource_name", "string"),
            Field(4, "options", "DevicePluginOptions"),
        ),
        "Empty": (),
        "ListAndWatchResponse": (_many(1, "devices", "Device"),),
        "TopologyInfo": (_many(1, "nodes", "NUMANode"),),
        "NUMANode": (Field(1, "ID", "int64"),),
        "Device": (
            Field(1, "ID", "string"),
            Field(2, "health", "string"),
            Field(3, "topology", "TopologyInfo"),
        ),
        "PreStartContainerRequest": (_many(1, "devices_ids", "string"),),
        "PreStartContainerResponse": (),
        "PreferredAllocationRequest": (_many(1, "container_requests", "ContainerPreferredAllocationRequest"),),
        "ContainerPreferredAllocationRequest": (
            _many(1, "available_deviceIDs", "string"),
            _many(2, "must_include_deviceIDs", "string"),
            Field(3, "allocation_size", "int32"),
        ),
        "PreferredAllocationResponse": (_many(1, "container_responses", "ContainerPreferredAllocationResponse"),),
        "ContainerPreferredAllocationResponse": (_many(1, "deviceIDs", "string"),),
        "AllocateRequest": (_many(1, "container_requests", "ContainerAllocateRequest"),),
        "ContainerAllocateRequest": (_many(1, "devices_ids", "string"),),
        "CDIDevice": (Field(1, "name", "string"),),
        "AllocateResponse": (_many(1, "container_responses", "ContainerAllocateResponse"),),
        "ContainerAllocateResponse": (
            Field(1, "envs", "map"),
            _many(2, "mounts", "Mount"),
            _many(3, "devices", "DeviceSpec"),
            Field(4, "annotations", "map"),
            _many(5, "cdi_devices", "CDIDevice"),
        ),
        "Mount": (
            Field(1, "container_path", "string"),
            Field(2, "host_path", "string"),
            Field(3, "read_only", "bool"),
        ),
        "DeviceSpec": (
            Field(1, "container_path", "string"),
            Field(2, "host_path", "string"),
            Field(3, "permissions", "string"),
        ),
    },
    "v1": {
        "ListPodResourcesRequest": (),
        "ListPodResourcesResponse": (_many(1, "pod_resources", "PodResources"),),
        "PodResources": (
            Field(1, "name", "string"),
            Field(2, "namespace", "string"),
            _many(3, "containers", "ContainerResources"),
        ),
        "ContainerResources": (
            Field(1, "name", "string"),
            _many(2, "devices", "ContainerDevices"),
        ),
        "ContainerDevices": (
            Field(1, "resource_name", "string"),
            _many(2, "device_ids", "string"),
        ),
    },
}


class Method(NamedTuple):
    """One call of a service: its messages' names, and whether the answer is a stream."""

    request: str
    response: str
    streams: bool = False


#: Service, with its package → its methods.
SERVICES: dict[str, dict[str, Method]] = {
    "v1beta1.Registration": {"Register": Method("RegisterRequest", "Empty")},
    "v1beta1.DevicePlugin": {
        "GetDevicePluginOptions": Method("Empty", "DevicePluginOptions"),
        "ListAndWatch": Method("Empty", "ListAndWatchResponse", streams=True),
        "GetPreferredAllocation": Method("PreferredAllocationRequest", "PreferredAllocationResponse"),
        "Allocate": Method("AllocateRequest", "AllocateResponse"),
        "PreStartContainer": Method("PreStartContainerRequest", "PreStartContainerResponse"),
    },
    "v1.PodResourcesLister": {"List": Method("ListPodResourcesRequest", "ListPodResourcesResponse")},
}

_Proto = descriptor_pb2.FieldDescriptorProto
_SCALARS: dict[str, int] = {
    "string": _Proto.TYPE_STRING,
    "bool": _Proto.TYPE_BOOL,
    "int32": _Proto.TYPE_INT32,
    "int64": _Proto.TYPE_INT64,
}


def _add_field(message: Any, package: str, field: Field) -> None:
    made = message.field.add(name=field.name, number=field.number)
    made.label = _Proto.LABEL_REPEATED if field.repeated or field.kind == "map" else _Proto.LABEL_OPTIONAL
    if field.kind in _SCALARS:
        made.type = _SCALARS[field.kind]
        return
    made.type = _Proto.TYPE_MESSAGE
    if field.kind != "map":
        made.type_name = f".{package}.{field.kind}"
        return
    # A map is a repeated message of its own, with this very name (protobuf's language guide, "Maps").
    entry = message.nested_type.add(name=f"{field.name.capitalize()}Entry")
    entry.options.map_entry = True
    _add_field(entry, package, Field(1, "key", "string"))
    _add_field(entry, package, Field(2, "value", "string"))
    made.type_name = f".{package}.{message.name}.{entry.name}"


def _classes(package: str, tables: Mapping[str, tuple[Field, ...]]) -> dict[str, Any]:
    # A pool of our own: in the common one somebody else's package may be called v1 as well.
    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for name, fields in tables.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, package, field)
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in tables}


_CLASSES = {package: _classes(package, tables) for package, tables in TABLES.items()}


def message(package: str, name: str) -> Any:
    """The class of a message."""
    return _CLASSES[package][name]


def device_plugin(kind: str, /, **fields: Any) -> Any:
    """A message of the device plugin's protocol."""
    return message("v1beta1", kind)(**fields)
