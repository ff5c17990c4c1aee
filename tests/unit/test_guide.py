"""docs/rdma.md as far as it can be judged without running it, which tests/rdma/test_guide.py does; how it is read."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from rdmanet import config
from rdmanet.broker.values import Reason
from rdmanet.cni.request import NetworkConfig
from rdmanet.errors import InputError
from testbed.guide import COMMANDS, Block, blocks
from testbed.paths import REPOSITORY

GUIDE = REPOSITORY / "docs/rdma.md"
BLOCKS = blocks(GUIDE)


def test_every_python_block_compiles() -> None:
    programs = [block for block in BLOCKS if block.language == "python"]
    assert programs
    for block in programs:
        compile(block.text, f"{GUIDE.name}:{block.line}", "exec")


def test_every_network_configuration_is_one() -> None:
    conflists = [block for block in BLOCKS if block.language == "json"]
    assert conflists
    for block in conflists:
        document = json.loads(block.text)
        for plugin in document["plugins"]:
            parsed = NetworkConfig.parse({**plugin, "name": document["name"], "cniVersion": document["cniVersion"]})
            assert parsed.rdma


def test_the_agents_configuration_is_one(tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if block.language == "toml"]
    file = tmp_path / "rdmanet.toml"
    file.write_text(block.text)
    assert config.load(file).network.mtu_bytes == 9000


def test_every_reason_to_refuse_has_its_line_and_no_other() -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("| reason | what to do |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(Reason)


@pytest.mark.parametrize("document", ["docs/rdma.md", "docs/design/rdma.md"])
def test_every_metric_that_is_named_exists(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`(rdmanet_[a-z_]+)`", text))
    assert named
    exported = set(re.findall(r'"(rdmanet_[a-z_]+)"', (REPOSITORY / "rdmanet/metrics.py").read_text(encoding="utf-8")))
    assert named <= exported


def test_every_configuration_key_that_is_named_exists() -> None:
    sections = {section: set(keys) for section, keys in dataclasses.asdict(config.Config()).items()}
    text = GUIDE.read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)\.(\w+)(?: = [^`]*)?`", text)
    found = [(section, key) for section, key in named if section in sections]
    assert ("rdma", "backend") in found
    for section, key in found:
        assert key in sections[section], f"{section}.{key}"


@pytest.mark.parametrize("document", ["docs/rdma.md", "examples/allreduce/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = REPOSITORY / document
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8"))
    assert links
    for file, heading in links:
        target = path.parent / file if file else path
        assert target.exists(), file
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]
            assert heading in slugs, f"{file}#{heading}"


def written(tmp_path: Path, text: str) -> list[Block]:
    document = tmp_path / "guide.md"
    document.write_text(text)
    return blocks(document)


def test_a_document_is_read_in_order(tmp_path: Path) -> None:
    text = """
        ```sh train-1 &
        serve
        ```
        1. in a list

           ```python train-0
           if ask():
               print("a")
           ```

           ```text
           a …
             b
           ```
        ```toml host /etc/x.toml
        ```
    """
    first, second, third = written(tmp_path, "\n".join(line[8:] for line in text.splitlines()))
    assert (first.language, first.place, first.background, first.text) == ("sh", "train-1", True, "serve\n")
    assert second.text == 'if ask():\n    print("a")\n'
    assert not second.background
    assert (third.path, third.text) == ("/etc/x.toml", "")
    assert second.prints("a lot of\nb\n")
    assert not second.prints("a lot of b c")
    assert first.prints("anything")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("```\nls\n```\n", "'nothing' cannot be tested"),
        ("```sh\nls\n```\n", "'sh' cannot be tested"),
        ("```console host\nls\n```\n", "'console host' cannot be tested"),
        ("```text\na\n```\n", "output of no command"),
        ("```sh host\nls\n", "without an end"),
    ],
)
def test_what_could_not_be_run_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        written(tmp_path, text)


def test_commands_have_no_other_language() -> None:
    assert {"sh", "python"} == COMMANDS
