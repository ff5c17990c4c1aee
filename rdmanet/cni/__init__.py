"""CNI requests and results as plain values: parsing, validation and the version differences; no I/O.

Written from the CNI specification 1.1.0 (section 2 "Execution Protocol", section 5 "Result Types") and its
CONVENTIONS.md; what 0.3.1, 0.4.0 and 1.0.0 had otherwise is named where it matters.

A request that cannot be understood raises :class:`CniError`, which carries the specification's error code: that is
part of what the specification says about a *request*. What all other errors mean to a runtime is decided in
``rdmanet.api`` alone.
"""

from rdmanet.cni.request import (
    BODY_MAX_BYTES,
    CAPABILITIES,
    SUPPORTED_VERSIONS,
    Args,
    Command,
    NetworkConfig,
    Request,
    RuntimeConfig,
    check_container_id,
    check_ifname,
    parse_document,
    parse_version,
)
from rdmanet.cni.result import Dns, Interface, IpConfig, Result, Route, error_json, result
from rdmanet.cni.transport import HEADERS, parse_pending, pending_name, variables_of_headers
from rdmanet.cni.values import CniCode, CniError

__all__ = [
    "BODY_MAX_BYTES",
    "CAPABILITIES",
    "HEADERS",
    "SUPPORTED_VERSIONS",
    "Args",
    "CniCode",
    "CniError",
    "Command",
    "Dns",
    "Interface",
    "IpConfig",
    "NetworkConfig",
    "Request",
    "Result",
    "Route",
    "RuntimeConfig",
    "check_container_id",
    "check_ifname",
    "error_json",
    "parse_document",
    "parse_pending",
    "parse_version",
    "pending_name",
    "result",
    "variables_of_headers",
]
