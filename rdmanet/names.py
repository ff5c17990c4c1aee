"""How Kubernetes spells names and labels (RFC 1123; k8s.io/apimachinery, util/validation)."""

from __future__ import annotations

import re

#: Keys of labels and annotations: an optional prefix, "/", and a part.
LABEL_KEY_MAX = 253 + 1 + 63

_WORD = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_PART = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(_WORD)
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_KEY_PART = re.compile(_PART)
_VALUE = re.compile(rf"({_PART})?")
_PORT = re.compile(r"[a-z0-9](-?[a-z0-9]){0,14}")


def is_label_name(text: str) -> bool:
    """An RFC 1123 label: at most 63 of a-z, 0-9 and "-", not at the ends."""
    return _LABEL.fullmatch(text) is not None


def is_subdomain(text: str) -> bool:
    """An RFC 1123 subdomain: words of a-z, 0-9 and "-" with dots between, 253 characters at most."""
    return len(text) <= 253 and _SUBDOMAIN.fullmatch(text) is not None


def is_label_key(text: str) -> bool:
    """A key of labels (IsQualifiedName): at most 63 letters, digits, "-", "_" and ".", letters or digits at the ends;
    before it perhaps a subdomain and "/"."""
    prefix, slash, part = text[: LABEL_KEY_MAX + 1].rpartition("/")
    return _KEY_PART.fullmatch(part) is not None and (not slash or is_subdomain(prefix))


def is_label_value(text: str) -> bool:
    """A value of labels (IsValidLabelValue): like a key without prefix, or empty."""
    return _VALUE.fullmatch(text) is not None


def is_port_name(text: str) -> bool:
    """A port's name (IsValidPortName, RFC 6335 5.1): at most 15 of a-z, 0-9 and single "-", with a letter."""
    return len(text) <= 15 and _PORT.fullmatch(text) is not None and not text.replace("-", "").isdigit()
