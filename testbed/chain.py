"""A chain of CNI plugins, executed as a runtime does (CNI 1.1.0, section 3 "Execution of Network Configurations")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rdmanet.errors import RdmanetError
from testbed.host import CNI_EXECUTABLE, REFERENCE_PLUGINS, CniOutcome, Host
from testbed.pod import Pod

OURS = "rdmanet"


class ChainError(RdmanetError):
    """A plugin of the chain refused; ``outcome`` has what it said."""

    def __init__(self, plugin: str, outcome: CniOutcome):
        said = outcome.sentence or outcome.stderr.strip() or f"status {outcome.returncode}"
        super().__init__(f"{plugin} refused: {said}", operation=outcome.command, subject=plugin)
        self.plugin = plugin
        self.outcome = outcome


@dataclass
class Chain:
    """One network of several plugins on a host. Results are kept as a runtime keeps them, by (pod, interface)."""

    host: Host
    plugins: Sequence[Mapping[str, Any]]
    version: str = "1.0.0"
    name: str = "chain"
    results: dict[tuple[str, str], Any] = field(default_factory=dict)
    given: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    def add(
        self, pod: Pod, capabilities: Mapping[str, Any] | None = None, *, ifname: str = "eth0", args: str | None = None
    ) -> Any:
        """ADD of every plugin in turn; the last one's result. `capabilities` are the runtime's arguments.

        Raises ChainError at the first that refuses: the runtime then calls `delete`.
        """
        key = (pod.container_id, ifname)
        self.given[key] = capabilities or {}
        result: Any = None
        for plugin in self.plugins:
            outcome = self._execute("ADD", plugin, pod, ifname, result, args=args)
            result = outcome.output
        self.results[key] = result
        return result

    def check(self, pod: Pod, *, ifname: str = "eth0") -> None:
        """CHECK of every plugin in turn, each with the last one's result of ADD; ChainError."""
        for plugin in self.plugins:
            outcome = self._execute("CHECK", plugin, pod, ifname, self.results[pod.container_id, ifname])
            assert outcome.output is None, outcome  # "must return either nothing or an error"

    def delete(self, pod: Pod, *, ifname: str = "eth0", netns: str | None = None) -> None:
        """DEL of every plugin in reverse order; ChainError. Without a result where ADD has failed."""
        key = (pod.container_id, ifname)
        for plugin in reversed(self.plugins):
            outcome = self._execute("DEL", plugin, pod, ifname, self.results.get(key), netns=netns)
            assert outcome.output is None, outcome
        self.results.pop(key, None)
        self.given.pop(key, None)

    def configuration(self, plugin: Mapping[str, Any], key: tuple[str, str], previous: Any) -> dict[str, Any]:
        """What the runtime derives for one plugin (section 3, "Deriving execution configuration")."""
        derived = {k: v for k, v in plugin.items() if k != "capabilities"}
        derived |= {"cniVersion": self.version, "name": self.name}
        wanted = plugin.get("capabilities", {})
        runtime_config = {k: v for k, v in self.given.get(key, {}).items() if wanted.get(k)}
        if runtime_config:
            derived["runtimeConfig"] = runtime_config
        if previous is not None:
            derived["prevResult"] = previous
        return derived

    def _execute(
        self, command: str, plugin: Mapping[str, Any], pod: Pod, ifname: str, previous: Any, **options: Any
    ) -> CniOutcome:
        kind = plugin["type"]
        executable = CNI_EXECUTABLE if kind == OURS else REFERENCE_PLUGINS / kind
        conf = self.configuration(plugin, (pod.container_id, ifname), previous)
        outcome = self.host.cni(command, pod, conf, ifname=ifname, executable=executable, **options)
        if outcome.returncode != 0:
            raise ChainError(kind, outcome)
        return outcome
