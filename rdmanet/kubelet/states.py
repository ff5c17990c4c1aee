"""What the plugin tells kubelet: the newest state of each slot, and what a container gets with it. Without I/O."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from rdmanet import cdi
from rdmanet.config import KubernetesConfig
from rdmanet.errors import NotFoundError, UnavailableError
from rdmanet.kubelet.messages import HEALTHY, UNHEALTHY, device_plugin
from rdmanet.kubelet.topology import NOWHERE, Place

#: Before the agent has said anything.
UNKNOWN = "the agent has not said yet"


class SlotStates:
    """Of one event loop."""

    def __init__(self, config: KubernetesConfig):
        self._config = config
        self._ids = tuple(cdi.slot_id(number) for number in range(config.slots))
        self._problems: dict[str, str | None] = dict.fromkeys(self._ids, UNKNOWN)
        self._device: str | None = None  # what all slots share, where it is there beforehand
        self._nodes: tuple[str, ...] = ()
        self.place = NOWHERE
        self._version = 0
        self._changed = asyncio.Condition()

    @property
    def device(self) -> str | None:
        """The device that all slots share."""
        return self._device

    def problem(self, identity: str) -> str | None:
        """Why a slot cannot be used. Raises NotFoundError for one that is not ours."""
        if identity not in self._problems:
            raise NotFoundError(
                f"{self._config.resource} has no slot {identity}: those are {self._ids[0]} to {self._ids[-1]}"
                " (kubernetes.slots).",
                subject=identity,
            )
        return self._problems[identity]

    async def take(self, document: Mapping[str, Any], place: Place) -> bool:
        """What the agent says (``GET /v1/slots``), and where the device is that it names; whether that is news."""
        said = {str(one["id"]): one["problem"] for one in document["slots"]}
        unsaid = "the agent has no such slot: give agent and plugin the same configuration, and start both again"
        if document["resource"] != self._config.resource:
            said = {}
        self._device, self._nodes = document["device"], tuple(document["nodes"])
        return await self._set({identity: said.get(identity, unsaid) for identity in self._ids}, place)

    async def lose(self, why: str) -> bool:
        """Nothing is known any more; whether that is news."""
        return await self._set(dict.fromkeys(self._ids, why), self.place)

    async def _set(self, problems: dict[str, str | None], place: Place) -> bool:
        if problems == self._problems and place == self.place:
            return False
        self._problems, self.place = problems, place
        self._version += 1
        async with self._changed:
            self._changed.notify_all()
        return True

    def problems(self) -> dict[str, str]:
        """Why slots cannot be used, by id."""
        return {identity: problem for identity, problem in self._problems.items() if problem is not None}

    async def lists(self) -> AsyncGenerator[Any, None]:
        """The list of devices, and again after changes: who takes them slowly gets the newest only."""
        while True:
            seen = self._version
            yield self._list()
            async with self._changed:
                while self._version == seen:
                    await self._changed.wait()

    def _list(self) -> Any:
        devices = []
        for identity, problem in self._problems.items():
            device = device_plugin("Device", ID=identity, health=HEALTHY if problem is None else UNHEALTHY)
            if self.place.numa_node is not None:
                device.topology.nodes.add(ID=self.place.numa_node)
            devices.append(device)
        return device_plugin("ListAndWatchResponse", devices=devices)

    def allocation(self, ids: Sequence[str]) -> Any:
        """What a container with these slots gets.

        Raises NotFoundError, and UnavailableError for a slot that cannot be used now.
        """
        for identity in ids:
            if (problem := self.problem(identity)) is not None:
                raise UnavailableError(
                    f"The slot {identity} of {self._config.resource} cannot be used: {problem}.", subject=identity
                )
        answer = device_plugin("ContainerAllocateResponse")
        if self._config.cdi:
            for identity in ids:
                answer.cdi_devices.add(name=cdi.qualified(self._config.resource, identity))
            return answer
        if self._device is None:
            raise UnavailableError(
                f"Devices of {self._config.resource} are made when a pod gets its network, so they reach its container"
                " by CDI only: use a runtime that reads CDI files and set kubernetes.cdi = true, or give pods a device"
                ' of the host (rdma.backend = "shared").'
            )
        for path in self._nodes:
            answer.devices.add(container_path=path, host_path=path, permissions="rw")
        answer.envs.update(known_beforehand(self._device))
        return answer


def known_beforehand(device: str) -> dict[str, str]:
    """The environment without what comes with the pod's address: `python -m rdmanet.verbs env` tells the rest."""
    return {
        "RDMANET_DEVICE": device,
        "RDMANET_PORT": "1",
        "NCCL_IB_HCA": f"={device}:1",
        "UCX_NET_DEVICES": f"{device}:1",
        "UCX_TLS": "rc,self",
    }
