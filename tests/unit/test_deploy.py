"""deploy/: manifests against Kubernetes' published schema, and against the programs that read what they carry."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rdmanet import cli, config
from rdmanet.cni import NetworkConfig
from testbed.limited import granted
from testbed.openapi import violations
from testbed.paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
CUSTOM = "NetworkAttachmentDefinition"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((MANIFESTS / name).read_text(encoding="utf-8")))


def one(name: str, kind: str) -> Any:
    (found,) = [document for document in documents(name) if document["kind"] == kind]
    return found


DAEMON_SET = one("rdmanet.yaml", "DaemonSet")
POD = DAEMON_SET["spec"]["template"]["spec"]
CONTAINERS = {c["name"]: c for c in POD["initContainers"] + POD["containers"]}


def settings(tmp_path: Path) -> config.Config:
    path = tmp_path / "rdmanet.toml"
    path.write_text(one("rdmanet.yaml", "ConfigMap")["data"]["rdmanet.toml"])
    return config.load(path)


@pytest.mark.parametrize("path", sorted(MANIFESTS.iterdir()), ids=lambda path: path.name)
def test_manifests_are_what_the_schema_says(path: Path) -> None:
    found = documents(path.name)
    assert found
    for document in found:
        if document["kind"] != CUSTOM:
            assert violations(document) == []


def _typing_error(pod: Any) -> None:
    pod["containers"][0]["volumeMounts"][0]["mountpath"] = "/etc"


def _text_for_number(pod: Any) -> None:
    pod["terminationGracePeriodSeconds"] = "30"


def _without_name(pod: Any) -> None:
    del pod["volumes"][0]["name"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_typing_error, "containers[0].volumeMounts[0].mountpath is no field of V1VolumeMount"),
        (_text_for_number, "terminationGracePeriodSeconds is '30' and not of type int"),
        (_without_name, "volumes[0].name is missing"),
    ],
)
def test_the_check_can_say_no(spoil: Callable[[Any], None], sentence: str) -> None:
    document = copy.deepcopy(DAEMON_SET)
    spoil(document["spec"]["template"]["spec"])
    (found,) = violations(document)
    assert sentence in found


def test_volumes_are_there_and_used() -> None:
    used = {mount["name"] for c in CONTAINERS.values() for mount in c["volumeMounts"]}
    assert used == {volume["name"] for volume in POD["volumes"]}


def test_everything_is_in_one_namespace_that_is_there() -> None:
    (namespace,) = {d["metadata"]["namespace"] for d in documents("rdmanet.yaml") if d["kind"] != "Namespace"}
    assert namespace == one("rdmanet.yaml", "Namespace")["metadata"]["name"]
    assert POD["serviceAccountName"] == one("rdmanet.yaml", "ServiceAccount")["metadata"]["name"]
    (config_volume,) = [volume for volume in POD["volumes"] if "configMap" in volume]
    assert config_volume["configMap"]["name"] == one("rdmanet.yaml", "ConfigMap")["metadata"]["name"]


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_run_commands_that_exist(container: Any) -> None:
    chosen = cli._parser().parse_args(container["args"])
    # No --config: where the ConfigMap is mounted is where rdmanet looks.
    assert chosen.config is None
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"{mounts['config']}/rdmanet.toml" == str(config.DEFAULT_PATH)
    for probe in ("readinessProbe", "livenessProbe"):
        if probe in container:
            program, *words = container[probe]["exec"]["command"]
            assert program == "rdmanet"
            cli._parser().parse_args(words)


def test_the_installer_writes_into_the_hosts_directories() -> None:
    chosen = cli._parser().parse_args(CONTAINERS["install"]["args"])
    hosts = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in POD["volumes"]}
    places = {mount["mountPath"]: hosts[mount["name"]] for mount in CONTAINERS["install"]["volumeMounts"]}
    assert places[str(chosen.bin_dir)] == "/opt/cni/bin"
    assert places[str(chosen.conf_dir)] == "/etc/cni/net.d"
    # What it copies is where the image has it, and nothing of the host's is mounted over that.
    (directory,) = re.findall(r"make -C cni OUT=/out(/\S+)", (REPOSITORY / "Dockerfile").read_text())
    assert str(chosen.executable) == f"{directory}/rdmanet"
    assert not [place for place in places if chosen.executable.is_relative_to(place)]


def test_what_the_daemon_set_did_is_taken_back() -> None:
    """By the same image with the same rights and mounts: its files, then everything that the agent did to the host."""
    pod = one("remove.yaml", "DaemonSet")["spec"]["template"]["spec"]
    files, uninstall = pod["initContainers"]
    (done,) = pod["containers"]
    parser = cli._parser()
    removal, installation = (parser.parse_args(args) for args in (files["args"], CONTAINERS["install"]["args"]))
    assert removal.remove
    assert (removal.bin_dir, removal.conf_dir) == (installation.bin_dir, installation.conf_dir)
    assert parser.parse_args(uninstall["args"]).config is None
    assert {c["image"] for c in (files, uninstall, done)} == {CONTAINERS["agent"]["image"]}
    assert uninstall["securityContext"] | {"runAsUser": 0} == CONTAINERS["agent"]["securityContext"]
    assert (pod["hostNetwork"], pod["hostPID"], pod["tolerations"]) == (True, True, POD["tolerations"])

    def places(pod: Any, container: Any) -> set[tuple[str, str, str]]:
        """The host's directories: there, in the container, and which way mounts go."""
        hosts = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
        return {
            (hosts[m["name"]], m["mountPath"], m.get("mountPropagation", ""))
            for m in container["volumeMounts"]
            if m["name"] in hosts
        }

    assert places(pod, files) == places(POD, CONTAINERS["install"])
    kubelets = {place for place in places(POD, CONTAINERS["agent"]) if place[0].startswith("/var/lib/kubelet/")}
    assert places(pod, uninstall) == places(POD, CONTAINERS["agent"]) - kubelets


def test_the_configuration_is_read_and_its_directories_are_mounted(tmp_path: Path) -> None:
    found = settings(tmp_path)
    assert found.kubernetes.slots > 0
    hosts = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in POD["volumes"]}

    def mounted(container: str) -> set[str]:
        """Paths that are the host's under the same name."""
        mounts = CONTAINERS[container]["volumeMounts"]
        return {mount["mountPath"] for mount in mounts if hosts[mount["name"]] == mount["mountPath"]}

    agent, kubernetes = found.agent, found.kubernetes
    both = {str(agent.socket.parent)}
    places = {agent.state_dir, found.datapath.bpffs_dir.parent, kubernetes.pod_resources.parent, kubernetes.cdi_dir}
    assert {str(path) for path in places} | both <= mounted("agent")
    assert {str(kubernetes.plugin_dir)} | both <= mounted("device-plugin")


def test_the_agent_has_the_units_capabilities_and_the_others_none() -> None:
    """Those that tests/kernel/test_service.py takes away one by one, and docs/operations.md lists."""
    listed = re.findall(r"^\| `CAP_(\w+)` \|", (REPOSITORY / "docs/operations.md").read_text(), re.MULTILINE)
    assert tuple(listed) == granted()
    for name, container in CONTAINERS.items():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert "privileged" not in context
        assert context["capabilities"]["drop"] == ["ALL"]
        if name == "agent":
            assert tuple(context["capabilities"]["add"]) == granted()
        else:
            assert "add" not in context["capabilities"]
            assert context["allowPrivilegeEscalation"] is False
        # What goes from the container to the host needs a privileged one.
        assert not [m for m in container["volumeMounts"] if m.get("mountPropagation") == "Bidirectional"]
    assert (POD["hostNetwork"], POD["hostPID"]) == (True, True)
    assert POD["automountServiceAccountToken"] is False


def test_the_job_asks_for_the_resource(tmp_path: Path) -> None:
    resource = settings(tmp_path).kubernetes.resource
    job = one("training-job.yaml", "Job")
    (rank,) = job["spec"]["template"]["spec"]["containers"]
    assert rank["resources"]["limits"] == {resource: "1"}
    environment = {one["name"]: one.get("value") for one in rank["env"]}
    assert int(environment["WORLD_SIZE"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    service = one("training-job.yaml", "Service")["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["subdomain"] == service
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service}"
    # The Job controller gives its pods this label; they are looked up before they are ready, and are on one node.
    ranks = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    spec = one("training-job.yaml", "Service")["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"], spec["selector"]) == ("None", True, ranks)
    affinity = job["spec"]["template"]["spec"]["affinity"]["podAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert (term["topologyKey"], term["labelSelector"]["matchLabels"]) == ("kubernetes.io/hostname", ranks)


def test_multus_network_is_one_of_ours(tmp_path: Path) -> None:
    document = one("network-attachment-definition.yaml", CUSTOM)
    assert document["apiVersion"] == "k8s.cni.cncf.io/v1"
    assert set(document["spec"]) == {"config"}
    found = NetworkConfig.parse(json.loads(document["spec"]["config"]))
    assert found.name == document["metadata"]["name"]
    assert "deviceID" in found.capabilities
    resource = document["metadata"]["annotations"]["k8s.v1.cni.cncf.io/resourceName"]
    assert resource == settings(tmp_path).kubernetes.resource


def test_systemd_understands_the_device_plugins_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (package systemd)")
    name = "rdmanet-device-plugin.service"
    text = (DEPLOY / name).read_text(encoding="utf-8")
    assert "ExecStart=/opt/rdmanet/bin/rdmanet device-plugin\n" in text
    unit = tmp_path / name
    unit.write_text(text.replace("/opt/rdmanet/bin/rdmanet", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], check=False, capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if name in line]
    assert (done.returncode, ours) == (0, []), done.stderr
