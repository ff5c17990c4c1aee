"""Kubernetes' manifests checked against the API's published schema, as the official Python client carries it.

Stricter than the API server's default: a field that the schema does not have is an error, at any depth.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

from kubernetes.client import models

#: (apiVersion, kind) → the client's model of the document.
KINDS = {
    ("v1", "Namespace"): "V1Namespace",
    ("v1", "ServiceAccount"): "V1ServiceAccount",
    ("v1", "ConfigMap"): "V1ConfigMap",
    ("v1", "Service"): "V1Service",
    ("apps/v1", "DaemonSet"): "V1DaemonSet",
    ("batch/v1", "Job"): "V1Job",
}
_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "datetime": (datetime.datetime, str),
    "bytes": (str,),
}
#: IntOrString, RawExtension and the like.
_ANY = "object"


def violations(document: Any) -> list[str]:
    """What the schema refuses in a document: sentences with the field's path. Empty where all is well."""
    kind = (document.get("apiVersion"), document.get("kind"))
    if kind not in KINDS:
        return [f"{kind[0]} {kind[1]} is no kind that is known here"]
    return list(_check(kind[1], KINDS[kind], document))


def _check(path: str, wanted: str, value: Any) -> Iterator[str]:
    if listed := re.fullmatch(r"List\[(.+)\]", wanted):
        if not isinstance(value, list):
            yield f"{path} is no list"
            return
        for number, item in enumerate(value):
            yield from _check(f"{path}[{number}]", listed.group(1), item)
    elif mapped := re.fullmatch(r"Dict\[str, (.+)\]", wanted):
        if not isinstance(value, dict):
            yield f"{path} is no object"
            return
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{path}: the key {key!r} is no text"
            yield from _check(f"{path}[{key}]", mapped.group(1), item)
    elif wanted in _PLAIN:
        if not isinstance(value, _PLAIN[wanted]) or (isinstance(value, bool) and wanted != "bool"):
            yield f"{path} is {value!r} and not of type {wanted}"
    elif wanted != _ANY:
        yield from _check_model(path, getattr(models, wanted), value)


def _check_model(path: str, model: Any, value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path} is no object"
        return
    attributes = {name: attribute for attribute, name in model.attribute_map.items()}
    for name, item in value.items():
        if name not in attributes:
            yield f"{path}.{name} is no field of {model.__name__}"
        else:
            yield from _check(f"{path}.{name}", model.openapi_types[attributes[name]], item)
    for name, attribute in attributes.items():
        if name not in value and model.model_fields[attribute].is_required():
            yield f"{path}.{name} is missing"
