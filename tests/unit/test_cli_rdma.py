"""`rdmanet rdma` as a person types it, against an agent's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rdmanet import cli
from tests.unit.test_show import rdma


class Agent:
    """Answers, and after so many lets the person at the keyboard press Ctrl-C."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.asked: list[str] = []
        self.clock_s = 100.0

    def ask(self, path: Path, url: str) -> dict[str, Any]:
        self.asked.append(url)
        (pod,) = rdma()["pods"]
        packets = 10 * len(self.asked)
        return rdma(pods=[{**pod, "sent": {"packets": packets, "bytes": packets}}])

    def monotonic(self) -> float:
        return self.clock_s

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= cli.WATCH_S
        self.clock_s += seconds
        if len(self.asked) == self.rounds:
            raise KeyboardInterrupt


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    agent = Agent(rounds=3)
    monkeypatch.setattr(cli, "ask", agent.ask)
    monkeypatch.setattr(cli, "time", agent)
    return agent


def test_once(agent: Agent, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert cli.main(["rdma", "--config", str(tmp_path / "empty.toml")]) == 0
    shown = capsys.readouterr().out
    assert agent.asked == ["/v1/rdma"]
    assert shown.startswith("RDMA shared\n\nDEVICE")
    assert "  10 packets, 10 B  " in shown


def test_again_each_second(agent: Agent, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert cli.main(["rdma", "-w", "--config", str(tmp_path / "empty.toml")]) == 0
    tables = capsys.readouterr().out.split("RDMA shared")[1:]
    assert len(tables) == agent.rounds
    assert "  10 packets, 10 B  " in tables[0]
    assert all(
        f"  {packets} packets, 10/s, 10 B/s  " in table for packets, table in zip((20, 30), tables[1:], strict=True)
    )
    assert "\x1b" not in "".join(tables), "this is no terminal"


def test_again_as_json_is_a_document_a_line(agent: Agent, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert cli.main(["rdma", "-w", "-o", "json", "--config", str(tmp_path / "empty.toml")]) == 0
    sent = [json.loads(line)["pods"][0]["sent"]["packets"] for line in capsys.readouterr().out.splitlines()]
    assert sent == [10, 20, 30]
