/* SPDX-License-Identifier: GPL-2.0 */
/* ICMP errors, and the packet that each quotes. */
#include "drop.h"
#include "packet.h"

/* Before the quoted packet: type, code, checksum and four bytes of the error's own. */
#define QUOTE_OFFSET sizeof(struct icmphdr)
/* What every error quotes of the transport header (RFC 792; RFC 1812 4.3.2.3). */
#define QUOTED_BYTES 8

/*
 * The checksum of a whole ICMPv6 message behind its pseudo header, in a multiple of 4 bytes, 512 at
 * most. bcc takes what the helper returns for an int, and the kernel folds it only from 6.13 on: as
 * a signed number it would be folded wrong.
 */
static __always_inline __u16 icmp_checksum(void *covered, __u32 bytes)
{
	__u32 sum = bpf_csum_diff(NULL, 0, covered, bytes, 0);

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/*
 * Destination unreachable (fragmentation needed too), time exceeded, parameter problem; ICMPv6's
 * types 1 to 4. Not a redirect: that is no error, and a pod's routes are ours.
 */
static __always_inline bool icmp_is_error(const struct packet *packet)
{
	if (!is_icmp(packet) || (packet->flags & IS_LATER_FRAGMENT))
		return false;
	if (packet->family == 6)
		return packet->icmp_type >= ICMPV6_DEST_UNREACH &&
		       packet->icmp_type <= ICMPV6_PARAMPROB;
	return packet->icmp_type == ICMP_DEST_UNREACH || packet->icmp_type == ICMP_TIME_EXCEEDED ||
	       packet->icmp_type == ICMP_PARAMETERPROB;
}

static __always_inline int quoted_ipv4(struct __sk_buff *skb, __u32 offset, struct packet *quoted)
{
	struct iphdr ip;
	__u16 fragment;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version != 4 ||
	    ip.ihl * 4 < sizeof(ip))
		return DROP_MALFORMED;
	address_map(&quoted->source, ip.saddr);
	address_map(&quoted->destination, ip.daddr);
	quoted->protocol = ip.protocol;
	quoted->transport = offset + ip.ihl * 4;
	fragment = bpf_ntohs(ip.frag_off);
	if (fragment & 0x1fff)
		return DROP_ICMP_UNRELATED;
	if (fragment & 0x2000)
		quoted->flags |= IS_FRAGMENT;
	return 0;
}

static __always_inline int quoted_ipv6(struct __sk_buff *skb, __u32 offset, struct packet *quoted)
{
	struct ipv6hdr ip;
	__u8 extension[4], next;
	int i;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version != 6)
		return DROP_MALFORMED;
	copy_address(&quoted->source, (const __be32 *)&ip.saddr);
	copy_address(&quoted->destination, (const __be32 *)&ip.daddr);
	next = ip.nexthdr;
	offset += sizeof(ip);

#pragma unroll
	for (i = 0; i < MAXIMUM_EXTENSIONS; i++) {
		if (next != IPPROTO_FRAGMENT && next != IPPROTO_HOPOPTS &&
		    next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS)
			break;
		if (bpf_skb_load_bytes(skb, offset, extension, sizeof(extension)))
			return DROP_MALFORMED;
		if (next == IPPROTO_FRAGMENT) {
			if (extension[2] || (extension[3] & 0xf8))
				return DROP_ICMP_UNRELATED;
			quoted->flags |= IS_FRAGMENT;
			offset += 8;
		} else {
			offset += (extension[1] + 1) * 8;
		}
		next = extension[0];
	}
	quoted->protocol = next;
	quoted->transport = offset;
	return 0;
}

/*
 * What an error quotes, as the packet that it was: addresses, protocol and ports in the direction
 * in which that was sent (echo: its identifier, as read_transport() has it), `transport` from this
 * frame's start, `end` 0. `quoted` comes in zeroed. 0, or a drop reason: DROP_ICMP_UNRELATED where
 * no flow can be told from it (a later fragment, an error about an error) and where the error does
 * not go to who sent the quoted packet.
 */
static __always_inline int icmp_quoted(struct __sk_buff *skb, const struct packet *packet,
				       struct packet *quoted)
{
	__u32 offset = packet->transport + QUOTE_OFFSET;
	__u8 head[14] = {};
	int reason;

	if (packet->flags & IS_FRAGMENT)
		return DROP_ICMP_UNRELATED;
	quoted->family = packet->family;
	quoted->ethertype = packet->ethertype;
	if (packet->family == 4)
		reason = quoted_ipv4(skb, offset, quoted);
	else
		reason = quoted_ipv6(skb, offset, quoted);
	if (reason)
		return reason;
	if (packet->end && quoted->transport + QUOTED_BYTES > packet->end)
		return DROP_MALFORMED;
	if (!address_equal(&quoted->source, &packet->destination))
		return DROP_ICMP_UNRELATED;
	if (quoted->protocol != IPPROTO_TCP && quoted->protocol != IPPROTO_UDP &&
	    quoted->protocol != IPPROTO_SCTP && !is_icmp(quoted))
		return 0;
	if (bpf_skb_load_bytes(skb, quoted->transport, head, QUOTED_BYTES))
		return DROP_MALFORMED;
	read_transport(quoted, head);
	if (is_icmp(quoted) && !is_echo(quoted))
		return DROP_ICMP_UNRELATED;
	return 0;
}
