/* SPDX-License-Identifier: GPL-2.0 */
/* Changes one end of a packet, or of the packet that an ICMP error quotes, and all checksums. */
#include "address.h"
#include "icmp.h"
#include "packet.h"

/* An address, and a port or an echo's identifier. */
struct nat_end {
	struct address_key address;
	__be16 port;
};

/* The network header's source or destination; an IPv4 header's own checksum with it. */
static __always_inline int rewrite_address(struct __sk_buff *skb, __u32 network, __u8 family,
					   bool source, const struct address_key *old,
					   const struct address_key *address, __u64 flags)
{
	if (family == 4) {
		__be32 before = old->word[3], after = address->word[3];

		if (bpf_l3_csum_replace(skb, network + offsetof(struct iphdr, check), before, after,
					4))
			return -1;
		return bpf_skb_store_bytes(skb,
					   network + (source ? offsetof(struct iphdr, saddr)
							     : offsetof(struct iphdr, daddr)),
					   &after, 4, 0);
	} else {
		struct address_key after = *address;

		return bpf_skb_store_bytes(skb,
					   network + (source ? offsetof(struct ipv6hdr, saddr)
							     : offsetof(struct ipv6hdr, daddr)),
					   &after, 16, flags);
	}
}

/* What a change of addresses does to an IPv6 checksum. */
static __always_inline __u32 address_difference(const struct address_key *old,
						const struct address_key *address)
{
	struct address_key before = *old, after = *address;

	return bpf_csum_diff(before.word, 16, after.word, 16, 0);
}

/* Where a transport header has its checksum. */
static __always_inline __u32 checksum_place(__u8 protocol, __u32 transport)
{
	if (protocol == IPPROTO_TCP)
		return transport + offsetof(struct tcphdr, check);
	if (protocol == IPPROTO_UDP)
		return transport + offsetof(struct udphdr, check);
	return transport + offsetof(struct icmphdr, checksum);
}

/* Where a transport header has one end's port, or an echo's identifier. */
static __always_inline __u32 port_place(__u8 protocol, __u32 transport, bool source)
{
	if (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP)
		return transport + (source ? 0 : 2);
	return transport + 4;
}

/*
 * Changes the source or the destination of a packet; of a later fragment the address alone. Partial
 * checksums and UDP's 0 are the helpers' care. 0 or a drop reason.
 */
static __always_inline int rewrite(struct __sk_buff *skb, const struct packet *packet, bool source,
				   const struct nat_end *end)
{
	const struct address_key *old = source ? &packet->source : &packet->destination;
	__be16 old_port = source ? packet->source_port : packet->destination_port;
	__u32 checksum = checksum_place(packet->protocol, packet->transport);
	__u64 flags = packet->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__be16 port = end->port;
	int error = 0;

	if (!(packet->flags & IS_LATER_FRAGMENT)) {
		error |= bpf_l4_csum_replace(skb, checksum, old_port, port, flags | 2);
		/* ICMP's checksum has no pseudo header. */
		if (packet->family == 4 && !is_icmp(packet))
			error |= bpf_l4_csum_replace(skb, checksum, old->word[3],
						     end->address.word[3],
						     flags | BPF_F_PSEUDO_HDR | 4);
		/*
		 * The helper takes the address's change out of a device's sum over the whole packet
		 * (CHECKSUM_COMPLETE), as if a header checksum had made up for it like IPv4's.
		 * Storing with BPF_F_RECOMPUTE_CSUM puts it back; kernel commit ead7f9b8de65 adds a
		 * flag to the same end from 6.16 on.
		 */
		if (packet->family == 6)
			error |= bpf_l4_csum_replace(skb, checksum, 0,
						     address_difference(old, &end->address),
						     flags | BPF_F_PSEUDO_HDR);
		error |= bpf_skb_store_bytes(
			skb, port_place(packet->protocol, packet->transport, source), &port, 2, 0);
	}
	error |= rewrite_address(skb, NETWORK_OFFSET, packet->family, source, old, &end->address,
				 BPF_F_RECOMPUTE_CSUM);
	return error ? DROP_MALFORMED : 0;
}

/*
 * Changes an ICMP error about a translated flow (RFC 5508 4.2, RFC 6146 3.4): inbound its
 * destination and the quoted source, outbound its source and the quoted destination, which are the
 * same end. `quoted` says where the quoted transport header is; `old_port` is what it has there. 0
 * or a drop reason.
 */
static __always_inline int rewrite_error(struct __sk_buff *skb, const struct packet *packet,
					 const struct packet *quoted, bool inbound, __be16 old_port,
					 const struct nat_end *end)
{
	const struct address_key *old = inbound ? &packet->destination : &packet->source;
	__u32 icmp_checksum = packet->transport + offsetof(struct icmphdr, checksum);
	__u32 checksum = checksum_place(quoted->protocol, quoted->transport);
	__u64 flags = quoted->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u32 before = 0, after = 0, difference = 0, changed;
	__be16 port = end->port;
	int error = 0;

	if (packet->family == 6)
		difference = address_difference(old, &end->address);
	/* What changes in the error's own bytes; an IPv4 header makes up for its address. */
	changed = difference;
	before = old_port;
	after = port;
	changed = bpf_csum_diff(&before, 4, &after, 4, changed);
	/* Of TCP 8 bytes may be all that is quoted. */
	if (!packet->end || checksum + 2 <= packet->end) {
		before = after = 0;
		error |= bpf_skb_load_bytes(skb, checksum, &before, 2);
		if (before || quoted->protocol != IPPROTO_UDP) {
			error |= bpf_l4_csum_replace(skb, checksum, old_port, port, flags | 2);
			if (packet->family == 6)
				error |= bpf_l4_csum_replace(skb, checksum, 0, difference, flags);
			else if (!is_icmp(quoted))
				error |= bpf_l4_csum_replace(skb, checksum, old->word[3],
							     end->address.word[3], flags | 4);
		}
		error |= bpf_skb_load_bytes(skb, checksum, &after, 2);
		changed = bpf_csum_diff(&before, 4, &after, 4, changed);
	}
	error |= bpf_skb_store_bytes(skb, port_place(quoted->protocol, quoted->transport, inbound),
				     &port, 2, 0);
	error |= rewrite_address(skb, packet->transport + QUOTE_OFFSET, packet->family, inbound,
				 old, &end->address, 0);

	error |= bpf_l4_csum_replace(skb, icmp_checksum, 0, changed, 0);
	if (packet->family == 6)
		error |= bpf_l4_csum_replace(skb, icmp_checksum, 0, difference, BPF_F_PSEUDO_HDR);
	error |= rewrite_address(skb, NETWORK_OFFSET, packet->family, !inbound, old, &end->address,
				 BPF_F_RECOMPUTE_CSUM);
	return error ? DROP_MALFORMED : 0;
}
