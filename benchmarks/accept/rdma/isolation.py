"""Row `isolation`: what a pod tries against another, how often, and how often it succeeds: never.

The pods are those of the row `guard`, in `enforce`: a victim that has leases, a friend that it has them with, and an
intruder, with a second program that speaks to the agent by hand. The runtime here is a careless one: it puts the
victim's node into the intruder's /dev.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.accept.rdma import guard
from benchmarks.peers import namespaces
from rdmanet.lease import PROTOCOL_VERSION, lease_text
from rdmanet.model import GATEWAY_MAC, GuardMode, address_key
from testbed import adversary
from testbed.host import Host
from testbed.peer import Peer
from testbed.pod import Pod
from testbed.rows import Figure, need

TIMEOUT_S = 90.0
#: Opens every device that libibverbs lists, as UCX does; prints those that open.
OPEN_ALL = """
import json
from pyverbs.device import Context, get_device_list
from pyverbs.pyverbs_error import PyverbsError
opened = []
for device in get_device_list():
    name = device.name.decode()
    try:
        Context(name=name).close()
        opened.append(name)
    except PyverbsError:
        pass
print(json.dumps(opened))
"""
#: A flood succeeds where others wait so many times as long as beside the same number of processes that only compute.
FLOOD_FACTOR = 5.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How often each thing is tried."""

    opens: int = 100
    guesses: int = 1000
    leases: int = 9  # by the friend, in each flood
    adds: int = 5
    processes: int = 2
    floods: tuple[str, ...] = tuple(sorted(adversary.FLOODS.keys() - {"nothing"}))


@dataclass
class Attempts:
    """The pods, and what was tried."""

    at: guard.Scene
    speaker: Peer  # in the intruder's pod
    sizes: Sizes
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        return self.at.host

    def pod(self, name: str) -> Pod:
        return self.at.ends[name].pod

    def row(self, name: str) -> dict[str, Any]:
        """The pod's attachment, as `rdmanet status` shows it."""
        container_id = self.pod(name).container_id
        (row,) = [r for r in self.host.api("GET", "/v1/status")["attachments"] if r["container_id"] == container_id]
        return dict(row)

    def tried(self, case: str, attempts: int, successes: int, **more: Any) -> None:
        """Keeps what came of a case; StepError at the first success."""
        self.results[case] = {"attempts": attempts, "successes": successes, **more}
        need(attempts > 0, f"{case}: nothing was tried")
        need(successes == 0, f"{case}: {self.results[case]}")

    def say(self, **message: Any) -> dict[str, Any]:
        """The agent's answer on the intruder's line."""
        answer: dict[str, Any] = self.speaker.ask("say", line="line", message=message)["answer"]
        return answer

    def dial(self, line: str = "line") -> None:
        """A greeted line."""
        self.speaker.ask("dial", line=line)
        message = {"type": "hello", "id": 1, "version": PROTOCOL_VERSION}
        answer = self.speaker.ask("say", line=line, message=message)["answer"]
        need(answer["type"] == "reply", f"the intruder's own hello was refused: {answer}")


@contextlib.contextmanager
def attempts(host: Host, sizes: Sizes) -> Iterator[Attempts]:
    """The pods, with leases between victim and friend."""
    packets = guard.Sizes(guesses=sizes.guesses, repeats=sizes.guesses, real=min(sizes.guesses, 100))
    with guard.scene(host, GuardMode.ENFORCE, packets) as at:
        at.unleased = at.peers["victim"].ask("serve")["unleased"]
        lease(at)
        argv = [sys.executable, "-I", "-S", "-E", adversary.__file__, str(PROTOCOL_VERSION)]
        pod = at.ends["intruder"].pod
        with Peer.start(f"{pod.name}-speaker", pod.popen, argv) as speaker:
            yield Attempts(at, speaker, sizes)


def lease(at: guard.Scene, version: int = 4) -> None:
    """One of each transport, from friend to victim."""
    source = at.address("friend", version)
    at.friends = at.peers["friend"].ask("lease", target=at.ends["victim"].pod.name, source=source)
    at.leased = at.peers["victim"].ask("leased")


# Devices


def devices(tries: Attempts) -> None:
    """Another pod's device: by its node, by one of the pod's own making, through whatever lists devices."""
    tries.dial()
    deadline = time.monotonic() + TIMEOUT_S
    while tries.row("intruder")["cgroup"] is None:
        need(time.monotonic() < deadline, f"the intruder's cgroup: {tries.row('intruder')['not_limited']}")
        time.sleep(0.1)
    intruder, victim = tries.pod("intruder"), tries.row("victim")["device"]
    own = tries.row("intruder")["device"]
    path = f"/dev/infiniband/{victim['uverbs']}"
    inside = ["nsenter", "-t", str(intruder.running.pid), "-m"]
    tries.host.exec([*inside, "mknod", path, "c", str(victim["major"]), str(victim["minor"])])

    found = [tries.speaker.ask("open", path=path)["errno"] for _ in range(tries.sizes.opens)]
    tries.tried("another pod's node in /dev", len(found), found.count(0), errno=sorted(set(found)))
    need(tries.speaker.ask("open", path=f"/dev/infiniband/{own['uverbs']}")["errno"] == 0, "its own does not open")

    # As a privileged container would: with every capability, in the pod's cgroup and its mounts.
    made = f"/dev/stolen-{secrets.token_hex(4)}"
    numbers = f"c {victim['major']} {victim['minor']}"
    script = f"mknod {made} {numbers} && for n in $(seq {tries.sizes.opens}); do (exec 3<>{made}) && echo opened; done"
    join = (
        f"echo $$ > {intruder.cgroup.path}/cgroup.procs && exec nsenter -t {intruder.running.pid} -m sh -c '{script}'"
    )
    done = tries.host.exec(["sh", "-c", join], check=False)
    need("Operation not permitted" in done.stderr, f"mknod: {done.stderr[-200:]}")
    tries.tried("a node of its own making, privileged", tries.sizes.opens, done.stdout.count("opened"))

    listed = tries.speaker.ask("devices")["devices"]
    opened = intruder.exec([sys.executable, "-c", OPEN_ALL], timeout_s=TIMEOUT_S).json()
    need(own["name"] in opened, "the intruder cannot open its own device")
    others = len(listed) - 1
    tries.tried("every device that is listed", others, len(set(opened) - {own["name"]}), listed=sorted(listed))


# Packets


def packets(tries: Attempts) -> None:
    """A forged source, a guessed queue pair, and a queue pair of its own connected to another pod's."""
    at = tries.at
    for version in (4, 6):
        victim, friend, intruder = (at.address(name, version) for name in guard.NAMES)
        forged = {
            "mac": at.mac("intruder"),
            "gateway_mac": GATEWAY_MAC,
            "source": friend,
            "destination": victim,
            "qpns": [at.leased["rc"], 1],
            "count": tries.sizes.guesses,
        }
        case = f"forged source address, IPv{version}"
        at.attempt(case, "intruder", {"spoofed_address"}, guard.by_hand(at.peers["intruder"], "frames", forged))
        guessed = {"source": intruder, "destination": victim, "qpns": [guard.FIRST_QPN, tries.sizes.guesses]}
        work = guard.by_hand(at.peers["intruder"], "packets", guessed)
        at.attempt(f"guessed QPN, IPv{version}", "intruder", {"roce_unleased", "roce_not_peer"}, work)

        def own(source: str = intruder, destination: str = victim) -> int:
            before = at.sent("intruder")
            at.peers["intruder"].ask("connect_unleased", source=source, destination=destination, qpn=at.leased["rc"])
            return at.sent("intruder") - before

        reasons = {"roce_unleased", "roce_not_peer"}
        at.attempt(f"its own queue pair connected to another's, IPv{version}", "intruder", reasons, own)
    for case, result in at.results.items():
        tries.tried(case, result["attempts"], result["passed"], dropped=result["dropped"])


# Leases


def names_and_gids(tries: Attempts) -> None:
    """Leases as somebody else, or for somebody else's address."""
    victim, friend = (f"default/{tries.pod(name).name}" for name in ("victim", "friend"))
    tries.speaker.ask("dial", line="other")
    hello = {"type": "hello", "id": 1, "version": PROTOCOL_VERSION, "pod": victim}
    answer = tries.speaker.ask("say", line="other", message=hello)["answer"]
    tries.tried("hello as another pod", 1, int(answer["type"] == "reply"), answer=answer["kind"])
    tries.speaker.ask("hang_up", line="other")

    listen = {"type": "listen", "transport": "rc"}
    answers = [
        tries.say(**listen, id=2, service=f"{victim}:mine"),
        tries.say(**listen, id=3, service="mine", pod=victim),
        tries.say(**listen, id=4, service="mine", namespace="default"),
    ]
    tries.tried("listen as another pod", len(answers), sum(a["type"] == "reply" for a in answers))

    def ends(gid: str) -> dict[str, Any]:
        return {"gid": gid, "mtu_bytes": 1024, "qpns": [4242], "psns": [1], "transport": "rc", "qkey": None}

    foreign = [
        address_key(tries.at.address(name, version)).hex() for name in ("victim", "friend") for version in (4, 6)
    ]
    own = address_key(tries.at.address("intruder", 4)).hex()
    connect = {"type": "connect", "target": f"{victim}:params"}
    answers = [tries.say(**connect, id=10 + n, ends=ends(gid)) for n, gid in enumerate(foreign)]
    successes = sum(a["type"] == "reply" for a in answers)
    tries.tried("connect with another pod's GID", len(answers), successes, answers=sorted({a["kind"] for a in answers}))
    answers = [
        tries.say(**connect, id=20, ends=ends(own), source=friend),
        tries.say(**connect, id=21, ends=ends(own), pod=friend),
    ]
    tries.tried("connect as another pod", len(answers), sum(a["type"] == "reply" for a in answers))

    # As a listener that accepts with somebody else's address.
    need(tries.say(**listen, id=30, service="trap")["type"] == "reply", "the intruder cannot listen")
    successes, answers = 0, []
    for number, gid in enumerate(foreign):
        tries.dial("caller")
        target = f"{tries.pod('intruder').name}:trap"
        message = {"type": "connect", "id": 40 + number, "target": target, "ends": ends(own)}
        tries.speaker.ask("tell", line="caller", message=message)
        incoming = tries.speaker.ask("hear", line="line")["message"]
        accept = {
            "type": "accept",
            "id": 50 + number,
            "lease": incoming["lease"],
            "ends": {**ends(gid), "qpns": [4243]},
        }
        answers.append(tries.say(**accept))
        tries.speaker.ask("hang_up", line="caller")
    tries.tried("accept with another pod's GID", len(answers), sum(a["type"] == "reply" for a in answers))


def replays(tries: Attempts) -> None:
    """Another pod's lease, by its id: while it is held, and when a new agent waits for its claim."""
    leases = tries.host.api("GET", "/v1/status")["leases"]
    need(len(leases) >= 2, "the victim has no leases")
    known = [(row["lease"], row[end]["qpn"]) for row in leases for end in ("connector", "listener")]
    ids = sorted({number for number, _ in known})
    _claim(tries, "claim of another's lease", known)
    guessed = [(lease_text(secrets.randbits(63) | 1), qpn) for _ in range(tries.sizes.guesses) for _, qpn in known[:1]]
    _claim(tries, "claim of guessed leases", guessed)
    answers = [tries.say(type="release", id=60, leases=ids)]
    answers += [tries.say(type="reject", id=61 + n, lease=number, sentence="no") for n, number in enumerate(ids)]
    tries.tried("release of another's lease", len(answers), sum(a["type"] == "reply" for a in answers))

    # Its holders cannot claim first: they are stopped.
    holders = [tries.at.peers[name].process for name in ("victim", "friend")]
    for process in holders:
        process.signal(signal.SIGSTOP)
    try:
        tries.host.kill_agent()
        tries.host.start_agent()
        tries.dial()
        states = {row["state"] for row in tries.host.api("GET", "/v1/status")["leases"]}
        need(states == {"unclaimed"}, f"the new agent's leases are {states}")
        _claim(tries, "claim of another's lease from a new agent", known)
    finally:
        for process in holders:
            process.signal(signal.SIGCONT)
    deadline = time.monotonic() + TIMEOUT_S
    while {row["state"] for row in tries.host.api("GET", "/v1/status")["leases"]} != {"granted"}:
        need(time.monotonic() < deadline, "the victim did not get its leases back")
        time.sleep(0.1)


def _claim(tries: Attempts, case: str, known: list[tuple[str, int]]) -> None:
    claimed = 0
    for first in range(0, len(known), 32):
        answer = tries.say(type="claim", id=100 + first, leases=[list(one) for one in known[first : first + 32]])
        need(answer["type"] == "reply", f"{case}: {answer}")
        claimed += len(answer["claimed"])
    tries.tried(case, len(known), claimed)


# Floods


def floods(tries: Attempts) -> None:
    """The friend leases from the victim, and pods are added, while the intruder floods the agent."""
    if not tries.sizes.floods:
        return
    quiet = _during(tries, "nothing")
    for kind in tries.sizes.floods:
        found = _during(tries, kind)
        waited = max(found["lease_p50_ms"] / quiet["lease_p50_ms"], found["add_p50_ms"] / quiet["add_p50_ms"])
        tries.tried(f"flood: {kind}", found["rounds"], int(waited > FLOOD_FACTOR), **found, beside_computing=quiet)


def _during(tries: Attempts, kind: str) -> dict[str, Any]:
    at, leases, adds = tries.at, [], []
    tries.speaker.ask("flood_begin", kind=kind, processes=tries.sizes.processes)
    try:
        for _ in range(tries.sizes.leases):
            at.peers["friend"].ask("release")
            begun = time.monotonic()
            lease(at)
            leases.append(time.monotonic() - begun)
        for number in range(tries.sizes.adds):
            adds.append(_add(tries.host, f"{kind.replace('_', '-')}-{number}"))
    finally:
        rounds = tries.speaker.ask("flood_end")["done"]
    return {
        "rounds": rounds,
        "lease_p50_ms": round(statistics.median(leases) * 1000, 2),
        "lease_max_ms": round(max(leases) * 1000, 2),
        "add_p50_ms": round(statistics.median(adds) * 1000, 2),
    }


def _add(host: Host, name: str) -> float:
    configuration = {"cniVersion": "1.1.0", "name": "plain", "type": "rdmanet"}
    with Pod.create(host, name) as pod:
        outcome = host.cni("ADD", pod, configuration)
        need(outcome.returncode == 0, f"ADD during a flood: {outcome.sentence}")
        host.cni("DEL", pod, configuration)
    return outcome.elapsed_s


def all_attempts(host: Host, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """By case: attempts, successes and what else there is to say. StepError at the first success."""
    with attempts(host, sizes) as tries:
        devices(tries)
        packets(tries)
        names_and_gids(tries)
        replays(tries)
        floods(tries)
        return tries.results


def measure() -> Figure:
    """At full size."""
    with namespaces.agent_host("isolation") as host:
        results = all_attempts(host, Sizes())
    tried = sum(result["attempts"] for name, result in results.items() if not name.startswith("flood"))
    flooded = [result for name, result in results.items() if name.startswith("flood")]
    slower = max(flood["lease_p50_ms"] / flood["beside_computing"]["lease_p50_ms"] for flood in flooded)
    detail = (
        f"{sum(result['successes'] for result in results.values())} successes of {tried} attempts in"
        f" {len(results)} cases; beside a flood a lease takes at most {slower:.2f} times as long (p50) as beside the"
        " same number of processes that only compute"
    )
    return Figure(tried, "attempts", detail, results)
