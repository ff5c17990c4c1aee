"""How a CNI call travels: as headers and body of ``POST /v1/cni``, and as a file in the queue of DELs.

The other end is ``cni/rdmanet.c``.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

from rdmanet.cni.values import CniCode, CniError, environment_error

#: Header of ``POST /v1/cni`` and name in a queue entry, for each of the specification's environment variables.
HEADERS = {
    "CNI-Command": "CNI_COMMAND",
    "CNI-ContainerID": "CNI_CONTAINERID",
    "CNI-NetNS": "CNI_NETNS",
    "CNI-IfName": "CNI_IFNAME",
    "CNI-Args": "CNI_ARGS",
    "CNI-Path": "CNI_PATH",
}


def variables_of_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that ``POST /v1/cni`` carries as percent-encoded headers; names in any case.

    Raises CniError (4): a value is not UTF-8.
    """
    folded = {name.lower(): value for name, value in headers.items()}
    variables = {}
    for header, variable in HEADERS.items():
        value = folded.get(header.lower())
        if value:
            try:
                # aiohttp hands over bytes that are not UTF-8 as surrogates, which are refused as well.
                variables[variable] = unquote_to_bytes(value.encode("utf-8", "surrogatepass")).decode("utf-8")
            except UnicodeDecodeError:
                raise environment_error(variable, "not UTF-8") from None
    return variables


def pending_name(container_id: str, ifname: str) -> str:
    """The file below ``pending`` that holds this attachment's queued DEL (``queue_delete`` in cni/rdmanet.c)."""
    return f"{container_id}@{ifname.replace('%', '%25')}"


def parse_pending(entry: bytes) -> tuple[dict[str, str], bytes]:
    """A queued DEL as (environment variables, standard input): the entry is the HTTP request that was not sent.

    Raises CniError: 6 not such a request, 4 as :func:`variables_of_headers`.
    """
    head, blank, body = entry.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if not blank or lines[0] != "POST /v1/cni HTTP/1.1" or headers.get("Content-Length") != str(len(body)):
        raise CniError("A queue entry is not a whole request", CniCode.DECODE)
    return variables_of_headers(headers), body
