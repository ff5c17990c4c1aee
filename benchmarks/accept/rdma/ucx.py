"""Row `ucx`: ucx_perftest between two pods, told by `rdmanet.verbs env` and nothing else; counters prove RoCE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.accept.rdma.perftest import FAMILIES
from benchmarks.peers import namespaces, programs
from benchmarks.peers.namespaces import Pair
from testbed.host import Host
from testbed.rdma_tools import ucx_perftest
from testbed.rows import Figure, StepError, need

ITERATIONS = 100
TIMEOUT_S = 60.0
ATTEMPTS = 3
#: Its first line; it listens a moment earlier.
LISTENING = "Waiting for connection"
#: The two ends exchange their addresses and figures over TCP, and nothing else: far less than the messages' bytes.
MOST_OTHER_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Case:
    """A UCP test of ucx_perftest. Its UCT tests are none of them: there the server takes the device's name from the
    client, and no two pods' devices have one name."""

    test: str
    size_bytes: int

    @property
    def name(self) -> str:
        """As in the row's JSON."""
        return f"{self.test} {self.size_bytes} B"


CASES = (
    Case("tag_lat", 8),
    Case("tag_bw", 65536),
    Case("tag_sync_lat", 8),
    Case("ucp_put_lat", 8),
    Case("ucp_put_bw", 65536),
    Case("ucp_get", 65536),
    Case("ucp_fadd", 8),
    Case("ucp_cswap", 8),
    Case("stream_bw", 65536),
    Case("ucp_am_bw", 65536),
)


def run(host: Host, pair: Pair, case: Case, environments: Sequence[dict[str, str]]) -> dict[str, object]:
    """One case, made again when it fails by itself; figures and counters. StepError when it fails or RoCE did not
    carry it. `environments` are the server's and the client's."""
    why = ""
    for attempt in range(1, ATTEMPTS + 1):
        argv = [*ucx_perftest(), "-t", case.test, "-s", str(case.size_bytes), "-n", str(ITERATIONS), "-w", "10", "-f"]
        before = programs.traffic(host, (pair.client, pair.server))
        ended = programs.both_ends(
            pair,
            argv,
            [*argv, pair.server.addresses[4]],
            LISTENING,
            environments=(environments[0], environments[1]),
            timeout_s=TIMEOUT_S,
        )
        moved = programs.traffic(host, (pair.client, pair.server)).since(before)
        if not ended.ok:
            why = ended.words
            continue
        least = ITERATIONS * case.size_bytes
        need(moved.roce_bytes >= least, f"{case.name}: RoCE carried {moved.roce_bytes} bytes of at least {least}")
        need(moved.other_bytes < MOST_OTHER_BYTES, f"{case.name}: {moved.other_bytes} bytes went beside RoCE")
        figures = [float(word) for word in ended.client.stdout.split()[-8:] if word.replace(".", "", 1).isdigit()]
        need(any(figures), f"{case.name} printed no figures: {ended.client.stdout[-200:]!r}")
        return {
            "figures": figures,
            "attempts": attempt,
            "roce_packets": moved.roce_packets,
            "roce_bytes": moved.roce_bytes,
            "other_bytes": moved.other_bytes,
        }
    raise StepError(f"ucx_perftest {case.name} failed {ATTEMPTS} times in a row: {why}")


def measure() -> Figure:
    """All cases over both families."""
    results: dict[str, dict[str, object]] = {}
    failed = []
    settings: dict[str, dict[str, str]] = {}
    with namespaces.agent_host("ucx") as host, namespaces.ours(host, "ucx", 9000) as pair:
        told = programs.told_all((pair.server, pair.client))
        for family in FAMILIES:
            environments = told[family]
            settings[f"IPv{family}"] = {k: v for k, v in environments[1].items() if k.startswith("UCX_")}
            for case in CASES:
                try:
                    results.setdefault(case.name, {})[f"IPv{family}"] = run(host, pair, case, environments)
                except StepError as error:
                    results.setdefault(case.name, {})[f"IPv{family}"] = {"failed": error.sentence}
                    failed.append(f"IPv{family}: {error.sentence}")
    count = len(CASES) * len(FAMILIES)
    need(not failed, f"{len(failed)} of {count} runs failed: " + "; ".join(failed))
    return Figure(
        count,
        "runs",
        f"of ucx_perftest ({len(CASES)} tests, IPv4 and IPv6) with what `rdmanet.verbs env` says; RoCE carried all "
        "messages by the datapath's counters, TCP only the exchange of addresses",
        {"results": results, "settings": settings},
    )
