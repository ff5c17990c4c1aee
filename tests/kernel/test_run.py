"""`rdmanet run`: what ranks find and say, how they end, and that nothing is left, whatever the way out."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.host import CNI_EXECUTABLE
from testbed.jobs import Ended, Gate, Job, left, python, run
from testbed.paths import REPOSITORY
from testbed.world import World

#: Says where it is, in JSON.
WHERE = """
import json, os, socket, subprocess, sys
from pathlib import Path

def refused(attempt):
    try:
        attempt()
    except OSError as error:
        return error.strerror
    return "done"

def capabilities():
    line = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("CapEff")][0]
    return int(line.split()[1], 16)

print(json.dumps({
    "environment": dict(os.environ),
    "host": socket.gethostname(),
    "dev": sorted(os.listdir("/dev")),
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "links": sorted(os.listdir("/sys/class/net")),
    "directory": os.getcwd(),
    "user": os.getuid(),
    "capabilities": capabilities(),
    "agent": os.listdir("/run/rdmanet"),
    "state": os.listdir("/var/lib/rdmanet"),
    "mknod": refused(lambda: os.mknod("/dev/null2", 0o020666, os.makedev(1, 3))),
    "sysctl": refused(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1")),
    "sysrq": refused(lambda: Path("/proc/sysrq-trigger").write_text("h")),
    "kill": [refused(lambda: os.kill(1, number)) for number in (2, 9, 15)],
    "stdin": sys.stdin.read(),
    "shared_memory": refused(lambda: Path("/dev/shm/mine").write_text("x")),
}))
"""
#: Every rank hears from every rank, by name and by address, over both families.
TALK = """
import json, os, socket, threading

rank, peers = int(os.environ["RANK"]), os.environ["RDMANET_PEERS"].split(",")
assert len(peers) == int(os.environ["WORLD_SIZE"])
port = int(os.environ["MASTER_PORT"])
heard = []

def serve(server):
    for _ in peers:
        sock, _ = server.accept()
        with sock:
            heard.append(sock.makefile().readline().strip())

servers = [
    socket.create_server((anywhere, port), family=family)
    for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))
]
threads = [threading.Thread(target=serve, args=(server,)) for server in servers]
for thread in threads:
    thread.start()
told = []
for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
    addresses = os.environ[f"RDMANET_PEER_ADDRESSES_IPV{version}"].split(",")
    for peer, address in zip(peers, addresses):
        found = {info[4][0] for info in socket.getaddrinfo(peer, port, family, socket.SOCK_STREAM)}
        assert found == {address}, (peer, found, address)
        while True:
            try:
                sock = socket.create_connection((address, port))
            except ConnectionRefusedError:
                continue
            break
        with sock:
            sock.sendall(f"{version} {rank}\\n".encode())
        told.append(address)
for thread in threads:
    thread.join()
print(json.dumps({"heard": sorted(heard), "told": told}))
"""
#: Says that it is there, and which signals come; ends with 3 on SIGTERM, never by anything else.
STUBBORN = """
import os, signal, sys
signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print("there", os.environ["RANK"])
while True:
    print("got", os.environ["RANK"], signal.sigwait(signals).name)
"""
#: Rank 1 fails, when the others wait for ever, with a process in a session of its own.
CRASH = """
import os, signal, socket, subprocess, sys
peers, port = os.environ["RDMANET_PEERS"].split(","), int(os.environ["MASTER_PORT"])
subprocess.Popen(["sleep", "1000"], start_new_session=True)
if os.environ["RANK"] == "1":
    for peer in (peers[0], peers[2]):
        while True:
            try:
                socket.create_connection((peer, port)).close()
                break
            except ConnectionRefusedError:
                pass
    print("crashing")
    {how}
signal.signal(signal.SIGTERM, {term})
server = socket.create_server(("0.0.0.0", port))
while True:
    signal.pause()
"""
WAIT = "import signal, os; print('there', os.environ['RANK']); signal.pause()"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("run") as world:
        yield world


@pytest.fixture(autouse=True)
def nothing_left(world: World) -> Iterator[None]:
    """As before: on the host, in the agent's database and maps, and in the places that are jobs' own."""
    with world.unchanged():
        yield
        assert left(world.host) == []


def there(job: Job, pods: int) -> None:
    """All ranks run."""
    job.wait_for(*(f"there {rank}" for rank in range(pods)))


def test_what_a_rank_finds(world: World) -> None:
    ended = run(world.host, "--pods", "2", "--name", "train", "--master-port", "1234", *python(WHERE))
    assert ended.code == 0, ended.stderr
    for rank in range(2):
        found = ended.json(rank)
        environment = found["environment"]
        assert environment["RANK"] == environment["OMPI_COMM_WORLD_RANK"] == environment["PMI_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["OMPI_COMM_WORLD_SIZE"] == environment["PMI_SIZE"] == "2"
        assert (environment["LOCAL_RANK"], environment["MASTER_PORT"]) == ("0", "1234")
        assert (environment["MASTER_ADDR"], environment["RDMANET_PEERS"]) == ("train-0", "train-0,train-1")
        assert (found["host"], found["links"]) == (f"train-{rank}", ["eth0", "lo"])
        assert set(found["dev"]) == {
            *("fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm"),
            *("stderr", "stdin", "stdout", "tty", "urandom", "zero"),
        }
        assert found["processes"] == [1, 2]
        assert found["agent"] == found["state"] == []
        assert found["capabilities"] == 0xA00425FB  # the runtimes' default, less CAP_MKNOD
        assert "Read-only" in found["sysctl"]
        assert "Read-only" in found["sysrq"] or not Path("/proc/sysrq-trigger").exists()
        assert (found["mknod"], found["stdin"], found["shared_memory"]) == ("Operation not permitted", "", "done")
        assert found["kill"] == ["done"] * 3  # and nothing came of it: the kernel keeps process 1 from its own
    assert "pods train-0 to train-1" in ended.stderr
    assert "all ended with status 0" in ended.stderr


def test_another_user_has_no_capability(world: World) -> None:
    program = WHERE.replace('os.listdir("/run/rdmanet")', "[]").replace('os.listdir("/var/lib/rdmanet")', "[]")
    ended = run(world.host, "--user", "nobody", "--", "/usr/bin/python3", "-c", program)
    assert ended.code == 0, ended.stderr
    found = ended.json(0)
    assert (found["user"], found["capabilities"]) == (65534, 0)


def test_ranks_talk(world: World) -> None:
    ended = run(world.host, "--pods", "3", *python(TALK))
    assert ended.code == 0, ended.stderr
    for rank in range(3):
        assert ended.json(rank)["heard"] == [f"{version} {other}" for version in (4, 6) for other in range(3)]


def test_output(world: World) -> None:
    """Whole lines with the rank in front, in each rank's order, on the stream that they were written to."""
    program = """
import os, sys
for number in range(3000):
    print(number, "x" * (number % 200))
    print("complaint", number, file=sys.stderr)
sys.stdout.write("1 %\\r2 %\\r")
sys.stdout.write("y" * 70000 + "\\n")
sys.stdout.write("no end")
"""
    ended = run(world.host, "--pods", "3", *python(program))
    assert ended.code == 0, ended.stderr[-500:]
    wanted = [f"{number} {'x' * (number % 200)}" for number in range(3000)]
    for rank in range(3):
        said = ended.of(rank)
        assert said[:3000] == wanted
        assert said[3000:] == ["1 %", "2 %", "y" * 65536, "y" * (70000 - 65536), "no end"]
        complaints = [line for line in ended.stderr.splitlines() if line.startswith(f"[{rank}] ")]
        assert complaints == [f"[{rank}] complaint {number}" for number in range(3000)]
    assert len(ended.stdout.splitlines()) == 3 * 3005


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("import os, sys; sys.exit(7 if os.environ['RANK'] == '2' else 0)", 7, "rank 2 (pod job-"),
        ("import os; os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else None", 137, "by signal SIGKILL"),
        ("import os; os.abort() if os.environ['RANK'] == '1' else None", 134, "by signal SIGABRT"),
        ("import os; os.execvp('false', ['false'])", 1, "2 more did not end with status 0"),
    ],
    ids=["status", "killed", "aborted", "all"],
)
def test_exit_codes(world: World, program: str, code: int, words: str) -> None:
    ended = run(world.host, "--pods", "3", *python(program))
    assert ended.code == code
    assert words in ended.stderr


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("sys.exit(5)", 5),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139),
        ("os.kill(-1, signal.SIGKILL); os._exit(6)", 6),
    ],
    ids=["status", "crash", "suicide"],
)
@pytest.mark.parametrize("term", ["signal.SIG_DFL", "signal.SIG_IGN"])
def test_one_rank_fails_and_the_others_are_ended(world: World, how: str, code: int, term: str) -> None:
    ended = run(world.host, "--pods", "3", "--grace-s", "0.3", *python(CRASH.format(how=how, term=term)))
    assert ended.code == code
    assert "rank 1 (pod job-" in ended.stderr
    assert ended.of(1) == ["crashing"]
    assert ("are killed" in ended.stderr) == (term == "signal.SIG_IGN")


def test_signals_are_passed_on_and_the_second_kills(world: World) -> None:
    with Job(world.host, "--pods", "2", *python(STUBBORN)) as job:
        there(job, 2)
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            job.signal(number)
            job.wait_for(*(f"got {rank} {number.name}" for rank in range(2)))
        job.signal(signal.SIGINT)
        ended = job.end()
    assert ended.code == 137
    assert "a second signal: the ranks are killed" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_a_signal_ends_a_job(world: World, number: signal.Signals) -> None:
    with Job(world.host, "--pods", "2", "--", "sh", "-c", "echo there $RANK; sleep 1000; true") as job:
        there(job, 2)
        job.signal(number)
        ended = job.end()
    assert ended.code == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_pods_are_made(world: World, number: signal.Signals) -> None:
    gate = Gate(world.host, "ADD", f"signal-{number}")
    with gate, Job(world.host, "--pods", "2", *python(WAIT), plugin=gate.plugin) as job:
        gate.wait()
        job.signal(number)
        gate.wait()
        gate.go(2)
        ended = job.end()
    assert ended.code == 128 + number
    assert ended.stdout == ""
    assert "before the job had started" in ended.stderr


def killed(job: Job) -> None:
    job.signal(signal.SIGKILL)
    assert job.end().code == -signal.SIGKILL


def cleanup(world: World) -> Ended:
    return run(world.host, "--cleanup")


def test_a_launcher_that_was_killed(world: World) -> None:
    """Its processes end by themselves; the rest is taken back by the next job, or by --cleanup."""
    with Job(world.host, "--pods", "2", "--name", "lost", *python(WAIT)) as job:
        there(job, 2)
        again = run(world.host, "--name", "lost", "--", "true")
        assert again.code == 125
        assert "There is a job lost already" in again.stderr
        killed(job)
    assert "namespace rdmanet-lost-1" in left(world.host)
    done = cleanup(world)
    assert (done.code, done.stderr) == (0, "rdmanet run: job lost, whose launcher is gone, was taken back\n")
    assert left(world.host) == []
    with Job(world.host, "--pods", "2", "--name", "lost", *python(STUBBORN)) as job:
        there(job, 2)
        killed(job)
    ended = run(world.host, "--name", "lost", "--", "echo", "again")
    assert (ended.code, ended.stdout) == (0, "[0] again\n"), ended.stderr
    assert "job lost, whose launcher is gone, was taken back" in ended.stderr


def test_a_launcher_that_was_killed_in_an_add(world: World) -> None:
    """The ADD goes on without it; who takes the job back waits for it."""
    with Gate(world.host, "ADD", "killed") as gate:
        with Job(world.host, "--name", "lost", *python(WAIT), plugin=gate.plugin) as job:
            gate.wait()
            killed(job)
        with Job(world.host, "--cleanup") as other:
            gate.go()
            assert other.end().code == 0


def test_a_launcher_that_was_killed_in_a_del(world: World) -> None:
    with Gate(world.host, "DEL", "killed-del") as gate:
        with Job(world.host, "--name", "lost", "--", "true", plugin=gate.plugin) as job:
            gate.wait()
            killed(job)
        gate.go()
        with Job(world.host, "--cleanup") as other:
            gate.wait()
            gate.go()
            assert other.end().code == 0


def test_first_processes_that_were_killed(world: World) -> None:
    """As by the kernel when memory is short: the rank counts as killed."""
    with Job(world.host, "--pods", "2", "--grace-s", "0.3", *python(WAIT)) as job:
        there(job, 2)
        done = world.host.exec(["pgrep", "-o", "-f", "rdmanet/run/pod_init.py", "-P", str(job.process.pid)])
        os.kill(int(done.stdout.split()[0]), signal.SIGKILL)
        ended = job.end()
    assert ended.code == 137
    assert "was ended by signal SIGKILL" in ended.stderr


def test_a_reader_that_goes_away(world: World) -> None:
    reader, writer = os.pipe()
    with Job(world.host, "--grace-s", "0.3", "--", "yes", stdout=writer) as job:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        ended = job.end()
    assert ended.code == 125
    assert "output cannot be written (Broken pipe)" in ended.stderr


def test_a_reader_that_stops(world: World) -> None:
    """The ranks wait for it, and Ctrl-C, twice, ends them all the same."""
    reader, writer = os.pipe()
    program = "import os, sys; print('x' * 400000, flush=True); os.kill(os.getppid(), 0)"
    with Job(world.host, *python(STUBBORN.replace('print("there"', f"{program}; print('there'")), stdout=writer) as job:
        os.close(writer)
        os.read(reader, 1)
        job.signal(signal.SIGINT)
        job.signal(signal.SIGTERM)
        ended = job.end()
    os.close(reader)
    assert ended.code == 137


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--", "no-such-command"), "There is no command 'no-such-command' here"),
        ((), "Say what to run, behind --"),
        (("--pods", "0", "--", "true"), "A job has from 1 to 4096 pods, not 0"),
        (("--name", "No", "--", "true"), "A job cannot be called 'No'"),
        (("--user", "nobody-at-all", "--", "true"), "There is no user 'nobody-at-all' here"),
        (("--device", "/dev/none", "--", "true"), "There is no device /dev/none"),
        (("--rdma", "--", "true"), "This host has no RDMA to give to pods"),
    ],
    ids=["command", "nothing", "pods", "name", "user", "device", "rdma"],
)
def test_refusals(world: World, words: tuple[str, ...], sentence: str) -> None:
    if sentence.startswith("This host has no RDMA") and world.status()["agent"].get("rdma_backend"):
        pytest.skip("this host has RDMA for pods: the sentence is for those that have none")
    ended = run(world.host, *words)
    assert ended.code == 125
    assert ended.stderr.startswith(f"rdmanet run: {'Pod job-' if 'RDMA' in sentence else ''}"), ended.stderr
    assert sentence in ended.stderr


def test_no_plugin(world: World) -> None:
    ended = run(world.host, "--", "true", plugin="/nowhere/rdmanet")
    assert ended.code == 125
    assert "There is no CNI executable at /nowhere/rdmanet" in ended.stderr


def test_a_command_that_cannot_be_executed(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("run") / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    ended = run(world.host, "--pods", "2", "--", str(script))
    assert ended.code == 125
    assert f"{script} cannot be started" in ended.stderr


def test_a_device(world: World) -> None:
    ended = run(world.host, "--device", "/dev/zero", "--device", "/dev/kmsg", "--", "stat", "-c", "%t:%T", "/dev/kmsg")
    assert (ended.code, ended.of(0)) == (0, ["1:b"]), ended.stderr


def test_jobs_side_by_side(world: World) -> None:
    with Job(world.host, "--name", "one", *python(WAIT)) as one:
        there(one, 1)
        two = run(world.host, "--name", "two", "--", "sh", "-c", f"{sys.executable} -c 'print(2)'")
        assert (two.code, two.of(0)) == (0, ["2"])
        assert cleanup(world).code == 0
        one.signal(signal.SIGTERM)
        assert one.end().code == 143


def test_the_executable_is_where_runtimes_look(world: World) -> None:
    argv = [sys.executable, "-m", "rdmanet", "run", "--config", world.host._config_file(), "--", "echo", "found"]
    environment = {"CNI_PATH": f"/nowhere:{CNI_EXECUTABLE.parent}"}
    done = world.host.exec(argv, cwd=str(REPOSITORY), environment=environment)
    assert done.stdout == "[0] found\n"
