"""The agent as deploy/rdmanet.service starts it: what the manager hears, which capabilities it has and needs, and who
may speak to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.container import CommandError
from testbed.host import SOCKET, diff
from testbed.limited import SERVICE, granted, program, service
from testbed.world import World, config, refused, succeeded

NOTIFY = "/run/notify"
WAIT_S = 150.0


@pytest.fixture
def world() -> Iterator[World]:
    with World.start("service", agent=False) as world:
        yield world


# What the manager hears


@contextlib.contextmanager
def manager(world: World) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(world.host.path(NOTIFY)))
        sock.settimeout(WAIT_S)
        yield sock


def test_ready_alive_and_stopping(world: World) -> None:
    with manager(world) as sock:
        world.host.start_agent(environment={"NOTIFY_SOCKET": NOTIFY, "WATCHDOG_USEC": "300000"})
        assert sock.recv(4096) == b"READY=1\nSTATUS=ready"
        succeeded(world.host.cni("STATUS", None, config({})))
        for _ in range(3):
            assert sock.recv(4096) == b"WATCHDOG=1"
        world.host.stop_agent()
        while (said := sock.recv(4096)) == b"WATCHDOG=1":
            pass
        assert said == b"STOPPING=1\nSTATUS=stopping; pods keep their network"


def test_a_start_that_is_refused_says_why(world: World) -> None:
    with manager(world) as sock:
        world.host.ip("link add rdmanet0 type veth peer name theirs")
        with pytest.raises(CommandError):
            world.host.start_agent(environment={"NOTIFY_SOCKET": NOTIFY})
        assert sock.recv(4096).startswith(
            b"STATUS=cannot start: A netdev rdmanet0 exists that this agent did not make."
        )


# The unit


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (package systemd)")
    # The executable is where the unit says on hosts that have it installed.
    unit = tmp_path / SERVICE.name
    unit.write_text(SERVICE.read_text().replace("ExecStart=/opt/rdmanet/bin/rdmanet", "ExecStart=/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], check=False, capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if SERVICE.name in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_its_directories_are_the_configurations(world: World) -> None:
    unit = service()["Service"]
    assert f"/run/{unit['RuntimeDirectory']}/agent.sock" == SOCKET
    assert f"/var/lib/{unit['StateDirectory']}" == "/var/lib/rdmanet"
    assert unit["Type"] == "notify"


# Capabilities


def test_with_its_capabilities_everything_works(world: World) -> None:
    before = world.host.dump()
    world.start_agent(*program(*granted()))
    assert world.host.agent is not None
    status = Path(f"/proc/{world.host.agent.process.pid}/status").read_text()
    assert f"CapBnd:\t{sum(1 << n for n in (11, 12, 19, 21)):016x}" in status
    assert "NoNewPrivs:\t1" in status
    one, two = world.add(), world.add()
    for attached in (one, two):
        attached.pod.start()
        succeeded(world.check(attached))
    for version in (4, 6):
        one.pod.exec(["ping", "-c", "1", "-W", "5", two.address(version)])
    # The lease socket is in each pod's namespace.
    assert "@rdmanet" in one.pod.exec(["cat", "/proc/net/unix"]).stdout
    world.command("datapath", "swap")
    world.host.exec(["tc", "qdisc", "del", "dev", two.host_ifname, "clsact"])
    pod = world.pod()
    with world.other_users_namespace(pod.netns) as path:
        outcome = world.host.cni("ADD", pod, config({}), netns=path)
        assert outcome.returncode == 0, outcome.sentence
        succeeded(world.host.cni("DEL", pod, config({}), netns=path))
    for attached in (one, two):
        world.delete(attached)
    succeeded(world.host.cni("GC", None, config({"cni.dev/valid-attachments": []})))
    world.host.stop_agent()
    world.command("uninstall")
    for pod in world.pods:
        pod.destroy()
    world.pods.clear()
    assert diff(before, world.host.dump()) == []


def test_they_are_enough_where_proc_sys_is_read_only(world: World) -> None:
    """As container runtimes mount it for all that are not privileged."""
    for words in (["--bind", "/proc/sys", "/proc/sys"], ["-o", "remount,bind,ro", "/proc/sys"]):
        world.host.exec(["mount", *words])
    names = [f"/proc/sys/net/{family}/conf/rdmanet0/forwarding" for family in ("ipv4", "ipv6")]
    world.start_agent(*program(*granted()))
    assert world.host.exec(["cat", *names]).stdout.split() == ["1", "1"]
    refused_by_kernel = world.host.exec(["sh", "-c", f"echo 0 > {names[0]}"], check=False)
    assert "Read-only file system" in refused_by_kernel.stderr
    one, two = world.add(), world.add()
    one.pod.start()
    for version in (4, 6):
        one.pod.exec(["ping", "-c", "1", "-W", "5", two.address(version)])


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("NET_ADMIN", "The kernel refused RTM_NEWLINK for rdmanet0"),
        ("NET_BROADCAST", "does not let the agent hear what happens to links"),
        ("SYS_ADMIN", "The kernel allows eBPF only to root"),
    ],
)
def test_without_one_of_them_it_does_not_start(world: World, missing: str, words: str) -> None:
    assert missing in granted()
    with pytest.raises(CommandError, match=words):
        world.start_agent(*program(*(name for name in granted() if name != missing)))


def test_without_ptrace_it_does_not_see_other_users_namespaces(world: World) -> None:
    world.start_agent(*program(*(name for name in granted() if name != "SYS_PTRACE")))
    pod = world.pod()
    with world.other_users_namespace(pod.netns) as path:
        refused(world.host.cni("ADD", pod, config({}), netns=path), 103, "cannot be opened")


# Who may speak to it


def test_the_socket_is_roots_and_nothing_listens_on_the_network(world: World) -> None:
    world.start_agent()
    one = world.add()
    path = world.host.path(SOCKET)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (path.stat().st_uid, path.parent.stat().st_uid) == (0, 0)
    asking = "import socket; socket.socket(socket.AF_UNIX).connect('/run/rdmanet/agent.sock')"
    argv = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "/usr/bin/python3", "-c", asking]
    done = world.host.exec(argv, check=False)
    assert done.returncode != 0
    assert "PermissionError" in done.stderr
    # And not by the file's mode alone: the directory is closed too.
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o666)
    assert "PermissionError" in world.host.exec(argv, check=False).stderr
    listening = "cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 0A ' ; cat /proc/net/udp /proc/net/udp6 | grep -vc local"
    for enter in ([], ["nsenter", f"--net={one.pod.netns}"]):
        done = world.host.exec([*enter, "sh", "-c", listening], check=False)
        assert done.stdout.split() == ["0", "0"], os.fsdecode(done.stdout)


def test_another_user_is_refused_where_the_socket_can_be_reached(world: World) -> None:
    """Somebody has opened directory and socket: the agent asks the kernel who has connected."""
    world.start_agent()
    path = world.host.path(SOCKET)
    path.parent.chmod(0o755)
    path.chmod(0o666)
    asking = f"""
import socket
line = socket.socket(socket.AF_UNIX)
line.connect({SOCKET!r})
line.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
print(line.recv(4096).decode())
"""
    python = ["/usr/bin/python3", "-c", asking]
    other = world.host.exec(["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", *python]).stdout
    assert other.startswith("HTTP/1.1 403 ")
    assert "not user 1000" in other
    assert world.host.exec(python).stdout.startswith("HTTP/1.1 200 ")


def test_what_is_no_http_is_refused_without_a_word_in_the_log(world: World) -> None:
    """A traceback for each would let a pod fill the host's disk."""
    world.start_agent()
    pod = world.add().pod
    asking = """
import socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1].replace("@", "\\0"))
line.sendall(b"GET / HTTP/x.y\\r\\nHost: a\\r\\n\\r\\n")
print(line.recv(4096).decode())
"""
    for enter, name in (([], SOCKET), (["nsenter", f"--net={pod.netns}"], "@rdmanet")):
        answer = world.host.exec([*enter, "/usr/bin/python3", "-c", asking, name]).stdout
        assert answer.startswith(("HTTP/1.1 400 ", "HTTP/1.0 400 ")), answer
    world.host.api("GET", "/v1/status")
    assert world.host.agent is not None
    assert "Traceback" not in world.host.agent.log
    assert "BadStatusLine" not in world.host.agent.log


def test_a_caller_that_hangs_up_in_the_middle_of_its_body_is_no_error(world: World) -> None:
    """As a CNI executable that is killed."""
    world.start_agent()
    assert world.host.agent is not None
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(world.host.path(SOCKET)))
            line.sendall(b"POST /v1/cni HTTP/1.1\r\nHost: a\r\nCNI-Command: ADD\r\nContent-Length: 100\r\n\r\n{")
            line.shutdown(socket.SHUT_WR)
            line.recv(4096)  # until the agent has closed it
    world.delete(world.add())
    assert "Traceback" not in world.host.agent.log
