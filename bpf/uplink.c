// SPDX-License-Identifier: GPL-2.0
/*
 * tc ingress of an uplink: what belongs to pods' translated flows, ICMP errors about them, and what
 * goes to NodePorts and external IPs (nodeport.c). Everything else goes on untouched.
 */
#include "counters.h"
#include "drop.h"
#include "endpoint.h"
#include "flow.h"
#include "fragment.h"
#include "hook.h"
#include "icmp.h"
#include "limit.h"
#include "nat.h"
#include "node.h"
#include "packet.h"
#include "rewrite.h"
#include "service.h"

/*
 * The flow of a packet from outside, if it goes on: its pod is still there, and it is not stale.
 * NULL: as if there were none; what is worth nothing has been removed.
 */
static __always_inline struct flow_entry *uplink_flow(const struct packet *packet,
						      bool *from_origin, struct nat_end *pod,
						      struct endpoint_entry **endpoint,
						      __u64 now_ns)
{
	struct nat_end remote = {.address = packet->source, .port = packet->source_port};
	struct nat_work *work = nat_work_lookup();
	struct flow_entry *flow;
	__u32 service;
	bool from_high;

	if (!work)
		return NULL;
	flow = nat_inbound(packet, work, &from_high, pod, &service);
	if (!flow)
		return NULL;
	*from_origin = flow_from_origin(flow, from_high);
	*endpoint = endpoints.lookup(&pod->address);
	/* The address may belong to another pod by now. */
	if (*endpoint && (*endpoint)->attachment == (*from_origin ? flow->target : flow->origin) &&
	    !flow_is_stale(flow, packet->protocol, now_ns) &&
	    /* A client connects anew from the same port: its backend is chosen anew. */
	    !(*from_origin && flow->closing && flow_opens(packet)) &&
	    /* Datagrams leave a backend that has gone at once. */
	    !(*from_origin && packet->protocol == IPPROTO_UDP && (flow->flags & FLOW_SERVICE) &&
	      !member_lives(service, &pod->address, pod->port)))
		return flow;
	nat_remove(work, flow, pod, &remote);
	return NULL;
}

/* RFC 5508 4.2: to the pod, with the flow's inside addresses; 0 where it is none of ours. */
static __always_inline int uplink_error(struct __sk_buff *skb, const struct packet *packet,
					const struct node_entry *config)
{
	__u32 epoch = policy_epoch(config);
	struct packet about = {}; /* the quoted packet, then one the other way */
	struct endpoint_entry *endpoint;
	struct address_key address;
	struct flow_entry *flow;
	struct nat_end pod;
	bool from_origin;
	__be16 port;
	int reason;

	if (icmp_quoted(skb, packet, &about))
		return TC_ACT_UNSPEC;
	address = about.source;
	about.source = about.destination;
	about.destination = address;
	port = about.source_port;
	about.source_port = about.destination_port;
	about.destination_port = port;
	about.tcp_flags = 0;
	flow = uplink_flow(&about, &from_origin, &pod, &endpoint, flow_clock());
	if (!flow)
		return TC_ACT_UNSPEC;
	if (flow->epoch != epoch) {
		reason = nat_judge(&about, from_origin, endpoint, &pod);
		if (reason)
			return drop(skb, endpoint->attachment, reason);
	}
	reason = limit_to_pod(skb, packet, endpoint);
	if (!reason)
		reason = rewrite_error(skb, packet, &about, true, port, &pod);
	if (reason)
		return drop(skb, endpoint->attachment, reason);
	count(skb, endpoint->slot, TO_POD, false);
	return deliver(skb, config, endpoint);
}

static __always_inline int uplink_packet(struct __sk_buff *skb, const struct packet *packet,
					 const struct node_entry *config)
{
	__u32 epoch = policy_epoch(config);
	__u64 now_ns = flow_clock();
	struct endpoint_entry *endpoint;
	struct flow_entry *flow;
	struct nat_end pod;
	bool from_origin;
	int reason;

	/* Pods are not asked from outside, only answered. */
	if (is_icmp(packet) && !(packet->flags & IS_LATER_FRAGMENT) &&
	    packet->icmp_type != (packet->family == 4 ? ICMP_ECHOREPLY : ICMPV6_ECHO_REPLY))
		return TC_ACT_UNSPEC;
	flow = uplink_flow(packet, &from_origin, &pod, &endpoint, now_ns);
	if (!flow) {
		if (config->maglev_size)
			programs.call(skb, HOOK_NODEPORT);
		return TC_ACT_UNSPEC;
	}
	/* No answer, unless both ends open at once (RFC 5382 REQ-2). */
	if (!from_origin && flow_opens(packet) && (flow->closing || (flow->flags & FLOW_REPLIED)))
		return TC_ACT_UNSPEC;
	if (flow->epoch != epoch) {
		reason = nat_judge(packet, from_origin, endpoint, &pod);
		if (reason)
			return drop(skb, endpoint->attachment, reason);
		flow->epoch = epoch;
	}
	flow_touch(flow, packet, from_origin, now_ns);
	reason = limit_to_pod(skb, packet, endpoint);
	if (!reason)
		reason = rewrite(skb, packet, false, &pod);
	if (reason)
		return drop(skb, endpoint->attachment, reason);
	fragment_keep(packet);
	count(skb, endpoint->slot, TO_POD, false);
	return deliver(skb, config, endpoint);
}

/*
 * Nobody outside has the node's own addresses, which policy trusts, or its pods'. IPv4's stack
 * takes packets from them for martians (RFC 1812 5.3.7), IPv6's would forward them to a pod. IPv6
 * packets with mapped addresses (RFC 4291 2.5.5.2) would meet the keys of IPv4.
 */
static __always_inline bool uplink_is_martian(const struct packet *packet)
{
	if (packet->family == 6 &&
	    (address_is_mapped(&packet->source) || address_is_mapped(&packet->destination)))
		return true;
	return node_addresses.lookup((struct address_key *)&packet->source) ||
	       endpoints.lookup((struct address_key *)&packet->source);
}

int uplink(struct __sk_buff *skb)
{
	struct node_entry *config = node_lookup();
	struct packet *packet = packet_new();
	struct endpoint_entry *endpoint;
	__u32 ifindex = skb->ifindex;

	enter(skb, HOOK_UPLINK);
	if (!config || !packet || !uplinks.lookup(&ifindex))
		return TC_ACT_UNSPEC;
	if (parse_ethernet(skb, packet))
		return TC_ACT_UNSPEC;
	if (packet->ethertype != ETH_P_IP && packet->ethertype != ETH_P_IPV6)
		return TC_ACT_UNSPEC;
	if (skb->pkt_type != PACKET_HOST || parse_network(skb, packet))
		return TC_ACT_UNSPEC;
	if (uplink_is_martian(packet)) {
		endpoint = endpoints.lookup(&packet->destination);
		if (endpoint)
			return drop(skb, endpoint->attachment, DROP_SPOOFED_ADDRESS);
		return TC_ACT_UNSPEC;
	}
	if (parse_transport(skb, packet))
		return TC_ACT_UNSPEC;
	/*
	 * A later part whose first one was not a pod's is the host's as well. What only passes
	 * through this node goes on in the order in which it came.
	 */
	if (node_addresses.lookup(&packet->destination) ? fragment_meet(skb, packet)
							: fragment_join(packet))
		return TC_ACT_UNSPEC;
	if (icmp_is_error(packet))
		return uplink_error(skb, packet, config);
	return uplink_packet(skb, packet, config);
}
