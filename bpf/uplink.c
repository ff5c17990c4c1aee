// SPDX-License-Identifier: GPL-2.0
/* tc ingress of an uplink: answers to what was masqueraded; everything else goes on untouched. */
#include "counters.h"
#include "endpoint.h"
#include "nat.h"
#include "node.h"
#include "packet.h"

int uplink(struct __sk_buff *skb)
{
	struct packet packet = {};
	struct node_entry *config = node_lookup();
	struct endpoint_entry *endpoint;
	struct uplink_entry *own;
	struct nat_entry *found, flow;
	__u32 ifindex = skb->ifindex;
	int reason;

	enter(skb, HOOK_UPLINK);
	if (!config || !config->masquerade)
		return TC_ACT_UNSPEC;
	own = uplinks.lookup(&ifindex);
	if (!own)
		return TC_ACT_UNSPEC;
	if (parse_ethernet(skb, &packet))
		return TC_ACT_UNSPEC;
	if (packet.ethertype != ETH_P_IP && packet.ethertype != ETH_P_IPV6)
		return TC_ACT_UNSPEC;
	if (skb->pkt_type != PACKET_HOST || parse_network(skb, &packet))
		return TC_ACT_UNSPEC;
	if (!address_equal(&packet.destination, packet.family == 4 ? &own->ipv4 : &own->ipv6))
		return TC_ACT_UNSPEC;
	if (parse_transport(skb, &packet))
		return TC_ACT_UNSPEC;
	found = nat_inbound(&packet);
	if (!found)
		return TC_ACT_UNSPEC;
	/* At once: another CPU may evict the entry and use its memory for another flow. */
	flow = *found;
	endpoint = endpoints.lookup(&flow.address);
	/* The address may belong to another pod by now. */
	if (!endpoint || endpoint->attachment != flow.attachment)
		return TC_ACT_UNSPEC;

	reason = nat_rewrite(skb, &packet, false, &flow.address, flow.port);
	if (reason)
		return drop(skb, endpoint->attachment, reason);
	count(skb, endpoint->slot, TO_POD, false);
	return deliver(skb, config, endpoint);
}
