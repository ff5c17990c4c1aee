"""rdmanet.commands.manifests: YAML and JSON as kubectl reads them, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rdmanet.commands.manifests import Json, documents, dump, parse
from rdmanet.errors import RequestError

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "annotations": {"x": "\U0001f600 / <b>\t\u2028"}}}


def read(text: str) -> list[Json]:
    return list(parse(text.encode(), "file"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: yes\nb: Off\nc: ~\nd:", {"a": True, "b": False, "c": None, "d": None}),
        ('a: "yes"\nb: !!str 1', {"a": "yes", "b": "1"}),
        ("a: 12:30:45\nb: 2026-01-01\nc: 1.2.3", {"a": "12:30:45", "b": "2026-01-01", "c": "1.2.3"}),
        ("a: 010\nb: 0x1f\nc: 1_000\nd: 1e3\ne: -.5", {"a": 8, "b": 31, "c": 1000, "d": 1000.0, "e": -0.5}),
        ("a: &a {c: 1, d: 1}\nb: {<<: *a, d: 2}", {"a": {"c": 1, "d": 1}, "b": {"c": 1, "d": 2}}),
        ("kind: Pod\r\nmetadata:\r\n  name: a\r\n", {"kind": "Pod", "metadata": {"name": "a"}}),
        ("{kind: Pod, metadata: {name: a}}", {"kind": "Pod", "metadata": {"name": "a"}}),
    ],
)
def test_yaml(text: str, value: Json) -> None:
    assert read(text) == [value]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(POD),
        json.dumps(POD, indent="\t"),
        json.dumps(POD, ensure_ascii=False, indent=2),
        json.dumps(POD).replace("/", "\\/"),
        "\ufeff\n " + json.dumps(POD) + "\r\n",
    ],
    ids=["escaped", "tabs", "as it is", "slashes", "marked"],
)
def test_json(text: str) -> None:
    assert read(text) == [POD]
    assert read(f"{text.strip()}\n{text.strip(chr(0xFEFF))}") == [POD, POD], "one behind the other"


def test_several_documents() -> None:
    assert read("---\na: 1\n---\n# nothing\n---\n{b: 2}\n...\n") == [{"a": 1}, None, {"b": 2}]
    assert read('{"a": 1}\n---\n{"b": 2}\n') == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\na: 2", "file line 2: the key 'a' is there twice"),
        ('{"a": 1,\n "a": 2}', "file line 2: the key 'a' is there twice"),
        ("a:\n  1: 2", "file line 2: the key '1' is no text: put it in quotes"),
        ("a: .nan", "file line 1: .nan is no number that JSON has"),
        ('{"a": 1e999}', "file line 1: 1e999 is no number that JSON has"),
        ('{"a": "\\ud800"}', "file line 1: "),
        ("a: !!binary aGk=", "means nothing here"),
        ("a: [", "file line 2: did not find expected node content"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "nested more than 64 deep"),
        ("a: *b", "the alias *b stands for nothing before it"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_wrong_is_named_with_its_line(text: str, sentence: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(text)
    assert sentence in refused.value.sentence


TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ("yes", "n", "~", "", "1e3", "0x1", "1_0", "010", ".inf", "12:30", "2026-01-01", "- a", "a: b", "#", "<<", "=", "?")
)
NUMBERS = st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(TEXT, VALUES, max_size=4))
@example({"k" * 300: "v" * 300, "a": {"b" * 200: ["c " * 200]}})
@example({"y": "Y", "on": "a\n\n b\n", "": "\t", "<<": "<<", "\x85": "\u2029\x07\ufeff"})
def test_what_is_written_is_read_as_the_same(document: dict[str, Json]) -> None:
    assert read(dump(document)) == [document]
    assert read(json.dumps(document, indent=4)) == [document]


def test_directories_and_what_cannot_be_read(tmp_path: Path) -> None:
    for name, text in {"b.yaml": "b: 1", "a.yml": "a: 1", "c.json": '{"c": 1}{"d": 1}', "d.txt": "e: 1"}.items():
        (tmp_path / name).write_text(text)
    assert list(documents([str(tmp_path), str(tmp_path / "d.txt")])) == [
        {"a": 1},
        {"b": 1},
        {"c": 1},
        {"d": 1},
        {"e": 1},
    ]
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        list(documents([str(tmp_path / "nothing")]))
