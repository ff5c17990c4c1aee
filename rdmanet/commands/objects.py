"""``rdmanet apply``, ``get`` and ``delete``: Kubernetes objects, with kubectl's words and output."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from rdmanet import config, show
from rdmanet.client import ask
from rdmanet.commands.resources import RESOURCES, Resource, resources_of, table_of
from rdmanet.errors import NotFoundError, RequestError
from rdmanet.objects.values import Kind

DEFAULT_NAMESPACE = "default"
URL = "/v1/objects"
#: Fifty thousand services with their slices take some 20 s to be validated and put into force.
ANSWER_TIMEOUT_S = 600.0


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the three commands; ``commands`` is what ``add_subparsers`` has returned."""
    placed = argparse.ArgumentParser(add_help=False)
    placed.add_argument("-n", "--namespace", default=None, metavar="NAME", help=f"default: {DEFAULT_NAMESPACE}")
    files = {"action": "append", "metavar": "FILE", "help": "YAML or JSON; a directory, or - for standard input"}

    apply = commands.add_parser("apply", parents=[common, placed], help="create and change Kubernetes objects")
    apply.add_argument("-f", "--filename", required=True, **files)
    apply.set_defaults(run=_apply)

    get = commands.add_parser("get", parents=[common, placed], help="show Kubernetes objects")
    get.add_argument("kind", metavar="KIND", help="po, ns, svc, eps, netpol, their long names, several, or all")
    get.add_argument("name", nargs="?", metavar="NAME")
    get.add_argument("-A", "--all-namespaces", action="store_true")
    get.add_argument("-o", "--output", choices=("table", "name", "json", "yaml"), default="table")
    get.set_defaults(run=_get)

    delete = commands.add_parser("delete", parents=[common, placed], help="delete Kubernetes objects")
    delete.add_argument("-f", "--filename", **files)
    delete.add_argument("kind", nargs="?", metavar="KIND")
    delete.add_argument("name", nargs="*", metavar="NAME")
    delete.add_argument("--ignore-not-found", action="store_true", help="what is not there is no error")
    delete.set_defaults(run=_delete)


def _apply(chosen: argparse.Namespace) -> int:
    documents = list(_documents(chosen.filename, chosen.namespace))
    if not any(documents):
        raise RequestError("There are no objects in what was given.")
    for row in _send(chosen, "PUT", documents):
        print(f"{RESOURCES[Kind(row['kind'])].shown(row['name'])} {row['outcome']}")
    return 0


def _delete(chosen: argparse.Namespace) -> int:
    if bool(chosen.filename) is bool(chosen.kind):
        raise RequestError("Say what to delete: either -f FILE, or KIND NAME.")
    if chosen.filename:
        documents = list(_documents(chosen.filename, chosen.namespace))
    else:
        documents = list(_named(chosen.kind, chosen.name, chosen.namespace or DEFAULT_NAMESPACE))
    missing = []
    for row in _send(chosen, "DELETE", documents):
        resource = RESOURCES[Kind(row["kind"])]
        if row["outcome"] == "deleted":
            print(f'{resource.shown("").rstrip("/")} "{row["name"]}" deleted')
        else:
            missing.append(f'{resource.names[0]} "{row["name"]}" not found')
    if missing and not chosen.ignore_not_found:
        raise NotFoundError("; ".join(missing))
    return 0


def _named(kind: str, names: list[str], namespace: str) -> Iterator[dict[str, object]]:
    """Documents with what names objects: ``svc web``, or ``svc/web``."""
    if not names and "/" in kind:
        kind, _, name = kind.partition("/")
        names = [name]
    resources = resources_of(kind)
    if len(resources) > 1 or not names:
        raise RequestError("Say one kind, and the names of what is to be deleted.")
    for name in names:
        metadata = {"name": name} if resources[0].kind is Kind.NAMESPACE else {"name": name, "namespace": namespace}
        yield {"apiVersion": _version(resources[0]), "kind": resources[0].kind, "metadata": metadata}


def _version(resource: Resource) -> str:
    return f"{resource.group}/v1" if resource.group else "v1"


def _send(chosen: argparse.Namespace, method: str, documents: list[object]) -> list[Mapping[str, str]]:
    socket = config.load(chosen.config).agent.socket
    rows: list[Mapping[str, str]] = ask(socket, URL, method, {"documents": documents}, ANSWER_TIMEOUT_S)["objects"]
    return rows


def _documents(paths: list[str], namespace: str | None) -> Iterator[object]:
    from rdmanet.commands import manifests

    for document in manifests.documents(paths):
        if namespace is not None:
            _place(document, namespace)
        yield document


def _place(document: object, namespace: str) -> None:
    """Puts objects that say no namespace into this one. Raises RequestError for those that say another."""
    if not isinstance(document, dict) or document.get("kind") == Kind.NAMESPACE:
        return
    for item in document.get("items") or () if str(document.get("kind")).endswith("List") else ():
        _place(item, namespace)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "items" not in document:
        given = metadata.get("namespace") or namespace
        if given != namespace:
            raise RequestError(
                f"{document.get('kind')} {metadata.get('name')} says namespace {given}, and --namespace {namespace}."
            )
        metadata["namespace"] = namespace


def _get(chosen: argparse.Namespace) -> int:
    socket = config.load(chosen.config).agent.socket
    kind, name = chosen.kind, chosen.name
    if name is None and "/" in kind:
        kind, _, name = kind.partition("/")
    resources = resources_of(kind)
    namespace = None if chosen.all_namespaces else chosen.namespace or DEFAULT_NAMESPACE
    found = {resource: _find(socket, resource, namespace, name) for resource in resources}
    if name is not None and not any(found.values()):
        raise NotFoundError(f'{resources[0].names[0]} "{name}" not found')
    documents = [document for some in found.values() for document in some]
    if chosen.output in ("json", "yaml"):
        single = name is not None and len(documents) == 1
        _dump(documents[0] if single else {"apiVersion": "v1", "kind": "List", "items": documents}, chosen.output)
    elif chosen.output == "name":
        for resource, some in found.items():
            for document in some:
                print(resource.shown(document["metadata"]["name"]))
    elif documents:
        print("\n\n".join(_tables(found, all_namespaces=chosen.all_namespaces)))
    else:
        where = "" if namespace is None else f" in {namespace} namespace"
        print(f"No resources found{where}.", file=sys.stderr)
    return 0


def _find(socket: Path, resource: Resource, namespace: str | None, name: str | None) -> list[dict[str, Any]]:
    asked = {"kind": str(resource.kind), "namespace": namespace, "name": name}
    if resource.kind is Kind.NAMESPACE:
        del asked["namespace"]
    query = urlencode({key: value for key, value in asked.items() if value is not None})
    items: list[dict[str, Any]] = ask(socket, f"{URL}?{query}", timeout_s=ANSWER_TIMEOUT_S)["items"]
    return items


def _tables(found: Mapping[Resource, list[dict[str, Any]]], *, all_namespaces: bool) -> Iterator[str]:
    now_s = time.time()
    for resource, documents in found.items():
        if documents:
            headings, rows = table_of(resource, documents, namespaces=all_namespaces, now_s=now_s)
            if len(found) > 1:
                column = headings.index("name")
                rows = [(*row[:column], resource.shown(row[column]), *row[column + 1 :]) for row in rows]
            yield show.table(headings, rows)


def _dump(document: dict[str, Any], form: str) -> None:
    if form == "json":
        print(json.dumps(document, indent=4))
    else:
        from rdmanet.commands import manifests

        print(manifests.dump(document), end="")
