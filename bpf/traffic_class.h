/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The bandwidth class of what a pod sends by RoCE. The ICRC leaves the traffic class out, as it
 * does what routers change (RoCEv2, annex A17.3.3).
 */
#include "packet.h"

/*
 * Writes the pod's class over whatever the packet says: who makes its own queue pairs may choose
 * any. The two bits of congestion notification (RFC 3168 5) stay. 0, or an error.
 */
static __always_inline int set_traffic_class(struct __sk_buff *skb, const struct packet *packet,
					     __u8 traffic_class)
{
	bool ipv4 = packet->family == 4;
	/* IPv4: version, header length, class; IPv6: version, class, begin of the flow label. */
	__be16 mask = ipv4 ? bpf_htons(0x00fc) : bpf_htons(0x0fc0);
	__be16 wanted = ipv4 ? bpf_htons(traffic_class) : bpf_htons(traffic_class << 4);
	__be16 before, after;

	if (bpf_skb_load_bytes(skb, NETWORK_OFFSET, &before, sizeof(before)))
		return -1;
	after = (before & ~mask) | (wanted & mask);
	if (before == after)
		return 0;
	if (ipv4 && bpf_l3_csum_replace(skb, NETWORK_OFFSET + offsetof(struct iphdr, check), before,
					after, sizeof(after)))
		return -1;
	return bpf_skb_store_bytes(skb, NETWORK_OFFSET, &after, sizeof(after), 0);
}
