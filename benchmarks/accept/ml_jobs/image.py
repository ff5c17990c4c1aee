"""Row `image`: agent, device plugin, command line and CNI executable of the image as a host runs them, and no compiler.

It is built on a Debian base that is made here, and run by podman on a scratch host in the way of a DaemonSet: in the
host's network, with the host's directories. Its installer puts the CNI executable on the host, which adds and deletes a
pod by the agent's socket. The device plugin runs without capabilities, says that kubelet is away, and registers when it
comes.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rdmanet import __version__
from rdmanet.config import DEFAULT_PATH
from testbed.built_image import NAME, build
from testbed.host import SOCKET, Host, diff, toml
from testbed.kubelet import running
from testbed.kubelet_host import RESOURCE, ROOT
from testbed.paths import BUILD
from testbed.pod import Pod
from testbed.podman import IMAGE, WRAPPER, Podman
from testbed.rows import Figure, need
from testbed.session import session

AGENT, OTHER, PLUGIN = "agent", "other", "plugin"
SLOTS = 4
NETWORK = {"cniVersion": "1.1.0", "name": "net", "type": "rdmanet"}
CONFIG_FILE = "/run/image/rdmanet.toml"
CONFIG = ("--volume", f"{CONFIG_FILE}:{DEFAULT_PATH}:ro")
#: Files and packages that compile, or that only compilers need.
FILES = ("libLLVM*", "libclang*", "clang", "clang-*", "libbcc*", "gcc", "gcc-[0-9]*[0-9]", "cc1", "*musl*")
PACKAGES = re.compile(
    r"(gcc|g\+\+|cpp|clang|llvm|tcc|musl-tools)(-[\d.]+)?|lib(llvm|clang|bpfcc)\S*|\S*bpfcc|\S*-dev|linux-headers\S*"
)
#: As the manifests run what is not the agent.
PLAIN = (
    "--cap-drop",
    "all",
    "--security-opt",
    "no-new-privileges",
    "--read-only",
    "--network",
    "none",
    "--no-healthcheck",
)
#: Where the installer's files go; the testbed executes plugins that it sees itself.
BIN_DIR, CONF_DIR = BUILD / "image-bin", "/run/image/net.d"
LOAD_TIMEOUT_S = 300.0


def measure() -> Figure:
    """The image's size, with its base."""
    built = build()
    with Host.scratch("image") as host:
        # podman's timers of health checks are systemd's; the check itself is asked for here.
        host.container.environment = {**host.container.environment, "DISABLE_HC_SYSTEMD": "true"}
        host.exec(["mount", "--make-rshared", "/run"])
        with Podman.start(host) as podman:
            podman("load", "--quiet", "--input", str(built.archive), timeout_s=LOAD_TIMEOUT_S)
            packages = _without_compiler(podman)
            _write_config(host)
            before = host.dump()
            ready_s = host.run_agent(_run(AGENT, "--privileged", "--read-only", *_like_a_daemon_set(), words=["agent"]))
            _commands(podman)
            _pod(host, podman)
            waiting = _plugin(host)
            need(host.stop_agent() == 0, "the agent's container did not end as it should")
            host.exec(_run(OTHER, "--privileged", "--no-healthcheck", *_like_a_daemon_set(), words=["uninstall"]))
            need(not podman.containers(), f"containers are left: {podman.containers()}")
            left = diff(before, host.dump())
            need(not left, f"is left: {left[:3]}")
    size, base = (round(count / 1e6) for count in (built.size_bytes, built.base_bytes))
    detail = (
        f"of which {base} MB are the Debian base; {packages} packages, no compiler, LLVM, bcc or headers; its agent was"
        f" ready in {ready_s:.1f} s, the health check saw it, and that none runs elsewhere; the CNI executable"
        " that its installer put on the host added and deleted a pod with both families; its plugin without any"
        f" capability: “{waiting}”, then registered; nothing was left"
    )
    return Figure(size, "MB", detail, {"base": base, "ready_s": ready_s, "packages": packages})


def _like_a_daemon_set() -> list[str]:
    """The host's namespaces and directories; also where this testbed has its pods' namespaces."""
    words = ["--network", "host", "--pid", "host", "--cgroupns", "host"]
    for path in ("/run/rdmanet", "/var/lib/rdmanet", "/sys/fs/bpf"):
        words += ["--volume", f"{path}:{path}"]
    netns = session().netns
    return [*words, "--volume", f"{netns}:{netns}:rshared", *CONFIG]


def _run(name: str, *options: str, words: Sequence[str]) -> list[str]:
    return [WRAPPER, "run", "--rm", "--name", name, *options, NAME, *words]


def _write_config(host: Host) -> None:
    """What agent and plugin both read."""
    sections = {"kubernetes": {"slots": SLOTS, "plugin_dir": f"{ROOT}/device-plugins", "ask_kubelet": False}}
    directories = ("/run/rdmanet", f"{ROOT}/device-plugins", CONF_DIR)
    host.container.act(*(("mkdir", path) for path in directories), ("write", CONFIG_FILE, toml(sections)))


def _without_compiler(podman: Podman) -> int:
    """How many packages there are, none of them to compile with."""
    inside = ("run", "--rm", "--network", "none", "--entrypoint")
    packages = podman(*inside, "dpkg-query", NAME, "--show", "--showformat", "${Package}\\n").stdout.split()
    found = [package for package in packages if PACKAGES.fullmatch(package)]
    need(len(packages) > 50 and not found, f"of {len(packages)} packages some compile: {found}")
    names = [word for name in FILES for word in ("-o", "-name", name)][1:]
    files = podman(*inside, "find", NAME, "/", "-xdev", "!", "-type", "d", "(", *names, ")").stdout.split()
    need(not files, f"to compile with: {files[:5]}")
    return len(packages)


def _commands(podman: Podman) -> None:
    """The command line inside, and the health check with an agent and without one."""
    version = podman("exec", AGENT, "rdmanet", "--version").stdout.strip()
    need(version == f"rdmanet {__version__}", f"the version is {version!r}")
    status = json.loads(podman("exec", AGENT, "rdmanet", "status", "--output", "json").stdout)
    need(status["attachments"] == [], f"the status is {status}")
    need(podman("healthcheck", "run", AGENT, check=False).returncode == 0, "an agent that is ready is not healthy")
    podman("run", "--rm", "--detach", "--name", OTHER, "--network", "none", "--entrypoint", "sleep", NAME, "infinity")
    need(podman("healthcheck", "run", OTHER, check=False).returncode == 1, "a container without an agent is healthy")
    podman("rm", "--force", "--time", "0", OTHER)


def _install(host: Host, *words: str) -> None:
    """The image's installer, as the DaemonSet's init container."""
    volumes = [*CONFIG, "--volume", f"{BIN_DIR}:/host/bin", "--volume", f"{CONF_DIR}:/host/conf"]
    argv = ["install", "--bin-dir", "/host/bin", "--conf-dir", "/host/conf", *words]
    host.exec(_run(OTHER, *PLAIN, *volumes, words=argv))


def _pod(host: Host, podman: Podman) -> None:
    """ADD and DEL by the executable that the image's installer puts on the host, which takes it out again."""
    BIN_DIR.mkdir(parents=True, exist_ok=True)
    executable = BIN_DIR / "rdmanet"
    _install(host)
    # An image of busybox alone has no libraries.
    alone = ("--volume", f"{executable}:/rdmanet:ro", "--env", "CNI_COMMAND=VERSION", IMAGE, "/rdmanet")
    need("1.1.0" in podman("run", "--rm", "--network", "none", *alone).stdout, "the CNI executable is not static")
    pod = Pod.create(host, "in-image")
    try:
        added = host.cni("ADD", pod, NETWORK, executable=executable)
        need(added.returncode == 0 and added.output is not None, f"ADD: {added.sentence}")
        assert added.output is not None
        addresses = [entry["address"].partition("/")[0] for entry in added.output["ips"]]
        need(len({":" in address for address in addresses}) == 2, f"not both families: {addresses}")
        for address in addresses:
            host.exec(["ping", "-c", "1", "-W", "10", address])
        deleted = host.cni("DEL", pod, NETWORK, executable=executable)
        need(deleted.returncode == 0, f"DEL: {deleted.sentence}")
    finally:
        pod.destroy()
    conflist = host.path(CONF_DIR)
    need(len(list(conflist.iterdir())) == 1, "the installer wrote no configuration")
    _install(host, "--remove")
    need(not list(BIN_DIR.iterdir()) and not list(conflist.iterdir()), "the installer has left something")


def _plugin(host: Host) -> str:
    """What it says while kubelet is away; then kubelet comes, and it registers."""
    socket = str(Path(SOCKET).parent)
    volumes = ["--volume", f"{socket}:{socket}", "--volume", f"{ROOT}:{ROOT}"]
    words = _run(PLUGIN, *PLAIN, *volumes, *CONFIG, words=["device-plugin"])
    with host.popen(["sh", "-c", 'exec "$@" 2>&1', "plugin", *words], stdout=subprocess.PIPE) as plugin:
        assert plugin.stdout is not None
        said = ""
        for line in plugin.stdout:
            said = line.decode().strip()
            if "waiting for kubelet" in said:
                break
        need("waiting for kubelet" in said, f"the plugin ended: {said}")
        with running(host.path(ROOT)) as loop:
            loop.do(loop.kubelet.until(lambda: RESOURCE in loop.kubelet.endpoints, "the image's plugin"))
            plugin.signal(15)
            rest = plugin.stdout.read().decode(errors="replace").strip()
            status = plugin.wait()
        need(status == 0, f"the plugin's container ended with status {status}: {rest[-600:]}")
    return said[said.index("waiting for kubelet") :]
