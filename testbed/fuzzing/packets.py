"""Packets to the programs of every hook (BPF_PROG_TEST_RUN): one of the known verdicts, and drops have names."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
from collections.abc import Callable, Iterator

from rdmanet.errors import BpfError
from testbed.bpf import lab, packets
from testbed.bpf.bench import OK, REDIRECT, SHOT, UNSPEC, Bench, Outcome, good_frames, host_frame, uplink_frame
from testbed.bpf.lab import FAR, GATEWAYS, UPLINK
from testbed.bpf.packets import ICMP, ICMPV6, TCP, UDP, Ip
from testbed.fuzzing.search import Failure, Places, Target

#: Longer ones are segmented before a program sees them.
LONGEST_BYTES = 4096
#: Flows of so many inputs fill a good part of the tables.
RESET_EVERY = 2_000
#: include/uapi/linux/pkt_cls.h: a fragment that waits for the first one.
STOLEN = 4
VERDICTS = {
    b"p": {OK, SHOT, REDIRECT, STOLEN},
    b"h": {OK, SHOT, REDIRECT, STOLEN, UNSPEC},
    b"u": {OK, SHOT, REDIRECT, STOLEN, UNSPEC},
}


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """On a bench of its own. The first byte of an input is the hook, the others are the packet."""
    with Bench.build(lab.artifact()) as bench:
        bench.reset()
        yield _target(bench)


def _target(bench: Bench) -> Target:
    hooks: dict[bytes, Callable[[bytes], Outcome]] = {
        b"p": lambda packet: bench.from_pod(bench.train_0, packet),
        b"h": bench.from_host,
        b"u": bench.from_outside,
    }
    names = set(bench.datapath.drop_reasons)
    done = 0

    def run(data: bytes) -> Places:
        nonlocal done
        done += 1
        if done % RESET_EVERY == 0:
            bench.reset()
        hook, packet = data[:1], data[1:LONGEST_BYTES]
        if hook not in hooks:
            hook = sorted(hooks)[sum(hook) % len(hooks)]
        try:
            outcome = hooks[hook](packet)
        except BpfError as error:
            if error.errno == errno.EINVAL:
                return set()  # the kernel takes no frame without its whole network header
            raise
        if outcome.verdict not in VERDICTS[hook]:
            raise Failure(f"verdict {outcome.verdict}")
        reasons = {reason for _, reason in outcome.drops}
        if (outcome.verdict == SHOT) != bool(reasons) or not reasons <= names:
            raise Failure(f"verdict {outcome.verdict} with drops {outcome.drops}")
        counted = frozenset((path, direction) for _, path, direction in outcome.counters)
        return {(hook, outcome.verdict, frozenset(reasons), counted, outcome.frame == packet)}

    return Target("packets", _seeds(bench), run, _tokens(bench))


def _seeds(bench: Bench) -> list[bytes]:
    found = [b"p" + packet for packet in good_frames(bench).values()]
    for version, pod_address in bench.train_0.addresses.items():
        payloads = ((UDP, packets.roce(17)), (UDP, packets.datagram(17, 20)), (TCP, packets.tcp(1, 2)))
        echo = (ICMP, packets.icmp(8, 1)) if version == 4 else (ICMPV6, packets.icmp(128, 1))
        for protocol, payload in (*payloads, echo):
            found.append(b"h" + host_frame(Ip(GATEWAYS[version], pod_address, protocol, payload)))
            found.append(b"u" + uplink_frame(Ip(FAR[version], UPLINK[version], protocol, payload)))
            found.append(b"u" + uplink_frame(Ip(FAR[version], pod_address, protocol, payload)))
    return found


def _tokens(bench: Bench) -> list[bytes]:
    """EtherTypes, addresses, RoCE's port and opcodes, extension headers."""
    pods = (bench.train_0, bench.train_1, bench.web, bench.strict)
    tokens = [ipaddress.ip_address(address).packed for pod in pods for address in pod.addresses.values()]
    tokens += [pod.mac for pod in pods]
    return [
        *tokens,
        b"\x08\x00",
        b"\x86\xdd",
        b"\x81\x00",
        b"\x12\xb7",
        b"\x00\x00\x11",
        b"\x2c",
        b"\x00\x00\x01",
        b"\x64",
    ]
