"""A lost database on a host whose pods have RDMA devices and leases: both are known again, and transfers go on."""

from __future__ import annotations

import sys

from benchmarks.accept.rdma import faults
from testbed.damage import damage
from testbed.host import Host
from testbed.paths import REPOSITORY
from testbed.world import DATABASE

FIELDS = ("id", "container_id", "pod", "netns", "mac", "ipv4", "ipv6", "guard", "max_leases", "device")


def known(host: Host) -> list[dict[str, object]]:
    """What status says of each attachment that a repair has to find."""
    rows = host.api("GET", "/v1/status")["attachments"]
    return [{field: row[field] for field in FIELDS} for row in rows]


def test_devices_and_leases_are_known_again(host: Host) -> None:
    host.start_agent(faults.CONFIGURATION)
    with faults.scene(host, "database") as at:
        faults.begin(at)
        before = known(host)
        host.kill_agent()
        damage(host, DATABASE, "gone")
        argv = [sys.executable, "-m", "rdmanet", "repair", "--database", "--config", host._config_file()]
        said = host.exec(argv, cwd=str(REPOSITORY)).stdout
        at.run_on()
        for end in at.ends:
            assert f"and {end.device} of default/{end.pod.name}" in said
        host.start_agent(faults.CONFIGURATION)
        at.run_on()
        assert known(host) == before
        assert len(host.api("GET", "/v1/status")["leases"]) == faults.LEASES
        outcomes = at.client.ask("end", within_s=faults.WITHIN_S, timeout_s=faults.WITHIN_S + 30)
        received = at.server.ask("received", within_s=faults.WITHIN_S, timeout_s=faults.WITHIN_S + 30)
        result = faults.verdict("database", True, outcomes, received)
        assert not any(result["told"].values())
    host.stop_agent()
