/* SPDX-License-Identifier: GPL-2.0 */
/* Options of the node: a map and not compiler flags, so that one artifact serves all hosts. */

struct node_entry {
	__u8 gateway_mac[6];
	__u16 masquerade;   /* not 0: translate what leaves through an uplink */
	__u32 host_ifindex; /* rdmanet0; 0: not configured yet */
	__u16 first_port;   /* outside ports for masquerading, in host byte order, both included */
	__u16 last_port;
	__u32 epoch; /* of the policy: raised after every change, flows are judged again */
	__u32 maglev_size;
	__u32 max_flows_per_pod;
	__u32 monitor; /* not 0: somebody reads events */
};

BPF_F_TABLE("array", __u32, struct node_entry, node, 1, 0);

static __always_inline struct node_entry *node_lookup(void)
{
	__u32 zero = 0;
	struct node_entry *entry = node.lookup(&zero);

	if (!entry || !entry->host_ifindex)
		return NULL;
	return entry;
}
