"""The body of a request: ``{"documents": [...]}``, document by document.

json.loads holds the interpreter for as long as it takes: a second for fifty thousand services, and nobody's ADD would
be answered meanwhile.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import NoReturn

from rdmanet.errors import RequestError

_SPACE = re.compile(r"[ \t\n\r]*")


def documents_of(body: bytes) -> Iterator[object]:
    """Each document. Raises RequestError: another form, a key that is there twice, too deep, no JSON."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise RequestError("The body is not UTF-8.") from None
    decoder = json.JSONDecoder(object_pairs_hook=_mapping, parse_constant=_no_constant)
    at = _expect(text, 0, "{")
    at = _expect(text, at, '"documents"')
    at = _expect(text, at, ":")
    at = _expect(text, at, "[")
    if text[at : at + 1] == "]":
        at = _expect(text, at, "]")
    else:
        while True:
            try:
                document, at = decoder.raw_decode(text, at)
            except RecursionError:
                raise RequestError("A document is nested too deeply.") from None
            except ValueError as error:
                raise RequestError(f"The body is not JSON: {error}.") from None
            yield document
            at = _after_space(text, at)
            if text[at : at + 1] == "]":
                break
            at = _expect(text, at, ",")
        at = _expect(text, at, "]")
    if _expect(text, at, "}") != len(text):
        raise RequestError('There is more behind the body; it must be {"documents": [...]} alone.')


def _expect(text: str, at: int, token: str) -> int:
    """Where the text goes on behind a token and the space around it."""
    at = _after_space(text, at)
    if not text.startswith(token, at):
        raise RequestError(f'The body must be {{"documents": [...]}}; at character {at} there is no {token}.')
    return _after_space(text, at + len(token))


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RequestError(f"A mapping has the key {json.dumps(twice[:80])} twice.")
    return found


def _no_constant(name: str) -> NoReturn:
    raise RequestError(f"{name} is not JSON.")
