// SPDX-License-Identifier: GPL-2.0
/*
 * Goes on from pod.c with what is for no pod of this host: to the host itself, or out through an
 * uplink. The source and, of RoCE, the device and the traffic class are right already.
 */
#include "counters.h"
#include "drop.h"
#include "endpoint.h"
#include "flow.h"
#include "fragment.h"
#include "icmp.h"
#include "icmp_answer.h"
#include "nat_out.h"
#include "node.h"
#include "packet.h"
#include "policy.h"
#include "rewrite.h"
#include "track.h"

#ifndef AF_INET
#define AF_INET	 2
#define AF_INET6 10
#endif

/* bcc 0.26 declares bpf_redirect_neigh without the length of its parameters. */
static long (*redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *next_hop, int bytes,
			      __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/* To the host's stack: its own addresses, or what it answers with an error. */
static __always_inline int pod_to_host(struct __sk_buff *skb, const struct packet *packet,
				       const struct node_entry *config,
				       const struct attachment_entry *attachment)
{
	count(skb, attachment->slot, FROM_POD, packet->flags & IS_ROCE);
	return deliver_to_host(skb, config, attachment->id, attachment->mac);
}

/* Of the largest IP packet that the frame is or, as GSO, becomes; 0: not known. */
static __always_inline __u16 largest_bytes(struct __sk_buff *skb, const struct packet *packet)
{
	__u32 bytes = packet->transport - NETWORK_OFFSET + skb->gso_size;
	__u8 words = 0;

	if (!skb->gso_size)
		return packet->end - NETWORK_OFFSET;
	if (packet->protocol == IPPROTO_UDP)
		bytes += sizeof(struct udphdr);
	else if (packet->protocol == IPPROTO_TCP &&
		 !bpf_skb_load_bytes(skb, packet->transport + 12, &words, 1))
		bytes += (words >> 4) * 4;
	else
		return 0;
	return bytes > 0xffff ? 0xffff : bytes;
}

/*
 * A pod is told that its packet does not go on: IPv4 by the host's stack, IPv6 by icmp_answer(), as
 * the stack says nothing where the host as a whole does not forward.
 */
static __always_inline int pod_told(struct __sk_buff *skb, const struct packet *packet,
				    const struct node_entry *config,
				    const struct attachment_entry *attachment, __u8 type,
				    __u32 mtu_bytes)
{
	if (packet->flags & IS_LATER_FRAGMENT)
		return drop(skb, attachment->id, mtu_bytes ? DROP_FRAGMENT : DROP_NO_ROUTE);
	if (packet->family == 6) {
		/* RFC 4443 2.4(e) */
		if (icmp_is_error(packet))
			return drop(skb, attachment->id, DROP_NO_ROUTE);
		count(skb, attachment->slot, FROM_POD, packet->flags & IS_ROCE);
		if (icmp_answer(skb, &packet->source, type, mtu_bytes) ||
		    set_ethernet(skb, attachment->mac, config->gateway_mac))
			return drop(skb, attachment->id, DROP_MALFORMED);
		count(skb, attachment->slot, TO_POD, false);
		return bpf_redirect(skb->ifindex, 0);
	}
	/*
	 * The stack would send on parts, with the pod's own address: with DF it says how large they
	 * may be, and the pod's stack makes them.
	 */
	if (mtu_bytes && !(packet->flags & DONT_FRAGMENT) && set_dont_fragment(skb))
		return drop(skb, attachment->id, DROP_MALFORMED);
	return pod_to_host(skb, packet, config, attachment);
}

static __always_inline int decrement_hop_limit(struct __sk_buff *skb, const struct packet *packet)
{
	__u8 hop_limit = packet->hop_limit - 1;

	if (packet->family == 6)
		return bpf_skb_store_bytes(skb,
					   NETWORK_OFFSET + offsetof(struct ipv6hdr, hop_limit),
					   &hop_limit, 1, 0);
	/* The checksum counts 16-bit words: time to live and protocol. */
	if (bpf_l3_csum_replace(skb, NETWORK_OFFSET + offsetof(struct iphdr, check),
				bpf_htons(packet->hop_limit << 8 | packet->protocol),
				bpf_htons(hop_limit << 8 | packet->protocol), 2))
		return -1;
	return bpf_skb_store_bytes(skb, NETWORK_OFFSET + offsetof(struct iphdr, ttl), &hop_limit, 1,
				   0);
}

/* Untracked; acknowledgements must be allowed as well. */
static __always_inline int pod_roce(const struct packet *packet, const struct node_entry *config,
				    const struct attachment_entry *attachment,
				    const struct uplink_entry *uplink)
{
	struct flow_end from, to;

	if (uplink && config->masquerade)
		return DROP_ROCE_NAT;
	if (attachment->flags & ENFORCE)
		return DROP_ROCE_UNLEASED;
	end_of_attachment(&from, attachment);
	end_outside(&to);
	return policy_judge_roce(packet, &from, &to);
}

/*
 * Judged, tracked, and with the source that the other end sees: 0, FLOW_TO_STACK or a drop reason.
 * `uplink` is NULL for what goes to the host.
 */
static __always_inline int pod_pass(struct __sk_buff *skb, const struct packet *packet,
				    const struct node_entry *config,
				    const struct attachment_entry *attachment,
				    const struct uplink_entry *uplink, __u32 epoch)
{
	bool masquerade = uplink && config->masquerade;
	struct address_key own = {};
	struct flow_end from;
	struct nat_end seen = {};
	int reason;

	if (packet->flags & IS_ROCE)
		return pod_roce(packet, config, attachment, uplink);
	end_of_attachment(&from, attachment);
	if (icmp_is_error(packet))
		return nat_outbound_error(skb, packet, &from, epoch);
	if (uplink && masquerade) {
		/* Its answers would come in as RoCE: port 4791 is only ever a destination. */
		if (packet->protocol == IPPROTO_UDP && packet->source_port == bpf_htons(ROCE_PORT))
			return DROP_ROCE_NAT;
		own = packet->family == 4 ? uplink->ipv4 : uplink->ipv6;
	}
	reason = nat_outbound(skb, packet, config, &from, masquerade, &own, epoch, &seen);
	if (reason && reason != FLOW_TO_STACK)
		return reason;
	fragment_keep(packet);
	if (reason || address_is_zero(&seen.address))
		return reason;
	return rewrite(skb, packet, true, &seen);
}

static __always_inline int pod_route(struct __sk_buff *skb, const struct packet *packet,
				     const struct node_entry *config,
				     const struct attachment_entry *attachment, __u32 epoch)
{
	struct bpf_redir_neigh next_hop = {};
	struct bpf_fib_lookup fib = {};
	struct uplink_entry *uplink = NULL;
	__u32 ifindex;
	int reason;

	if (packet->family == 4) {
		fib.family = AF_INET;
		fib.ipv4_src = packet->source.word[3];
		fib.ipv4_dst = packet->destination.word[3];
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, &packet->source, 16);
		__builtin_memcpy(fib.ipv6_dst, &packet->destination, 16);
	}
	fib.ifindex = config->host_ifindex;
	fib.l4_protocol = packet->protocol;
	fib.tot_len = largest_bytes(skb, packet);

	switch (bpf_fib_lookup(skb, &fib, sizeof(fib), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		ifindex = fib.ifindex;
		if (ifindex == config->host_ifindex)
			return drop(skb, attachment->id, DROP_NO_ENDPOINT);
		uplink = uplinks.lookup(&ifindex);
		if (!uplink)
			return drop(skb, attachment->id, DROP_NOT_UPLINK);
		if (packet->hop_limit <= 1)
			return pod_told(skb, packet, config, attachment, ICMPV6_TIME_EXCEED, 0);
		next_hop.nh_family = fib.family;
		__builtin_memcpy(next_hop.ipv6_nh, fib.ipv6_dst, sizeof(next_hop.ipv6_nh));
		break;
	case BPF_FIB_LKUP_RET_NOT_FWDED:
		/* The host's own address; or no route at all, and the stack tells the pod so. */
		break;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return pod_told(skb, packet, config, attachment, ICMPV6_PKT_TOOBIG, fib.mtu_result);
	default:
		return drop(skb, attachment->id, DROP_NO_ROUTE);
	}

	reason = pod_pass(skb, packet, config, attachment, uplink, epoch);
	if (reason && reason != FLOW_TO_STACK)
		return drop(skb, attachment->id, reason);
	if (!uplink || reason)
		return pod_to_host(skb, packet, config, attachment);
	if (decrement_hop_limit(skb, packet))
		return drop(skb, attachment->id, DROP_MALFORMED);
	count(skb, attachment->slot, FROM_POD, packet->flags & IS_ROCE);
	return redirect_neigh(ifindex, &next_hop, sizeof(next_hop), 0);
}

int outside(struct __sk_buff *skb)
{
	struct node_entry *config = node_lookup();
	struct packet *packet = packet_new();
	struct attachment_entry *attachment;
	__u32 epoch;
	int reason;

	enter(skb, HOOK_OUTSIDE);
	if (!config || !packet)
		return drop(skb, 0, DROP_NO_NODE);
	epoch = policy_epoch(config);
	attachment = attachment_lookup(skb->ifindex);
	if (!attachment)
		return drop(skb, 0, DROP_NO_ATTACHMENT);
	reason = parse_ethernet(skb, packet);
	if (!reason)
		reason = parse_network(skb, packet);
	if (!reason)
		reason = parse_transport(skb, packet);
	if (!reason)
		reason = fragment_join(packet);
	if (reason)
		return drop(skb, attachment->id, reason);
	return pod_route(skb, packet, config, attachment, epoch);
}
