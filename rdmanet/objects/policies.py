"""NetworkPolicies (networking.k8s.io/v1)."""

from __future__ import annotations

import ipaddress

from rdmanet.names import is_port_name
from rdmanet.objects.fields import Fields, Shape, integer_of, shown, wrong
from rdmanet.objects.metadata import Metadata, selector_of
from rdmanet.objects.pods import protocol_of
from rdmanet.objects.values import IpBlock, IPNetwork, NetworkPolicy, Peer, PolicyPort, Rule, Selector

_POLICY = Shape.of("apiVersion kind metadata spec", "status")
_SPEC = Shape.of("podSelector policyTypes ingress egress")
_INGRESS = Shape.of("from ports")
_EGRESS = Shape.of("to ports")
_PEER = Shape.of("podSelector namespaceSelector ipBlock")
_BLOCK = Shape.of("cidr except")
_PORT = Shape.of("protocol port endPort")


def policy_of(document: dict[str, object], metadata: Metadata) -> NetworkPolicy:
    """Raises RequestError. Without policyTypes a policy is for ingress, and for egress where it has such rules; rules
    of a direction that policyTypes leaves out mean nothing, as in Kubernetes."""
    fields = Fields(document, "", _POLICY)
    fields.needed("spec")
    spec = fields.mapping("spec", _SPEC)
    assert spec is not None
    ingress = tuple(_rule(rule, "from") for rule in spec.mappings("ingress", _INGRESS))
    egress = tuple(_rule(rule, "to") for rule in spec.mappings("egress", _EGRESS))
    types = spec.texts("policyTypes")
    if len(types) > 2:
        wrong(spec.at("policyTypes"), f"has {len(types)} entries; 2 at most are taken")
    for number, name in enumerate(types):
        if name not in ("Ingress", "Egress"):
            wrong(spec.at(f"policyTypes[{number}]"), f"is {shown(name)}; it can be Ingress, Egress")
    if not types:
        types = ["Ingress", "Egress"] if egress else ["Ingress"]
    return NetworkPolicy(
        metadata.key.namespace,
        metadata.key.name,
        selector_of(spec, "podSelector") or Selector(),
        ingress if "Ingress" in types else None,
        egress if "Egress" in types else None,
    )


def _rule(rule: Fields, peers: str) -> Rule:
    return Rule(
        tuple(_peer(peer) for peer in rule.mappings(peers, _PEER)),
        tuple(_port(port) for port in rule.mappings("ports", _PORT)),
    )


def _peer(peer: Fields) -> Peer:
    pods, namespaces = selector_of(peer, "podSelector"), selector_of(peer, "namespaceSelector")
    block = peer.mapping("ipBlock", _BLOCK)
    if block is not None and (pods is not None or namespaces is not None):
        wrong(peer.path, "has ipBlock beside a selector; write two entries")
    if block is None and pods is None and namespaces is None:
        wrong(
            peer.path,
            "is empty; it needs podSelector, namespaceSelector or ipBlock",
        )
    return Peer(pods, namespaces, _block(block) if block is not None else None)


def _block(block: Fields) -> IpBlock:
    block.needed("cidr")
    cidr = _network(block.text("cidr"), block.at("cidr"))
    excepted = []
    for number, text in enumerate(block.texts("except")):
        path = block.at(f"except[{number}]")
        network = _network(text, path)
        inside = (
            network.subnet_of(cidr)
            if isinstance(network, ipaddress.IPv4Network) and isinstance(cidr, ipaddress.IPv4Network)
            else isinstance(network, ipaddress.IPv6Network)
            and isinstance(cidr, ipaddress.IPv6Network)
            and network.subnet_of(cidr)
        )
        if not inside or network == cidr:
            wrong(path, f"is {text}, which is not a smaller part of {cidr}")
        excepted.append(network)
    return IpBlock(cidr, tuple(excepted))


def _network(text: str, path: str) -> IPNetwork:
    """As Go's net.ParseCIDR reads it: bits behind the prefix mean nothing, a prefix length must be there."""
    address, slash, length = text.partition("/")
    try:
        if not slash or not (length.isascii() and length.isdigit()) or len(length) > 3 or "%" in address:
            raise ValueError
        network = ipaddress.ip_network(f"{address}/{int(length)}", strict=False)
    except ValueError:
        wrong(path, f"is {shown(text)}, not a block of addresses such as 10.0.0.0/8 or fd00::/8")
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        wrong(path, f"is {shown(text)}: write IPv4 blocks as such")
    return network


def _port(fields: Fields) -> PolicyPort:
    protocol = protocol_of(fields)
    port = fields.values.get("port")
    end = fields.integer("endPort", 1, 65535)
    if isinstance(port, str):
        if not is_port_name(port):
            wrong(fields.at("port"), f'is {shown(port)}, not a number or at most 15 of a-z, 0-9 and "-" with a letter')
        if end is not None:
            wrong(fields.at("endPort"), "needs a number as port, not a name")
        return PolicyPort(protocol, port)
    if port is None:
        if end is not None:
            wrong(fields.at("endPort"), "needs port, the first one of the range")
        return PolicyPort(protocol)
    number = integer_of(port, fields.at("port"), 1, 65535)
    if end is not None and end < number:
        wrong(fields.at("endPort"), f"is {end}, less than port, {number}")
    return PolicyPort(protocol, number, end)
