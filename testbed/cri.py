"""A small client of the CRI (Kubernetes' container runtime interface, runtime.v1): as much as runs pods.

Messages and their field numbers are those of k8s.io/cri-api's api.proto; only what is used is described.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from rdmanet.errors import RdmanetError

PACKAGE = "runtime.v1"
SERVICE = f"{PACKAGE}.RuntimeService"
TIMEOUT_S = 60.0

#: Message → field → (number, type). A type is of protobuf, another message, "a[]" for many, "map".
MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "PodSandboxMetadata": {
        "name": (1, "string"),
        "uid": (2, "string"),
        "namespace": (3, "string"),
        "attempt": (4, "uint32"),
    },
    "PortMapping": {"protocol": (1, "int32"), "container_port": (2, "int32"), "host_port": (3, "int32")},
    "PodSandboxConfig": {
        "metadata": (1, "PodSandboxMetadata"),
        "hostname": (2, "string"),
        "log_directory": (3, "string"),
        "port_mappings": (5, "PortMapping[]"),
        "labels": (6, "map"),
        "annotations": (7, "map"),
        "linux": (8, "LinuxPodSandboxConfig"),
    },
    "LinuxPodSandboxConfig": {"cgroup_parent": (1, "string")},
    "RunPodSandboxRequest": {"config": (1, "PodSandboxConfig")},
    "RunPodSandboxResponse": {"pod_sandbox_id": (1, "string")},
    "StopPodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "StopPodSandboxResponse": {},
    "RemovePodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "RemovePodSandboxResponse": {},
    "PodSandboxStatusRequest": {"pod_sandbox_id": (1, "string")},
    "PodSandboxStatusResponse": {"status": (1, "PodSandboxStatus")},
    "PodSandboxStatus": {"id": (1, "string"), "state": (3, "int32"), "network": (5, "PodSandboxNetworkStatus")},
    "PodSandboxNetworkStatus": {"ip": (1, "string"), "additional_ips": (2, "PodIP[]")},
    "PodIP": {"ip": (1, "string")},
    "ListPodSandboxRequest": {},
    "ListPodSandboxResponse": {"items": (1, "PodSandbox[]")},
    "PodSandbox": {"id": (1, "string"), "metadata": (2, "PodSandboxMetadata"), "state": (3, "int32")},
    "ContainerMetadata": {"name": (1, "string"), "attempt": (2, "uint32")},
    "ImageSpec": {"image": (1, "string")},
    "Mount": {"container_path": (1, "string"), "host_path": (2, "string"), "readonly": (3, "bool")},
    "Device": {"container_path": (1, "string"), "host_path": (2, "string"), "permissions": (3, "string")},
    "ContainerConfig": {
        "metadata": (1, "ContainerMetadata"),
        "image": (2, "ImageSpec"),
        "command": (3, "string[]"),
        "args": (4, "string[]"),
        "mounts": (7, "Mount[]"),
        "devices": (8, "Device[]"),
        "linux": (15, "LinuxContainerConfig"),
    },
    "LinuxContainerConfig": {},
    "CreateContainerRequest": {
        "pod_sandbox_id": (1, "string"),
        "config": (2, "ContainerConfig"),
        "sandbox_config": (3, "PodSandboxConfig"),
    },
    "CreateContainerResponse": {"container_id": (1, "string")},
    "RemoveContainerRequest": {"container_id": (1, "string")},
    "RemoveContainerResponse": {},
    "StartContainerRequest": {"container_id": (1, "string")},
    "StartContainerResponse": {},
    "ExecSyncRequest": {"container_id": (1, "string"), "cmd": (2, "string[]"), "timeout": (3, "int64")},
    "ExecSyncResponse": {"stdout": (1, "bytes"), "stderr": (2, "bytes"), "exit_code": (3, "int32")},
    "StatusRequest": {"verbose": (1, "bool")},
    "StatusResponse": {"status": (1, "RuntimeStatus"), "info": (2, "map")},
    "RuntimeStatus": {"conditions": (1, "RuntimeCondition[]")},
    "RuntimeCondition": {"type": (1, "string"), "status": (2, "bool"), "message": (4, "string")},
}


class CriError(RdmanetError):
    """The runtime refused a call, with its own words."""


def _field(message: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number)
    repeated = kind.endswith("[]") or kind == "map"
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    kind = kind.removesuffix("[]")
    if kind == "map":
        entry = f"{name.title().replace('_', '')}Entry"
        nested = message.nested_type.add(name=entry)
        nested.options.map_entry = True
        _field(nested, "key", 1, "string")
        _field(nested, "value", 2, "string")
        field.type, field.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{message.name}.{entry}"
    elif kind in MESSAGES:
        field.type, field.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="cri.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _field(message, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


CLASSES = _classes()


@dataclass
class Cri:
    """A runtime behind a unix socket. Requests and answers are plain values, named as in api.proto."""

    socket: str

    def call(self, method: str, timeout_s: float = TIMEOUT_S, **fields: Any) -> dict[str, Any]:
        """One call; CriError where the runtime refuses or cannot be reached."""
        request = json_format.ParseDict(fields, CLASSES[f"{method}Request"]())
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            stub = channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=CLASSES[f"{method}Response"].FromString,
            )
            try:
                # Not there yet: wait for it, within the time that the call may take.
                answer = stub(request, timeout=timeout_s, wait_for_ready=True)
            except grpc.RpcError as error:
                raise CriError(f"{method}: {error.details()}", operation=method) from error
        found: dict[str, Any] = json_format.MessageToDict(answer, preserving_proto_field_name=True)
        return found
