/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The usual packet: TCP or UDP (not RoCE) from one pod to another of this host, whole, without IP
 * options or extension headers. It is judged here in as few instructions as can be and exactly as
 * pod.c would: what is in any way else, spoofed or malformed, is left to it.
 *
 * Loads wider than a field take what is beside it along: both architectures that the datapath runs
 * on (x86_64, aarch64) are little-endian and load from any address.
 */
#include "counters.h"
#include "endpoint.h"
#include "node.h"
#include "packet.h"

/* From a plain pointer: of a field's, the compiler would know the alignment and load in parts. */
static __always_inline __u64 load_64(const void *base, __u32 offset)
{
	return *(const __u64 *)(base + offset);
}

static __always_inline __u32 load_32(const void *base, __u32 offset)
{
	return *(const __u32 *)(base + offset);
}

static __always_inline __u16 load_16(const void *base, __u32 offset)
{
	return *(const __u16 *)(base + offset);
}

/* A MAC is the low 48 bits of a 64-bit word. */
#define HIGH_16(number) ((__u64)(number) << 48)

/* Whether ports are there, from the offset on, and are not RoCE's. */
static __always_inline bool usual_transport(__u8 protocol, const void *frame, __u32 offset,
					    __u32 end)
{
	if (protocol == IPPROTO_TCP)
		return end >= offset + sizeof(struct tcphdr);
	return protocol == IPPROTO_UDP && end >= offset + sizeof(struct udphdr) &&
	       load_16(frame, offset + offsetof(struct udphdr, dest)) != bpf_htons(ROCE_PORT);
}

/*
 * False, and nothing is done, for nobody's place (the unspecified address finds one) and the pod's
 * own address.
 */
static __always_inline bool usual_deliver(struct __sk_buff *skb, const struct node_entry *config,
					  const struct attachment_entry *attachment,
					  const struct near_endpoint *near, void *frame,
					  int *verdict)
{
	__u32 ifindex = near->entry.ifindex;

	if (!ifindex || near->entry.slot == attachment->slot)
		return false;
	*(__u64 *)frame = load_64(near->entry.mac, 0) | HIGH_16(load_16(config->gateway_mac, 0));
	*(__u32 *)(frame + 8) = load_32(config->gateway_mac, 2);
	count_both(skb, attachment->slot, near->entry.slot);
	*verdict = bpf_redirect_peer(ifindex, 0);
	return true;
}

/* The frame has room for IPv4 and UDP. */
static __always_inline bool usual_ipv4(struct __sk_buff *skb, const struct node_entry *config,
				       const struct attachment_entry *attachment, void *frame,
				       int *verdict)
{
	const struct iphdr *ip = frame + NETWORK_OFFSET;
	__u32 end = NETWORK_OFFSET + bpf_ntohs(ip->tot_len);
	const struct near_endpoint *near;
	__u32 place;

	/* Version 4, no options; no fragment; all there. */
	if (*(const __u8 *)ip != 0x45 || (ip->frag_off & bpf_htons(0x3fff)) || end > skb->len ||
	    !usual_transport(ip->protocol, frame, AFTER_IPV4, end))
		return false;
	/* Zero: the attachment has no address of the family. */
	if (!ip->saddr || ip->saddr != attachment->ipv4.word[3])
		return false;
	place = bpf_ntohl(ip->daddr) % NEAR_PLACES;
	near = near_endpoint.lookup(&place);
	if (!near || near->address.word[3] != ip->daddr)
		return false;
	return usual_deliver(skb, config, attachment, near, frame, verdict);
}

static __always_inline bool usual_ipv6(struct __sk_buff *skb, const struct node_entry *config,
				       const struct attachment_entry *attachment, void *frame,
				       int *verdict)
{
	const __u32 source = NETWORK_OFFSET + offsetof(struct ipv6hdr, saddr);
	const __u32 destination = NETWORK_OFFSET + offsetof(struct ipv6hdr, daddr);
	const struct ipv6hdr *ip = frame + NETWORK_OFFSET;
	const struct near_endpoint *near;
	__u32 end, place;

	if (frame + AFTER_IPV6 + sizeof(struct udphdr) > (void *)(long)skb->data_end)
		return false;
	end = AFTER_IPV6 + bpf_ntohs(ip->payload_len);
	if ((*(const __u8 *)ip & 0xf0) != 0x60 || end > skb->len ||
	    !usual_transport(ip->nexthdr, frame, AFTER_IPV6, end))
		return false;
	/* An attachment without IPv6 has zeros, as the second half of no address in use is. */
	if (!load_64(frame, source + 8) ||
	    load_64(frame, source + 8) != load_64(&attachment->ipv6, 8) ||
	    load_64(frame, source) != load_64(&attachment->ipv6, 0))
		return false;
	place = NEAR_PLACES + bpf_ntohl(load_32(frame, destination + 12)) % NEAR_PLACES;
	near = near_endpoint.lookup(&place);
	if (!near || load_64(frame, destination + 8) != load_64(&near->address, 8) ||
	    load_64(frame, destination) != load_64(&near->address, 0))
		return false;
	return usual_deliver(skb, config, attachment, near, frame, verdict);
}

/* True, and the verdict, when it was such a packet. */
static __always_inline bool usual(struct __sk_buff *skb, const struct node_entry *config,
				  const struct attachment_entry *attachment, int *verdict)
{
	void *frame = (void *)(long)skb->data;
	__u64 source;

	if (frame + AFTER_IPV4 + sizeof(struct udphdr) > (void *)(long)skb->data_end ||
	    skb->vlan_present)
		return false;
	/* To the gateway's MAC, which the device has too: to the host, and to no group. */
	if ((load_64(frame, 0) ^ load_64(config->gateway_mac, 0)) << 16)
		return false;
	/* Source MAC and, where the entry has padding, the EtherType. */
	source = load_64(frame, ETH_ALEN) ^ load_64(attachment->mac, 0);
	if (source == HIGH_16(bpf_htons(ETH_P_IP)))
		return usual_ipv4(skb, config, attachment, frame, verdict);
	if (source == HIGH_16(bpf_htons(ETH_P_IPV6)))
		return usual_ipv6(skb, config, attachment, frame, verdict);
	return false;
}
