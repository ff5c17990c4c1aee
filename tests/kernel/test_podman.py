"""podman, as Debian has it, with its CNI back end: real containers on our network."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from testbed.container import Completed
from testbed.hold import Hold
from testbed.host import Dump, diff
from testbed.outside import HOST_IPV4, HOST_IPV6
from testbed.podman import IMAGE, PLUGINS, Podman, why_no_networks
from testbed.world import World
from tests.kernel.test_chain import without_bases

OURS: dict[str, Any] = {"type": "rdmanet", "capabilities": {"mac": True, "ips": True}}
PORTMAP: dict[str, Any] = {"type": "portmap", "capabilities": {"portMappings": True}}
VERSIONS = ("0.3.1", "0.4.0", "1.0.0")
NODE = {4: HOST_IPV4, 6: HOST_IPV6}
SERVE = "mkdir -p /www && echo from $HOSTNAME > /www/index.html && exec httpd -f -p 80 -h /www"
KILLS = 8
#: A podman that was killed has left mounts and a name; the next one stumbles over them, and clears them away.
ATTEMPTS = 3
#: Of a server in a container that was just started.
CALLS = 200
SEED = 20


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World.start("podman") as world:
        world.host.exec(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
        yield world


@pytest.fixture(scope="module")
def podman(world: World) -> Iterator[Podman]:
    if missing := why_no_networks(world.host):
        pytest.skip(missing)
    with Podman.start(world.host) as podman:
        podman.network("net", [OURS, PORTMAP])
        for version in VERSIONS:
            podman.network(f"net-{version}", [OURS, PORTMAP], version)
        yield podman


@pytest.fixture(scope="module")
def hold(world: World, podman: Podman) -> Hold:
    return Hold(world.host, PLUGINS)


def snapshot(world: World) -> Dump:
    """Without what podman and the reference plugins have on a host that uses them."""
    return without_bases(world.snapshot())


@pytest.fixture
def unchanged(world: World, podman: Podman) -> Iterator[None]:
    """No container is left, and nothing of ours."""
    before = snapshot(world)
    try:
        yield
    finally:
        podman.remove_all()
    assert diff(before, snapshot(world)) == []


def url(address: str, port: int = 80) -> str:
    return f"http://{f'[{address}]' if ':' in address else address}:{port}/"


def fetch(place: Any, address: str, port: int = 80) -> Completed:
    """What a container serves; asked again while its server does not listen yet."""
    done: Completed
    for _ in range(CALLS):
        done = place.exec(["busybox", "wget", "-q", "-O", "-", url(address, port)], check=False)
        if "refused" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done


def serve(podman: Podman, name: str, *words: str, network: str = "net", attempts: int = 1) -> dict[int, str]:
    """A container that serves, and listens; its addresses."""
    options = ("--name", name, "--hostname", name, "--network", network, *words)
    for _ in range(attempts):
        done = podman("run", "-d", *options, IMAGE, "sh", "-c", SERVE, check=attempts == 1)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    addresses = podman.addresses(name, network)
    fetch(podman.host, addresses[4])
    return addresses


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("version", VERSIONS)
def test_containers_talk(podman: Podman, version: str) -> None:
    """Start, TCP between two of them by both families, stop, start again, remove: with each spec version."""
    network = f"net-{version}"
    addresses = serve(podman, "server", network=network)
    for address in addresses.values():
        said = podman("run", "--rm", "--network", network, IMAGE, "wget", "-q", "-O", "-", url(address))
        assert said.stdout == "from server\n"
    podman("stop", "--time", "0", "server")
    podman("start", "server")
    fetch(podman.host, podman.addresses("server", network)[4])
    for address in podman.addresses("server", network).values():
        said = podman("run", "--rm", "--network", network, IMAGE, "wget", "-q", "-O", "-", url(address))
        assert said.stdout == "from server\n"
    podman("rm", "--force", "--time", "0", "server")


@pytest.mark.usefixtures("unchanged")
def test_port_mappings(world: World, podman: Podman) -> None:
    """From outside, from the host, from another container; while it runs, and no longer."""
    serve(podman, "server", "--publish", "8080:80")
    outside = world.host.outside
    assert outside is not None
    for address in NODE.values():
        for place in (outside.container, world.host):
            assert fetch(place, address, 8080).stdout == "from server\n"
        words = ("wget", "-q", "-O", "-", url(address, 8080))
        assert podman("run", "--rm", "--network", "net", IMAGE, *words).stdout == "from server\n"
    assert fetch(world.host, "127.0.0.1", 8080).stdout == "from server\n"
    podman("rm", "--force", "--time", "0", "server")
    for address in NODE.values():
        done = outside.container.exec(["busybox", "wget", "-q", "-O", "-", url(address, 8080)], check=False)
        assert done.returncode != 0


@pytest.mark.usefixtures("unchanged")
def test_what_is_asked_for(podman: Podman) -> None:
    """An address, a MAC, two networks."""
    words = ("--network", "net:ip=10.213.9.9,mac=02:00:00:00:00:99")
    shown = podman("run", "--rm", *words, IMAGE, "ip", "address", "show", "eth0").stdout
    assert "10.213.9.9/32" in shown
    assert "02:00:00:00:00:99" in shown
    podman("run", "-d", "--name", "two", "--network", "net", "--network", "net-0.4.0", IMAGE, "sleep", "1000")
    names = {line.split(":")[1].split("@")[0].strip() for line in _links(podman, "two")}
    assert names == {"lo", "eth0", "eth1"}  # in whatever order podman takes the networks
    podman("rm", "--force", "--time", "0", "two")


def _links(podman: Podman, name: str) -> list[str]:
    return podman("exec", name, "ip", "-o", "link").stdout.splitlines()


@pytest.mark.usefixtures("unchanged")
def test_containers_that_share_a_network(world: World, podman: Podman) -> None:
    """One that is in another one's namespace, as those with RDMA are, is no attachment of its own."""
    podman("run", "-d", "--name", "pod", "--network", "net", IMAGE, "sleep", "1000")
    podman("run", "-d", "--name", "inside", "--network", "container:pod", IMAGE, "sh", "-c", SERVE)
    assert [row["pod"] for row in world.status()["attachments"]] == ["default/pod"]
    fetch(world.host, podman.addresses("pod", "net")[6])


@pytest.mark.usefixtures("unchanged")
def test_a_refusal_is_podmans_error(podman: Podman) -> None:
    """With our sentence, and nothing left of it: podman DELs what it could not add."""
    podman.network("wrong", [{"type": "rdmanet", "mtu": 100}])
    done = podman("run", "--rm", "--network", "wrong", IMAGE, "true", check=False)
    assert done.returncode != 0
    assert "write a whole number from 1280" in done.stderr


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("order", ["before", "behind"])
def test_podman_is_killed_while_plugins_work(world: World, podman: Podman, hold: Hold, order: str) -> None:
    """Before our ADD and after it. The name can be used again at once, and GC collects what podman has forgotten."""
    plugins = [{"type": "hold"}, OURS] if order == "before" else [OURS, {"type": "hold"}]
    podman.network("held", plugins)
    process = podman.popen("run", "--name", "killed", "--network", "held", IMAGE, "sleep", "1000")
    hold.wait()
    process.kill()
    process.close()
    hold.go()
    addresses = serve(podman, "killed", "--replace", attempts=ATTEMPTS)
    assert fetch(world.host, addresses[6]).stdout == "from killed\n"
    collect(world, podman)
    assert fetch(world.host, addresses[4]).stdout == "from killed\n"


def collect(world: World, podman: Podman) -> None:
    """What an administrator does: forgets the namespaces that podman has left, and has the attachments of containers
    that it does not know any more collected."""
    known = podman.containers()
    valid = [{"containerID": id, "ifname": f"eth{n}"} for id in known for n in range(4)]
    for name in ("net", "held"):
        conf = {"cniVersion": "1.1.0", "name": name, "type": "rdmanet", "cni.dev/valid-attachments": valid}
        outcome = world.host.cni("GC", None, conf)
        assert outcome.returncode == 0, outcome.sentence
    used = {row["netns"] for row in world.status()["attachments"]}
    for path in world.host.path("/run/netns").iterdir():
        if f"/run/netns/{path.name}" not in used:
            world.host.container.act(("umount", f"/run/netns/{path.name}"), ("unlink", f"/run/netns/{path.name}"))


@pytest.mark.usefixtures("unchanged")
def test_podman_is_killed_at_any_moment(world: World, podman: Podman) -> None:
    """Whatever it was at, the same name can be run again, and what is left is collected."""
    moments = random.Random(SEED)
    for _ in range(KILLS):
        process = podman.popen("run", "--replace", "--name", "killed", "--network", "net", IMAGE, "sleep", "1000")
        try:
            process.wait(moments.uniform(0.02, 0.5))
        except TimeoutError:
            process.kill()
        process.close()
    addresses = serve(podman, "killed", "--replace", attempts=ATTEMPTS)
    collect(world, podman)
    (row,) = world.status()["attachments"]
    assert row["pod"] == "default/killed"
    assert fetch(world.host, addresses[4]).stdout == "from killed\n"


def test_the_agent_is_away(world: World, podman: Podman) -> None:
    """A container can be removed while no agent runs; one can be started when there is one again."""
    before = snapshot(world)
    serve(podman, "server")
    world.host.kill_agent()
    done = podman("run", "--rm", "--network", "net", IMAGE, "true", check=False)
    assert "Start the agent" in done.stderr
    podman("rm", "--force", "--time", "0", "server")
    world.start_agent()
    addresses = serve(podman, "server")
    assert fetch(world.host, addresses[6]).stdout == "from server\n"
    podman.remove_all()
    assert diff(before, snapshot(world)) == []
