"""Row `manifests`: the files of deploy/kubernetes against Kubernetes' published schema; the network configurations and
the agent's configuration in them are read by the programs that get them, and a spoiled manifest is refused."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from rdmanet import cli, config
from rdmanet.cni import NetworkConfig
from testbed.openapi import violations
from testbed.paths import REPOSITORY
from testbed.rows import Figure, need

MANIFESTS = REPOSITORY / "deploy/kubernetes"


def measure() -> Figure:
    """Documents that were found to be right."""
    found = [
        document
        for path in sorted(MANIFESTS.iterdir())
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]
    spoiled = 0
    for document in found:
        if document["kind"] == "NetworkAttachmentDefinition":
            NetworkConfig.parse(json.loads(document["spec"]["config"]))
            continue
        wrong = violations(document)
        need(not wrong, f"{document['kind']}: {'; '.join(wrong)}")
        spoiled += _refused(document)
    pods = [document["spec"]["template"]["spec"] for document in found if document["kind"] == "DaemonSet"]
    containers = [container for pod in pods for container in pod["initContainers"] + pod["containers"]]
    # Of the image's own program, which a command would replace.
    commands = [container["args"] for container in containers if "command" not in container]
    for words in commands:
        cli._parser().parse_args(words)
    (config_map,) = [document for document in found if document["kind"] == "ConfigMap"]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(config_map["data"]["rdmanet.toml"])
        file.flush()
        need(config.load(Path(file.name)).kubernetes.slots > 0, "the ConfigMap's agent gives kubelet no slots")
    detail = (
        f"documents are as the published schema and our own readers have them; {spoiled} with a field that the schema"
        f" does not have were refused; {len(commands)} containers run commands that exist"
    )
    return Figure(len(found), "documents", detail)


def _refused(document: Any) -> int:
    """How many copies with a field too many, one in each object of the document, are refused: all."""
    count = 0
    for path in list(_objects(document, ())):
        spoiled = copy.deepcopy(document)
        place = spoiled
        for key in path:
            place = place[key]
        place["notAField"] = 1  # in a map of texts it has the wrong type
        need(bool(violations(spoiled)), f"{document['kind']}: a field too many at {path} was let through")
        count += 1
    return count


def _objects(value: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from _objects(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _objects(item, (*path, number))
