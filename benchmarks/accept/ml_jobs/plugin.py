"""Row `plugin`: the device plugin as a process of its own, an agent with devices, a kubelet that speaks the protocol.

Every slot is admitted once and is somebody's alone; one more is refused; what ends comes back. A second reader that
takes nothing while the list changes gets the newest, not all of them. For a runtime without CDI a device that is there
beforehand is given by its nodes, and one that is not is refused with a sentence.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.accept.ml_jobs.stage import add, delete, slot_ids, stage
from benchmarks.peers import host_device
from rdmanet.kubelet import rpc
from rdmanet.kubelet.messages import HEALTHY, device_plugin
from rdmanet.model import PodName
from testbed.kubelet import SLOW, AdmissionError
from testbed.kubelet_host import RESOURCE, KubeletHost
from testbed.rows import Figure, need

SLOTS = 32
#: For the slow reader: lists that fill what the kernel and HTTP/2 keep for it.
MANY_SLOTS = 2000
CHANGES = 30


def measure() -> Figure:
    """Milliseconds that an admission waits for the plugin (GetPreferredAllocation and Allocate), in the middle."""
    with stage("plugin", SLOTS) as found:
        spent_ms = _all_once(found)
        calls = found.loop.do(_other_calls(found))
    with stage("plugin-slow", MANY_SLOTS) as found:
        lists = _slow_reader(found)
    without = {"cdi": False}
    with stage("plugin-nodes", SLOTS, kubernetes=without) as found:
        sentence = _refused(found, PodName("default", "train-0")).partition("due to ")[2].partition(":")[0]
        need("by CDI only" in sentence, f"a device that is made later was given without CDI: {sentence!r}")
    with stage(
        "plugin-nodes", SLOTS, within=host_device.host_device, kubernetes=without, more=host_device.CONFIG
    ) as found:
        nodes = _nodes(found)
    middle = statistics.median(spent_ms)
    detail = (
        f"per admission, in the middle: {SLOTS} of {SLOTS} slots given once and named for CDI, the next refused, what"
        f" ended given again; {calls} other calls answered; a reader that slept through {2 * CHANGES} changes of a"
        f" list of {MANY_SLOTS} then read {lists} of them; without CDI: {', '.join(nodes)} of the"
        f" host's device, and of others “{sentence}”"
    )
    return Figure(middle, "ms", detail, {"longest_ms": max(spent_ms), "lists": lists})


def _all_once(found: KubeletHost) -> list[float]:
    kubelet, spent_ms = found.loop.kubelet, []
    names = [PodName("default", f"train-{number}") for number in range(SLOTS + 1)]
    devices = []
    for name in names[:-1]:
        started = time.monotonic()
        answer = found.loop.do(kubelet.admit(name, RESOURCE))
        spent_ms.append((time.monotonic() - started) * 1000)
        need(not answer.devices and not answer.envs, f"Allocate said more than a CDI device: {answer}")
        devices += [device.name for device in answer.cdi_devices]
    wanted = sorted(f"{RESOURCE}={one}" for one in slot_ids(SLOTS))
    need(sorted(devices) == wanted, f"the slots were given as {devices}")
    need("available 0" in _refused(found, names[-1]), "a slot was given twice")
    back = kubelet.slot_of(names[5])
    found.loop.call(lambda: kubelet.forget(names[5]))
    found.loop.do(kubelet.admit(names[-1], RESOURCE))
    need(kubelet.slot_of(names[-1]) == back, "what came back was not given again")
    return spent_ms


def _refused(found: KubeletHost, name: PodName) -> str:
    try:
        found.loop.do(found.loop.kubelet.admit(name, RESOURCE))
    except AdmissionError as error:
        return str(error)
    return ""


async def _other_calls(found: KubeletHost) -> int:
    channel = found.loop.kubelet.endpoints[RESOURCE].channel

    def call(name: str, request: Any) -> Any:
        return rpc.call(channel, "v1beta1.DevicePlugin", name)(request)

    options = await call("GetDevicePluginOptions", device_plugin("Empty"))
    need(options.get_preferred_allocation_available, "GetPreferredAllocation is not offered")
    need(not options.pre_start_required, "PreStartContainer is asked for")
    await call("PreStartContainer", device_plugin("PreStartContainerRequest", devices_ids=["slot-0"]))
    wish = device_plugin("PreferredAllocationRequest")
    wish.container_requests.add(
        available_deviceIDs=slot_ids(SLOTS), must_include_deviceIDs=["slot-7"], allocation_size=2
    )
    answer = await call("GetPreferredAllocation", wish)
    ids = list(answer.container_responses[0].deviceIDs)
    need(ids == ["slot-7", "slot-0"], f"preferred were {ids}")
    wish = device_plugin("AllocateRequest")
    wish.container_requests.add(devices_ids=["slot-99"])
    try:
        await call("Allocate", wish)
    except rpc.Refusal as error:
        need(error.code() is rpc.Code.NOT_FOUND, f"a slot that is not there: {error.code()}")
        return 4
    need(False, "a slot that is not there was given")
    return 0


def _slow_reader(found: KubeletHost) -> int:
    """How many lists a reader got that took none while a pod's link went down and up again and again."""
    kubelet, everything = found.loop.kubelet, slot_ids(MANY_SLOTS)
    pods = [found.admit(name) for name in ("flapping", "down")]
    links = [["nsenter", f"--net={one.pod.netns}", "ip", "link", "set", "eth0"] for one in pods]
    for sandbox in pods:
        add(found, sandbox)
    socket = kubelet.plugins / kubelet.registrations[-1]

    async def begin() -> tuple[Any, Any]:
        channel = rpc.channel(socket, *SLOW)
        stream = rpc.call(channel, "v1beta1.DevicePlugin", "ListAndWatch")(device_plugin("Empty"))
        await stream.read()
        return channel, stream

    channel, stream = found.loop.do(begin())
    before = kubelet.endpoints[RESOURCE].lists
    for _ in range(CHANGES):
        found.host.exec([*links[0], "down"])
        found.healthy(*everything[1:])
        found.host.exec([*links[0], "up"])
        found.healthy(*everything)
    need(kubelet.endpoints[RESOURCE].lists >= before + 2 * CHANGES, "kubelet itself was not told of each change")
    found.host.exec([*links[1], "down"])  # what was never so before
    found.healthy(everything[0], *everything[2:])

    async def rest() -> int:
        lists = 0
        while True:
            answer = await stream.read()
            lists += 1
            if [device.ID for device in answer.devices if device.health != HEALTHY] == ["slot-1"]:
                await channel.close()
                return lists

    lists = found.loop.do(rest())
    need(lists < CHANGES, f"the plugin kept {lists} lists for a reader that took none")
    for sandbox in pods:
        delete(found, sandbox)
    return lists


def _nodes(found: KubeletHost) -> list[str]:
    """What a container of a runtime without CDI gets of the host's device."""
    answer = found.loop.do(found.loop.kubelet.admit(PodName("default", "train-0"), RESOURCE))
    paths = [device.host_path for device in answer.devices]
    need(not answer.cdi_devices, "a CDI device was named")
    need(all(found.host.path(path).is_char_device() for path in paths), f"{paths} are no device nodes")
    need(answer.envs["UCX_NET_DEVICES"] == f"{host_device.DEVICE}:1", f"the environment is {answer.envs}")
    return paths
