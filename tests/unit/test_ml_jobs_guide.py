"""docs/ml-jobs.md, its way with Kubernetes: what it configures, what a Job asks for, and the files that it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rdmanet import config
from testbed.guide import blocks
from testbed.paths import REPOSITORY

BLOCKS = [block for block in blocks(REPOSITORY / "docs/ml-jobs.md") if block.place == "kubernetes"]
FILES = ("deploy/kubernetes/rdmanet.yaml", "deploy/kubernetes/training-job.yaml")


def test_configuration() -> None:
    (block,) = [block for block in BLOCKS if block.language == "toml"]
    assert config.parse(block.text).kubernetes.slots == 16
    assert block.path == str(config.DEFAULT_PATH)


def test_job() -> None:
    """It asks for the resource, and says all that the example needs to know."""
    (block,) = [block for block in BLOCKS if block.language == "yaml"]
    job = yaml.safe_load(block.text)["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {config.Config().kubernetes.resource: "1"}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (job["completionMode"], environment["WORLD_SIZE"]) == ("Indexed", str(job["completions"]))
    assert environment["MASTER_ADDR"] == f"train-0.{job['template']['spec']['subdomain']}"
    assert container["command"][1].endswith("examples/train/train.py")
    assert job["parallelism"] == job["completions"]


def test_names_of_manifests() -> None:
    named = {name for block in BLOCKS for name in re.findall(r"deploy/\S+", block.text)}
    assert named == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_manifests_are_there(name: str) -> None:
    assert (REPOSITORY / name).is_file()


def documents(name: str) -> dict[str, Any]:
    """By kind."""
    found = yaml.safe_load_all((REPOSITORY / name).read_text())
    return {document["kind"]: document for document in found}


def is_part(shown: Any, whole: Any) -> bool:
    """Whether everything that is shown is there, with what else there may be."""
    if isinstance(shown, dict):
        return isinstance(whole, dict) and all(key in whole and is_part(shown[key], whole[key]) for key in shown)
    if isinstance(shown, list):
        return isinstance(whole, list) and all(any(is_part(one, item) for item in whole) for one in shown)
    return bool(shown == whole)


def test_what_is_shown_is_what_the_manifests_have() -> None:
    (shown,) = [yaml.safe_load(block.text) for block in BLOCKS if block.language == "yaml"]
    job = documents(FILES[1])["Job"]
    assert is_part(shown, job)
    shown["spec"]["template"]["spec"]["containers"][0]["image"] = "another"
    assert not is_part(shown, job)
    (text,) = [block.text for block in BLOCKS if block.language == "toml"]
    assert config.parse(documents(FILES[0])["ConfigMap"]["data"]["rdmanet.toml"]) == config.parse(text)


def test_the_image_has_what_the_job_starts(tmp_path: Path) -> None:
    """Laid out as the Containerfile copies, and started as the Job does it, with no other rank."""
    (container,) = documents(FILES[1])["Job"]["spec"]["template"]["spec"]["containers"]
    text = (REPOSITORY / "examples/train/Containerfile").read_text()
    assert f"-t {container['image']} " in text
    for source, target in re.findall(r"^COPY (\S+) /srv/(\S+)$", text, re.MULTILINE):
        shutil.copytree(REPOSITORY / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
    (variables,) = re.findall(r"^ENV (.+)$", text, re.MULTILINE)
    environment = dict(word.split("=") for word in variables.replace("/srv", str(tmp_path)).split())
    argv = [sys.executable, *container["command"][1:], "--hidden", "8", "--steps", "2"]
    done = subprocess.run(
        argv, cwd=tmp_path, env={"PATH": os.environ["PATH"], **environment}, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["parameters_sha256"]
