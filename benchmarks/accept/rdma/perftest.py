"""Row `perftest`: every tool of perftest over every transport it knows, and rdma_cm's and libibverbs' own examples.

Between two pods of an agent with the guard at `observe`, as these programs make queue pairs of their own; over IPv4 and
IPv6, with rdma_cm (-R) and with events (-e) where a tool has them. That RoCE carried each run is read from the
datapath's counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.peers import namespaces, programs
from benchmarks.peers.namespaces import Pair
from benchmarks.peers.programs import Ended
from testbed.demo.rdma import last_figures
from testbed.host import Host
from testbed.rows import Figure, StepError, need

#: Tool → the transports it knows on RoCE.
TRANSPORTS = {
    "ib_send_bw": ("RC", "UC", "UD"),
    "ib_send_lat": ("RC", "UC", "UD"),
    "ib_write_bw": ("RC", "UC"),
    "ib_write_lat": ("RC", "UC"),
    "ib_read_bw": ("RC",),
    "ib_read_lat": ("RC",),
    "ib_atomic_bw": ("RC",),
    "ib_atomic_lat": ("RC",),
}
#: perftest's WRITE tests look at memory, not at completions: they have no -e. rdma_cm knows RC and UD.
EVENT_TOOLS = tuple(tool for tool in TRANSPORTS if "write" not in tool)
CM_TRANSPORTS = ("RC", "UD")
FAMILIES = (4, 6)
ITERATIONS = 100
#: perftest 4.5's ib_send_lat takes one completion per event: when two come with one it waits for ever, on any path. The
#: fewer there are, the rarer that is.
EVENT_LATENCY_ITERATIONS = 10
#: One RoCE packet at an MTU of 1500: UD takes no more.
SIZE_BYTES = 1024
#: The UC server ends with 1 by itself now and then, -e stalls, and the clock's rate comes out as 0 on a busy
#: machine (perftest 4.5, on any path): such a run is made again, and counted.
ATTEMPTS = 6
TIMEOUT_S = 15.0
LISTENING = "Waiting for client"
#: perftest 4.5 looks -R's server up as IPv4 alone (perftest_communication.c, rdma_client_connect).
UNKNOWN = "Problem in resolving basic address"


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run one tool."""

    tool: str
    transport: str
    family: int
    way: str = ""  # "", "-R" or "-e"

    @property
    def name(self) -> str:
        """As the row's JSON has it, below tool and transport."""
        return f"IPv{self.family}{' ' + self.way if self.way else ''}"

    @property
    def iterations(self) -> int:
        """How many messages or operations."""
        return EVENT_LATENCY_ITERATIONS if self.way == "-e" and self.tool.endswith("_lat") else ITERATIONS


def cases() -> Iterator[Case]:
    """All of them."""
    for tool, transports in TRANSPORTS.items():
        for transport in transports:
            for family in FAMILIES:
                yield Case(tool, transport, family)
                if transport in CM_TRANSPORTS:
                    yield Case(tool, transport, family, "-R")
            if tool in EVENT_TOOLS:
                yield Case(tool, transport, 4, "-e")


def arguments(case: Case, pair: Pair) -> tuple[list[str], list[str]]:
    """The server's and the client's command line."""
    common = [case.tool, "-c", case.transport, "-F", "-n", str(case.iterations)]
    if "atomic" not in case.tool:  # always 8 bytes
        common += ["-s", str(SIZE_BYTES)]
    if case.way:
        common.append(case.way)
    # With rdma_cm the address that is connected to decides; else the GID does, and the address is where the two ends
    # exchange their numbers over TCP.
    address = pair.server.addresses[case.family if case.way == "-R" else 4]
    lines = []
    for end in (pair.server, pair.client):
        own = [*common, "-d", end.device, "-x", str(end.gid_index(case.family))]
        if case.way == "-R" and case.family == 6:
            own.append("--ipv6")
        lines.append(own)
    return lines[0], [*lines[1], address]


def run(pair: Pair, case: Case) -> dict[str, object]:
    """Until it passes, at most ATTEMPTS times: {"figures": …, "attempts": N}; {"unknown": …} where this version of the
    tool has no such way. StepError when it never passes."""
    server, client = arguments(case, pair)
    why = ""
    for attempt in range(1, ATTEMPTS + 1):
        ended = programs.both_ends(pair, server, client, LISTENING, timeout_s=TIMEOUT_S)
        if ended.ok:
            figures = figures_of(ended)
            if any(figure > 0 for figure in figures[2:]):
                return {"figures": figures, "attempts": attempt}
            why = f"printed no figures but zeros: {ended.client.stdout.strip()[-200:]!r}"
        elif case.way == "-R" and case.family == 6 and UNKNOWN in ended.words:
            return {"unknown": "rdma_cm with IPv6, in this version of perftest"}
        else:
            why = ended.words
    raise StepError(f"{case.tool} {case.transport} {case.name} failed {ATTEMPTS} times in a row: {why}")


def figures_of(ended: Ended) -> list[float]:
    """The finite numbers of a table's last row; none where it has no such row (a clock without a rate gives inf)."""
    try:
        return [figure for figure in last_figures(ended.client) if math.isfinite(figure)]
    except StepError:
        return []


# Beside perftest


def rping(pair: Pair, family: int) -> Ended:
    """RDMA READ and WRITE over rdma_cm."""
    address = pair.server.addresses[family]
    server = ["rping", "-s", "-d", "-C", "10", "-V", "-a", address]
    return programs.both_ends(pair, server, ["rping", "-c", "-C", "10", "-V", "-a", address], "rdma_listen")


def ucmatose(pair: Pair, family: int) -> Ended:
    """RC connections and messages over rdma_cm."""
    return _connection_example("ucmatose", "cmatose", pair, family)


def udaddy(pair: Pair, family: int) -> Ended:
    """Datagrams whose addresses rdma_cm resolved."""
    return _connection_example("udaddy", "udaddy", pair, family)


def _connection_example(program: str, said: str, pair: Pair, family: int) -> Ended:
    address, kind = pair.server.addresses[family], {4: "ip", 6: "ipv6"}[family]
    common = [program, "-f", kind, "-c", "4", "-C", "10", "-S", "512"]
    server, client = [*common, "-b", address], [*common, "-s", address]
    return programs.both_ends(pair, server, client, f"{said}: starting server")


def pingpong(program: str) -> Callable[[Pair, int], Ended]:
    """One of libibverbs' examples."""

    def both(pair: Pair, family: int) -> Ended:
        lines = [
            [program, "-d", end.device, "-g", str(end.gid_index(family)), "-s", "1024", "-n", "50"]
            for end in (pair.server, pair.client)
        ]
        return programs.both_ends(pair, lines[0], [*lines[1], pair.server.addresses[4]], "local address")

    return both


EXAMPLES: dict[str, Callable[[Pair, int], Ended]] = {
    "rping": rping,
    "ucmatose": ucmatose,
    "udaddy": udaddy,
    **{f"ibv_{kind}_pingpong": pingpong(f"ibv_{kind}_pingpong") for kind in ("rc", "uc", "ud", "srq")},
}


def example(pair: Pair, name: str, family: int) -> dict[str, object]:
    """Run one of EXAMPLES until it passes; as `run`."""
    why = ""
    for attempt in range(1, ATTEMPTS + 1):
        ended = EXAMPLES[name](pair, family)
        if ended.ok:
            return {"attempts": attempt}
        why = ended.words
    raise StepError(f"{name} over IPv{family} failed {ATTEMPTS} times in a row: {why}")


def carried(host: Host, pair: Pair, work: Callable[[], dict[str, object]], packets: int) -> dict[str, object]:
    """Do `work`, whose result gets how many RoCE packets left the pods meanwhile; StepError when fewer than `packets`
    did or the guard dropped one."""
    before, dropped = programs.traffic(host, (pair.client, pair.server)), programs.roce_drops(host)
    done = work()
    roce = programs.traffic(host, (pair.client, pair.server)).since(before).roce_packets
    need("unknown" in done or roce >= packets, f"RoCE carried {roce} packets of at least {packets}: {done}")
    need(programs.roce_drops(host) == dropped, f"RoCE packets were dropped: {programs.roce_drops(host)}")
    return {**done, "roce_packets": roce}


def measure() -> Figure:
    """Everything; what fails is in the row's sentence, after all has been tried."""
    results: dict[str, dict[str, dict[str, object]]] = {}
    failed: list[str] = []
    passed = again = unknown = 0

    def note(tool: str, transport: str, name: str, work: Callable[[], dict[str, object]], packets: int) -> None:
        nonlocal passed, again, unknown
        place = results.setdefault(tool, {}).setdefault(transport, {})
        try:
            done = carried(host, pair, work, packets)
        except StepError as error:
            place[name] = {"failed": error.sentence}
            failed.append(error.sentence)
            return
        place[name] = done
        if "unknown" in done:
            unknown += 1
            return
        passed += 1
        again += int(str(done["attempts"])) - 1

    with namespaces.agent_host("perf") as host, namespaces.ours(host, "pt") as pair:
        for case in cases():
            note(case.tool, case.transport, case.name, partial(run, pair, case), case.iterations)
        for name in EXAMPLES:
            for family in FAMILIES:
                note(name, "-", f"IPv{family}", partial(example, pair, name, family), 10)
    need(not failed, f"{len(failed)} of {passed + len(failed)} runs failed: " + "; ".join(failed))
    return Figure(
        passed,
        "runs",
        f"of {len(TRANSPORTS)} perftest tools over RC, UC and UD with IPv4, IPv6, rdma_cm and events, and "
        f"{', '.join(EXAMPLES)}: all passed over RoCE ({again} made again for perftest's own faults; "
        f"{unknown} that this version of perftest does not know)",
        {"results": results},
    )
