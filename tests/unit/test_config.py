"""The configuration: every key is read, checked and documented; what is unknown or wrong is named."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmanet import config
from rdmanet.config import Config, load, parse
from rdmanet.errors import ConfigError
from rdmanet.model import Backend, GuardMode
from testbed.paths import REPOSITORY

DOCUMENT = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")

#: How docs/configuration.md calls a type.
TYPE_NAMES: dict[object, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    tuple[str, ...]: "list of texts",
    ipaddress.IPv4Network: "IPv4 range",
    ipaddress.IPv6Network: "IPv6 range",
    GuardMode: "guard",
    Backend: "backend",
}

#: A value other than the default for every key, as TOML, and what it becomes.
SECTIONS = "agent, datapath, kubernetes, masquerade, network, policy, rdma, services, tracking"
OTHER: dict[str, tuple[str, object]] = {
    "agent.socket": ('"/run/other.sock"', Path("/run/other.sock")),
    "agent.state_dir": ('"/srv/rdmanet"', Path("/srv/rdmanet")),
    "agent.repair": ("false", False),
    "agent.metrics_port": ("9742", 9742),
    "agent.log_level": ('"debug"', "debug"),
    "network.ipv4_range": ('"10.40.0.0/22"', ipaddress.IPv4Network("10.40.0.0/22")),
    "network.ipv6_range": ('"fd00:40::/64"', ipaddress.IPv6Network("fd00:40::/64")),
    "network.mtu_bytes": ("9000", 9000),
    "network.uplinks": ('["eth1", "eth2"]', ("eth1", "eth2")),
    "masquerade.enabled": ("false", False),
    "masquerade.first_port": ("62000", 62000),
    "masquerade.last_port": ("62999", 62999),
    "datapath.artifact_dir": ('"/opt/artifact"', Path("/opt/artifact")),
    "datapath.bpffs_dir": ('"/sys/fs/bpf/other"', Path("/sys/fs/bpf/other")),
    "rdma.enabled": ("false", False),
    # The one needs the other.
    "rdma.backend": ('"shared"\nshared_device = "mlx5_0"', Backend.SHARED),
    "rdma.shared_device": ('"mlx5_0"\nbackend = "shared"', "mlx5_0"),
    "rdma.guard": ('"enforce"', GuardMode.ENFORCE),
    "rdma.max_leases_per_pod": ("7", 7),
    "rdma.claim_grace_s": ("2.5", 2.5),
    "rdma.traffic_class": ("104", 104),
    "rdma.service_level": ("3", 3),
    "rdma.cgroup_controller": ("true", True),
    "rdma.max_handles": ("8", 8),
    "rdma.max_objects": ("500", 500),
    "tracking.max_flows": ("4096", 4096),
    "tracking.max_flows_per_pod": ("100", 100),
    "tracking.interval_s": ("2.5", 2.5),
    "policy.max_entries": ("1000", 1000),
    "policy.max_prefixes": ("100", 100),
    "services.maglev_size": ("251", 251),
    "services.max_services": ("1000", 1000),
    "services.max_backends": ("2000", 2000),
    "services.max_outside_services": ("64", 64),
    "kubernetes.slots": ("32", 32),
    "kubernetes.resource": ('"example.com/roce"', "example.com/roce"),
    "kubernetes.plugin_dir": ('"/srv/kubelet/device-plugins"', Path("/srv/kubelet/device-plugins")),
    "kubernetes.ask_kubelet": ("false", False),
    "kubernetes.pod_resources": ('"/srv/kubelet/pods.sock"', Path("/srv/kubelet/pods.sock")),
    "kubernetes.timeout_s": ("2.5", 2.5),
    "kubernetes.cdi": ("false", False),
    "kubernetes.cdi_dir": ('"/etc/cdi"', Path("/etc/cdi")),
}


def every_key() -> dict[str, tuple[object, object]]:
    """section.key → (type, default), from the tables in rdmanet.config."""
    found: dict[str, tuple[object, object]] = {}
    sections = typing.get_type_hints(Config)
    for section, kind in sections.items():
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            found[f"{section}.{item.name}"] = (hints[item.name], item.default)
    return found


def as_toml(value: object) -> str:
    """A default as a person would write it into the file."""
    if isinstance(value, tuple):
        return json.dumps(list(value))
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value))


def read(whole: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(whole, section), name)


def test_nothing_is_a_configuration() -> None:
    assert parse("") == Config()
    assert parse("[network]\n[rdma]\n") == Config()


def test_other_values_cover_every_key() -> None:
    assert set(OTHER) == set(every_key())


@pytest.mark.parametrize("key", sorted(OTHER))
def test_every_key_is_read(key: str) -> None:
    text, value = OTHER[key]
    section, _, name = key.partition(".")
    whole = parse(f"[{section}]\n{name} = {text}\n")
    assert read(whole, key) == value
    assert type(read(whole, key)) is type(value)
    assert read(Config(), key) != value
    rest = dataclasses.replace(whole, **{section: getattr(Config(), section)})
    assert rest == Config(), "another section changed"


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, (kind, _) in every_key().items()])
def test_a_wrong_type_names_the_key_and_the_value(key: str, kind: object) -> None:
    section, _, name = key.partition(".")
    wrong = ["{ a = 1 }"]
    wrong += [] if kind in (int, float) else ["17"]
    wrong += [] if kind is bool else ["true"]
    wrong += ['"seventeen"'] if kind in (int, float, bool, tuple[str, ...]) else ["[1, 2]"]
    wrong += ["1.5"] if kind is int else []
    for text in wrong:
        with pytest.raises(ConfigError) as caught:
            parse(f"[{section}]\n{name} = {text}\n", source="x.toml")
        assert caught.value.subject == key
        assert caught.value.sentence.startswith(f"x.toml: {key} must be ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[netwrok]\n", "c: unknown section [netwrok]; did you mean network?."),
        (
            "[zzz]\n",
            f"c: unknown section [zzz]; known are {SECTIONS}.",
        ),
        ("[network]\nmtu = 9000\n", "c: unknown key network.mtu; did you mean mtu_bytes?."),
        ("[rdma]\nGuard = 'observe'\n", "c: unknown key rdma.Guard; did you mean guard?."),
        (
            "mtu = 9000\n",
            f"c: unknown section [mtu]; known are {SECTIONS}.",
        ),
        ("network = 5\n", "c: [network] must be a section, not a value."),
        ("[network]\nuplinks = ['a', 1]\n", "c: network.uplinks must be a list of texts, not ['a', 1]."),
        ("[agent]\nsocket = 'agent.sock'\n", "c: agent.socket must be an absolute path, not 'agent.sock'."),
        (
            "[network]\nipv4_range = '10.0.0.1/24'\n",
            "c: network.ipv4_range must be an IPv4 range such as 10.213.0.0/20 (no bits set behind the prefix), not"
            " '10.0.0.1/24'.",
        ),
        (
            "[network]\nipv6_range = '10.0.0.0/24'\n",
            "c: network.ipv6_range must be an IPv6 range such as fd72:646d:616e::/64 (no bits set behind the prefix),"
            " not '10.0.0.0/24'.",
        ),
        ("[rdma]\nguard = 'deny'\n", "c: rdma.guard must be observe or enforce, not 'deny'."),
    ],
)
def test_sentences(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="c")
    assert caught.value.sentence == sentence


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("agent.metrics_port", ["0", "65535"], ["-1", "65536"]),
        ("agent.log_level", ["'debug'", "'info'", "'warning'", "'error'"], ["'INFO'", "'trace'", "''"]),
        ("network.ipv4_range", ["'10.0.0.0/30'", "'0.0.0.0/0'"], ["'10.0.0.0/31'", "'10.0.0.0/32'"]),
        ("network.ipv6_range", ["'fd00::/126'"], ["'fd00::/127'", "'fd00::/128'"]),
        ("network.mtu_bytes", ["0", "1280", "65535"], ["1", "1279", "65536", "-1"]),
        ("masquerade.first_port", ["1024", "65535"], ["1023", "0", "65536"]),
        ("masquerade.last_port", ["61000", "65535"], ["60999", "65536"]),
        ("rdma.max_leases_per_pod", ["1", "65536"], ["0", "65537"]),
        ("rdma.claim_grace_s", ["1", "3600", "1.0"], ["0.99", "3601", "nan", "inf", "-1"]),
        ("rdma.traffic_class", ["0", "4", "252"], ["1", "3", "254", "256", "-4"]),
        ("rdma.service_level", ["0", "7"], ["8", "-1"]),
        ("rdma.max_handles", ["0", "1", "2147483647"], ["-1", "2147483648"]),
        ("rdma.max_objects", ["0", "1", "2147483647"], ["-1", "2147483648"]),
        ("tracking.max_flows", ["1024", "16777216"], ["1023", "16777217"]),
        ("tracking.max_flows_per_pod", ["0", "16777216"], ["-1", "16777217"]),
        ("tracking.interval_s", ["1", "60.0"], ["0.5", "61"]),
        ("policy.max_entries", ["16", "4194304"], ["15", "4194305"]),
        ("policy.max_prefixes", ["16", "4194304"], ["15", "4194305"]),
        ("services.maglev_size", ["3", "251", "4093", "65537"], ["0", "1", "1000", "65539"]),
        ("services.max_services", ["1", "4194304"], ["0", "4194305"]),
        ("services.max_backends", ["4", "4194304"], ["3", "4194305"]),
        ("services.max_outside_services", ["1", "65536"], ["0", "65537"]),
        ("kubernetes.slots", ["0", "4096"], ["-1", "4097"]),
        (
            "kubernetes.resource",
            ["'a.b/c'", "'rdma-1.example.com/RoCE_v2'"],
            [
                "'rdma'",
                "'1a.b/c'",
                "'a.b/1c'",
                "'a.b/c/d'",
                "'a.b/c='",
                "'k.kubernetes.io/c'",
                "'requests.a.b/c'",
                "''",
            ],
        ),
        ("kubernetes.timeout_s", ["0.1", "60"], ["0", "61", "nan"]),
    ],
)
def test_bounds(key: str, inside: list[str], outside: list[str]) -> None:
    section, _, name = key.partition(".")
    for text in inside:
        parse(f"[{section}]\n{name} = {text}\n")
    for text in outside:
        with pytest.raises(ConfigError, match=r"\."):
            parse(f"[{section}]\n{name} = {text}\n")


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = tmp_path / "default.toml"
    monkeypatch.setattr(config, "DEFAULT_PATH", default)
    assert load(None) == Config(), "no file at all"
    default.write_text("[network]\nmtu_bytes = 9000\n")
    assert load(None).network.mtu_bytes == 9000
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=f"The configuration file {missing} cannot be read: "):
        load(missing)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "bytes.toml")
    (tmp_path / "bad.toml").write_text("[network\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .* line 1"):
        load(tmp_path / "bad.toml")


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):  # and nothing else
        parse(text)


def documented() -> dict[str, tuple[str, str, str]]:
    """section.key → (type, default, meaning), from the tables in docs/configuration.md."""
    found: dict[str, tuple[str, str, str]] = {}
    section = ""
    for line in DOCUMENT.splitlines():
        if line.startswith("## "):
            section = line[3:].strip("`[]") if line.startswith("## `[") else ""
        elif section and line.startswith("| `"):
            key, kind, default, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            found[f"{section}.{key.strip('`')}"] = (kind, default.strip("`"), meaning)
    return found


def test_documentation_has_every_key_with_type_and_default_in_order() -> None:
    wanted = {key: (TYPE_NAMES[kind], as_toml(default)) for key, (kind, default) in every_key().items()}
    written = {key: (kind, default) for key, (kind, default, _) in documented().items()}
    assert written == wanted
    assert list(written) == list(wanted)
    assert all(len(meaning) > 10 for _, _, meaning in documented().values())


def test_documented_defaults_and_the_example_are_accepted() -> None:
    lines = [f"[{key.partition('.')[0]}]\n{key.partition('.')[2]} = {d}\n" for key, (_, d, _) in documented().items()]
    for text in lines:
        assert parse(text) == Config()
    example = DOCUMENT.partition("```toml\n")[2].partition("```")[0]
    assert parse(example).network.uplinks == ("eth1",)
