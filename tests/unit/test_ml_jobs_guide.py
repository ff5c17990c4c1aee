"""docs/ml-jobs.md, its way with Kubernetes: what it configures, what a Job asks for, and the files that it names."""

from __future__ import annotations

import re

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
    assert container["resources"]["limits"] == {config.Config().kubernetes.resource: 1}
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
    if not (REPOSITORY / "deploy/kubernetes").is_dir():
        pytest.skip("deploy/kubernetes is not there yet: the manifests of issue 7, point 4")
    assert (REPOSITORY / name).is_file()
