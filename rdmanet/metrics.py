"""Metrics in Prometheus' own words. Cardinality is bounded by the number of attachments times fixed label sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rdmanet.broker.values import Counts
from rdmanet.datapath.maps import Datapath
from rdmanet.limits import Usage
from rdmanet.model import AttachmentState
from rdmanet.numbers import DeviceNumbers
from rdmanet.store import Store

#: Of a lease: one that is native and warm takes less than a millisecond.
_SUBMILLISECOND = (0.0001, 0.00025, 0.0005)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Leases(Protocol):
    """The broker's numbers (``rdmanet.broker.server.BrokerServer``); safe from any thread."""

    def states(self) -> dict[str, int]: ...
    @property
    def counts(self) -> Counts: ...
    @property
    def guard_failures(self) -> int: ...
    @property
    def dropped_connections(self) -> Mapping[str, int]: ...


class Removals(Protocol):
    """``rdmanet.removal.Removals``; safe from any thread."""

    @property
    def failed(self) -> int: ...


class PodLimits(Protocol):
    """``rdmanet.limits.PodLimits``; safe from any thread."""

    def usage(self) -> Mapping[int, Usage]: ...


class Devices(Protocol):
    """``rdmanet.numbers.RdmaNumbers``; safe from any thread."""

    def devices(self) -> Sequence[DeviceNumbers]: ...


#: Name → how many entries there are, and how many there can be.
Tables = Callable[[], Mapping[str, tuple[int, int]]]


class Repairs(Protocol):
    """``rdmanet.reconcile.Record``; safe from any thread."""

    def repairs(self) -> Mapping[tuple[str, str], int]: ...


class _State(Collector):
    """Read at each scrape from the datapath, the store and the broker, so that nothing is counted twice."""

    def __init__(
        self,
        store: Store,
        datapath: Datapath,
        leases: Leases,
        removals: Removals,
        limits: PodLimits,
        devices: Devices,
        tables: Tables,
        repairs: Repairs,
    ):
        self._tables = tables
        self._repairs = repairs
        self._limits = limits
        self._devices = devices
        self._store = store
        self._datapath = datapath
        self._leases = leases
        self._removals = removals

    def collect(self) -> Iterable[Metric]:
        attachments = self._store.attachments()
        names = {attachment.id: (str(attachment.pod), attachment.ifname) for attachment in attachments}
        states = GaugeMetricFamily("rdmanet_attachments", "Attachments by state.", labels=["state"])
        for state in AttachmentState:
            states.add_metric([state], sum(1 for attachment in attachments if attachment.state is state))
        yield states
        yield CounterMetricFamily(
            "rdmanet_removals_failed", "Tries to remove a deleted pod's link that failed.", value=self._removals.failed
        )
        labels = ["pod", "interface", "direction", "path"]
        packets = CounterMetricFamily(
            "rdmanet_pod_packets", "Packets by pod, direction and path (ip or roce).", labels=labels
        )
        size = CounterMetricFamily("rdmanet_pod_bytes", "Bytes by pod, direction and path (ip or roce).", labels=labels)
        # Summed by labels: a pod re-created before its old attachment is gone has two of one name, and drops outlive
        # their attachment by what was in flight. A sample may appear only once.
        counted: dict[tuple[str, str, str, str], tuple[int, int]] = {}
        for (number, direction, path), count in self._datapath.counters().items():
            if number in names:
                key = (*names[number], direction, path)
                before = counted.get(key, (0, 0))
                counted[key] = (before[0] + count.packets, before[1] + count.bytes)
        for key, (packets_counted, bytes_counted) in counted.items():
            packets.add_metric(key, packets_counted)
            size.add_metric(key, bytes_counted)
        yield packets
        yield size
        limits = GaugeMetricFamily(
            "rdmanet_pod_bandwidth_limit_bits_per_second",
            "Bits a second of kernel traffic that the pod may send or get, where that is limited.",
            labels=["pod", "interface", "direction"],
        )
        allowed: dict[tuple[str, str, str], int] = {}  # of two of one name, the newer one's
        for one in attachments:
            for direction, limit in (("from_pod", one.bandwidth.egress), ("to_pod", one.bandwidth.ingress)):
                if limit is not None:
                    allowed[*names[one.id], direction] = limit.bits_per_s
        for pod_words, bits_per_s in allowed.items():
            limits.add_metric(pod_words, bits_per_s)
        yield limits
        drops = CounterMetricFamily(
            "rdmanet_drops",
            "Packets dropped, and sockets refused, by pod (empty: none known), direction and drop reason.",
            labels=["pod", "interface", "direction", "reason"],
        )
        dropped: Counter[tuple[str, str, str, str]] = Counter()
        for (number, direction, reason), times in self._datapath.drops_by_direction().items():
            dropped[*names.get(number, ("", "")), direction, reason] += times
        for words, times in dropped.items():
            drops.add_metric(words, times)
        yield drops
        yield from self._flows(names)
        leases = GaugeMetricFamily("rdmanet_leases", "Leases by state.", labels=["state"])
        for name, held in self._leases.states().items():
            leases.add_metric([name], held)
        yield leases
        counts = self._leases.counts
        yield CounterMetricFamily("rdmanet_leases_granted", "Leases granted.", value=counts.granted)
        yield CounterMetricFamily(
            "rdmanet_leases_claimed", "Ends of leases claimed after a restart.", value=counts.claimed
        )
        refused = CounterMetricFamily("rdmanet_leases_refused", "Leases refused, by reason.", labels=["reason"])
        for reason, times in counts.refused.items():
            refused.add_metric([reason], times)
        yield refused
        revoked = CounterMetricFamily(
            "rdmanet_leases_revoked", "Granted leases that ended, by cause.", labels=["cause"]
        )
        for cause, times in counts.revoked.items():
            revoked.add_metric([cause], times)
        yield revoked
        dropped_connections = CounterMetricFamily(
            "rdmanet_lease_connections_dropped",
            "Pods' connections to the broker that it closed by itself, by cause.",
            labels=["cause"],
        )
        for cause, times in self._leases.dropped_connections.items():
            dropped_connections.add_metric([cause], times)
        yield dropped_connections
        refused_objects = CounterMetricFamily(
            "rdmanet_rdma_refused_objects",
            "Verbs objects and device contexts that the kernel refused a pod because of rdma.max, by resource.",
            labels=["pod", "interface", "resource"],
        )
        counted_objects: Counter[tuple[str, str, str]] = Counter()
        for number, usage in self._limits.usage().items():
            if number in names:
                for resource, times in usage.refused.items():
                    counted_objects[*names[number], resource] += times
        for object_words, times in counted_objects.items():
            refused_objects.add_metric(object_words, times)
        yield refused_objects
        yield CounterMetricFamily(
            "rdmanet_guard_failures",
            "Writes of guard entries that the kernel refused; of a lease that was to be revoked, packets still pass.",
            value=self._leases.guard_failures,
        )
        repairs = CounterMetricFamily(
            "rdmanet_repairs",
            "What was found broken, by kind, and what came of it: repaired, collected, followed, failed or given_up.",
            labels=["kind", "outcome"],
        )
        for repaired, times in self._repairs.repairs().items():
            repairs.add_metric(repaired, times)
        yield repairs
        yield from _devices(self._devices.devices())

    def _flows(self, names: Mapping[int, tuple[str, str]]) -> Iterable[Metric]:
        flows = self._datapath.flows
        begun = CounterMetricFamily(
            "rdmanet_pod_flows_begun",
            "Flows entered into the table, by pod and direction (from_pod: the pod began them).",
            labels=["pod", "interface", "direction"],
        )
        entered: Counter[tuple[str, str, str]] = Counter()
        for (number, direction), times in flows.begun().items():
            if number in names:
                entered[*names[number], direction] += times
        for words, times in entered.items():
            begun.add_metric(words, times)
        yield begun
        tracked = GaugeMetricFamily(
            "rdmanet_pod_flows",
            "Flows that the pod has of the table: those that it began, and those from the host or outside to it.",
            labels=["pod", "interface"],
        )
        shares: Counter[tuple[str, str]] = Counter()
        for number, count in flows.shares().items():
            if number in names:
                shares[names[number]] += count
        for pod, count in shares.items():
            tracked.add_metric(pod, count)
        yield tracked
        used = GaugeMetricFamily(
            "rdmanet_table_entries",
            "Entries of the datapath's tables; of flows when idle ones were last looked for.",
            labels=["table"],
        )
        most = GaugeMetricFamily("rdmanet_table_entries_max", "Entries that these can have.", labels=["table"])
        for name, (entries, bound) in self._tables().items():
            used.add_metric([name], entries)
            most.add_metric([name], bound)
        yield used
        yield most
        yield CounterMetricFamily(
            "rdmanet_events_lost",
            "Drops and new flows that `rdmanet monitor` could not be shown: more came than were read.",
            value=self._datapath.events.lost(),
        )


def _devices(found: Sequence[DeviceNumbers]) -> Iterable[Metric]:
    healthy: dict[tuple[str, str], int] = {}
    events = CounterMetricFamily(
        "rdmanet_device_events",
        "What RDMA devices count themselves, by the driver's names (hw_counters); pod is empty where pods share it.",
        labels=["pod", "device", "event"],
    )
    ports = GaugeMetricFamily(
        "rdmanet_device_port_active", "Whether the RDMA device's port is active.", labels=["device"]
    )
    for one in found:
        for attachment in one.attachments:
            key = (str(attachment.pod), one.device.name)
            healthy[key] = min(healthy.get(key, 1), int(attachment.id not in one.unhealthy))
        pod = "" if one.shared else str(one.attachments[0].pod)
        for event, times in one.events.items():
            events.add_metric([pod, one.device.name, event], times)
        ports.add_metric([one.device.name], int(one.port_active or False))
    health = GaugeMetricFamily(
        "rdmanet_device_healthy", "Whether the pod's RDMA device can be used.", labels=["pod", "device"]
    )
    for key, well in healthy.items():
        health.add_metric(key, well)
    yield health
    yield ports
    yield events


class Metrics:
    """The agent's registry."""

    def __init__(
        self,
        store: Store,
        datapath: Datapath,
        leases: Leases,
        removals: Removals,
        limits: PodLimits,
        devices: Devices,
        tables: Tables,
        repairs: Repairs,
    ):
        self._registry = CollectorRegistry()
        self._registry.register(_State(store, datapath, leases, removals, limits, devices, tables, repairs))
        self._cni = Histogram(
            "rdmanet_cni_seconds",
            "Duration of CNI calls, by command and CNI error code (0: success).",
            ["command", "code"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._lease = Histogram(
            "rdmanet_lease_seconds",
            "From asking for a lease to its grant.",
            registry=self._registry,
            buckets=(*_SUBMILLISECOND, *_SECONDS),
        )

    def cni_call(self, command: str, code: int, seconds: float) -> None:
        """See ``rdmanet.api.Observer``."""
        self._cni.labels(command=command, code=str(code)).observe(seconds)

    def lease_granted(self, seconds: float) -> None:
        """A lease was granted so long after it was asked for."""
        self._lease.observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus' text format; blocks for map reads."""
        return generate_latest(self._registry)
