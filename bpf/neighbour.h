/* SPDX-License-Identifier: GPL-2.0 */
/*
 * ARP and neighbour discovery of a pod: its next hops are this node, and nobody else is on its
 * link. They are answered here, with the gateway's MAC, and the pod's stack never learns of
 * another.
 */
#include <uapi/linux/if_arp.h>
#include "drop.h"
#include "endpoint.h"
#include "icmp.h"
#include "node.h"
#include "packet.h"
#include "policy.h"

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

/* Types of neighbour discovery (RFC 4861 4); the UAPI headers do not have them. */
#define ND_FIRST	 133 /* router solicitation */
#define ND_SOLICITATION	 135
#define ND_ADVERTISEMENT 136
#define ND_LAST		 137 /* redirect */

#define ND_OPTION_SOURCE 1 /* link-layer address (4.6.1), 8 bytes with Ethernet's */
#define ND_OPTION_TARGET 2

#define ND_ROUTER    0x80
#define ND_SOLICITED 0x40
#define ND_OVERRIDE  0x20

struct nd_option {
	__u8 type;
	__u8 units; /* of 8 bytes */
	__u16 mac[3];
};

/* Neighbour solicitation (4.3; its flags are 0) or advertisement (4.4), with one option. */
struct nd_neighbour {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u8 flags;
	__u8 pad[3];
	struct address_key target;
	struct nd_option option;
};

/* What an ICMPv6 checksum covers, the pseudo header (RFC 8200 8.1) first. */
struct nd_covered {
	struct address_key source;
	struct address_key destination;
	__be32 bytes;
	__be32 protocol;
	struct nd_neighbour message;
};

#define ND_BYTES_WITHOUT_OPTION offsetof(struct nd_neighbour, option)

static __always_inline bool mac_equal(const __u16 *a, const void *mac)
{
	const __u16 *b = mac;

	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]));
}

/* The node's own addresses, of which the gateways are two, and the link-local gateway fe80::1. */
static __always_inline bool is_next_hop(const struct address_key *address)
{
	if (address->word[0] == bpf_htonl(0xfe800000) && !address->word[1] && !address->word[2] &&
	    address->word[3] == bpf_htonl(1))
		return true;
	return node_addresses.lookup((struct address_key *)address);
}

/* ARP from a pod: its whole verdict. */
static __always_inline int neighbour_arp(struct __sk_buff *skb, const struct node_entry *config,
					 const struct attachment_entry *attachment)
{
	struct arp_packet arp;
	struct address_key sender, target;
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
	__builtin_memcpy(&address, arp.target_address, 4);
	address_map(&target, address);
	if (arp.operation != bpf_htons(ARPOP_REQUEST) || !is_next_hop(&target))
		return drop(skb, attachment->id, DROP_NEIGHBOUR);

	arp.operation = bpf_htons(ARPOP_REPLY);
	__builtin_memcpy(arp.target_address, arp.sender_address, 4);
	__builtin_memcpy(arp.sender_address, &address, 4);
	copy_mac(arp.target_mac, attachment->mac);
	copy_mac(arp.sender_mac, config->gateway_mac);
	if (bpf_skb_store_bytes(skb, NETWORK_OFFSET, &arp, sizeof(arp), 0) ||
	    set_ethernet(skb, attachment->mac, config->gateway_mac))
		return drop(skb, attachment->id, DROP_MALFORMED);
	return bpf_redirect(skb->ifindex, 0);
}

/*
 * Whether a packet of IPv6's EtherType is neighbour discovery. There are no extension headers to
 * look behind: fragments are forbidden (RFC 6980), and others are of no use; pod.c drops both.
 */
static __always_inline bool is_neighbour_discovery(struct __sk_buff *skb)
{
	__u8 next, type;

	return !bpf_skb_load_bytes(skb, NETWORK_OFFSET + offsetof(struct ipv6hdr, nexthdr), &next,
				   1) &&
	       next == IPPROTO_ICMPV6 && !bpf_skb_load_bytes(skb, AFTER_IPV6, &type, 1) &&
	       type >= ND_FIRST && type <= ND_LAST;
}

/* The same of a packet whose transport header has been looked for. */
static __always_inline bool icmp_is_neighbour_discovery(const struct packet *packet)
{
	return packet->family == 6 && is_icmp(packet) && !(packet->flags & IS_LATER_FRAGMENT) &&
	       packet->icmp_type >= ND_FIRST && packet->icmp_type <= ND_LAST;
}

/* Who asks: the pod by its own address, or by one that is its link's alone. */
static __always_inline bool nd_sender_is_honest(const struct packet *packet,
						const struct attachment_entry *attachment)
{
	if ((packet->source.word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
		return true;
	return !address_is_zero(&packet->source) &&
	       address_equal(&packet->source, &attachment->ipv6);
}

/*
 * Neighbour discovery from a pod: its whole verdict. What is not a solicitation of the pod's own is
 * dropped: `multicast` where it went to a group (router solicitations, duplicate address
 * detection, unsolicited advertisements), as other multicast is.
 */
static __always_inline int neighbour_discovery(struct __sk_buff *skb, struct packet *packet,
					       const struct node_entry *config,
					       const struct attachment_entry *attachment)
{
	struct nd_covered covered = {};
	struct nd_neighbour *message = &covered.message;
	__be16 payload_bytes = bpf_htons(sizeof(*message));
	__u32 bytes;

	if (parse_network(skb, packet))
		return drop(skb, attachment->id, DROP_MALFORMED);
	bytes = packet->end - AFTER_IPV6;
	if (packet->transport != AFTER_IPV6 || bytes < ND_BYTES_WITHOUT_OPTION ||
	    bpf_skb_load_bytes(skb, AFTER_IPV6, message, ND_BYTES_WITHOUT_OPTION))
		return drop(skb, attachment->id,
			    packet->flags & IS_TO_GROUP ? DROP_MULTICAST : DROP_MALFORMED);
	if (message->type != ND_SOLICITATION || address_is_zero(&packet->source))
		return drop(skb, attachment->id,
			    packet->flags & IS_TO_GROUP ? DROP_MULTICAST : DROP_NEIGHBOUR);
	if (!nd_sender_is_honest(packet, attachment))
		return drop(skb, attachment->id, DROP_SPOOFED_ADDRESS);
	/* 255: it was sent on this link (7.1.1). */
	if (packet->hop_limit != 255 || message->code)
		return drop(skb, attachment->id, DROP_MALFORMED);
	if (bytes >= sizeof(*message)) {
		if (bpf_skb_load_bytes(skb, AFTER_IPV6 + ND_BYTES_WITHOUT_OPTION, &message->option,
				       sizeof(message->option)))
			return drop(skb, attachment->id, DROP_MALFORMED);
		if (message->option.type == ND_OPTION_SOURCE &&
		    !mac_equal(message->option.mac, attachment->mac))
			return drop(skb, attachment->id, DROP_SPOOFED_MAC);
	}
	if (!is_next_hop(&message->target))
		return drop(skb, attachment->id, DROP_NEIGHBOUR);

	message->type = ND_ADVERTISEMENT;
	message->checksum = 0;
	message->flags = ND_ROUTER | ND_SOLICITED | ND_OVERRIDE;
	message->pad[0] = 0;
	message->pad[1] = 0;
	message->pad[2] = 0;
	message->option.type = ND_OPTION_TARGET;
	message->option.units = 1;
	copy_mac(message->option.mac, config->gateway_mac);
	covered.source = message->target;
	covered.destination = packet->source;
	covered.bytes = bpf_htonl(sizeof(*message));
	covered.protocol = bpf_htonl(IPPROTO_ICMPV6);
	message->checksum = icmp_checksum(&covered, sizeof(covered));
	if (bpf_skb_change_tail(skb, AFTER_IPV6 + sizeof(*message), 0) ||
	    bpf_skb_store_bytes(skb, NETWORK_OFFSET + offsetof(struct ipv6hdr, payload_len),
				&payload_bytes, 2, 0) ||
	    bpf_skb_store_bytes(skb, NETWORK_OFFSET + offsetof(struct ipv6hdr, saddr),
				&covered.source, 32, 0) ||
	    bpf_skb_store_bytes(skb, AFTER_IPV6, message, sizeof(*message), 0) ||
	    set_ethernet(skb, attachment->mac, config->gateway_mac))
		return drop(skb, attachment->id, DROP_MALFORMED);
	return bpf_redirect(skb->ifindex, 0);
}
