"""The metrics text: valid, complete, bounded; read with Prometheus' own parser."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rdmanet.broker.values import Counts
from rdmanet.datapath.layout import Count
from rdmanet.limits import Usage
from rdmanet.metrics import Metrics
from rdmanet.model import Backend, Bandwidth, Limit, PodName
from rdmanet.numbers import DeviceNumbers
from rdmanet.store import Store
from tests.unit.test_store import DEVICE, wanted

Labels = frozenset[tuple[str, str]]


class Numbers:
    """What the datapath and the broker count, as plain values."""

    def __init__(self) -> None:
        self.counted: dict[tuple[int, str, str], Count] = {}
        self.dropped: dict[tuple[int, str, str], int] = {}
        self.entered: dict[tuple[int, str], int] = {}
        self.shared: dict[int, int] = {}
        self.tables = {"flows": (7, 100), "policy": (0, 50)}
        self.counts = Counts()
        self.failed = 3  # removals
        self.guard_failures = 2
        self.dropped_connections = {"unread": 4}
        self.used: dict[int, Usage] = {}
        self.repaired: dict[tuple[str, str], int] = {}
        self.found: list[DeviceNumbers] = []

    def counters(self) -> dict[tuple[int, str, str], Count]:
        return self.counted

    def drops_by_direction(self) -> dict[tuple[int, str, str], int]:
        return self.dropped

    @property
    def flows(self) -> Numbers:
        return self

    def begun(self) -> dict[tuple[int, str], int]:
        return self.entered

    def shares(self) -> dict[int, int]:
        return self.shared

    @property
    def events(self) -> Numbers:
        return self

    def lost(self) -> int:
        return 12

    def states(self) -> dict[str, int]:
        return {"pending": 0, "granted": 2, "unclaimed": 1}

    def usage(self) -> dict[int, Usage]:
        return self.used

    def repairs(self) -> dict[tuple[str, str], int]:
        return self.repaired

    def devices(self) -> list[DeviceNumbers]:
        return self.found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state.db")
    yield store
    store.close()


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


@pytest.fixture
def metrics(store: Store, numbers: Numbers) -> Metrics:
    return Metrics(
        store,
        numbers,  # type: ignore[arg-type]
        numbers,
        numbers,
        numbers,
        numbers,
        lambda: numbers.tables,
        numbers,
    )


def samples(metrics: Metrics) -> dict[tuple[str, Labels], float]:
    """(name, labels) → value; a sample that appears twice fails."""
    found: dict[tuple[str, Labels], float] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} appears twice"
            found[key] = sample.value
    return found


def labels(**pairs: str) -> Labels:
    return frozenset(pairs.items())


def test_every_name_is_there_from_the_start(metrics: Metrics) -> None:
    names = {family.name for family in text_string_to_metric_families(metrics.text().decode())}
    assert {name for name in names if not name.endswith("_created")} == {
        "rdmanet_attachments",
        "rdmanet_removals_failed",
        "rdmanet_repairs",
        "rdmanet_pod_packets",
        "rdmanet_pod_bytes",
        "rdmanet_pod_bandwidth_limit_bits_per_second",
        "rdmanet_drops",
        "rdmanet_events_lost",
        "rdmanet_pod_flows",
        "rdmanet_pod_flows_begun",
        "rdmanet_table_entries",
        "rdmanet_table_entries_max",
        "rdmanet_leases",
        "rdmanet_leases_granted",
        "rdmanet_leases_claimed",
        "rdmanet_leases_refused",
        "rdmanet_leases_revoked",
        "rdmanet_lease_connections_dropped",
        "rdmanet_rdma_refused_objects",
        "rdmanet_guard_failures",
        "rdmanet_device_healthy",
        "rdmanet_device_port_active",
        "rdmanet_device_events",
        "rdmanet_cni_seconds",
        "rdmanet_lease_seconds",
    }


def test_pods_by_name_direction_and_path(store: Store, numbers: Numbers, metrics: Metrics) -> None:
    made = store.reserve(wanted(pod=PodName("jobs", "train-0")))
    store.set_ready(made.id, {})
    store.reserve(wanted(2))
    numbers.counted = {
        (made.id, "from_pod", "ip"): Count(packets=5, bytes=500),
        (made.id, "to_pod", "roce"): Count(packets=7, bytes=7000),
        (99, "to_pod", "ip"): Count(packets=1, bytes=1),  # an attachment that is gone
    }
    found = samples(metrics)
    sent = labels(pod="jobs/train-0", interface="eth0", direction="from_pod", path="ip")
    got = labels(pod="jobs/train-0", interface="eth0", direction="to_pod", path="roce")
    assert {key: value for key, value in found.items() if key[0].startswith("rdmanet_pod_")} == {
        ("rdmanet_pod_packets_total", sent): 5,
        ("rdmanet_pod_bytes_total", sent): 500,
        ("rdmanet_pod_packets_total", got): 7,
        ("rdmanet_pod_bytes_total", got): 7000,
    }
    states = {name: found["rdmanet_attachments", labels(state=name)] for name in ("adding", "ready", "releasing")}
    assert states == {"adding": 1, "ready": 1, "releasing": 0}


def test_two_attachments_of_one_name_are_summed(store: Store, numbers: Numbers, metrics: Metrics) -> None:
    """A runtime adds a pod's successor before it deletes the old one: two container ids, one name."""
    old, new = (store.reserve(wanted(n, pod=PodName("default", "web"))) for n in (1, 2))
    numbers.counted = {(a.id, "from_pod", "ip"): Count(packets=a.id, bytes=10) for a in (old, new)}
    numbers.dropped = {(a.id, "from_pod", "multicast"): 3 for a in (old, new)}
    numbers.entered = {(a.id, "to_pod"): 4 for a in (old, new)}
    numbers.shared = {a.id: a.id for a in (old, new)}
    found = samples(metrics)
    sent = labels(pod="default/web", interface="eth0", direction="from_pod", path="ip")
    assert found["rdmanet_pod_packets_total", sent] == 3
    assert found["rdmanet_pod_bytes_total", sent] == 20
    dropped = labels(pod="default/web", interface="eth0", direction="from_pod", reason="multicast")
    assert found["rdmanet_drops_total", dropped] == 6
    begun = labels(pod="default/web", interface="eth0", direction="to_pod")
    assert found["rdmanet_pod_flows_begun_total", begun] == 8
    assert found["rdmanet_pod_flows", labels(pod="default/web", interface="eth0")] == 3


def test_drops_without_a_pod_are_summed_under_no_name(store: Store, numbers: Numbers, metrics: Metrics) -> None:
    numbers.dropped = {
        (0, "to_pod", "no_node"): 2,
        (98, "to_pod", "no_node"): 3,
        (98, "from_pod", "no_node"): 7,
        (99, "from_pod", "multicast"): 1,
    }
    found = samples(metrics)
    nobody = {"pod": "", "interface": ""}
    assert {key: value for key, value in found.items() if key[0] == "rdmanet_drops_total"} == {
        ("rdmanet_drops_total", labels(**nobody, direction="to_pod", reason="no_node")): 5,
        ("rdmanet_drops_total", labels(**nobody, direction="from_pod", reason="no_node")): 7,
        ("rdmanet_drops_total", labels(**nobody, direction="from_pod", reason="multicast")): 1,
    }


def test_flows_of_pods_that_have_gone_are_nobodys(store: Store, numbers: Numbers, metrics: Metrics) -> None:
    """Cardinality is that of the attachments there are."""
    made = store.reserve(wanted(pod=PodName("jobs", "train-0")))
    numbers.entered = {(made.id, "from_pod"): 5, (made.id, "to_pod"): 2, (99, "from_pod"): 1}
    numbers.shared = {made.id: 3, 99: 1}
    pod = {"pod": "jobs/train-0", "interface": "eth0"}
    assert {key: value for key, value in samples(metrics).items() if key[0].startswith("rdmanet_pod_flows")} == {
        ("rdmanet_pod_flows_begun_total", labels(**pod, direction="from_pod")): 5,
        ("rdmanet_pod_flows_begun_total", labels(**pod, direction="to_pod")): 2,
        ("rdmanet_pod_flows", labels(**pod)): 3,
    }


def test_tables_and_lost_events(metrics: Metrics) -> None:
    found = samples(metrics)
    assert {key: value for key, value in found.items() if key[0].startswith("rdmanet_table")} == {
        ("rdmanet_table_entries", labels(table="flows")): 7,
        ("rdmanet_table_entries", labels(table="policy")): 0,
        ("rdmanet_table_entries_max", labels(table="flows")): 100,
        ("rdmanet_table_entries_max", labels(table="policy")): 50,
    }
    assert found["rdmanet_events_lost_total", labels()] == 12


def test_bandwidth(store: Store, metrics: Metrics) -> None:
    name = "rdmanet_pod_bandwidth_limit_bits_per_second"
    store.reserve(wanted(1))
    assert not [key for key in samples(metrics) if key[0] == name]
    for number, limits in ((2, Bandwidth(Limit(1, 1), Limit(2, 1))), (3, Bandwidth(Limit(10**9, 1), Limit(10**8, 1)))):
        made = store.reserve(wanted(number, bandwidth=limits, pod=PodName("default", "web")))
    pod = {"pod": "default/web", "interface": made.ifname}
    assert {key[1]: value for key, value in samples(metrics).items() if key[0] == name} == {
        labels(**pod, direction="from_pod"): 10**8,
        labels(**pod, direction="to_pod"): 10**9,
    }


def test_repairs(numbers: Numbers, metrics: Metrics) -> None:
    numbers.repaired = {("link", "repaired"): 3, ("link", "given_up"): 1}
    found = samples(metrics)
    assert found["rdmanet_repairs_total", labels(kind="link", outcome="repaired")] == 3
    assert found["rdmanet_repairs_total", labels(kind="link", outcome="given_up")] == 1


def test_leases(numbers: Numbers, metrics: Metrics) -> None:
    numbers.counts = Counts(granted=4, claimed=2, refused=Counter(no_device=3), revoked=Counter(released=1, pod_gone=2))
    metrics.lease_granted(0.004)
    found = samples(metrics)
    assert found["rdmanet_leases", labels(state="granted")] == 2
    assert found["rdmanet_leases_granted_total", labels()] == 4
    assert found["rdmanet_leases_claimed_total", labels()] == 2
    assert found["rdmanet_leases_refused_total", labels(reason="no_device")] == 3
    assert found["rdmanet_leases_revoked_total", labels(cause="pod_gone")] == 2
    assert found["rdmanet_lease_connections_dropped_total", labels(cause="unread")] == 4
    assert found["rdmanet_lease_seconds_count", labels()] == 1
    assert found["rdmanet_lease_seconds_bucket", labels(le="0.00025")] == 0
    assert found["rdmanet_lease_seconds_bucket", labels(le="0.0025")] == 0
    assert found["rdmanet_lease_seconds_bucket", labels(le="0.005")] == 1


def test_devices(numbers: Numbers, metrics: Metrics) -> None:
    one, two = (dataclasses.replace(wanted(n, pod=PodName("jobs", f"p{n}")), id=n, device=DEVICE) for n in (1, 2))
    host = dataclasses.replace(DEVICE, name="host0", backend=Backend.SHARED)
    numbers.found = [
        DeviceNumbers(DEVICE, (one,), {}, True, {"sent_pkts": 7}),
        DeviceNumbers(host, (one, two), {2: "it is missing"}, None, {"sent_pkts": 9}),
    ]
    found = samples(metrics)
    assert {key: value for key, value in found.items() if key[0].startswith("rdmanet_device_")} == {
        ("rdmanet_device_healthy", labels(pod="jobs/p1", device="rxe_rn1")): 1,
        ("rdmanet_device_healthy", labels(pod="jobs/p1", device="host0")): 1,
        ("rdmanet_device_healthy", labels(pod="jobs/p2", device="host0")): 0,
        ("rdmanet_device_port_active", labels(device="rxe_rn1")): 1,
        ("rdmanet_device_port_active", labels(device="host0")): 0,
        ("rdmanet_device_events_total", labels(pod="jobs/p1", device="rxe_rn1", event="sent_pkts")): 7,
        ("rdmanet_device_events_total", labels(pod="", device="host0", event="sent_pkts")): 9,
    }
    assert found["rdmanet_guard_failures_total", labels()] == 2


def test_two_attachments_of_a_pod_that_share_a_device_are_one_sample(numbers: Numbers, metrics: Metrics) -> None:
    host = dataclasses.replace(DEVICE, backend=Backend.SHARED)
    pod = PodName("jobs", "p")
    both = tuple(dataclasses.replace(wanted(n, pod=pod), id=n, device=host) for n in (1, 2))
    numbers.found = [DeviceNumbers(host, both, {1: "it is missing"}, True, {})]
    healthy = [value for (name, _), value in samples(metrics).items() if name == "rdmanet_device_healthy"]
    assert healthy == [0]


def test_cni_calls_by_command_and_code(metrics: Metrics) -> None:
    for _ in range(3):
        metrics.cni_call("ADD", 0, 0.02)
    metrics.cni_call("ADD", 101, 0.001)
    found = samples(metrics)
    assert found["rdmanet_cni_seconds_count", labels(command="ADD", code="0")] == 3
    assert found["rdmanet_cni_seconds_count", labels(command="ADD", code="101")] == 1
    assert found["rdmanet_cni_seconds_sum", labels(command="ADD", code="0")] == pytest.approx(0.06)


def test_names_are_escaped(store: Store, numbers: Numbers, metrics: Metrics) -> None:
    made = store.reserve(dataclasses.replace(wanted(), pod=PodName('a"b', "c\\d\ne")))
    numbers.dropped = {(made.id, "from_pod", "multicast"): 1}
    dropped = labels(pod='a"b/c\\d\ne', interface="eth0", direction="from_pod", reason="multicast")
    assert samples(metrics)["rdmanet_drops_total", dropped] == 1
