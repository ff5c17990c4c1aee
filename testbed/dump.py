"""Everything on a host that must be as it was before, as JSON that compares byte for byte. Standard library only.

Run inside the host's namespaces as ``python -I -S -E dump.py [SECTION...]``. What changes by itself is
left out, by name, in `VOLATILE` and `VOLATILE_SYSCTLS`; everything else is compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Keys of iproute2's JSON that move without anybody changing anything.
VOLATILE = {
    "stats64",
    "stats",  # traffic
    "bytes",
    "packets",
    "drops",
    "overlimits",
    "requeues",
    "backlog",
    "qlen",  # a qdisc's momentary figures
    "valid_life_time",
    "preferred_life_time",
    "expires",
    "age",
    "used",
    "confirmed",
    "updated",
    "probes",
    "refcnt",  # clocks and uses
}
#: Values that count or that the kernel refuses to show.
VOLATILE_SYSCTLS = re.compile(r"nf_conntrack_count$|/route/flush$|stable_secret$")

NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_GETTABLE, NFT_MSG_GETCHAIN, NFT_MSG_GETRULE = 1, 4, 7
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3


def steady(value: Any) -> Any:
    """`value` without volatile keys."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [steady(v) for v in value]
    return value


def rows(values: list[Any]) -> list[Any]:
    """Sorted by their text: the kernel's order may follow hash tables."""
    return sorted((steady(v) for v in values), key=lambda v: json.dumps(v, sort_keys=True))


def batch(program: str, lines: list[str], *options: str) -> list[list[Any]]:
    """Answers of ``program -json -batch`` to each of `lines`: one process for all."""
    done = subprocess.run(
        [program, "-json", *options, "-batch", "-"],
        input="\n".join(lines) + "\n",
        text=True,
        capture_output=True,
        check=True,
    )
    decoder, position, answers = json.JSONDecoder(), 0, []
    text = done.stdout.strip()
    while position < len(text):
        answer, position = decoder.raw_decode(text, position)
        answers.append(answer)
        while position < len(text) and text[position].isspace():
            position += 1
    if len(answers) != len(lines):
        raise RuntimeError(f"{program} answered {len(answers)} of {len(lines)} questions: {done.stderr.strip()}")
    return answers


def network() -> dict[str, Any]:
    """Links, addresses, routes of all tables, rules, permanent neighbours."""
    names = ["links", "addresses", "neighbours", "routes4", "rules4", "routes6", "rules6"]
    answers = batch("ip", ["link show", "address show", "neighbour show nud permanent"], "-details")
    for family in ("-4", "-6"):
        answers += batch("ip", ["route show table all", "rule show"], "-details", family)
    return {name: rows(answer) for name, answer in zip(names, answers, strict=True)}


def traffic_control(names: list[str]) -> dict[str, Any]:
    """Queueing disciplines of all links, and filters of the clsact and root hooks of each."""
    questions = [f"filter show dev {name} {hook}" for name in names for hook in ("ingress", "egress", "root")]
    qdiscs, *filters = batch("tc", ["qdisc show", *questions])
    return {
        "qdiscs": rows(qdiscs),
        "filters": {q: rows(f) for q, f in zip(questions, filters, strict=True) if f},
    }


def nftables() -> list[str]:
    """Tables, chains and rules as the kernel's own messages: no tool needed, iptables-nft's rules included."""
    found = []
    try:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
    except OSError:
        return []  # a kernel without netfilter's netlink has no rules
    with netlink:
        netlink.settimeout(10)
        for kind in (NFT_MSG_GETTABLE, NFT_MSG_GETCHAIN, NFT_MSG_GETRULE):
            header = struct.pack("=IHHII", 20, NFNL_SUBSYS_NFTABLES << 8 | kind, NLM_F_REQUEST_DUMP, 1, 0)
            netlink.send(header + struct.pack("=BBH", 0, 0, 0))  # struct nfgenmsg, all families
            done = False
            while not done:
                data = netlink.recv(1 << 16)
                while data:
                    length, what = struct.unpack_from("=IH", data)
                    if what in (NLMSG_DONE, NLMSG_ERROR):
                        done = True  # an error: nf_tables is not there, so it has no rules
                        break
                    # Rules hold counters; what they are called and where they are is enough to see one come or go.
                    body = data[16:length] if kind == NFT_MSG_GETTABLE else data[16 : min(length, 16 + 4 + 64)]
                    found.append(f"{kind}:{body.hex()}")
                    data = data[(length + 3) & ~3 :]
    return sorted(found)


def legacy_iptables() -> dict[str, str]:
    """Tables that the legacy iptables back end has registered."""
    names = ("ip_tables_names", "ip6_tables_names")
    return {n: Path("/proc/net", n).read_text() for n in names if Path("/proc/net", n).exists()}


def rdma() -> dict[str, Any]:
    """RDMA devices, their node GUIDs and the netdev of each port's GIDs."""
    devices: dict[str, Any] = {}
    for device in sorted(Path("/sys/class/infiniband").glob("*")):
        netdevs = set()
        for attribute in device.glob("ports/*/gid_attrs/ndevs/*"):
            try:
                netdevs.add(attribute.read_text().strip())
            except OSError:
                continue  # an empty slot of the GID table answers EINVAL
        devices[device.name] = {
            "node_guid": (device / "node_guid").read_text().strip(),
            "netdevs": sorted(netdevs),
        }
    return devices


def sysctls() -> dict[str, str]:
    """Every readable value below net."""
    values = {}
    for directory, _, files in os.walk("/proc/sys/net"):
        for file in files:
            path = f"{directory}/{file}"
            if VOLATILE_SYSCTLS.search(path):
                continue
            try:
                with open(path, encoding="utf-8") as handle:  # noqa: PTH123 - a thousand of them, emulated
                    values[path.removeprefix("/proc/sys/")] = handle.read().strip()
            except OSError as error:
                values[path.removeprefix("/proc/sys/")] = f"errno {error.errno}"
    return values


def mounts(kind: str) -> list[str]:
    """Where file systems of a kind are mounted, in the order of mounting."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split()[0] == kind:
            found.append(fields.split()[4])
    return found


def tree(root: Path) -> dict[str, str]:
    """Every entry below `root`: its kind, and for files a hash of the content."""
    entries = {}
    for path in sorted([root, *root.rglob("*")]):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        kind = stat.filemode(mode)
        if stat.S_ISREG(mode) and root.parts[1] != "sys":
            kind += " " + hashlib.sha256(path.read_bytes()).hexdigest()
        entries[str(path)] = kind
    return entries


def cgroups() -> list[str]:
    """Directories of the cgroup2 hierarchy, except the testbed's own."""
    found = []
    for mount in mounts("cgroup2")[-1:]:
        for directory, children, _ in os.walk(mount):
            children[:] = [c for c in children if c != "rdmanet-testbed"]
            found.append(directory)
    return sorted(found)


def bpffs() -> dict[str, str]:
    """Everything in mounted bpf file systems."""
    return {path: kind for mount in mounts("bpf") for path, kind in tree(Path(mount)).items()}


#: What is compared besides `network` and `traffic_control`, by section.
SECTIONS: dict[str, Callable[[], Any]] = {
    "rdma": rdma,
    "nftables": nftables,
    "iptables": legacy_iptables,
    "sysctls": sysctls,
    "bpffs_mounts": lambda: mounts("bpf"),
    "bpffs": bpffs,
    "cgroups": cgroups,
    "run": lambda: tree(Path("/run/rdmanet")),
    "state": lambda: tree(Path("/var/lib/rdmanet")),
}


def dump(only: list[str]) -> dict[str, Any]:
    """Everything, or `only` some sections and the network; the keys are what `testbed.host.diff` names."""
    found = network()
    if not only:
        found |= traffic_control([link["ifname"] for link in found["links"]])
    return found | {name: read() for name, read in SECTIONS.items() if not only or name in only}


if __name__ == "__main__":
    json.dump(dump(sys.argv[1:]), sys.stdout, sort_keys=True)
