"""What `rdmanet status` and `rdmanet rdma` print, as whole texts."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest

from rdmanet import show

AGENT: dict[str, Any] = {
    "version": "0.1.0",
    "ready_s": 61.7,
    "kernel": "7.3.4-amd64",
    "rdma_mode": "shared",
    "rdma_missing": None,
}


def document(**changes: Any) -> dict[str, Any]:
    releasing = {"count": 0, "failing": {}}
    parts = {"attachments": [], "leases": [], "drops": [], "releasing": releasing, "repairs": repairs()}
    return {"agent": AGENT, **parts, **changes}


def repairs(**changes: Any) -> dict[str, Any]:
    return {"broken": [], "given_up": [], "done": [], **changes}


def attachment(pod: str, **changes: Any) -> dict[str, Any]:
    row = {
        "pod": pod,
        "ifname": "eth0",
        "ipv4": "10.213.0.2",
        "ipv6": "fd72:646d:616e::2",
        "device": None,
        "state": "ready",
        "degraded": None,
        "unhealthy": None,
    }
    return {**row, **changes}


def text(golden: str) -> str:
    return dedent(golden).strip("\n")


def test_nothing_yet() -> None:
    assert show.status(document()) == text("""
        agent 0.1.0 ready for 62 s, Linux 7.3.4-amd64, RDMA shared

        no pods

        no leases
        """)


def test_a_host_without_rdma_says_why() -> None:
    agent = {**AGENT, "rdma_mode": None, "rdma_missing": "This kernel has no RDMA subsystem."}
    first = show.status(document(agent=agent)).splitlines()[0]
    assert first == "agent 0.1.0 ready for 62 s, Linux 7.3.4-amd64, RDMA none: This kernel has no RDMA subsystem."


def test_everything() -> None:
    shown = show.status(
        document(
            attachments=[
                attachment("default/train-0", device={"name": "rxe_rn1"}),
                attachment("jobs/web-0", ipv4=None, ifname="net1", degraded="its leases cannot work"),
                attachment("default/train-1", unhealthy="its RDMA device rxe_rn2 is missing"),
                attachment("default/train-2", not_limited="it is in the root cgroup"),
                attachment("default/old", ipv6=None, state="releasing"),
            ],
            leases=[
                {
                    "lease": "3f2a",
                    "state": "granted",
                    "service": "params",
                    "connector": {"pod": "default/train-0", "qpn": 17},
                    "listener": {"pod": "default/train-1", "qpn": 18},
                    "packets": 1200,
                },
                {
                    "lease": "77",
                    "state": "unclaimed",
                    "service": None,
                    "connector": {"pod": "default/a", "qpn": 1},
                    "listener": {"pod": "default/b", "qpn": 2},
                    "packets": 0,
                },
            ],
            drops=[
                {"pod": "default/train-0", "reason": "spoofed_mac", "packets": 3},
                {"pod": None, "reason": "no_node", "packets": 1},
            ],
        )
    )
    assert shown == text("""
        agent 0.1.0 ready for 62 s, Linux 7.3.4-amd64, RDMA shared

        POD              INTERFACE  IPV4        IPV6               DEVICE   STATE
        default/train-0  eth0       10.213.0.2  fd72:646d:616e::2  rxe_rn1  ready
        jobs/web-0       net1       -           fd72:646d:616e::2  -        ready (its leases cannot work)
        default/train-1  eth0       10.213.0.2  fd72:646d:616e::2  -        ready (its RDMA device rxe_rn2 is missing)
        default/train-2  eth0       10.213.0.2  fd72:646d:616e::2  -        ready (it is in the root cgroup)
        default/old      eth0       10.213.0.2  -                  -        releasing

        LEASE  FROM             TO               SERVICE  QPN      STATE      PACKETS
        3f2a   default/train-0  default/train-1  params   17 - 18  granted    1200
        77     default/a        default/b        -        1 - 2    unclaimed  0

        POD              DROP REASON  PACKETS
        default/train-0  spoofed_mac  3
        -                no_node      1
        """)


def test_limits_are_shown_where_there_are_some() -> None:
    half = {"ingress": {"bits_per_s": 12_500_000, "burst_bytes": 390_625}, "egress": None}
    both = {name: {"bits_per_s": bits, "burst_bytes": 1} for name, bits in (("ingress", 10**9), ("egress", 10**15))}
    shown = document(
        attachments=[
            attachment("default/half", bandwidth=half),
            attachment("default/none", bandwidth={"ingress": None, "egress": None}),
            attachment("default/both", bandwidth=both),
        ]
    )
    assert text("""
        LIMITED POD   INTERFACE  GETS AT MOST  SENDS AT MOST
        default/half  eth0       12.5 Mbit/s   -
        default/both  eth0       1 Gbit/s      1000 Tbit/s
        """) in show.status(shown)
    assert "LIMITED" not in show.status(document(attachments=[attachment("default/none")]))


def test_no_line_ends_in_blanks() -> None:
    shown = show.table(("a", "long heading"), [("much longer than its heading", ""), ("x", "y")])
    assert (
        shown
        == "A                             LONG HEADING\nmuch longer than its heading\nx                             y"
    )


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises((ValueError, IndexError)):
        show.table(("a", "b"), [("only one",)])


def test_a_link_that_cannot_be_removed_is_shown_with_the_reason() -> None:
    lines = show.status(document(releasing={"count": 2, "failing": {"rn-7": "The kernel refused RTM_DELLINK."}}))
    assert "\n\nLINK  NOT REMOVED YET, TRIED AGAIN\nrn-7  The kernel refused RTM_DELLINK.\n" in lines
    assert "NOT REMOVED" not in show.status(document(releasing={"count": 2, "failing": {}}))


def test_what_is_broken_left_alone_and_done() -> None:
    web = {"what": "jobs/web-0 eth0", "kind": "link"}
    open_ = {**web, "sentence": "the interface eth0 is missing from the pod"}
    given_up = {**web, "kind": "route", "sentence": "the default route for IPv4 is missing; it has broken 5 times"}
    done = {**web, "sentence": "the interface eth0 is missing", "outcome": "repaired", "ago_s": 3.2, "took_s": 0.1}
    lines = show.status(document(repairs=repairs(broken=[open_], given_up=[given_up], done=[done] * 20)))
    assert "\n\nBROKEN           KIND\njobs/web-0 eth0  link  the interface eth0 is missing from the pod\n" in lines
    assert (
        "\n\nLEFT ALONE       KIND   `RDMANET REPAIR` ASKS FOR IT AGAIN\njobs/web-0 eth0  route  the default" in lines
    )
    assert lines.count("repaired  3 s ago") == show.SHOWN_REPAIRS


def counts(packets: int) -> dict[str, int]:
    return {"packets": packets, "bytes": packets * 1024}


def rdma(**changes: Any) -> dict[str, Any]:
    """GET /v1/rdma with one pod, and with changes."""
    pod = {
        "pod": "default/train-0",
        "interface": "eth0",
        "device": "rxe_rn1",
        "unhealthy": None,
        "leases": 1,
        "max_leases": 256,
        "resources": {"hca_handle": {"used": 1, "limit": None}, "hca_object": {"used": 9, "limit": 40}},
        "counted": True,
        "sent": counts(10),
        "received": counts(2048),
    }
    device = {"device": "rxe_rn1", "pods": ["default/train-0"], "port": "active", "events": {"sent_pkts": 9, "x": 0}}
    agent = {**AGENT, "rdma_backend": "rxe"}
    return {"agent": agent, "devices": [device], "pods": [pod], "leases": [], **changes}


def test_rdma() -> None:
    lease = {
        "lease": "3f2a",
        "transport": "rc",
        "state": "granted",
        "service": "params",
        "connector": {"pod": "default/train-0", "qpn": 17, "received": counts(3)},
        "listener": {"pod": "default/train-1", "qpn": 18, "received": counts(5)},
        "counted": True,
    }
    shown = show.rdma(rdma(leases=[lease]))
    assert shown == text("""
        RDMA shared

        DEVICE   OF               PORT    COUNTERS
        rxe_rn1  default/train-0  active  sent_pkts 9

        POD              DEVICE   LEASES    OBJECTS  SENT                RECEIVED             HEALTH
        default/train-0  rxe_rn1  1 of 256  9 of 40  10 packets, 10 KiB  2048 packets, 2 MiB  ok

        LEASE  TRANSPORT  FROM             TO                      QPN      PACKETS THERE  PACKETS BACK  STATE
        3f2a   rc         default/train-0  default/train-1:params  17 - 18  5              3             granted
        """)


def test_rdma_again_after_two_seconds() -> None:
    before = rdma()
    (pod,) = rdma()["pods"]
    after = rdma(pods=[{**pod, "sent": counts(30)}])
    line = show.rdma(after, before, 2.0).splitlines()[6]
    assert "  30 packets, 10/s, 10 KiB/s  2048 packets, 0/s, 0 B/s  ok" in line


def test_rdma_of_a_device_that_pods_share_and_that_is_gone() -> None:
    (pod,) = rdma()["pods"]
    pods = [
        {
            **pod,
            "pod": f"default/p{n}",
            "counted": False,
            "resources": None,
            "unhealthy": "its RDMA device host0 is missing",
        }
        for n in (1, 2)
    ]
    devices: list[dict[str, Any]] = [
        {"device": "host0", "pods": [one["pod"] for one in pods], "port": None, "events": {}}
    ]
    shown = show.rdma(rdma(agent={**AGENT, "rdma_backend": "shared"}, devices=devices, pods=pods))
    assert "nothing but the broker keeps them apart" in shown.splitlines()[0]
    assert "host0   2 pods  missing  -" in shown
    assert "-        -     -         its RDMA device host0 is missing" in shown


def test_rdma_without_devices() -> None:
    agent = {**AGENT, "rdma_mode": None, "rdma_backend": None, "rdma_missing": "no RDMA here"}
    assert show.rdma(rdma(agent=agent, devices=[], pods=[])) == "RDMA none: no RDMA here\n\nno devices"
