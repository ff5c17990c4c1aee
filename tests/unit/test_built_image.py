"""What the image is built of, and pip's settings for builds elsewhere: the decisions, without podman."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from rdmanet.cli import main
from rdmanet.commands.install import EXECUTABLE, NAME
from rdmanet.config import DatapathConfig
from testbed.built_image import DOCKERFILE, sources
from testbed.paths import REPOSITORY
from testbed.pip_settings import Pip

TEXT = DOCKERFILE.read_text()


def test_what_is_copied_is_there_and_not_left_out() -> None:
    left_out = (REPOSITORY / ".dockerignore").read_text().split()
    assert len(sources()) >= 5
    for source in sources():
        assert source.exists()
        assert source.name not in left_out


def test_extras_are_the_projects() -> None:
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", TEXT)
    assert set(extras.split(",")) <= known.keys()


def test_the_artifact_is_where_the_agent_looks() -> None:
    (output,) = re.findall(r"--output /out(\S+)", TEXT)
    assert Path(output) == DatapathConfig().artifact_dir


def test_the_cni_executable_is_where_the_installer_looks() -> None:
    (output,) = re.findall(r"OUT=/out(\S+)", TEXT)
    assert Path(output, NAME) == EXECUTABLE


@pytest.mark.parametrize("keyword", ["CMD", "HEALTHCHECK"])
def test_commands_are_the_command_lines(keyword: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        json.loads(found) for found in re.findall(rf"^(?:{keyword}|{keyword} .*CMD) (\[.*\])$", TEXT, re.MULTILINE)
    ]
    (argv,) = [[word for word in found if word != "rdmanet"] for found in words]
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--help"])
    assert ended.value.code == 0
    assert f"rdmanet {argv[0]}" in capsys.readouterr().out


def test_no_mirror_or_index_is_named() -> None:
    assert not re.findall(r"https?://|index-url|deb\.", TEXT)


def test_pip_settings_are_those_that_lead_to_packages(tmp_path: Path) -> None:
    (tmp_path / "simple").mkdir()
    listing = (
        "global.cert='/etc/ssl/one.crt'\n"
        f"global.extra-index-url='https://wheels.invalid/simple file://{tmp_path}/simple'\n"
        f"global.find-links='{tmp_path}/absent'\n"
        "global.constraint='/etc/constraints.txt'\n"
        ":env:.cert='/etc/ssl/two.crt'\n"
    )
    pip = Pip.parse(listing)
    assert pip.places == (tmp_path,)
    assert pip.settings["cert"] == "/etc/ssl/two.crt"
    assert "cert = /etc/pip.pem\n" in pip.text("/etc/pip.pem")
    assert f"extra-index-url = https://wheels.invalid/simple file://{tmp_path}/simple\n" in pip.text("")
    assert "constraint" not in pip.settings
    assert Pip.parse("").text("/etc/pip.pem") == "[global]\n"
    assert Pip.parse("").certificates == b""
