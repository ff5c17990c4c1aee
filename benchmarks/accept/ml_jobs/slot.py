"""Row `slot`: who has which slot, through races, lost DELs, kills and restarts: never a pod without its device.

Runs of pods race for fewer slots than there are pods, from several threads. A pod that comes up has its device, the CDI
file of its slot says so, and the programs in two containers that know nothing but those files talk to each other. Some
pods end without a DEL, some ADDs and DELs end with the agent's SIGKILL; kubelet's count and the agent's agree again
each time, and in the end nothing is left.
"""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.accept.ml_jobs.stage import add, delete, slot_ids, stage
from rdmanet.errors import NotFoundError
from testbed.kubelet import AdmissionError
from testbed.kubelet_host import NETWORK, KubeletHost, Sandbox
from testbed.rdma_tools import tool
from testbed.rows import Figure, need

SLOTS = 4
THREADS = 6
#: Pods that each thread wants, one after another.
PODS = 6
KILLS = 6
SEED = 7
COMMAND = 'exec ib_send_lat -d "$RDMANET_DEVICE" -x "$RDMANET_GID_INDEX" -F -n 50 {}'


def measure() -> Figure:
    """How many pods with a slot there were."""
    with stage("slot", SLOTS) as found:
        _talk(found)
        pods, lost, refused = _race(found)
        killed = _killed(found)
        _taken(found)
        _agree(found, {})
    detail = (
        f"pods had a slot and its device: {pods} of them in a race of {THREADS} for {SLOTS} slots (kubelet had none"
        f" {refused} times, {lost} pods ended without a DEL), {killed} through a SIGKILL of the agent in"
        " an ADD or a DEL; ib_send_lat ran on what CDI gave; a slot that is another's was refused; nothing was left"
    )
    return Figure(2 + pods + killed, "pods", detail, {"seed": SEED, "lost DELs": lost, "refused": refused})


def _talk(found: KubeletHost) -> None:
    one, two = found.admit("talk-0"), found.admit("talk-1")
    for sandbox in (one, two):
        need(_unresolvable(found, sandbox), "a slot had a device before its pod was added")
        add(found, sandbox)
        found.start(sandbox)
    address = found.edits(one).environment["RDMANET_ADDRESS"]
    server, client = (["sh", "-c", COMMAND.format(words)] for words in ("", address))
    tool(one.pod, two.pod, server, client, "Waiting for client")
    for sandbox in (one, two):
        delete(found, sandbox)


def _unresolvable(found: KubeletHost, sandbox: Sandbox) -> bool:
    try:
        found.edits(sandbox)
    except NotFoundError:
        return True
    return False


def _whole(found: KubeletHost, sandbox: Sandbox) -> None:
    """What a container of the sandbox would get is its pod's own device, which is there."""
    edits = found.edits(sandbox)
    rows = found.host.api("GET", "/v1/status")["attachments"]
    (row,) = [row for row in rows if row["container_id"] == sandbox.pod.container_id]
    device = row["device"]
    need([row["slot"]] == sandbox.devices, f"{sandbox.name} has {row['slot']}, and kubelet says {sandbox.devices}")
    need(edits.environment["RDMANET_DEVICE"] == device["name"], f"{sandbox.name}'s file names another's device")
    numbers = (edits.nodes[0].major, edits.nodes[0].minor)
    need(numbers == (device["major"], device["minor"]), f"{sandbox.name}'s node is another's")


def _race(found: KubeletHost) -> tuple[int, int, int]:
    """Pods that came up, those that ended without a DEL, and how often kubelet had no slot."""
    lock = threading.Lock()
    counts = {"pods": 0, "lost": 0, "refused": 0}

    def count(what: str) -> None:
        with lock:
            counts[what] += 1

    def work(thread: int) -> None:
        choice = random.Random(f"{SEED}-{thread}")
        for number in range(PODS):
            sandbox = None
            while sandbox is None:
                try:
                    sandbox = found.admit(f"race-{thread}-{number}")
                except AdmissionError as error:
                    need("available 0" in str(error), str(error))
                    count("refused")
                    time.sleep(choice.uniform(0.05, 0.3))  # as a scheduler comes back to a pod
            add(found, sandbox)
            _whole(found, sandbox)
            count("pods")
            if choice.random() < 0.25:  # DEL never comes: the runtime lost the pod, kubelet has let it go
                sandbox.pod.destroy()
                found.loop.call(lambda name=sandbox.name: found.loop.kubelet.forget(name))  # type: ignore[misc]
                found.sandboxes.remove(sandbox)
                count("lost")
            else:
                delete(found, sandbox)

    with ThreadPoolExecutor(THREADS) as threads:
        for done in [threads.submit(work, number) for number in range(THREADS)]:
            done.result()
    outcome = found.host.cni("GC", None, {**NETWORK, "cni.dev/valid-attachments": []})
    need(outcome.returncode == 0, f"GC: {outcome.sentence}")
    _agree(found, {})
    return counts["pods"], counts["lost"], counts["refused"]


def _killed(found: KubeletHost) -> int:
    """The agent dies in the middle of an ADD or a DEL; the same call again, or the start, makes all right."""
    choice = random.Random(SEED)
    for number in range(KILLS):
        sandbox = found.admit(f"kill-{number}")
        in_add = number % 2 == 0
        if not in_add:
            add(found, sandbox)
        call = threading.Thread(
            target=lambda: found.add(sandbox) if in_add else found.host.cni("DEL", sandbox.pod, NETWORK)  # noqa: B023
        )
        call.start()
        time.sleep(choice.uniform(0.0, 0.2))  # somewhere in it
        found.host.kill_agent()
        call.join()
        found.start_agent()
        found.healthy(*slot_ids(SLOTS))
        if in_add:
            status = found.host.cni("DEL", sandbox.pod, NETWORK)  # as runtimes do after an ADD that failed
            need(status.returncode == 0, f"DEL after a killed ADD: {status.sentence}")
            _agree(found, {})
            add(found, sandbox)
            _whole(found, sandbox)
        delete(found, sandbox)
        _agree(found, {})
    return KILLS


def _taken(found: KubeletHost) -> None:
    """A slot that another pod has is refused, also where the runtime is wrong about it."""
    one, two = found.admit("one"), found.admit("two", count=0)
    add(found, one)
    outcome = found.add(two, runtimeConfig={"deviceID": one.devices[0].partition("=")[2]})
    need(outcome.output is not None and outcome.output["code"] == 100, f"two pods have one slot: {outcome}")
    need("default/one's still" in outcome.sentence, outcome.sentence)
    _agree(found, {"slot-0": "default/one"})
    delete(found, two)
    delete(found, one)


def _agree(found: KubeletHost, holders: dict[str, str]) -> None:
    """Rows, CDI files and kubelet say the same."""
    found.host.settle()
    said = {identity: slot["pod"] for identity, slot in found.slots().items() if slot["pod"] is not None}
    need(said == holders, f"the agent says {json.dumps(said)}, not {json.dumps(holders)}")
    files = [f"rdmanet.io-rdma-{identity}.json" for identity in holders]
    need(found.files() == files, f"CDI files are {found.files()}, not {files}")
