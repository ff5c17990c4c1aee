// SPDX-License-Identifier: GPL-2.0
/* tc ingress of the host's end of a pod's veth pair: everything that a pod sends. */
#include <uapi/linux/in.h>
#include "counters.h"
#include "drop.h"
#include "endpoint.h"
#include "flow.h"
#include "fragment.h"
#include "guard.h"
#include "hook.h"
#include "limit.h"
#include "monitor.h"
#include "neighbour.h"
#include "node.h"
#include "packet.h"
#include "policy.h"
#include "service.h"
#include "track.h"
#include "traffic_class.h"
#include "usual.h"

static __always_inline bool pod_owns_source(const struct packet *packet,
					    const struct attachment_entry *attachment)
{
	if (packet->family == 4)
		return packet->source.word[3] == attachment->ipv4.word[3] &&
		       attachment->ipv4.word[2]; /* zero: none */
	/* Zero means none, and is the unspecified address as well. */
	return !address_is_zero(&packet->source) &&
	       address_equal(&packet->source, &attachment->ipv6);
}

/* To another pod of this host. */
static __always_inline int pod_to_pod(struct __sk_buff *skb, const struct packet *packet,
				      const struct node_entry *config,
				      const struct attachment_entry *attachment,
				      const struct endpoint_entry *endpoint, __u32 epoch)
{
	bool roce = packet->flags & IS_ROCE;
	struct flow_end from, to;
	int reason;

	/* Its own stack keeps such packets inside; what comes out was made by hand. */
	if (endpoint->ifindex == skb->ifindex)
		return drop(skb, attachment->id, DROP_NO_ROUTE);
	end_of_attachment(&from, attachment);
	end_of_endpoint(&to, endpoint);
	if (roce) {
		reason = guard_judge(skb, packet, attachment->flags, endpoint->flags);
		if (reason == GUARD_UNLEASED)
			reason = policy_judge_roce(packet, &from, &to);
	} else if (icmp_is_error(packet)) {
		reason = flow_pass_error(skb, config, packet, &from, &to);
	} else {
		reason = flow_pass(skb, config, packet, &from, &to, epoch);
	}
	if (!reason)
		reason = limit_to_pod(skb, packet, endpoint);
	if (reason && reason != FLOW_TO_STACK)
		return drop(skb, drop_attachment(reason, &from, &to), reason);
	fragment_keep(packet);
	if (reason) {
		count(skb, attachment->slot, FROM_POD, false);
		return deliver_to_host(skb, config, attachment->id, attachment->mac);
	}
	count(skb, attachment->slot, FROM_POD, roce);
	count(skb, endpoint->slot, TO_POD, roce);
	return deliver(skb, config, endpoint);
}

int pod(struct __sk_buff *skb)
{
	struct node_entry *config = node_lookup();
	struct packet *packet;
	struct attachment_entry *attachment;
	struct endpoint_entry *endpoint;
	__u32 epoch, ifindex;
	int reason, verdict;

	enter(skb, HOOK_POD);
	if (!config)
		return drop(skb, 0, DROP_NO_NODE);
	epoch = policy_epoch(config);
	ifindex = skb->ifindex;
	attachment = near_attachment_lookup(ifindex);
	if (attachment) {
		if (usual(skb, config, attachment, &verdict))
			return verdict;
	} else {
		attachment = attachments.lookup(&ifindex);
		if (!attachment)
			return drop(skb, 0, DROP_NO_ATTACHMENT);
	}

	packet = packet_new();
	if (!packet)
		return drop(skb, 0, DROP_NO_NODE);
	reason = parse_ethernet(skb, packet);
	if (reason)
		return drop(skb, attachment->id, reason);
	if (!mac_equal(packet->source_mac, attachment->mac))
		return drop(skb, attachment->id, DROP_SPOOFED_MAC);
	if (packet->ethertype == ETHERTYPE_ARP)
		return neighbour_arp(skb, config, attachment);
	if (packet->ethertype != ETH_P_IP && packet->ethertype != ETH_P_IPV6)
		return drop(skb, attachment->id, DROP_NOT_IP);
	if (packet->ethertype == ETH_P_IPV6 && is_neighbour_discovery(skb))
		return neighbour_discovery(skb, packet, config, attachment);
	/*
	 * Router solicitations and multicast listener reports come from addresses that are not the
	 * attachment's.
	 */
	if (packet->flags & IS_TO_GROUP)
		return drop(skb, attachment->id, DROP_MULTICAST);

	reason = parse_network(skb, packet);
	if (reason)
		return drop(skb, attachment->id, reason);
	if (!pod_owns_source(packet, attachment))
		return drop(skb, attachment->id, DROP_SPOOFED_ADDRESS);
	endpoint = near_endpoint_lookup(&packet->destination, packet->family);
	/* What a pod has is neither a group nor local. */
	if (!endpoint) {
		if (address_is_group(&packet->destination))
			return drop(skb, attachment->id, DROP_MULTICAST);
		if (address_is_local_scope(&packet->destination, packet->family))
			return drop(skb, attachment->id, DROP_NO_ROUTE);
	}
	reason = parse_transport(skb, packet);
	if (!reason)
		reason = fragment_meet(skb, packet);
	if (reason)
		return drop(skb, attachment->id, reason);
	/* Behind extension headers, or in parts: no pod says to another who its neighbours are. */
	if (icmp_is_neighbour_discovery(packet))
		return drop(skb, attachment->id, DROP_NEIGHBOUR);
	if (packet->flags & IS_ROCE) {
		if (!(attachment->flags & HAS_DEVICE))
			return drop(skb, attachment->id, DROP_ROCE_NO_DEVICE);
		if (set_traffic_class(skb, packet, attachment->traffic_class))
			return drop(skb, attachment->id, DROP_MALFORMED);
	}
	reason = limit_from_pod(skb, packet, attachment);
	if (reason)
		return drop(skb, attachment->id, reason);

	if (!endpoint)
		endpoint = endpoints.lookup(&packet->destination);
	if (endpoint)
		return pod_to_pod(skb, packet, config, attachment, endpoint, epoch);
	programs.call(skb, HOOK_OUTSIDE);
	return drop(skb, attachment->id, DROP_NO_PROGRAM);
}
