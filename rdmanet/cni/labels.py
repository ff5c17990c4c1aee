"""``args.cni.labels``: a pod's labels where there is no Kubernetes (CONVENTIONS.md, "args in network config")."""

from __future__ import annotations

from collections.abc import Mapping

from rdmanet.cni.values import config_error, list_of, object_of, shown
from rdmanet.names import is_label_key, is_label_value

NAME = "args.cni.labels"


def labels_of(value: object) -> Mapping[str, str]:
    """From ``[{"key": "app", "value": "web"}]``. Raises CniError (7): another form, no label, or twice."""
    found: dict[str, str] = {}
    for item in list_of(NAME, value):
        pair = object_of(NAME, item)
        if pair.keys() != {"key", "value"}:
            raise config_error(f'"{NAME}" holds {shown(item)}; write {{"key": "app", "value": "web"}}')
        key, text = pair["key"], pair["value"]
        if not isinstance(key, str) or not is_label_key(key):
            raise config_error(f'"{NAME}" has the key {shown(key)}, not a label key such as app')
        if not isinstance(text, str) or not is_label_value(text):
            raise config_error(
                f'"{NAME}": the value of {key} is {shown(text)}, not at most 63 letters, digits, "-", "_" and "." with'
                " letters or digits at the ends"
            )
        if key in found:
            raise config_error(f'"{NAME}" has {key} twice')
        found[key] = text
    return found
