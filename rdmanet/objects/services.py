"""Services (core/v1) and EndpointSlices (discovery.k8s.io/v1).

Nobody assigns anything here: the API server's defaults are taken (ports, affinity's time-out), addresses and node ports
that it would choose must be given.
"""

from __future__ import annotations

from rdmanet.model import IPAddress
from rdmanet.names import is_label_key, is_label_name, is_label_value, is_port_name
from rdmanet.objects.fields import Fields, Shape, integer_of, reachable_address_of_text, shown, wrong
from rdmanet.objects.metadata import Metadata
from rdmanet.objects.pods import protocol_of
from rdmanet.objects.values import Endpoint, EndpointPort, EndpointSlice, Protocol, Service, ServicePort

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
#: sessionAffinityConfig.clientIP.timeoutSeconds: the API's default, and its bound.
AFFINITY_DEFAULT_S = 10800
AFFINITY_MAX_S = 86400
#: The API's bounds on one slice.
ENDPOINTS_MAX = 1000
ADDRESSES_MAX = 100
PORTS_MAX = 100

_PREFERENCES = "every ready backend that the traffic policies allow is used alike"
_SERVICE = Shape.of("apiVersion kind metadata spec status")
_SERVICE_SPEC = Shape.of(
    "type clusterIP clusterIPs ipFamilies ipFamilyPolicy ports selector externalIPs sessionAffinity"
    " sessionAffinityConfig externalTrafficPolicy internalTrafficPolicy publishNotReadyAddresses",
    "allocateLoadBalancerNodePorts loadBalancerClass loadBalancerIP",
    {
        "externalName": "it is a DNS name's alias, which is DNS's work",
        "healthCheckNodePort": "nobody would answer health checks there",
        "loadBalancerSourceRanges": "write a NetworkPolicy with ipBlock",
        "trafficDistribution": _PREFERENCES,
    },
)
_SERVICE_PORT = Shape.of("name protocol port targetPort nodePort", "appProtocol")
_AFFINITY = Shape.of("clientIP")
_CLIENT_IP = Shape.of("timeoutSeconds")
_STATUS = Shape.of("loadBalancer", "conditions")
_LOAD_BALANCER = Shape.of("ingress")
_INGRESS = Shape.of("ip ipMode", "hostname ports")

_SLICE = Shape.of("apiVersion kind metadata addressType endpoints ports")
_ENDPOINT = Shape.of(
    "addresses conditions", "hostname nodeName zone targetRef deprecatedTopology", {"hints": _PREFERENCES}
)
_CONDITIONS = Shape.of("ready serving terminating")
_ENDPOINT_PORT = Shape.of("name protocol port", "appProtocol")

_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_HEADLESS = "None"


def service_of(document: dict[str, object], metadata: Metadata) -> Service:
    """Raises RequestError. A load balancer's addresses (status.loadBalancer.ingress) are external addresses, as they
    are to kube-proxy, but where ipMode is Proxy."""
    fields = Fields(document, "", _SERVICE)
    fields.needed("spec")
    spec = fields.mapping("spec", _SERVICE_SPEC)
    assert spec is not None
    kind = spec.choice("type", _TYPES, "ClusterIP")
    if kind == "ExternalName":
        wrong(spec.at("type"), "ExternalName is not supported: it is a DNS name's alias, which is DNS's work")
    cluster_ips = _cluster_ips(spec, kind)
    spec.pairs("selector", is_label_key, is_label_value)
    external = [reachable_address_of_text(text, spec.at("externalIPs")) for text in spec.texts("externalIPs")]
    if kind == "LoadBalancer":
        external += _load_balancer_ips(fields)
    external_local = spec.choice("externalTrafficPolicy", ("Cluster", "Local", ""), "Cluster") == "Local"
    if external_local and kind == "ClusterIP" and not external:
        wrong(spec.at("externalTrafficPolicy"), "is for what comes from outside; no address or port here is")
    return Service(
        metadata.key.namespace,
        metadata.key.name,
        cluster_ips,
        _service_ports(spec, kind, headless=not cluster_ips),
        tuple(dict.fromkeys(external)),
        _affinity_s(spec),
        external_local,
        spec.choice("internalTrafficPolicy", ("Cluster", "Local"), "Cluster") == "Local",
        spec.boolean("publishNotReadyAddresses"),
    )


def _cluster_ips(spec: Fields, kind: str) -> tuple[IPAddress, ...]:
    texts = spec.texts("clusterIPs")
    first = spec.text("clusterIP") or (texts[0] if texts else "")
    if not first:
        wrong(spec.at("clusterIP"), "is missing: Kubernetes would choose an address, here write one, or None")
    texts = texts or [first]
    if texts[0] != first:
        wrong(spec.at("clusterIPs[0]"), f"is {shown(texts[0])}, and clusterIP is {shown(first)}: they must be the same")
    families = spec.texts("ipFamilies")
    for number, family in enumerate(families):
        if family not in ("IPv4", "IPv6") or family in families[:number]:
            wrong(spec.at(f"ipFamilies[{number}]"), f"is {shown(family)}; it can be IPv4 and IPv6, once each")
    policy = spec.choice("ipFamilyPolicy", ("SingleStack", "PreferDualStack", "RequireDualStack", ""), "")
    if texts == [_HEADLESS]:
        if kind != "ClusterIP":
            wrong(spec.at("clusterIP"), f"is None; a service of type {kind} needs an address")
        return ()
    if len(texts) > 2:
        wrong(spec.at("clusterIPs"), f"has {len(texts)} entries; one of each family at most")
    addresses = tuple(
        reachable_address_of_text(text, spec.at(f"clusterIPs[{number}]" if spec.has("clusterIPs") else "clusterIP"))
        for number, text in enumerate(texts)
    )
    names = [f"IPv{address.version}" for address in addresses]
    if len(set(names)) < len(names):
        wrong(spec.at("clusterIPs"), f"are both {names[0]}; one of each family at most")
    if families and families != names:
        wrong(spec.at("ipFamilies"), f"are {', '.join(families)}, and the addresses {', '.join(names)}")
    if policy == "RequireDualStack" and len(names) < 2:
        wrong(spec.at("ipFamilyPolicy"), "is RequireDualStack, and clusterIPs has one address")
    if policy == "SingleStack" and len(names) > 1:
        wrong(spec.at("ipFamilyPolicy"), "is SingleStack, and clusterIPs has two addresses")
    return addresses


def _load_balancer_ips(fields: Fields) -> list[IPAddress]:
    status = fields.mapping("status", _STATUS)
    balancer = status.mapping("loadBalancer", _LOAD_BALANCER) if status is not None else None
    found: list[IPAddress] = []
    for ingress in balancer.mappings("ingress", _INGRESS) if balancer is not None else ():
        if ingress.choice("ipMode", ("VIP", "Proxy"), "VIP") == "VIP" and ingress.text("ip"):
            found.append(reachable_address_of_text(ingress.text("ip"), ingress.at("ip")))
    return found


def _service_ports(spec: Fields, kind: str, *, headless: bool) -> tuple[ServicePort, ...]:
    given = spec.mappings("ports", _SERVICE_PORT)
    if not given and not headless:
        wrong(spec.at("ports"), "is missing or empty")
    found: list[ServicePort] = []
    names: set[str] = set()
    ports: set[tuple[Protocol, int]] = set()
    node_ports: set[tuple[Protocol, int]] = set()
    for fields in given:
        name = _port_name(fields, names, several=len(given) > 1)
        fields.needed("port")
        port, protocol = fields.integer("port", 1, 65535), protocol_of(fields)
        assert port is not None
        if (protocol, port) in ports:
            wrong(fields.at("port"), f"{port} of {protocol} is there twice")
        ports.add((protocol, port))
        _check_target(fields)
        node_port = fields.integer("nodePort", 0, 65535) or None
        if kind == "ClusterIP" and node_port:
            wrong(fields.at("nodePort"), "is not for services of type ClusterIP; write type: NodePort")
        if kind == "NodePort" and not node_port:
            wrong(fields.at("nodePort"), "is missing: Kubernetes would choose one, here write one (30000 to 32767)")
        if node_port and (protocol, node_port) in node_ports:
            wrong(fields.at("nodePort"), f"{node_port} of {protocol} is there twice")
        if node_port:
            node_ports.add((protocol, node_port))
        found.append(ServicePort(name, protocol, port, node_port))
    return tuple(found)


def _port_name(fields: Fields, names: set[str], *, several: bool) -> str:
    name = fields.text("name")
    if not name and several:
        wrong(fields.at("name"), "is missing: where there are several ports, all have names")
    if name and not is_label_name(name):
        wrong(fields.at("name"), f'is {shown(name)}, not 1 to 63 of a-z, 0-9 and "-", and "-" not at the ends')
    if name in names:
        wrong(fields.at("name"), f"{name or 'the empty name'} is there twice")
    names.add(name)
    return name


def _check_target(fields: Fields) -> None:
    """What backends listen on is in their slices; here it only has to be well formed."""
    target = fields.values.get("targetPort")
    if isinstance(target, str):
        if target and not is_port_name(target):
            wrong(fields.at("targetPort"), f'is {shown(target)}, not at most 15 of a-z, 0-9 and "-" with a letter')
    elif target is not None and target != 0:
        integer_of(target, fields.at("targetPort"), 1, 65535)


def _affinity_s(spec: Fields) -> int:
    config = spec.mapping("sessionAffinityConfig", _AFFINITY)
    client = config.mapping("clientIP", _CLIENT_IP) if config is not None else None
    seconds = client.integer("timeoutSeconds", 1, AFFINITY_MAX_S) if client is not None else None
    if spec.choice("sessionAffinity", ("None", "ClientIP", ""), "None") == "ClientIP":
        return seconds or AFFINITY_DEFAULT_S
    if client is not None:
        wrong(spec.at("sessionAffinityConfig"), "is for sessionAffinity: ClientIP alone")
    return 0


def slice_of(document: dict[str, object], metadata: Metadata) -> EndpointSlice:
    """Raises RequestError. Each of an endpoint's addresses is a backend, all under the endpoint's conditions."""
    fields = Fields(document, "", _SLICE)
    service = metadata.labels.get(SERVICE_NAME_LABEL, "")
    if not is_label_name(service):
        wrong("metadata.labels", f"need {SERVICE_NAME_LABEL}: it says whose backends these are")
    fields.needed("addressType")
    family = fields.choice("addressType", ("IPv4", "IPv6", "FQDN"), "")
    if family == "FQDN":
        wrong("addressType", "FQDN is not supported: backends are addresses")
    version = 4 if family == "IPv4" else 6
    given = fields.mappings("endpoints", _ENDPOINT)
    if len(given) > ENDPOINTS_MAX:
        wrong("endpoints", f"has {len(given)} entries; {ENDPOINTS_MAX} at most are taken")
    endpoints = [endpoint for one in given for endpoint in _endpoints(one, version)]
    return EndpointSlice(metadata.key.namespace, metadata.key.name, service, _endpoint_ports(fields), tuple(endpoints))


def _endpoint_ports(fields: Fields) -> tuple[EndpointPort, ...]:
    given = fields.mappings("ports", _ENDPOINT_PORT)
    if len(given) > PORTS_MAX:
        wrong("ports", f"has {len(given)} entries; {PORTS_MAX} at most are taken")
    names: set[str] = set()
    found = []
    for port in given:
        name = _port_name(port, names, several=False)
        if not port.has("port"):
            wrong(port.at("port"), "is missing: kube-proxy too would use no backend without its port")
        number = port.integer("port", 1, 65535)
        assert number is not None
        found.append(EndpointPort(name, protocol_of(port), number))
    return tuple(found)


def _endpoints(fields: Fields, version: int) -> list[Endpoint]:
    addresses = fields.texts("addresses")
    if not 1 <= len(addresses) <= ADDRESSES_MAX:
        wrong(fields.at("addresses"), f"has {len(addresses)} entries, not 1 to {ADDRESSES_MAX}")
    conditions = fields.mapping("conditions", _CONDITIONS)
    # discovery/v1, EndpointConditions: unknown readiness is ready, and unknown serving is as ready as it is.
    ready, serving, terminating = True, True, False
    if conditions is not None:
        ready = conditions.boolean("ready", True)
        serving = conditions.boolean("serving", ready)
        terminating = conditions.boolean("terminating")
    found = []
    for number, text in enumerate(addresses):
        address = reachable_address_of_text(text, fields.at(f"addresses[{number}]"))
        if address.version != version:
            wrong(fields.at(f"addresses[{number}]"), f"is {text}, and the slice's addressType IPv{version}")
        found.append(Endpoint(address, ready, serving, terminating))
    return found
