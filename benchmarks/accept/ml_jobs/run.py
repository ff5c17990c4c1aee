"""Row `run`: four pods with a device each under `rdmanet run`: what they find, say and end with."""

from __future__ import annotations

import ipaddress
from typing import Any

from benchmarks.peers.namespaces import agent_host
from rdmanet.model import address_key
from testbed.host import Host
from testbed.jobs import Ended, Gate, Job, left, python, run
from testbed.rows import Figure, need

PODS = 4
JOB = ("--pods", str(PODS), "--rdma", "--name", "train")
#: What a rank sees of RDMA, in JSON.
LOOK = """
import errno, json, os, resource
from pathlib import Path

device, port = os.environ["RDMANET_DEVICE"], os.environ["RDMANET_PORT"]
sysfs = Path("/sys/class/infiniband") / device / "ports" / port
nodes = sorted(os.listdir("/dev/infiniband"))
(uverbs,) = [name for name in nodes if name.startswith("uverbs")]
others = {}
for other in Path("/sys/class/infiniband_verbs").glob("uverbs*"):
    if other.name != uverbs:
        major, minor = map(int, (other / "dev").read_text().split(":"))
        try:
            os.mknod("/dev/infiniband/" + other.name, 0o020666, os.makedev(major, minor))
            others[other.name] = "made"
        except OSError as error:
            others[other.name] = errno.errorcode[error.errno]
print(json.dumps({
    "environment": dict(os.environ),
    "nodes": nodes,
    "device of the node": (Path("/sys/class/infiniband_verbs") / uverbs / "ibdev").read_text().strip(),
    "gid": (sysfs / "gids" / os.environ["RDMANET_GID_INDEX"]).read_text().strip(),
    "type": (sysfs / "gid_attrs/types" / os.environ["RDMANET_GID_INDEX"]).read_text().strip(),
    "others": others,
    "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
}))
"""
#: Even ranks serve; odd ones ask until their neighbour listens: by IPv4, while RoCE goes by the GID that was chosen.
LATENCY = """
set -- ib_send_lat -d $RDMANET_DEVICE -x $RDMANET_GID_INDEX -F -n 50
[ $((RANK % 2)) = 0 ] && exec "$@"
for attempt in $(seq 100); do
	"$@" $(echo $RDMANET_PEER_ADDRESSES_IPV4 | cut -d, -f$RANK) 2> /dev/null && exit 0
	sleep 0.2
done
exit 1
"""
#: Exit code → what one of the ranks does.
ENDINGS = {0: ":", 7: "exit 7", 137: "kill -9 $$", 143: "kill -TERM $$"}
#: Of 50 rounds, in each direction.
LEAST_PACKETS = 50


def measure() -> Figure:
    """How many pods there were."""
    with agent_host("run") as host:
        ended = run(host, *JOB, *python(LOOK))
        devices = _found(ended)
        packets = {family: _latency(host, family) for family in (4, 6)}
        _endings(host)
        _refused(host)
        need(left(host) == [], f"left: {left(host)}")
    detail = (
        f"had rank, world, peers and a device each ({', '.join(devices)}), no node but their own and none that they"
        f" could make; ib_send_lat ran between them by what was in their environment, over IPv4 and IPv6 (RoCE packets:"
        f" {packets[4]} and {packets[6]}); exit codes {', '.join(map(str, ENDINGS))} were the job's;"
        " lines had their rank in front; nothing was left"
    )
    return Figure(PODS, "pods", detail, {"devices": devices, "roce_packets": packets})


def _found(ended: Ended) -> list[str]:
    need(ended.code == 0, f"status {ended.code}: {ended.stderr}")
    devices = []
    for rank in range(PODS):
        found: dict[str, Any] = ended.json(rank)
        environment = found["environment"]
        device = environment["RDMANET_DEVICE"]
        devices.append(device)
        for name, wanted in (
            ("RANK", str(rank)),
            ("OMPI_COMM_WORLD_RANK", str(rank)),
            ("PMI_RANK", str(rank)),
            ("WORLD_SIZE", str(PODS)),
            ("MASTER_ADDR", "train-0"),
            ("RDMANET_PEERS", ",".join(f"train-{number}" for number in range(PODS))),
            ("RDMANET_ADDRESS", environment["RDMANET_PEER_ADDRESSES_IPV4"].split(",")[rank]),
            ("NCCL_IB_HCA", f"={device}:1"),
            ("UCX_NET_DEVICES", f"{device}:1"),
        ):
            need(environment[name] == wanted, f"rank {rank} has {name}={environment[name]}, not {wanted}")
        need(found["device of the node"] == device, f"rank {rank} has {found['nodes']}, and its device is {device}")
        need(len(found["nodes"]) == 2 and "rdma_cm" in found["nodes"], f"rank {rank} has the nodes {found['nodes']}")
        need(set(found["others"].values()) <= {"EPERM"}, f"rank {rank} could make nodes: {found['others']}")
        gid = ipaddress.IPv6Address(found["gid"]).packed
        need(gid == address_key(environment["RDMANET_ADDRESS"]), f"rank {rank}: the GID of its index is {found['gid']}")
        need(found["type"] == "RoCE v2", f"rank {rank}: its GID is of type {found['type']}")
        need(found["memlock"] == [-1, -1], f"rank {rank} may lock {found['memlock']} bytes")
    need(len(set(devices)) == PODS, f"devices are {devices}")
    return devices


def _latency(host: Host, family: int) -> int:
    """RoCE packets that the pods sent."""
    words = (*JOB, "--family", str(family), "--", "sh", "-c", LATENCY)
    with Gate(host, "DEL", f"latency-{family}") as gate, Job(host, *words, plugin=gate.plugin) as job:
        gate.wait(timeout_s=600.0)
        sent = roce_packets(host)
        gate.go(PODS)
        ended = job.end()
    need(ended.code == 0, f"ib_send_lat over IPv{family}: {ended.code}: {ended.stdout}{ended.stderr}")
    need(all("typical" in "".join(ended.of(rank)) for rank in range(PODS)), "a rank printed no latency")
    need(len(sent) == PODS and min(sent.values()) >= LEAST_PACKETS, f"RoCE packets over IPv{family}: {sent}")
    return sum(sent.values())


def roce_packets(host: Host) -> dict[str, int]:
    """Pod → RoCE packets that it has sent, as the datapath counted them."""
    rows = host.api("GET", "/v1/status")["attachments"]
    return {row["pod"]: row["counters"].get("from_pod_roce", {"packets": 0})["packets"] for row in rows}


def _endings(host: Host) -> None:
    for code, what in ENDINGS.items():
        program = f"echo out $RANK; echo err $RANK >&2; if [ $RANK = 2 ]; then {what}; fi; exit 0"
        ended = run(host, *JOB, "--", "sh", "-c", program)
        need(ended.code == code, f"the job ended with {ended.code}, not {code}: {ended.stderr}")
        for stream, word in ((ended.stdout, "out"), (ended.stderr, "err")):
            need(f"[2] {word} 2\n" in stream, f"rank 2's line is not there: {stream!r}")
            said = {line for line in stream.splitlines() if line.startswith("[")}
            need(said <= {f"[{rank}] {word} {rank}" for rank in range(PODS)}, f"other lines are: {stream!r}")


def _refused(host: Host) -> None:
    ended = run(host, *JOB, "--", "no-such-command")
    need((ended.code, "There is no command" in ended.stderr) == (125, True), f"{ended.code}: {ended.stderr}")
