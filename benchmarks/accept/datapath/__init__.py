"""The datapath: one eBPF layer in place of iptables, kube-proxy and the bridge."""

from __future__ import annotations

from benchmarks.accept.proof import Claim, Place, Proof, Work, later


def _of(module: str) -> Work:
    return later(__name__, module)


_HERE = (Place.HOST,)

#: In the order of the issue.
ROWS: Proof = {
    "dual-stack": Claim(_of("dual_stack"), _HERE),
    "masquerade": Claim(_of("masquerade"), _HERE),
    "nat-full": Claim(_of("nat_full"), _HERE),
    "clusterip": Claim(_of("clusterip"), _HERE),
    "nodeport": Claim(_of("nodeport"), _HERE),
    "maglev": Claim(_of("maglev"), _HERE),
    "affinity": Claim(_of("affinity"), _HERE),
    "drain": Claim(_of("drain"), _HERE),
    "policy": Claim(_of("policy"), _HERE),
    "policy-live": Claim(_of("policy_live"), _HERE),
    "one-policy": Claim(_of("one_policy")),
    "yaml": Claim(_of("manifests"), _HERE),
    "monitor": Claim(_of("monitor"), _HERE),
    "redirect-policy": Claim(_of("redirect_policy"), (Place.HOST, Place.DISTRIBUTION)),
    "swap": Claim(_of("swap"), _HERE),
    "differential": Claim(_of("differential"), _HERE),
    "scale": Claim(_of("scale"), _HERE),
}
