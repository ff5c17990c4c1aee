"""rdmanet.objects: manifests as people have them are understood, their mistakes are named, nothing else is raised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rdmanet.commands.manifests import parse
from rdmanet.documents import Documents
from rdmanet.errors import ConflictError, RequestError
from rdmanet.objects.changes import Changes
from rdmanet.objects.keeping import Objects
from rdmanet.objects.reading import read, unlisted
from rdmanet.objects.values import Kind
from testbed.manifests import MISTAKES, corpus, intruded, spoilt

SPOILT = 3000


def objects_of_corpus() -> list[Any]:
    return list(unlisted(corpus()))


def test_every_kind_is_understood_as_people_have_it() -> None:
    found = [read(document) for document in objects_of_corpus()]
    assert {one.key.kind for one in found} == set(Kind)
    for one in found:
        assert read(json.loads(one.text)) == one, "what is kept means the same"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    text, sentence = MISTAKES[name]
    with pytest.raises(RequestError) as refused:
        _ = [read(document) for document in parse(text.encode(), "file")]
    assert sentence in refused.value.sentence


def test_an_unknown_field_is_named_wherever_it_is() -> None:
    tried = [one for document in objects_of_corpus() for one in intruded(document)]
    for document, path in tried:
        with pytest.raises(RequestError) as refused:
            read(document)
        assert f": {path}: unknown" in refused.value.sentence
    assert len(tried) > 100


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "random"])
def test_spoilt_documents_are_refused_with_a_sentence_or_understood(fixed: bool) -> None:
    seed = 5 if fixed else Random().randrange(1 << 32)
    print(f"seed {seed}")
    random = Random(seed)
    documents, refused = objects_of_corpus(), 0
    for _ in range(SPOILT):
        try:
            one = read(spoilt(random.choice(documents), random))
        except RequestError:  # nothing else is raised
            refused += 1
        else:
            assert read(json.loads(one.text)) == one, seed
    assert SPOILT // 4 < refused < SPOILT


class Watching:
    """Remembers what it was told; refuses on demand."""

    def __init__(self) -> None:
        self.told: list[Changes] = []
        self.refuses = False

    def check(self, changes: Changes) -> None:
        if self.refuses:
            raise ConflictError("It is taken.")

    def objects_changed(self, changes: Changes) -> None:
        self.told.append(changes)


@pytest.fixture
def watching() -> Watching:
    return Watching()


@pytest.fixture
def objects(tmp_path: Path, watching: Watching) -> Iterator[Objects]:
    documents = Documents.beside(tmp_path)
    yield Objects(documents, [watching])
    documents.close()


def test_nothing_of_what_is_refused_is_kept(objects: Objects, watching: Watching) -> None:
    good, *rest = objects_of_corpus()
    objects.apply([good])
    for refused in ([*rest, {"kind": "Pod"}], [*rest, rest[0]], [rest[0], {**rest[1], "intruder": 1}]):
        with pytest.raises(RequestError):
            objects.apply(refused)
    watching.refuses = True
    with pytest.raises(ConflictError):
        objects.apply(rest)
    assert [document["kind"] for document in objects.documents()] == ["Namespace"]
    assert len(watching.told) == 1


def test_what_is_shown_can_be_applied_again(objects: Objects, watching: Watching) -> None:
    results = objects.apply(corpus())
    assert {result.outcome for result in results} == {"created"}
    shown = list(objects.documents())
    assert len(shown) == len(results)
    assert {result.outcome for result in objects.apply(shown)} == {"unchanged"}
    assert len(watching.told) == 1, "nobody is told of nothing"
    assert {result.outcome for result in objects.delete([result.key for result in results])} == {"deleted"}
    assert list(objects.documents()) == []
    assert watching.told[-1].removed.keys() == {result.key for result in results}
