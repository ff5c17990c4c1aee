/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The one place that reads packets: directly, where headers are in the linear part, as those of all
 * local sockets are. What the driver left in pages is pulled in (Ethernet and IP) or reached with
 * bpf_skb_load_bytes.
 */
#include "address.h"
#include "drop.h"
#include <uapi/linux/icmp.h>
#include <uapi/linux/icmpv6.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/udp.h>

#define ROCE_PORT     4791 /* RoCEv2, InfiniBand architecture annex A17 */
#define ETHERTYPE_ARP ETH_P_ARP

#define SCTP_HEADER_BYTES 12 /* RFC 9260 3.1: begins with the ports, as TCP and UDP do */

/*
 * IPv6 extension headers walked; longer chains are malformed to us, as to many routers (RFC 9098).
 */
#define MAXIMUM_EXTENSIONS 4

/* struct packet.flags */
#define IS_FRAGMENT	  1 /* any part of a fragmented packet */
#define IS_LATER_FRAGMENT 2 /* not the first part: no transport header */
#define DONT_FRAGMENT	  4
#define IS_ROCE		  8
#define IS_TO_GROUP	  16 /* by its destination MAC: multicast or broadcast */
#define IS_DATAGRAM	  32 /* RoCE of an unreliable datagram queue pair */

/* struct packet.tcp_flags, as byte 13 of the header has them (RFC 9293 3.1) */
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct packet {
	struct address_key source;
	struct address_key destination;
	__u16 source_mac[3];
	__u16 ethertype;    /* host byte order */
	__u16 transport;    /* offset of the transport header from the frame's start */
	__be16 source_port; /* TCP, UDP and SCTP; ICMP echo: its identifier at the end
			       that asks, echo_answerer() at the other; else 0 */
	__be16 destination_port;
	__u8 family; /* 4, 6 or 0 */
	__u8 protocol;
	__u8 hop_limit; /* IPv4: time to live */
	__u8 flags;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u16 fragment_offset; /* bytes; where IS_LATER_FRAGMENT */
	__u32 identification;  /* where IS_FRAGMENT */
	__u32 end;	       /* offset of the IP packet's end; 0: the frame's (BIG TCP) */
	__u32 destination_qpn; /* where IS_ROCE */
	__u32 source_qpn;      /* where IS_DATAGRAM */
};

/*
 * What a program reads of its packet. In a map and not on the stack, whose every value the verifier
 * follows: it would look at all that comes after once for each way through the headers (pod.c
 * 236,000 instructions instead of 70,000, outside.c 495,000 instead of 106,000).
 */
BPF_F_TABLE("percpu_array", __u32, struct packet, packets, 1, 0);

/* Empty; the verifier alone believes that it can be NULL. */
static __always_inline struct packet *packet_new(void)
{
	__u32 zero = 0;
	struct packet *packet = packets.lookup(&zero);

	if (packet)
		__builtin_memset(packet, 0, sizeof(*packet));
	return packet;
}

#define NETWORK_OFFSET ETH_HLEN

/* The frame, of which so many bytes can be read; NULL when it is shorter. */
static __always_inline void *frame_of(struct __sk_buff *skb, __u32 bytes)
{
	void *data = (void *)(long)skb->data;

	if (data + bytes > (void *)(long)skb->data_end) {
		if (bpf_skb_pull_data(skb, bytes))
			return NULL;
		data = (void *)(long)skb->data;
		if (data + bytes > (void *)(long)skb->data_end)
			return NULL;
	}
	return data;
}

static __always_inline int parse_ethernet(struct __sk_buff *skb, struct packet *packet)
{
	/* Headers begin at even addresses, and two bytes are one load. */
	const __u16 *half = frame_of(skb, ETH_HLEN);

	if (!half)
		return DROP_MALFORMED;
	if (*(const __u8 *)half & 1)
		packet->flags |= IS_TO_GROUP;
	packet->source_mac[0] = half[3];
	packet->source_mac[1] = half[4];
	packet->source_mac[2] = half[5];
	/* A VLAN tag may be in the frame or, taken out by the kernel, beside it. */
	if (skb->vlan_present)
		return DROP_NOT_IP;
	packet->ethertype = bpf_ntohs(half[6]);
	return 0;
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *packet)
{
	const void *frame = frame_of(skb, NETWORK_OFFSET + sizeof(struct iphdr));
	const struct iphdr *ip = frame + NETWORK_OFFSET;
	__u32 header_bytes, total_bytes;
	__u16 fragment;

	if (!frame)
		return DROP_MALFORMED;
	header_bytes = ip->ihl * 4;
	total_bytes = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || header_bytes < sizeof(*ip))
		return DROP_MALFORMED;
	/* BIG TCP: a GSO packet over 64 KiB says 0. */
	if (total_bytes || !skb->gso_size) {
		packet->end = NETWORK_OFFSET + total_bytes;
		if (total_bytes < header_bytes || packet->end > skb->len)
			return DROP_MALFORMED;
	}
	address_map(&packet->source, ip->saddr);
	address_map(&packet->destination, ip->daddr);
	packet->family = 4;
	packet->protocol = ip->protocol;
	packet->hop_limit = ip->ttl;
	packet->transport = NETWORK_OFFSET + header_bytes;
	fragment = bpf_ntohs(ip->frag_off);
	if (fragment & 0x1fff) {
		packet->flags |= IS_LATER_FRAGMENT;
		packet->fragment_offset = (fragment & 0x1fff) * 8;
	}
	if (fragment & 0x3fff) {
		packet->flags |= IS_FRAGMENT;
		packet->identification = ip->id;
	}
	if (fragment & 0x4000)
		packet->flags |= DONT_FRAGMENT;
	return 0;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *packet)
{
	const void *frame = frame_of(skb, NETWORK_OFFSET + sizeof(struct ipv6hdr));
	const struct ipv6hdr *ip = frame + NETWORK_OFFSET;
	__u8 extension[8];
	__u32 offset = NETWORK_OFFSET + sizeof(*ip);
	__u32 payload_bytes;
	__u8 next;
	int i;

	if (!frame)
		return DROP_MALFORMED;
	payload_bytes = bpf_ntohs(ip->payload_len);
	if (ip->version != 6)
		return DROP_MALFORMED;
	/* BIG TCP: a GSO packet over 64 KiB says 0. */
	if (payload_bytes || !skb->gso_size) {
		packet->end = offset + payload_bytes;
		if (packet->end > skb->len)
			return DROP_MALFORMED;
	}
	copy_address(&packet->source, (const __be32 *)&ip->saddr);
	copy_address(&packet->destination, (const __be32 *)&ip->daddr);
	packet->family = 6;
	packet->hop_limit = ip->hop_limit;
	packet->flags |= DONT_FRAGMENT;
	next = ip->nexthdr;

#pragma unroll
	for (i = 0; i < MAXIMUM_EXTENSIONS; i++) {
		if (next == IPPROTO_FRAGMENT) {
			__u16 place;

			if (bpf_skb_load_bytes(skb, offset, extension, 8))
				return DROP_MALFORMED;
			place = (extension[2] << 8) | extension[3];
			packet->flags |= IS_FRAGMENT;
			__builtin_memcpy(&packet->identification, extension + 4, 4);
			next = extension[0];
			offset += 8;
			if (place & 0xfff8) {
				packet->flags |= IS_LATER_FRAGMENT;
				packet->fragment_offset = place & 0xfff8;
				break;
			}
		} else if (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING ||
			   next == IPPROTO_DSTOPTS) {
			if (bpf_skb_load_bytes(skb, offset, extension, 2))
				return DROP_MALFORMED;
			next = extension[0];
			offset += (extension[1] + 1) * 8;
		} else {
			break;
		}
	}
	if (!(packet->flags & IS_LATER_FRAGMENT) &&
	    (next == IPPROTO_FRAGMENT || next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING ||
	     next == IPPROTO_DSTOPTS))
		return DROP_MALFORMED;
	packet->protocol = next;
	packet->transport = offset;
	return 0;
}

/* The network header; the ethertype is IPv4's or IPv6's. */
static __always_inline int parse_network(struct __sk_buff *skb, struct packet *packet)
{
	if (packet->ethertype == ETH_P_IP)
		return parse_ipv4(skb, packet);
	return parse_ipv6(skb, packet);
}

static __always_inline bool has_transport(const struct packet *packet, __u32 bytes)
{
	return !packet->end || packet->transport + bytes <= packet->end;
}

/* The upper three bits of an opcode are the transport; those of unreliable datagrams. */
#define ROCE_TRANSPORT	 0xe0
#define ROCE_IS_DATAGRAM 0x60

/*
 * Base transport header, InfiniBand 9.2: opcode, flags, partition key, then the destination QPN in
 * the low 24 bits. Behind it an unreliable datagram has its queue key and, in the low 24 bits, its
 * source's QPN (9.3.1).
 */
static __always_inline int parse_roce(struct __sk_buff *skb, struct packet *packet)
{
	__u32 offset = packet->transport + sizeof(struct udphdr);
	__be32 bth[3], deth[2];

	if (!has_transport(packet, sizeof(struct udphdr) + sizeof(bth)) ||
	    bpf_skb_load_bytes(skb, offset, bth, sizeof(bth)))
		return DROP_MALFORMED;
	packet->destination_qpn = bpf_ntohl(bth[1]) & 0xffffff;
	packet->flags |= IS_ROCE;
	if ((*(const __u8 *)bth & ROCE_TRANSPORT) != ROCE_IS_DATAGRAM)
		return 0;
	if (!has_transport(packet, sizeof(struct udphdr) + sizeof(bth) + sizeof(deth)) ||
	    bpf_skb_load_bytes(skb, offset + sizeof(bth), deth, sizeof(deth)))
		return DROP_MALFORMED;
	packet->source_qpn = bpf_ntohl(deth[1]) & 0xffffff;
	packet->flags |= IS_DATAGRAM;
	return 0;
}

#define AFTER_IPV4 (NETWORK_OFFSET + sizeof(struct iphdr))
#define AFTER_IPV6 (NETWORK_OFFSET + sizeof(struct ipv6hdr))

static __always_inline bool is_icmp(const struct packet *packet)
{
	return packet->protocol == (packet->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

/* Never of a later fragment: its type is not there. */
static __always_inline bool is_echo(const struct packet *packet)
{
	if (!is_icmp(packet) || (packet->flags & IS_LATER_FRAGMENT))
		return false;
	if (packet->family == 6)
		return packet->icmp_type == ICMPV6_ECHO_REQUEST ||
		       packet->icmp_type == ICMPV6_ECHO_REPLY;
	return packet->icmp_type == ICMP_ECHO || packet->icmp_type == ICMP_ECHOREPLY;
}

/*
 * The port of who answers an echo. It tells who asked, so that a question is never taken for an
 * answer: no two identifiers are each the other's answerer, and none its own.
 */
static __always_inline __be16 echo_answerer(__be16 identifier)
{
	if (!identifier)
		return bpf_htons(1);
	return identifier == bpf_htons(1) ? bpf_htons(2) : 0;
}

/* TCP, UDP, SCTP and ICMP; but for TCP only the first 8 bytes mean something. */
static __always_inline void read_transport(struct packet *packet, const void *header)
{
	const __be16 *half = header;

	if (packet->protocol == IPPROTO_TCP)
		packet->tcp_flags = ((const __u8 *)header)[13];
	if (!is_icmp(packet)) {
		packet->source_port = half[0];
		packet->destination_port = half[1];
		return;
	}
	packet->icmp_type = *(const __u8 *)header;
	if (!is_echo(packet))
		return;
	if (packet->icmp_type == (packet->family == 6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO)) {
		packet->source_port = half[2];
		packet->destination_port = echo_answerer(half[2]);
	} else {
		packet->source_port = echo_answerer(half[2]);
		packet->destination_port = half[2];
	}
}

/*
 * Ports, flags and RoCE of whole packets and first fragments. A first fragment too short for its
 * header is malformed: the rest of a RoCE packet must not slip through behind one that could not be
 * judged.
 */
static __always_inline int parse_transport(struct __sk_buff *skb, struct packet *packet)
{
	const void *frame, *end;
	__u8 head[14] = {};
	__u32 bytes = 0;

	if (packet->flags & IS_LATER_FRAGMENT)
		return 0;
	if (packet->protocol == IPPROTO_TCP)
		bytes = sizeof(struct tcphdr);
	else if (packet->protocol == IPPROTO_UDP)
		bytes = sizeof(struct udphdr);
	else if (packet->protocol == IPPROTO_SCTP)
		bytes = SCTP_HEADER_BYTES;
	else if (is_icmp(packet))
		bytes = sizeof(struct icmphdr);
	else
		return 0;
	if (!has_transport(packet, bytes))
		return DROP_MALFORMED;

	/*
	 * The compiler would load the end early and widen it by shifting, which the verifier
	 * refuses.
	 */
	asm volatile("" ::: "memory");
	frame = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	/* Without options or extensions, which the verifier can follow. */
	if (packet->transport == AFTER_IPV4 && frame + AFTER_IPV4 + 14 <= end)
		read_transport(packet, frame + AFTER_IPV4);
	else if (packet->transport == AFTER_IPV6 && frame + AFTER_IPV6 + 14 <= end)
		read_transport(packet, frame + AFTER_IPV6);
	else if (bpf_skb_load_bytes(skb, packet->transport, head,
				    packet->protocol == IPPROTO_TCP ? 14 : 8))
		return DROP_MALFORMED;
	else
		read_transport(packet, head);
	if (packet->protocol == IPPROTO_UDP && packet->destination_port == bpf_htons(ROCE_PORT))
		return parse_roce(skb, packet);
	return 0;
}
