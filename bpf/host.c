// SPDX-License-Identifier: GPL-2.0
/* tc ingress of rdmanet1: everything that the host's stack sends to pods. */
#include "counters.h"
#include "drop.h"
#include "endpoint.h"
#include "flow.h"
#include "fragment.h"
#include "guard.h"
#include "limit.h"
#include "node.h"
#include "packet.h"
#include "policy.h"
#include "track.h"

int host(struct __sk_buff *skb)
{
	struct node_entry *config = node_lookup();
	struct packet *packet = packet_new();
	struct endpoint_entry *endpoint;
	struct flow_end from, to;
	__u32 epoch;
	bool roce;
	int reason;

	enter(skb, HOOK_HOST);
	if (!config || !packet)
		return drop(skb, 0, DROP_NO_NODE);
	epoch = policy_epoch(config);
	reason = parse_ethernet(skb, packet);
	if (reason)
		return drop(skb, 0, reason);
	if (packet->ethertype != ETH_P_IP && packet->ethertype != ETH_P_IPV6)
		return drop(skb, 0, DROP_NOT_IP);
	reason = parse_network(skb, packet);
	if (reason)
		return drop(skb, 0, reason);
	if ((packet->flags & IS_TO_GROUP) || address_is_group(&packet->destination))
		return drop(skb, 0, DROP_MULTICAST);
	if (address_is_local_scope(&packet->destination, packet->family))
		return drop(skb, 0, DROP_NO_ROUTE);
	reason = parse_transport(skb, packet);
	if (!reason)
		reason = fragment_meet(skb, packet);
	if (reason)
		return drop(skb, 0, reason);

	endpoint = endpoints.lookup(&packet->destination);
	if (!endpoint)
		return drop(skb, 0, DROP_NO_ENDPOINT);
	end_outside(&from);
	end_of_endpoint(&to, endpoint);
	roce = packet->flags & IS_ROCE;
	if (roce) {
		reason = guard_judge(skb, packet, HAS_DEVICE, endpoint->flags);
		if (reason == GUARD_UNLEASED)
			reason = policy_judge_roce(packet, &from, &to);
	} else if (icmp_is_error(packet)) {
		/* The host's own may be about what was not let through. */
		if (!node_addresses.lookup(&packet->source))
			reason = flow_pass_error(skb, config, packet, &from, &to);
	} else {
		reason = flow_pass(skb, config, packet, &from, &to, epoch);
	}
	/* Back where it came from. */
	if (reason == FLOW_TO_STACK)
		reason = DROP_NO_ROUTE;
	if (!reason)
		reason = limit_to_pod(skb, packet, endpoint);
	if (reason)
		return drop(skb, endpoint->attachment, reason);
	fragment_keep(packet);
	count(skb, endpoint->slot, TO_POD, roce);
	return deliver(skb, config, endpoint);
}
