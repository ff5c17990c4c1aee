"""benchmarks.peers: what its programs print, and the GID table as the kernel writes it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from benchmarks.peers import kube_proxy, namespaces, perftest
from benchmarks.peers.namespaces import End
from benchmarks.peers.rdma_cm import connected_us
from rdmanet.errors import NotFoundError
from testbed.pod import Pod

# cmtime -c 64, of rdma-core 44 and 56
CMTIME_44 = """\
creating id
connecting
step              total ms     max ms     min us  us / conn
create id    :        1.03       0.58       5.00      16.14
bind addr    :        5.22       0.18      78.00      81.52
resolve addr :        0.79       0.50     430.00      12.30
resolve route:        0.78       0.52     390.00      12.11
create qp    :        3.91       0.12      53.00      61.14
connect      :       21.93      20.27     714.00     342.61
disconnect   :       14.71       4.42     364.00     229.78
destroy      :        0.42       0.01       6.00       6.53
"""
CMTIME_56 = """\
Client warmup
\tCreating IDs
Connect (64) QPs test
\tCreating IDs
qp_conn                64
threads                 1
step             avg/iter  total(us)    us/conn    sum(us)    max(us)    min(us)
full connect         3536     226356          0          0     224759      60488
create id              21       1365         20       1318        464          6
bind addr               0          0          0          0          0          0
resolve addr           58       3744       2434     155787       2577       2200
resolve route          35       2252       1317      84332       1469       1241
create qp             218      13957        214      13717       1212         96
init qp attr            0          0          4        318         53          3
init qp                19       1240          9        584         62          5
rtr qp attr             0          0         19       1232         49          6
rtr qp                  0          0        504      32311       1802         88
rts qp attr             0          0         46       2972       1282          7
rts qp                  0          0         27       1749         72         11
cm connect           3183     203751     120365    7703361     199969      37888
establish               0          0        258      16554       2293         39
disconnect             88       5693         24       1582        630          8
destroy id             21       1346         20       1309        183         12
destroy qp            144       9256        144       9218       1740         71
"""
CMTIME_56_WITHOUT_QUEUE_PAIRS = """\
Connect (64) test - no QPs
\tCreating IDs
cm_conn                64
threads                 1
step             avg/iter  total(us)    us/conn    sum(us)    max(us)    min(us)
create id              37       2376         36       2329       1320          6
cm connect            913      58491      44329    2837060      52063      31013
"""


def test_cmtime_44() -> None:
    assert connected_us(CMTIME_44) == pytest.approx(33660)


def test_cmtime_56() -> None:
    steps_us = 1365 + 3744 + 2252 + 13957 + 1240 + 203751
    assert connected_us(CMTIME_56) == steps_us
    assert steps_us == pytest.approx(226356, rel=0.001)  # its own sum
    assert connected_us(CMTIME_56 + CMTIME_56_WITHOUT_QUEUE_PAIRS) == steps_us


@pytest.mark.parametrize("printed", ["", "event: RDMA_CM_EVENT_REJECTED, error: 8\n", CMTIME_56_WITHOUT_QUEUE_PAIRS])
def test_cmtime_without_figures(printed: str) -> None:
    assert connected_us(printed) is None


def test_gid_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "SYSFS", tmp_path)
    gids = tmp_path / "infiniband/rxe0/ports/1/gids"
    gids.mkdir(parents=True)
    written = (
        "fe80:0000:0000:0000:0072:00ff:fe00:0001",
        "0000:0000:0000:0000:0000:ffff:0ad5:0003",
        "fd72:0000:0000:0000:0000:0000:0000:0003",
        "0000:0000:0000:0000:0000:0000:0000:0000",
    )
    for index, gid in enumerate(written):
        (gids / str(index)).write_text(f"{gid}\n")
    pod = cast(Pod, type("NamedPod", (), {"name": "ours0-b"}))
    end = End(pod, "rxe0", {4: "10.213.0.3", 6: "fd72::3"})
    assert end.gid_index(4) == 1
    assert end.gid_index(6) == 2
    with pytest.raises(NotFoundError, match="rxe0 has no GID"):
        End(pod, "rxe0", {4: "10.213.0.4"}).gid_index(4)


@pytest.mark.parametrize(
    ("figures", "each_us"),
    [
        # bytes, iterations, peak MiB/s, average MiB/s, million messages per second
        pytest.param([65536, 10, 0.0, 20.0, 0.000320], 1 / 0.000320, id="more digits in messages"),
        pytest.param([65536, 10, 0.0, 0.05, 0.000001], 1.25e6, id="more digits in bytes"),
        pytest.param([65536, 10, 0.0, 0.0, 0.0], None, id="no clock, no rates"),
    ],
)
def test_stream_of_perftest_per_message(figures: list[float], each_us: float | None) -> None:
    found = perftest.each_us(perftest.TESTS["write-bw"], 65536, figures)
    assert found == (None if each_us is None else pytest.approx(each_us))


def test_rules_of_services_are_those_of_kube_proxy() -> None:
    """Names of chains as in Kubernetes' own tests (pkg/proxy/iptables/proxier_test.go: ns1/svc1:p80)."""
    assert kube_proxy.chain("SVC", "ns1/svc1:p80", "tcp") == "KUBE-SVC-XPGD46QRK7WJZT7O"
    assert kube_proxy.chain("SEP", "ns1/svc1:p80", "tcp", "10.180.0.1:80") == "KUBE-SEP-SXIVWICOYRO3J4NJ"


@pytest.mark.parametrize("family", kube_proxy.FAMILIES)
def test_the_called_service_is_in_the_middle_of_all_rules(family: str) -> None:
    server = {"ipv4": "10.214.0.2", "ipv6": "fd72:646d:6170::2"}[family]
    services = kube_proxy.listed(101, family, server)
    assert len({service.address for service in services}) == 101
    lines = kube_proxy.iptables_rules(services, family).split("\n")
    portals = [line for line in lines if line.startswith("-A KUBE-SERVICES") and "KUBE-SVC-" in line]
    assert len(portals) == 101
    assert f"-d {kube_proxy.CALLED[family]}/" in portals[50]
    end = f"[{server}]:8080" if family == "ipv6" else f"{server}:8080"
    assert [line for line in lines if line.endswith(f"--to-destination {end}")]
    last = [line for line in lines if line.startswith("-A KUBE-SERVICES")][-1]
    assert last.endswith("-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS")


def test_of_many_endpoints_rules_have_no_comments() -> None:
    few, many = (kube_proxy.iptables_rules(kube_proxy.listed(n, "ipv4", "10.214.0.2"), "ipv4") for n in (1000, 1001))
    assert few.count("default/s7:http") == 5
    assert "default/s7:http" not in many
