"""`rdmanet doctor`: each line says what it found and what to do; it never raises and changes nothing."""

from __future__ import annotations

import ipaddress
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rdmanet import cli, doctor, memlock
from rdmanet.config import Config, parse
from rdmanet.doctor import Finding, Verdict, examine
from rdmanet.model import RdmaMode
from rdmanet.netlink import nldev
from rdmanet.node import Uplink
from rdmanet.rdma.cgroup import Cgroups

V4, V6 = ipaddress.ip_address("198.51.100.2"), ipaddress.ip_address("2001:db8::2")


def lines(config: Config, check: str) -> list[tuple[Verdict, str]]:
    return [(finding.verdict, finding.sentence) for finding in examine(config) if finding.check == check]


def test_every_check_answers_on_this_host() -> None:
    findings = examine(Config())
    assert {finding.check for finding in findings} == {
        "privileges",
        "kernel",
        "pins",
        "services",
        "artifact",
        "network",
        "ports",
        "rdma",
        "modules",
        "memlock",
    }
    assert all(finding.sentence for finding in findings)


def test_a_missing_artifact_is_a_finding(tmp_path: Path) -> None:
    ((verdict, sentence),) = lines(parse(f"[datapath]\nartifact_dir = '{tmp_path}/none'\n"), "artifact")
    assert verdict is Verdict.MISSING
    assert f"{tmp_path}/none" in sentence
    assert "; make one with `" in sentence


@pytest.mark.parametrize(("uid", "verdict"), [(0, Verdict.OK), (1000, Verdict.MISSING)])
def test_privileges(monkeypatch: pytest.MonkeyPatch, uid: int, verdict: Verdict) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert [found for found, _ in lines(Config(), "privileges")] == [verdict]


def test_services_need_the_root_cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Cgroups, "here", lambda: Cgroups(tmp_path))
    ((verdict, sentence),) = lines(Config(), "services")
    assert verdict is Verdict.MISSING
    assert "is not the root of the host's cgroups" in sentence
    assert "--cgroupns host" in sentence
    monkeypatch.setattr(doctor, "kernel_release", lambda: (5, 17))
    ((verdict, sentence),) = lines(Config(), "services")
    assert verdict is Verdict.WARNING
    assert "5.18 or newer" in sentence


@pytest.mark.parametrize(("release", "verdict"), [((5, 13), Verdict.MISSING), ((5, 14), Verdict.OK)])
def test_kernel(monkeypatch: pytest.MonkeyPatch, release: tuple[int, int], verdict: Verdict) -> None:
    monkeypatch.setattr(doctor, "kernel_release", lambda: release)
    assert [found for found, _ in lines(Config(), "kernel")] == [verdict]


@pytest.mark.parametrize(
    ("uplinks", "config", "expected"),
    [
        ([], "", [(Verdict.WARNING, "no default route"), (Verdict.WARNING, "pods' MTU is 1500")]),
        (
            [Uplink(2, "eth0", 9000, V4, V6)],
            "",
            [
                (Verdict.OK, "uplink eth0: pods leave behind 198.51.100.2 and 2001:db8::2"),
                (Verdict.OK, "pods' MTU is 9000"),
            ],
        ),
        (
            [Uplink(2, "eth0", 1500, V4, None), Uplink(3, "eth1", 9000, None, None)],
            "",
            [
                (Verdict.WARNING, "uplink eth0 has no IPv6 address"),
                (Verdict.WARNING, "uplink eth1 has no IPv4 and no IPv6 address"),
                (Verdict.WARNING, "pods' MTU is 1500"),
            ],
        ),
        (
            [Uplink(2, "eth0", 1500, V4, V6)],
            "[network]\nmtu_bytes = 9000\n",
            [(Verdict.OK, "uplink eth0"), (Verdict.OK, "pods' MTU is 9000")],
        ),
    ],
)
def test_network(
    monkeypatch: pytest.MonkeyPatch, uplinks: list[Uplink], config: str, expected: list[tuple[Verdict, str]]
) -> None:
    monkeypatch.setattr(doctor, "find_uplinks", lambda *_: uplinks)
    found = lines(parse(config), "network")
    assert [verdict for verdict, _ in found] == [verdict for verdict, _ in expected]
    assert all(sentence.startswith(start) for (_, sentence), (_, start) in zip(found, expected, strict=True)), found


def test_ports() -> None:
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    low, high = (int(word) for word in text.split())
    ((verdict, _),) = lines(parse(f"[masquerade]\nfirst_port = {max(low, 1024)}\nlast_port = {high}\n"), "ports")
    assert verdict is Verdict.WARNING
    ((verdict, _),) = lines(parse(f"[masquerade]\nenabled = false\nfirst_port = {max(low, 1024)}\n"), "ports")
    assert verdict is Verdict.OK


class Rdma:
    """RDMA netlink of a host that has it."""

    def __init__(self, mode: RdmaMode):
        self._mode = mode

    def mode(self) -> RdmaMode:
        return self._mode

    def devices(self) -> list[object]:
        return []


def rdma_host(mode: RdmaMode | None) -> Callable[[], object]:
    @contextmanager
    def available() -> Iterator[Rdma | None]:
        yield Rdma(mode) if mode else None

    return available


@pytest.mark.parametrize(
    ("mode", "release", "module", "verdicts", "word"),
    [
        (None, (7, 3), True, [Verdict.MISSING], "modprobe ib_core rdma_rxe"),
        (RdmaMode.SHARED, (7, 0), True, [Verdict.MISSING], "before Linux 7.1"),
        (RdmaMode.SHARED, (7, 1), False, [Verdict.MISSING], "rdma_rxe is neither loaded nor installed"),
        (RdmaMode.SHARED, (7, 1), True, [Verdict.OK], "RDMA in shared mode"),
        (RdmaMode.EXCLUSIVE, (7, 2), True, [Verdict.MISSING], "before Linux 7.3"),
        (RdmaMode.EXCLUSIVE, (7, 3), True, [Verdict.OK, Verdict.WARNING], "RDMA in exclusive mode"),
    ],
)
def test_rdma(
    monkeypatch: pytest.MonkeyPatch,
    mode: RdmaMode | None,
    release: tuple[int, int],
    module: bool,
    verdicts: list[Verdict],
    word: str,
) -> None:
    monkeypatch.setattr(nldev, "available", rdma_host(mode))
    monkeypatch.setattr(doctor, "kernel_release", lambda: release)
    monkeypatch.setattr(doctor, "_module", lambda name: module)
    found = lines(Config(), "rdma")
    assert [verdict for verdict, _ in found] == verdicts
    assert word in found[0][1]


def test_rdma_switched_off() -> None:
    config = parse("[rdma]\nenabled = false\n")
    assert lines(config, "rdma") == [(Verdict.WARNING, "switched off in the configuration (rdma.enabled)")]
    assert lines(config, "modules") == []


@pytest.mark.parametrize(
    ("soft", "verdict"),
    [
        (resource.RLIM_INFINITY, Verdict.OK),
        (64 << 20, Verdict.OK),
        ((64 << 20) - 1, Verdict.WARNING),
        (8192, Verdict.WARNING),
    ],
)
def test_memlock(monkeypatch: pytest.MonkeyPatch, soft: int, verdict: Verdict) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    monkeypatch.setattr(memlock, "runtimes", lambda: iter(()))
    assert [found for found, _ in lines(Config(), "memlock")] == [verdict]


@pytest.mark.parametrize(("verdict", "status"), [(Verdict.OK, 0), (Verdict.WARNING, 0), (Verdict.MISSING, 1)])
def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, verdict: Verdict, status: int
) -> None:
    (tmp_path / "c.toml").write_text("")
    monkeypatch.setattr(doctor, "examine", lambda config: [Finding("kernel", verdict, "a sentence")])
    assert cli.main(["doctor", "--config", str(tmp_path / "c.toml")]) == status
    assert capsys.readouterr().out == f"CHECK   VERDICT\nkernel  {verdict.ljust(7)}  a sentence\n"
    assert cli.main(["doctor", "--config", str(tmp_path / "c.toml"), "-o", "json"]) == status
    assert f'"verdict": "{verdict}"' in capsys.readouterr().out


def test_memlock_of_a_runtime_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"containerd": memlock.Limit(8 << 20, 8 << 20), "docker": memlock.Limit(None, None)}
    found = [memlock.Runtime(name, limit, "from a test", "do this") for name, limit in limits.items()]
    monkeypatch.setattr(memlock, "runtimes", lambda: iter(found))
    monkeypatch.setattr(memlock, "here", lambda: memlock.Limit(8 << 20, None))
    (warning, small), (fine, large) = lines(Config(), "memlock")
    assert (warning, fine) == (Verdict.WARNING, Verdict.OK)
    assert "containers of containerd may lock 8 MiB (from a test)" in small
    assert "raise it: do this" in small
    assert "docker may lock unlimited" in large
