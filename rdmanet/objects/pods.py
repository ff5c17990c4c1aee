"""Namespaces and Pods (core/v1): labels for selectors, and ports that have names."""

from __future__ import annotations

from rdmanet.model import PodName
from rdmanet.names import is_port_name
from rdmanet.objects.fields import Fields, Shape, address_of_text, shown, wrong
from rdmanet.objects.metadata import Metadata
from rdmanet.objects.values import ContainerPort, Namespace, Pod, Protocol

#: The label that the API server puts on every namespace.
NAME_LABEL = "kubernetes.io/metadata.name"

_OBJECT = Shape.of("apiVersion kind metadata spec", "status")
_NAMESPACE_SPEC = Shape.of("", "finalizers")
_POD_SPEC = Shape.of(
    "containers initContainers",
    "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy enableServiceLinks"
    " ephemeralContainers hostAliases hostIPC hostPID hostUsers hostname hostnameOverride imagePullSecrets nodeName"
    " nodeSelector os overhead preemptionPolicy priority priorityClassName readinessGates resourceClaims resources"
    " restartPolicy runtimeClassName schedulerName schedulingGates schedulingGroup securityContext serviceAccount"
    " serviceAccountName setHostnameAsFQDN shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations"
    " topologySpreadConstraints volumes workloadRef",
    {"hostNetwork": "a pod in the host's network has no attachment, and is the host to policies and services"},
)
_CONTAINER = Shape.of(
    "name ports restartPolicy",
    "args command env envFrom image imagePullPolicy lifecycle livenessProbe readinessProbe resizePolicy resources"
    " restartPolicyRules securityContext startupProbe stdin stdinOnce terminationMessagePath terminationMessagePolicy"
    " tty volumeDevices volumeMounts workingDir",
)
_PORT = Shape.of(
    "name containerPort protocol hostIP",
    "",
    {"hostPort": "chain the portmap plugin behind rdmanet, or use a Service of type NodePort"},
)
_PROTOCOLS = tuple(Protocol)


def protocol_of(fields: Fields) -> Protocol:
    """A port's protocol; TCP where it is absent."""
    return Protocol(fields.choice("protocol", _PROTOCOLS, Protocol.TCP))


def namespace_of(document: dict[str, object], metadata: Metadata) -> Namespace:
    """Raises RequestError."""
    Fields(document, "", _OBJECT).mapping("spec", _NAMESPACE_SPEC)
    name = metadata.key.name
    given = metadata.labels.get(NAME_LABEL, name)
    if given != name:
        wrong(f"metadata.labels.{NAME_LABEL}", f"is {shown(given)}; it is always the namespace's name, {name}")
    return Namespace(name, {**metadata.labels, NAME_LABEL: name})


def pod_of(document: dict[str, object], metadata: Metadata) -> Pod:
    """Raises RequestError. Of ports only those with names are kept; of two with one name and protocol the first holds,
    as it does where Kubernetes resolves names."""
    spec = Fields(document, "", _OBJECT).mapping("spec", _POD_SPEC)
    ports: dict[tuple[str, Protocol], ContainerPort] = {}
    if spec is not None:
        for container in spec.mappings("containers", _CONTAINER):
            _add_ports(container, ports)
        for container in spec.mappings("initContainers", _CONTAINER):
            # Those that go on running beside the others (KEP-753); the rest are over before the pod is used.
            if container.text("restartPolicy") == "Always":
                _add_ports(container, ports)
    return Pod(PodName(metadata.key.namespace, metadata.key.name), metadata.labels, tuple(ports.values()))


def _add_ports(container: Fields, ports: dict[tuple[str, Protocol], ContainerPort]) -> None:
    container.text("name")
    for fields in container.mappings("ports", _PORT):
        fields.needed("containerPort")
        number = fields.integer("containerPort", 1, 65535)
        assert number is not None
        protocol, name = protocol_of(fields), fields.text("name")
        if fields.text("hostIP"):
            address_of_text(fields.text("hostIP"), fields.at("hostIP"))
        if not name:
            continue
        if not is_port_name(name):
            wrong(fields.at("name"), f'is {shown(name)}, not at most 15 of a-z, 0-9 and "-" with a letter')
        ports.setdefault((name, protocol), ContainerPort(name, number, protocol))
