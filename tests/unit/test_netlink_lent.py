"""What ``rdmanet.netlink.lent`` packs by hand, read back by pyroute2."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from rdmanet.model import IPAddress
from rdmanet.netlink import lent, messages
from tests.unit.test_netlink_messages import V4, V6, decoded

RANGES = (ipaddress.ip_network("10.213.0.0/20"), ipaddress.ip_network("fd72:646d:616e::/64"))
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


@pytest.mark.parametrize("network", RANGES, ids=str)
def test_the_rule_and_its_table(network: messages.IPNetwork) -> None:
    rule = decoded(lent.rule(lent.RTM_NEWRULE, network, "nic0"), fibmsg)
    assert (rule["family"], rule["action"]) == (FAMILY[network.version], 1)
    found = [rule.get_attr(f"FRA_{name}") for name in ("PRIORITY", "TABLE", "OIFNAME")]
    assert found == [lent.TABLE, lent.TABLE, "nic0"]
    route = decoded(lent.table_route(network, 7), rtmsg)
    assert (route["family"], route["dst_len"], route["type"]) == (FAMILY[network.version], network.prefixlen, 2)
    found = [route.get_attr(f"RTA_{name}") for name in ("TABLE", "DST", "OIF")]
    assert found == [lent.TABLE, str(network.network_address), 7]


@pytest.mark.parametrize("address", [V4, V6], ids=str)
def test_an_address_from_which_the_host_never_sends(address: IPAddress) -> None:
    found = decoded(lent.add_address(7, address), ifaddrmsg)
    assert (found["index"], found["prefixlen"]) == (7, address.max_prefixlen)
    assert found.get_attr("IFA_LOCAL") == found.get_attr("IFA_ADDRESS") == str(address)
    assert found.get_attr("IFA_FLAGS") & lent.IFA_F_NOPREFIXROUTE
    if address.version == 4:
        assert found["scope"] == lent.RT_SCOPE_HOST
    else:
        lifetime = found.get_attr("IFA_CACHEINFO")
        assert (lifetime["ifa_preferred"], lifetime["ifa_valid"]) == (0, lent.FOREVER_S)
    again = decoded(lent.delete_address(7, address), ifaddrmsg)
    assert (again["index"], again.get_attr("IFA_LOCAL")) == (7, str(address))


@pytest.mark.parametrize("address", [V4, V6], ids=str)
def test_the_route_that_the_kernel_made(address: IPAddress) -> None:
    found = decoded(lent.delete_local_route(7, address), rtmsg)
    assert (found["dst_len"], found["type"]) == (address.max_prefixlen, 2)
    assert [found.get_attr(f"RTA_{name}") for name in ("TABLE", "DST", "OIF")] == [255, str(address), 7]
