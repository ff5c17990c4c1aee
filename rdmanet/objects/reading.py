"""Documents, as YAML and JSON give them, to objects."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from rdmanet.errors import RequestError
from rdmanet.objects.fields import Fields, Shape, shown, wrong
from rdmanet.objects.metadata import SERVERS_OWN, Metadata, key_of, kind_of, metadata_of
from rdmanet.objects.pods import namespace_of, pod_of
from rdmanet.objects.policies import policy_of
from rdmanet.objects.services import service_of, slice_of
from rdmanet.objects.values import Kind, Object, ObjectKey

#: The largest object as JSON: as much as etcd takes by default.
OBJECT_MAX_BYTES = 1536 * 1024
LIST = "List"
#: Lists in lists are no List; more than this is somebody playing.
_LIST_DEPTH_MAX = 4

_LISTS = {LIST, *(f"{kind}{LIST}" for kind in Kind)}
_LIST = Shape.of("apiVersion kind items", "metadata")
_READERS: dict[Kind, Callable[[dict[str, object], Metadata], Object]] = {
    Kind.NAMESPACE: namespace_of,
    Kind.POD: pod_of,
    Kind.SERVICE: service_of,
    Kind.ENDPOINT_SLICE: slice_of,
    Kind.NETWORK_POLICY: policy_of,
}


@dataclass(frozen=True, slots=True)
class Read:
    """One object, and its document as it is kept: JSON with sorted keys, without what the API server adds."""

    key: ObjectKey
    value: Object
    text: str


def read(document: object) -> Read:
    """One document that is no list. Raises RequestError, which names the object and the path in it."""
    if not isinstance(document, dict):
        raise RequestError(f"A document is {shown(document)}, not a Kubernetes object.")
    with _named(document):
        kind = kind_of(document)
        metadata = metadata_of(document, kind)
        value = _READERS[kind](document, metadata)
        return Read(metadata.key, value, _kept(document, metadata.key))


def keys(documents: Iterable[object]) -> list[ObjectKey]:
    """What documents name, whatever else is in them: to delete objects one needs no valid specification."""
    found = []
    for document in unlisted(documents):
        with _named(document):
            found.append(key_of(document))
    return found


def unlisted(documents: Iterable[object]) -> Iterator[object]:
    """Documents in order, those in lists (``kind: List`` and ``PodList`` and the like) in their place; empty ones are
    left out. Raises RequestError."""
    for document in documents:
        yield from _unlisted(document, _LIST_DEPTH_MAX)


def _unlisted(document: object, depth: int) -> Iterator[object]:
    if document is None:
        return
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(kind, str) or kind not in _LISTS:
        yield document
        return
    with _named(document):
        if depth == 0:
            wrong("items", f"lists in lists in lists; {_LIST_DEPTH_MAX} at most are taken")
        values = Fields(document, "", _LIST).values.get("items")
        if values is not None and not isinstance(values, list):
            wrong("items", f"is {shown(values)}, not a list")
    for item in values or ():
        # The items of a PodList need not say what they are.
        if isinstance(item, dict) and kind != LIST and "kind" not in item:
            item = {"apiVersion": document.get("apiVersion"), "kind": kind.removesuffix(LIST), **item}
        yield from _unlisted(item, depth - 1)


def _kept(document: Mapping[str, object], key: ObjectKey) -> str:
    metadata = document["metadata"]
    assert isinstance(metadata, dict)
    own = {name: value for name, value in metadata.items() if name not in SERVERS_OWN and value is not None}
    if key.namespace:
        own["namespace"] = key.namespace
    kept = {name: value for name, value in document.items() if name != "status" or key.kind is Kind.SERVICE}
    try:
        text = json.dumps({**kept, "metadata": own}, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise RequestError("nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RequestError(f"holds what JSON does not have: {error}") from None
    if len(text) > OBJECT_MAX_BYTES:
        raise RequestError(f"has {len(text)} bytes as JSON; {OBJECT_MAX_BYTES} at most are taken")
    return text


@contextlib.contextmanager
def _named(document: Mapping[object, object] | object) -> Iterator[None]:
    """Says of which object a RequestError is."""
    try:
        yield None
    except RequestError as error:
        fields = document if isinstance(document, dict) else {}
        metadata = fields.get("metadata")
        parts = metadata if isinstance(metadata, dict) else {}
        words = [fields.get("kind"), parts.get("name"), parts.get("namespace")]
        kind, name, namespace = (json.dumps(word[:300])[1:-1] if isinstance(word, str) else "" for word in words)
        named = f"{kind or 'document'} {namespace + '/' if namespace else ''}{name or 'without a name'}"
        raise RequestError(f"{named}: {error.sentence}.") from None
