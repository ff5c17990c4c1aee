"""What all kinds have: apiVersion, kind, metadata; and label selectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rdmanet.model import DEFAULT_NAMESPACE
from rdmanet.names import is_label_key, is_label_name, is_label_value, is_subdomain
from rdmanet.objects.fields import Fields, Shape, nearest, shown, wrong
from rdmanet.objects.values import Kind, ObjectKey, Requirement, Selector

API_VERSIONS = {
    Kind.NAMESPACE: "v1",
    Kind.POD: "v1",
    Kind.SERVICE: "v1",
    Kind.ENDPOINT_SLICE: "discovery.k8s.io/v1",
    Kind.NETWORK_POLICY: "networking.k8s.io/v1",
}

#: What the API server writes into metadata by itself; it is not kept.
SERVERS_OWN = Shape.of(
    "uid resourceVersion creationTimestamp managedFields generation selfLink deletionTimestamp"
    " deletionGracePeriodSeconds"
).read

#: Annotations together, in bytes (apimachinery's TotalAnnotationSizeLimitB).
ANNOTATIONS_MAX_BYTES = 256 * 1024

_METADATA = Shape(
    frozenset(("name", "namespace", "labels", "annotations")),
    SERVERS_OWN | {"ownerReferences", "finalizers", "generateName"},
)
_SELECTOR = Shape.of("matchLabels matchExpressions")
_EXPRESSION = Shape.of("key operator values")

_NAMES: dict[Kind, tuple[Callable[[str], bool], str]] = {
    Kind.NAMESPACE: (is_label_name, '1 to 63 of a-z, 0-9 and "-", and "-" not at the ends'),
    Kind.SERVICE: (is_label_name, '1 to 63 of a-z, 0-9 and "-", and "-" not at the ends'),
}
_SUBDOMAIN_NAME = (is_subdomain, '1 to 253 of a-z, 0-9, "-" and ".", with letters or digits at the ends of each word')


class Metadata(NamedTuple):
    """Of one document."""

    key: ObjectKey
    labels: Mapping[str, str]


def kind_of(document: Mapping[str, object]) -> Kind:
    """Which kind, in the version that is understood."""
    name = document.get("kind")
    if not isinstance(name, str) or name not in tuple(Kind):
        given = shown(name) if name is not None else "missing"
        hint = nearest(name, Kind) if isinstance(name, str) else ""
        wrong("kind", f"is {given}{hint or ';'} it can be {', '.join(Kind)}")
    kind = Kind(name)
    version = document.get("apiVersion")
    if version != API_VERSIONS[kind]:
        given = shown(version) if version is not None else "missing"
        wrong("apiVersion", f"is {given}; of a {kind} it is {API_VERSIONS[kind]}")
    return kind


def metadata_of(document: Mapping[str, object], kind: Kind) -> Metadata:
    """Name, namespace ("default" where there is none) and labels, checked as the API server checks them."""
    value = document.get("metadata")
    if value is None:
        wrong("metadata", "is missing")
    fields = Fields(value, "metadata", _METADATA)
    name = fields.text("name")
    is_name, form = _NAMES.get(kind, _SUBDOMAIN_NAME)
    if not name:
        wrong("metadata.name", "is missing")
    if not is_name(name):
        wrong("metadata.name", f"is {shown(name)}, not {form}")
    namespace = fields.text("namespace")
    if kind is Kind.NAMESPACE:
        if namespace:
            wrong("metadata.namespace", "a Namespace is in none")
    else:
        namespace = namespace or DEFAULT_NAMESPACE
        if not is_label_name(namespace):
            wrong("metadata.namespace", f"is {shown(namespace)}, not {_NAMES[Kind.NAMESPACE][1]}")
    annotations = fields.pairs("annotations", lambda key: is_label_key(key.lower()), lambda text: True)
    # In characters first: half surrogates have no bytes, and count as three.
    size = sum(len(key) + len(text.encode(errors="surrogatepass")) for key, text in annotations.items())
    if size > ANNOTATIONS_MAX_BYTES:
        wrong("metadata.annotations", f"have {size} bytes; {ANNOTATIONS_MAX_BYTES} at most are taken")
    return Metadata(ObjectKey(kind, namespace, name), fields.pairs("labels", is_label_key, is_label_value))


def key_of(document: object) -> ObjectKey:
    """What a document names, whatever else is in it."""
    if not isinstance(document, dict):
        wrong("the document", f"is {shown(document)}, not a mapping")
    return metadata_of(document, kind_of(document)).key


def selector_of(fields: Fields, name: str) -> Selector | None:
    """A LabelSelector; None where it is absent."""
    selector = fields.mapping(name, _SELECTOR)
    if selector is None:
        return None
    labels = selector.pairs("matchLabels", is_label_key, is_label_value)
    found = [Requirement(key, "In", frozenset((value,))) for key, value in labels.items()]
    found += [_requirement(expression) for expression in selector.mappings("matchExpressions", _EXPRESSION)]
    return Selector(frozenset(found))


def _requirement(expression: Fields) -> Requirement:
    key = expression.text("key")
    if not is_label_key(key):
        wrong(expression.at("key"), f"is {shown(key)}, not a label key such as app or example.com/app")
    expression.needed("operator")
    operator = expression.choice("operator", ("In", "NotIn", "Exists", "DoesNotExist"), "")
    values = expression.texts("values")
    for value in values:
        if not is_label_value(value):
            wrong(expression.at("values"), f"{shown(value)} is no label's value")
    if operator in ("In", "NotIn") and not values:
        wrong(expression.at("values"), f"is empty; {operator} needs at least one")
    if operator in ("Exists", "DoesNotExist") and values:
        wrong(expression.at("values"), f"must be left away with {operator}")
    return Requirement(key, operator, frozenset(values))
