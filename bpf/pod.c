// SPDX-License-Identifier: GPL-2.0
/* tc ingress of the host's end of a pod's veth pair: everything that a pod sends. */
#include <uapi/linux/if_arp.h>
#include <uapi/linux/in.h>
#include "counters.h"
#include "drop.h"
#include "endpoint.h"
#include "flow.h"
#include "fragment.h"
#include "guard.h"
#include "hook.h"
#include "monitor.h"
#include "node.h"
#include "packet.h"
#include "policy.h"
#include "service.h"
#include "traffic_class.h"
#include "usual.h"

/* ARP for Ethernet and IPv4 (RFC 826). */
struct arp_packet {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_bytes;
	__u8 protocol_bytes;
	__be16 operation;
	__u16 sender_mac[3];
	__u8 sender_address[4];
	__u8 target_mac[6];
	__u8 target_address[4];
};

static __always_inline bool mac_equal(const __u16 *a, const void *mac)
{
	const __u16 *b = mac;

	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]));
}

/* The stack answers the pod's ARP, if the pod says nothing but the truth about itself. */
static __always_inline int pod_arp(struct __sk_buff *skb, const struct attachment_entry *attachment)
{
	struct arp_packet arp;
	struct address_key sender;
	__be32 address;

	if (bpf_skb_load_bytes(skb, NETWORK_OFFSET, &arp, sizeof(arp)))
		return drop(skb, attachment->id, DROP_MALFORMED);
	if (arp.hardware != bpf_htons(ARPHRD_ETHER) || arp.protocol != bpf_htons(ETH_P_IP) ||
	    arp.hardware_bytes != 6 || arp.protocol_bytes != 4 ||
	    (arp.operation != bpf_htons(ARPOP_REQUEST) && arp.operation != bpf_htons(ARPOP_REPLY)))
		return drop(skb, attachment->id, DROP_MALFORMED);
	if (!mac_equal(arp.sender_mac, attachment->mac))
		return drop(skb, attachment->id, DROP_SPOOFED_MAC);
	__builtin_memcpy(&address, arp.sender_address, 4);
	address_map(&sender, address);
	if (!address_equal(&sender, &attachment->ipv4))
		return drop(skb, attachment->id, DROP_SPOOFED_ADDRESS);
	return TC_ACT_OK;
}

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
				      const struct endpoint_entry *endpoint)
{
	bool roce = packet->flags & IS_ROCE;

	/* Its own stack keeps such packets inside; what comes out was made by hand. */
	if (endpoint->ifindex == skb->ifindex)
		return drop(skb, attachment->id, DROP_NO_ROUTE);
	if (roce) {
		int reason = guard_judge(skb, packet, attachment->flags, endpoint->flags);

		if (reason)
			return drop(skb, attachment->id, reason);
	}
	count(skb, attachment->slot, FROM_POD, roce);
	count(skb, endpoint->slot, TO_POD, roce);
	return deliver(skb, config, endpoint);
}

int pod(struct __sk_buff *skb)
{
	struct packet packet;
	struct node_entry *config = node_lookup();
	struct attachment_entry *attachment;
	struct endpoint_entry *endpoint;
	int reason, verdict;

	if (!config)
		return drop(skb, 0, DROP_NO_NODE);
	attachment = attachment_lookup(skb->ifindex);
	if (!attachment)
		return drop(skb, 0, DROP_NO_ATTACHMENT);
	if (usual(skb, config, attachment, &verdict))
		return verdict;

	__builtin_memset(&packet, 0, sizeof(packet));
	reason = parse_ethernet(skb, &packet);
	if (reason)
		return drop(skb, attachment->id, reason);
	if (!mac_equal(packet.source_mac, attachment->mac))
		return drop(skb, attachment->id, DROP_SPOOFED_MAC);
	if (packet.ethertype == ETHERTYPE_ARP)
		return pod_arp(skb, attachment);
	if (packet.ethertype != ETH_P_IP && packet.ethertype != ETH_P_IPV6)
		return drop(skb, attachment->id, DROP_NOT_IP);
	/*
	 * Router solicitations and multicast listener reports come from addresses that are not the
	 * attachment's.
	 */
	if (packet.flags & IS_TO_GROUP)
		return drop(skb, attachment->id, DROP_MULTICAST);

	reason = parse_network(skb, &packet);
	if (reason)
		return drop(skb, attachment->id, reason);
	if (!pod_owns_source(&packet, attachment))
		return drop(skb, attachment->id, DROP_SPOOFED_ADDRESS);
	endpoint = near_endpoint_lookup(&packet.destination, packet.family);
	/* What a pod has is neither a group nor local. */
	if (!endpoint) {
		if (address_is_group(&packet.destination))
			return drop(skb, attachment->id, DROP_MULTICAST);
		if (address_is_local_scope(&packet.destination, packet.family))
			return drop(skb, attachment->id, DROP_NO_ROUTE);
	}
	reason = parse_transport(skb, &packet);
	if (reason)
		return drop(skb, attachment->id, reason);
	if (packet.flags & IS_ROCE) {
		if (!(attachment->flags & HAS_DEVICE))
			return drop(skb, attachment->id, DROP_ROCE_NO_DEVICE);
		if (set_traffic_class(skb, &packet, attachment->traffic_class))
			return drop(skb, attachment->id, DROP_MALFORMED);
	}

	if (!endpoint)
		endpoint = endpoints.lookup(&packet.destination);
	if (endpoint)
		return pod_to_pod(skb, &packet, config, attachment, endpoint);
	programs.call(skb, HOOK_OUTSIDE);
	return drop(skb, attachment->id, DROP_NO_PROGRAM);
}
