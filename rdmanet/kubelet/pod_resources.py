"""Which slots a pod's containers have: asked of kubelet, which gave them (PodResources v1).

Every question is a call on a channel of its own: kubelet makes its socket anew when it starts. ``List`` is asked, as
``Get`` comes with Kubernetes 1.34 only.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from rdmanet.errors import UnavailableError
from rdmanet.kubelet import rpc
from rdmanet.kubelet.messages import message
from rdmanet.model import PodName

#: Kubelet lets so many questions of this kind pass in a second as it likes (RESOURCE_EXHAUSTED), and is asked again.
_AGAIN = (rpc.Code.RESOURCE_EXHAUSTED, rpc.Code.UNAVAILABLE)
_PAUSE_S = 0.1


class PodResources:
    """``rdmanet.slots.Kubelet``: ``socket`` is kubelet's, ``timeout_s`` the longest that a question takes."""

    def __init__(self, socket: Path, resource: str, timeout_s: float):
        self._socket = socket
        self._resource = resource
        self._timeout_s = timeout_s

    async def slots_of(self, pod: PodName) -> tuple[str, ...] | None:
        """See ``rdmanet.slots.Kubelet``."""
        said = "nothing came"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                while True:
                    try:
                        return await self._ask(pod)
                    except rpc.Refusal as error:
                        said = error.details() or error.code().name
                        if error.code() not in _AGAIN:
                            break
                    await asyncio.sleep(_PAUSE_S)
        raise UnavailableError(
            f"Kubelet does not say on {self._socket} which slot of {self._resource} {pod} has ({said}).",
            operation="PodResources",
            subject=str(pod),
        )

    async def _ask(self, pod: PodName) -> tuple[str, ...] | None:
        async with rpc.channel(self._socket) as channel:
            ask = rpc.call(channel, "v1.PodResourcesLister", "List")
            answer = await ask(message("v1", "ListPodResourcesRequest")())
        for found in answer.pod_resources:
            if (found.namespace, found.name) == (pod.namespace, pod.name):
                return tuple(
                    dict.fromkeys(
                        identity
                        for container in found.containers
                        for devices in container.devices
                        if devices.resource_name == self._resource
                        for identity in devices.device_ids
                    )
                )
        return None
