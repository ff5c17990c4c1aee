/* SPDX-License-Identifier: GPL-2.0 */
/* ICMPv6 errors of the node's own, and what makes the host's stack send IPv4's. */
#include "address.h"
#include "icmp.h"
#include "packet.h"

/*
 * A whole error, behind the pseudo header (RFC 8200 8.1), which its checksum covers. Of the packet
 * it quotes what bpf_csum_diff() can add up at once, not all that RFC 4443 3.1 has room for.
 */
struct icmp_answer {
	struct address_key source;
	struct address_key destination;
	__be32 bytes;
	__be32 protocol;
	__u8 type; /* from here on the message (RFC 4443 2.1) */
	__u8 code;
	__u16 checksum;
	__be32 mtu_bytes;
	__u8 quoted[448];
};

#define ICMPV6_HEADER_BYTES 8

BPF_F_TABLE("percpu_array", __u32, struct icmp_answer, icmp_answers, 1, 0);

/* Makes an IPv6 packet an error about itself, from the pods' gateway fe80::1 to who sent it. */
static __always_inline int icmp_answer(struct __sk_buff *skb, const struct address_key *to,
				       __u8 type, __u32 mtu_bytes)
{
	__u64 bytes = skb->len - NETWORK_OFFSET;
	__u32 zero = 0;
	struct icmp_answer *answer = icmp_answers.lookup(&zero);
	struct ipv6hdr ip = {.version = 6, .nexthdr = IPPROTO_ICMPV6, .hop_limit = 255};
	__u32 message;

	if (!answer)
		return -1;
	__builtin_memset(answer, 0, sizeof(*answer));
	if (bytes > sizeof(answer->quoted))
		bytes = sizeof(answer->quoted);
	if (bytes < sizeof(ip))
		return -1;
	/* Else the compiler asks for both bounds at once, which the verifier does not follow. */
	asm volatile("" : "+r"(bytes));
	if (bytes > sizeof(answer->quoted) ||
	    bpf_skb_load_bytes(skb, NETWORK_OFFSET, answer->quoted, bytes))
		return -1;
	answer->source.word[0] = bpf_htonl(0xfe800000);
	answer->source.word[3] = bpf_htonl(1);
	copy_address(&answer->destination, to->word);
	message = ICMPV6_HEADER_BYTES + bytes;
	answer->bytes = bpf_htonl(message);
	answer->protocol = bpf_htonl(IPPROTO_ICMPV6);
	answer->type = type;
	answer->mtu_bytes = bpf_htonl(mtu_bytes);
	answer->checksum = icmp_checksum(answer, sizeof(*answer));

	ip.payload_len = bpf_htons(message);
	__builtin_memcpy(&ip.saddr, &answer->source, 16);
	__builtin_memcpy(&ip.daddr, &answer->destination, 16);
	return bpf_skb_change_tail(skb, AFTER_IPV6 + message, 0) ||
	       bpf_skb_store_bytes(skb, NETWORK_OFFSET, &ip, sizeof(ip), 0) ||
	       bpf_skb_store_bytes(skb, AFTER_IPV6, &answer->type, message, 0);
}

/* Of an IPv4 packet. */
static __always_inline int set_dont_fragment(struct __sk_buff *skb)
{
	const __u32 place = NETWORK_OFFSET + offsetof(struct iphdr, frag_off);
	__be16 before, after;

	if (bpf_skb_load_bytes(skb, place, &before, 2))
		return -1;
	after = before | bpf_htons(0x4000);
	return bpf_l3_csum_replace(skb, NETWORK_OFFSET + offsetof(struct iphdr, check), before,
				   after, 2) ||
	       bpf_skb_store_bytes(skb, place, &after, 2, 0);
}
