"""The testbed's own promises: namespaces are separate, /dev is restricted, nothing is left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rdmanet.errors import KernelError, UnavailableError
from testbed.container import CommandError, cgroup2_root
from testbed.host import Host, diff
from testbed.outside import FAR_IPV4, FAR_IPV6
from testbed.paths import REPOSITORY
from testbed.pod import DeviceNode, Pod
from testbed.session import ROOT, session, sweep

MakePod = Callable[[str], Pod]
NAMESPACES = ("net", "mnt", "ipc", "uts", "pid", "cgroup")
READ_NAMESPACES = "for n in net mnt ipc uts pid cgroup; do readlink /proc/self/ns/$n; done"
KMSG = DeviceNode("infiniband/uverbs7", 1, 11)  # /dev/kmsg's numbers: a device that every kernel has


def namespaces(pod: Pod) -> list[str]:
    return pod.exec(["sh", "-c", READ_NAMESPACES]).stdout.split()


def ends(pid: int, timeout_s: float = 10.0) -> bool:
    """Whether it has ended, or does within this time: a process leaves its cgroup a little before it is a zombie."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


def test_every_namespace_is_the_pods_own(make_pod: MakePod) -> None:
    one, two = namespaces(make_pod("one").start()), namespaces(make_pod("two").start())
    own = [str(Path("/proc/self/ns", name).readlink()) for name in NAMESPACES]
    assert len(one) == len(NAMESPACES)
    assert not {*one} & {*two}
    assert not {*one} & {*own}


def test_network_namespace_is_the_one_bound_before_start(make_pod: MakePod, host: Host) -> None:
    pod = make_pod("one")
    bound = host.path(pod.netns).stat().st_ino
    pod.start()
    assert namespaces(pod)[0] == f"net:[{bound}]"


def test_dev_has_common_nodes_and_only_what_was_granted(make_pod: MakePod) -> None:
    with_device, without = make_pod("one").start([KMSG]), make_pod("two").start()
    nodes = [
        "null",
        "zero",
        "full",
        "random",
        "urandom",
        "tty",
        "ptmx",
        "pts",
        "shm",
        "fd",
        "stdin",
        "stdout",
        "stderr",
    ]
    assert {*without.exec(["ls", "/dev"]).stdout.split()} == {*nodes}
    assert {*with_device.exec(["ls", "/dev"]).stdout.split()} == {*nodes, "infiniband"}
    stat = with_device.exec(["stat", "-c", "%F %t:%T %a", "/dev/infiniband/uverbs7"]).stdout.strip()
    assert stat == "character special file 1:b 666"


def test_a_pod_cannot_make_a_node_or_reach_the_agent(make_pod: MakePod, host: Host) -> None:
    host.container.act(("mkdir", "/run/rdmanet"), ("write", "/run/rdmanet/agent.sock", "here"))
    host.container.act(("write", "/var/lib/rdmanet/state.db", "here"))
    pod = make_pod("one").start()
    with pytest.raises(CommandError, match="Operation not permitted"):
        pod.exec(["mknod", "/run/kmsg", "c", "1", "11"])
    for path in ("/run/rdmanet/agent.sock", "/var/lib/rdmanet/state.db"):
        with pytest.raises(CommandError, match="No such file"):
            pod.exec(["cat", path])


def test_the_root_is_read_only_and_run_is_not(make_pod: MakePod) -> None:
    pod = make_pod("one").start()
    with pytest.raises(CommandError, match="Read-only file system"):
        pod.exec(["touch", str(REPOSITORY / "written")])
    pod.exec(["sh", "-c", "echo 1 > $TMPDIR/written && echo 1 > /dev/shm/written"])
    with pytest.raises(CommandError, match="Read-only file system"):
        pod.exec(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])


def test_hosts_hostname_and_sysfs_are_the_pods(make_pod: MakePod) -> None:
    pod = make_pod("one").start(hosts={"two": "10.9.8.7"})
    assert pod.exec(["cat", "/proc/sys/kernel/hostname"]).stdout.strip() == "one"
    assert "10.9.8.7 two" in pod.exec(["cat", "/etc/hosts"]).stdout
    assert pod.exec(["ls", "/sys/class/net"]).stdout.split() == ["lo"]


def test_memlock_is_unlimited_or_the_reason_is_noted(make_pod: MakePod) -> None:
    pod = make_pod("one").start()
    limit = pod.exec(["sh", "-c", "ulimit -l"]).stdout.strip()
    assert limit == "unlimited" or pod.running.notes[0].startswith("memlock stays at")


def test_commands_run_in_the_pods_cgroup_with_the_hosts_pid(make_pod: MakePod) -> None:
    pod = make_pod("one").start()
    with pod.popen(["sleep", "1000"]) as process:
        assert process.pid in pod.cgroup.pids()
        assert Path(f"/proc/{process.pid}/comm").read_text().strip() == "sleep"
        process.signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


def test_output_status_and_errors_come_back(make_pod: MakePod) -> None:
    pod = make_pod("one").start()
    done = pod.exec(["sh", "-c", "cat; echo complaint >&2; exit 7"], input="text", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "text", "complaint\n")
    with pytest.raises(CommandError, match="ended with status 7 in one: complaint"):
        pod.exec(["sh", "-c", "echo complaint >&2; exit 7"])
    with pytest.raises(KernelError, match="execute /no/such: No such file"):
        pod.exec(["/no/such"])
    with pytest.raises(CommandError, match=r"not done after 0\.1 s") as caught:
        pod.exec(["sh", "-c", "echo begun; sleep 1000"], timeout_s=0.1)
    assert caught.value.completed.returncode is None
    size = 3_000_000  # more than any pipe holds
    assert len(pod.exec(["head", "-c", str(size), "/dev/zero"]).stdout) == size


def test_popen_streams(make_pod: MakePod) -> None:
    pod = make_pod("one").start()
    with pod.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in (b"first\n", b"second\n"):
            process.stdin.write(line)
            assert process.stdout.readline() == line
        process.stdin.close()
        assert process.wait() == 0


def test_stop_ends_daemons_too(make_pod: MakePod) -> None:
    pod = make_pod("one").start()
    before = pod.cgroup.pids()
    # The shell ends at once: its child is the first process's from then on.
    pod.exec(["sh", "-c", "setsid sleep 1000 > /dev/null 2>&1 &"])
    (daemon,) = {*pod.cgroup.pids()} - {*before}
    pod.stop()
    assert ends(daemon)
    assert not pod.cgroup.path.exists()
    pod.stop()


def test_destroy_ends_the_network_namespace(make_pod: MakePod, host: Host) -> None:
    one = make_pod("one").start()
    host.ip("link add there type veth peer name here")
    host.exec(["ip", "link", "set", "there", "netns", str(one.running.pid)])
    # A later pod and the outside copy the mount table; neither may keep the first namespace alive.
    make_pod("two").start()
    with host.popen([sys.executable, "-ISEc", WAIT_FOR_LINK_TO_GO, "here"], stdout=subprocess.PIPE) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"listening\n"
        one.destroy()
        one.destroy()
        assert waiting.wait() == 0  # the kernel removes a namespace's links when its last reference goes
    assert not host.path(one.netns).exists()


WAIT_FOR_LINK_TO_GO = """
import socket, sys
events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
events.bind((0, 1))  # RTMGRP_LINK
events.settimeout(30)
print("listening", flush=True)
while sys.argv[1] in [name for _, name in socket.if_nameindex()]:
    events.recv(65536)
"""


def test_a_pod_that_fails_to_start_leaves_nothing(make_pod: MakePod) -> None:
    pod = make_pod("one")
    with pytest.raises(KernelError, match="File exists"):
        pod.start([KMSG, KMSG])
    assert not pod.cgroup.path.exists()
    pod.start()


def test_a_namespace_name_cannot_be_taken_twice(make_pod: MakePod) -> None:
    make_pod("one")
    with pytest.raises(KernelError, match="File exists"):
        make_pod("one")


def test_the_outside_is_reached_through_the_uplink(host: Host) -> None:
    before = host.dump()
    outside = host.connect_outside()
    for address in (FAR_IPV4, FAR_IPV6):
        route = host.exec(["ip", "-json", "route", "get", address]).json()[0]
        assert route["dev"] == "uplink0"
        with outside.popen(
            [sys.executable, "-ISEc", SERVER, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            said = host.exec([sys.executable, "-ISEc", CLIENT, address, str(port)]).stdout
            assert said == "hello"
    outside.disconnect()
    host.outside = None
    assert diff(before, host.dump()) == []


SERVER = """
import socket, sys
server = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(server.getsockname()[1], flush=True)
server.accept()[0].sendall(b"hello")
"""
CLIENT = """
import socket, sys
print(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10).recv(100).decode(), end="")
"""


def test_dump_sees_each_kind_of_change(host: Host) -> None:
    host.ip("link add d0 type veth peer name e0", "link set d0 up", "address add 192.0.2.1/24 dev d0")
    before = host.dump()
    assert diff(before, host.dump()) == []
    host.ip(
        "link add d1 type veth peer name e1",
        "address add 192.0.2.2/24 dev d0",
        "route add 198.51.100.0/24 dev d0",
        "rule add priority 77 table 77",
        "neighbour add 192.0.2.77 lladdr 02:00:00:00:00:01 dev d0 nud permanent",
    )
    host.exec(["tc", "qdisc", "add", "dev", "d0", "clsact"])
    host.container.act(("write", "/proc/sys/net/ipv4/conf/d0/forwarding", "1"), ("mkdir", "/run/rdmanet"))
    host.container.act(("mkdir", "/sys/fs/bpf/rdmanet"), ("write", "/var/lib/rdmanet/state.db", "1"))
    changed = {line.split(":")[0] for line in diff(before, host.dump())}
    kinds = ["links", "addresses", "routes4", "rules4", "neighbours", "qdiscs", "sysctls", "run", "bpffs", "state"]
    assert {*kinds} <= changed


def test_a_scratch_host_has_its_own_network_and_bpffs(host: Host) -> None:
    host.container.act(("mkdir", "/sys/fs/bpf/rdmanet-testbed-probe"))
    host.ip("link add probe0 type veth peer name probe1")
    assert not Path("/sys/fs/bpf/rdmanet-testbed-probe").exists()
    assert not Path("/sys/class/net/probe0").exists()
    assert host.exec(["ls", "/sys/class/net"]).stdout.split() == ["lo", "probe0", "probe1"]


CRASH = """
import os, sys
from testbed.host import Host
from testbed.pod import Pod
host = Host.scratch("crash")
pod = Pod.create(host, "one").start()
pod.popen(["sleep", "1000"])
from testbed.session import session
print(session().id, *pod.cgroup.pids(), flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_crashed_session_is_swept_up() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    done = subprocess.run([sys.executable, "-c", CRASH], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    id, *pids = done.stdout.split()
    groups = cgroup2_root() / "rdmanet-testbed"
    assert pids
    assert (ROOT / id).exists()
    session()  # this process's own must survive; its making may have swept already
    swept = sweep()
    assert id in swept or not (ROOT / id).exists()
    assert session().path.exists()
    assert not (ROOT / id).exists()
    assert not list(groups.glob(f"{id}-*"))
    assert [pid for pid in pids if not ends(int(pid))] == []


def test_a_stopped_pod_says_so(make_pod: MakePod) -> None:
    pod = make_pod("one")
    with pytest.raises(UnavailableError, match="pod one is not started"):
        pod.exec(["true"])
