// SPDX-License-Identifier: GPL-2.0
/* tc ingress of rdmanet1: everything that the host's stack sends to pods. */
#include "counters.h"
#include "drop.h"
#include "endpoint.h"
#include "guard.h"
#include "node.h"
#include "packet.h"

int host(struct __sk_buff *skb)
{
	struct packet packet = {};
	struct node_entry *config = node_lookup();
	struct endpoint_entry *endpoint;
	bool roce;
	int reason;

	if (!config)
		return drop(skb, 0, DROP_NO_NODE);
	reason = parse_ethernet(skb, &packet);
	if (reason)
		return drop(skb, 0, reason);
	if (packet.ethertype != ETH_P_IP && packet.ethertype != ETH_P_IPV6)
		return drop(skb, 0, DROP_NOT_IP);
	reason = parse_network(skb, &packet);
	if (reason)
		return drop(skb, 0, reason);
	if ((packet.flags & IS_TO_GROUP) || address_is_group(&packet.destination))
		return drop(skb, 0, DROP_MULTICAST);
	if (address_is_local_scope(&packet.destination, packet.family))
		return drop(skb, 0, DROP_NO_ROUTE);
	reason = parse_transport(skb, &packet);
	if (reason)
		return drop(skb, 0, reason);

	endpoint = endpoints.lookup(&packet.destination);
	if (!endpoint)
		return drop(skb, 0, DROP_NO_ENDPOINT);
	roce = packet.flags & IS_ROCE;
	if (roce) {
		reason = guard_judge(skb, &packet, HAS_DEVICE, endpoint->flags);
		if (reason)
			return drop(skb, endpoint->attachment, reason);
	}
	count(skb, endpoint->slot, TO_POD, roce);
	return deliver(skb, config, endpoint);
}
