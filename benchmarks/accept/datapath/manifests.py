"""Row `yaml`: Kubernetes' own manifests through `rdmanet apply`, `get` and `delete`, as people have them.

What is understood comes back as it was given and can be applied again; what is not is refused with a sentence that
names the object, the field's path or the line, and nothing of its file is kept. Labels reach attachments by their
Kubernetes names, and through CNI where there is no Kubernetes; connections say so.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from rdmanet.commands.manifests import parse
from rdmanet.errors import UnavailableError
from rdmanet.objects.metadata import SERVERS_OWN
from rdmanet.objects.reading import unlisted
from testbed.manifests import CORPUS, MISTAKES, corpus, intruded, spoilt
from testbed.policies import labelled, pods, policy
from testbed.progress import say
from testbed.rows import Figure, need
from testbed.services import FAMILIES, KINDS, NETWORK, TARGET_PORT, Document, Scene, wait_until

SPOILT = 2000
FIXED_SEED = 5
WEB, DB = "web-6d4cf56db6-x2x7k", "db-0"  # pods of the manifests
SQL_PORT = 5432
FORMS = ("yaml", "json")


def measure() -> Figure:
    """Everything on one host, its pods attached before anything is applied."""
    seeds = (FIXED_SEED, Random().randrange(1 << 32))
    with Scene.start("yaml", (f"shop/{WEB}", f"shop/{DB}", "toolbox")) as scene:
        whole = [one for one in unlisted(corpus()) if isinstance(one, dict)]
        shown = _round_trips(scene, whole)
        mistakes = _mistakes(scene)
        unknown = _unknown_fields(scene, whole)
        refused, understood = _spoilt(scene, whole, seeds)
        joined = _joined(scene)
        deleted = _deleted(scene, whole)
        alone = _without_kubernetes(scene)
    documents = len(whole) + shown + mistakes + unknown + refused + understood
    detail = (
        f"{len(whole)} objects of all kinds as clusters print them, applied, shown as YAML and JSON and applied again"
        f" unchanged; {mistakes} mistakes and {unknown} unknown fields, one in each mapping, refused by object and"
        f" path, and {refused} of {refused + understood} spoilt documents (seeds {seeds[0]} and {seeds[1]}), nothing of"
        f" their files kept, the others as they are; {joined} connections followed labels joined by Kubernetes' names,"
        f" {alone} those given through CNI; {deleted} deleted"
    )
    more = {"mistakes": mistakes, "unknown": unknown, "refused": refused, "understood": understood}
    return Figure(documents, "documents", detail, {**more, "seeds": list(seeds)})


def _given(document: Mapping[str, Any]) -> Document:
    """What of a document is kept: not what the API server adds, nor status, but a service's."""
    own = {key: value for key, value in document["metadata"].items() if key not in SERVERS_OWN and value is not None}
    if document["kind"] != "Namespace":
        own.setdefault("namespace", "default")
    kept = {key: value for key, value in document.items() if key != "status" or document["kind"] == "Service"}
    return {**kept, "metadata": own}


def _key(document: Mapping[str, Any]) -> str:
    metadata = document["metadata"]
    return f"{document['kind']} {metadata.get('namespace', '')}/{metadata['name']}"


def _kept(scene: Scene) -> dict[str, Document]:
    """Everything there is."""
    return {_key(item): _given(item) for item in scene.host.api("GET", "/v1/objects")["items"]}


def _outcomes(text: str) -> set[str]:
    return {line.rpartition(" ")[2] for line in text.splitlines()}


def _round_trips(scene: Scene, whole: Sequence[Document]) -> int:
    """The directory applied; then whatever way objects are shown they can be applied again, and nothing changes."""
    wanted = {_key(one): one for one in map(_given, whole)}
    lines = scene.command("apply", "-f", str(CORPUS))
    need(_outcomes(lines) == {"created"} and lines.count("\n") == len(whole), f"apply said: {lines}")
    need(_kept(scene) == wanted, "what is kept is not what was given")
    shown = 0
    for form in FORMS:
        text = scene.command("get", "all", "--all-namespaces", "-o", form)
        (given,) = parse(text.encode(), form)
        assert isinstance(given, dict)
        found = {_key(item): _given(item) for item in unlisted([given]) if isinstance(item, dict)}
        need(found == wanted, f"get -o {form} shows something else than was applied")
        again = scene.command("apply", "-f", "-", text=text)
        need(_outcomes(again) == {"unchanged"}, f"applied again: {again}")
        shown += len(found)
    for document in {one["kind"]: one for one in wanted.values()}.values():
        metadata = document["metadata"]
        words = [f"{document['kind'].lower()}/{metadata['name']}", "-n", metadata.get("namespace", "default")]
        for form in FORMS:
            text = scene.command("get", *words, "-o", form)
            need([_given(one) for one in _mappings(text)] == [document], f"get {words[0]} -o {form}: {text}")
            shown += 1
    names = scene.command("get", "all", "-A", "-o", "name").split()
    need(len(names) == len(wanted), f"get -o name: {names}")
    return shown


def _mappings(text: str) -> Iterator[Document]:
    for document in parse(text.encode(), "get"):
        assert isinstance(document, dict)
        yield document


def _mistakes(scene: Scene) -> int:
    """Each between two objects that are right, on the command line."""
    before = _kept(scene)
    good = json.dumps(labelled("right", app="right"))
    for name, (text, sentence) in MISTAKES.items():
        done = scene.run("apply", "-f", "-", text=f"{good}\n---\n{text}\n---\n{good}", check=False)
        need(done.returncode != 0 and sentence in done.stderr, f"{name}: {done.returncode}, {done.stderr.strip()}")
        need(not done.stdout, f"{name}: {done.stdout}")
    need(_kept(scene) == before, "something of a file with a mistake was kept")
    return len(MISTAKES)


def _refusal(scene: Scene, documents: Sequence[object]) -> str | None:
    """The agent's sentence; None: it has taken the documents. Anything but a refusal raises."""
    try:
        scene.host.api("PUT", "/v1/objects", {"documents": documents})
    except UnavailableError as error:
        need("answered 400" in error.sentence or "answered 409" in error.sentence, error.sentence)
        return error.sentence
    return None


def _unknown_fields(scene: Scene, whole: Sequence[Document]) -> int:
    """One in every mapping that is looked at."""
    before, tried, new = _kept(scene), 0, labelled("right", app="right")
    for document in whole:
        for found, path in intruded(document):
            sentence = _refusal(scene, [new, found])
            need(f": {path}: unknown" in (sentence or ""), f"{_key(document)} with {path}: {sentence or 'taken'}")
            tried += 1
    need(_kept(scene) == before, "something of a file with an unknown field was kept")
    return tried


def _spoilt(scene: Scene, whole: Sequence[Document], seeds: Sequence[int]) -> tuple[int, int]:
    """Refused, and nothing is kept; or understood, and kept as it is."""
    before, refused, understood = _kept(scene), 0, 0
    new = labelled("right", app="right")
    for seed in seeds:
        random = Random(seed)
        for number in range(SPOILT // len(seeds)):
            document = spoilt(random.choice(whole), random)
            if _refusal(scene, [new, document]) is not None:
                refused += 1
                continue
            understood += 1
            after = _kept(scene)
            given = {_key(one): one for one in map(_given, (new, document))}
            need(after == {**before, **given}, f"seed {seed}, document {number}: something else was kept")
            scene.host.api("DELETE", "/v1/objects", {"documents": list(given.values())})
            scene.host.api("PUT", "/v1/objects", {"documents": list(whole)})
        need(_kept(scene) == before, f"seed {seed}: something of a refused file was kept")
        say(f"yaml: {refused} spoilt documents refused, {understood} understood")
    need(min(refused, understood) > SPOILT // 20, f"{refused} refused, {understood} understood")
    return refused, understood


def _ask(scene: Scene, place: str, target: str, port: int, allowed: bool) -> int:
    """By both families and both protocols."""
    for version in FAMILIES:
        address = scene.addresses[target][version]
        ends = [{"kind": kind, "address": address, "port": port} for kind in KINDS]
        before = _policy_drops(scene)
        scene.ask(place, "attempt", ends=ends, wanted=[allowed] * len(ends))
        if not allowed:
            due = before + len(ends)
            wait_until(lambda due=due: _policy_drops(scene) >= due, f"what {place} sends is dropped")  # type: ignore[misc]
        answers = scene.ask(place, "attempted")["answers"]
        way = f"{place} to [{address}]:{port}, which policy {'allows' if allowed else 'denies'}"
        need(answers == ([target] * 2 if allowed else [None] * 2), f"{way}: {answers}")
    return 2 * len(FAMILIES)


def _policy_drops(scene: Scene) -> int:
    """Of all pods; a drop is counted while its packet is sent."""
    rows = scene.host.api("GET", "/v1/status")["drops"]
    return sum(row["packets"] for row in rows if row["reason"].startswith("policy_"))


def _joined(scene: Scene) -> int:
    """The manifests' pods are attached under their names; their policies say who reaches the database."""
    status = {row["pod"]: row for row in scene.host.api("GET", "/v1/status")["attachments"]}
    labels = status[f"shop/{DB}"]["policy"]["labels"]
    need(labels.get("app.kubernetes.io/name") == "db", f"shop/{DB} has the labels {labels}")
    scene.ask(DB, "serve", name=DB, port=SQL_PORT)
    calls = _ask(scene, WEB, DB, SQL_PORT, False)  # dns-egress
    scene.command("delete", "networkpolicy", "dns-egress", "-n", "shop")
    allowed: dict[str, Any] = {"port": SQL_PORT, "protocol": "UDP"}
    scene.apply(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "db-udp", "namespace": "shop"},
            "spec": {
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "db"}},
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"track": "stable"}}}], "ports": [allowed]}],
            },
        }
    )
    calls += _ask(scene, WEB, DB, SQL_PORT, True)
    calls += _ask(scene, WEB, DB, TARGET_PORT, False)
    calls += _ask(scene, "toolbox", DB, SQL_PORT, False)
    return calls + _ask(scene, DB, "toolbox", TARGET_PORT, True)


def _deleted(scene: Scene, whole: Sequence[Document]) -> int:
    """By file, by name; what is not there is an error but where nobody minds."""
    scene.command("delete", "netpol", "db-udp", "-n", "shop")
    missing = scene.run("delete", "-f", str(CORPUS), check=False)
    need(missing.returncode != 0 and 'networkpolicies "dns-egress" not found' in missing.stderr, missing.stderr)
    deleted = missing.stdout.count(" deleted")
    need(deleted == len(whole) - 1, f"{deleted} of {len(whole)} were deleted")
    need(_kept(scene) == {}, "something is left")
    need(scene.run("delete", "svc", "web", check=False).returncode != 0, "what is not there was deleted")
    scene.command("delete", "-f", str(CORPUS), "--ignore-not-found")
    return deleted + 2


def _without_kubernetes(scene: Scene) -> int:
    """Labels in the network configuration, no Kubernetes names; a Pod object's labels come before them."""
    with contextlib.ExitStack() as stack:
        for name in ("server", "client", "other"):
            labels = [{"key": "app", "value": name}, {"key": "example.com/by", "value": "cni"}]
            network = {**NETWORK, "args": {"cni": {"labels": labels}}}
            scene.add(name, stack, network=network, args="")
        own = scene.pods["client"].container_id
        rows = {row["pod"]: row for row in scene.host.api("GET", "/v1/status")["attachments"]}
        labels_there = rows[f"default/{own}"]["policy"]["labels"]
        need(labels_there == {"app": "client", "example.com/by": "cni"}, f"the client has the labels {labels_there}")
        scene.apply(policy("server", pods(app="client")))
        calls = _ask(scene, "client", "server", TARGET_PORT, True) + _ask(scene, "other", "server", TARGET_PORT, False)
        scene.apply(labelled(own, app="other"))
        calls += _ask(scene, "client", "server", TARGET_PORT, False)
        scene.delete(labelled(own))
        calls += _ask(scene, "client", "server", TARGET_PORT, True)
    return calls
