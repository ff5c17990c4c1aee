/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The usual packet: TCP or UDP (not RoCE) from one pod to another of this host, of which neither
 * has a limit (those have no place near by, limit.h), of a flow that is known and judged under
 * today's policy, whole, without IP options or extension headers. It is judged here in as few
 * instructions as can be and exactly as pod.c would: what is in any way else, spoofed or malformed,
 * is left to it.
 *
 * Loads wider than a field take what is beside it along: both architectures that the datapath runs
 * on (x86_64, aarch64) are little-endian and load from any address.
 */
#include "counters.h"
#include "endpoint.h"
#include "flow.h"
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

/* Whether ports are there, from the offset on, and neither are RoCE's nor open or end anything. */
static __always_inline bool usual_transport(struct __sk_buff *skb, __u8 protocol, void *frame,
					    __u32 offset, __u32 end)
{
	if (protocol == IPPROTO_TCP)
		return end >= offset + sizeof(struct tcphdr) &&
		       frame + offset + 14 <= (void *)(long)skb->data_end &&
		       !(*(const __u8 *)(frame + offset + 13) & (TCP_FIN | TCP_SYN | TCP_RST));
	return protocol == IPPROTO_UDP && end >= offset + sizeof(struct udphdr) &&
	       load_16(frame, offset + offsetof(struct udphdr, dest)) != bpf_htons(ROCE_PORT);
}

/* What the packet is of: two words for each address, as in struct address_key. */
struct usual_ends {
	__u64 source[2];
	__u64 destination[2];
	__u32 ports;
	__u8 protocol;
	__u8 family;
};

/* struct flow_key in words: two for each address, one for ports and protocol. */
struct usual_key {
	__u64 word[5];
};

/* In the order of address_order(); an address that is less in its first word is less. */
static __always_inline bool usual_from_high(const struct usual_ends *ends)
{
	if (ends->family == 6 && ends->source[0] != ends->destination[0])
		return __builtin_bswap64(ends->source[0]) > __builtin_bswap64(ends->destination[0]);
	return __builtin_bswap64(ends->source[1]) > __builtin_bswap64(ends->destination[1]);
}

static __always_inline void usual_key(struct usual_key *key, const struct usual_ends *ends)
{
	bool from_high = usual_from_high(ends);
	__u32 ports = ends->ports;

	key->word[0] = from_high ? ends->destination[0] : ends->source[0];
	key->word[1] = from_high ? ends->destination[1] : ends->source[1];
	key->word[2] = from_high ? ends->source[0] : ends->destination[0];
	key->word[3] = from_high ? ends->source[1] : ends->destination[1];
	if (from_high)
		ports = ports << 16 | ports >> 16;
	key->word[4] = ports | (__u64)ends->protocol << 32;
}

/* Where flags and closing are in the 64-bit word that begins with struct flow_entry.epoch. */
#define STATE_FLAGS(flags) ((__u64)(flags) << 48)
#define STATE_CLOSING	   ((__u64)0xff << 56)

/*
 * Whether flow_pass() would do no more than look and touch. A word of the entry is the two
 * attachments, another one its epoch and state.
 */
static __always_inline bool usual_tracked(__u32 epoch, __u32 from, __u32 to,
					  const struct usual_ends *packet)
{
	struct usual_key key;
	struct flow_entry *flow;
	__u64 now_ns, idle_ns, ends, state;

	usual_key(&key, packet);
	flow = flows.lookup((struct flow_key *)&key);
	if (!flow)
		return false;
	ends = load_64(flow, offsetof(struct flow_entry, origin));
	state = load_64(flow, offsetof(struct flow_entry, epoch)) ^ epoch;
	/* Neither changes by a packet that is neither SYN, FIN nor RST. */
	state &= ~(STATE_CLOSING | STATE_FLAGS(FLOW_ORIGIN_IS_HIGH));
	if (ends == (from | (__u64)to << 32))
		state &= ~STATE_FLAGS(FLOW_REPLIED);
	else if (ends == (to | (__u64)from << 32))
		state ^= STATE_FLAGS(FLOW_REPLIED);
	else
		return false;
	if (state)
		return false;
	now_ns = flow_clock();
	idle_ns = now_ns - flow->last_seen_ns;
	if (!idle_ns)
		return true;
	/* Perhaps stale; or another CPU was later. */
	if (idle_ns > FLOW_LEAST_S * NS_PER_S)
		return false;
	flow->last_seen_ns = now_ns;
	return true;
}

/*
 * A direction of a flow of which usual_tracked() was true in this very tick of the clock: so it is
 * still, but for one that was taken out of the table meanwhile, which is missed when the tick ends.
 * Another epoch, other attachments are seen at once. A look here is a fifth of one into the table
 * of flows.
 */
struct known_flow {
	__u64 address[4]; /* source and destination; IPv4: both in the first word */
	__u64 ends;	  /* their attachments, the source's in the lower half */
	__u64 tick;	  /* of bpf_jiffies64(), which is never 0 */
	__u64 epoch;
	__u32 ports;
	__u8 protocol;
	__u8 family;
	__u8 pad[2];
};

#define KNOWN_PLACES_BITS 8

BPF_F_TABLE("percpu_array", __u32, struct known_flow, known_flows, 1 << KNOWN_PLACES_BITS, 0);

/* Both directions of a flow have their own place. */
static __always_inline __u32 known_place(const struct usual_ends *packet)
{
	__u32 mixed = packet->ports ^ (__u32)(packet->destination[1] >> 32);

	return mixed * 0x9e3779b1 >> (32 - KNOWN_PLACES_BITS);
}

static __always_inline bool usual_flow(const struct node_entry *config, __u32 from, __u32 to,
				       const struct usual_ends *packet)
{
	__u64 tick = bpf_jiffies64(), epoch = config->epoch, different;
	__u64 ends = from | (__u64)to << 32, rest;
	__u32 place = known_place(packet);
	struct known_flow *known = known_flows.lookup(&place);
	__u64 first;

	if (!known)
		return false;
	rest = packet->ports | (__u64)packet->protocol << 32 | (__u64)packet->family << 40;
	first = packet->family == 6 ? packet->source[0]
				    : packet->source[1] >> 32 | packet->destination[1] >> 32 << 32;
	different = (load_64(known, offsetof(struct known_flow, ports)) ^ rest) |
		    (known->ends ^ ends) | (known->tick ^ tick) | (known->epoch ^ epoch) |
		    (known->address[0] ^ first);
	if (packet->family == 6)
		different |= (known->address[1] ^ packet->source[1]) |
			     (known->address[2] ^ packet->destination[0]) |
			     (known->address[3] ^ packet->destination[1]);
	if (!different)
		return true;
	if (!usual_tracked(epoch, from, to, packet))
		return false;
	known->address[0] = first;
	known->address[1] = packet->source[1];
	known->address[2] = packet->destination[0];
	known->address[3] = packet->destination[1];
	known->ends = ends;
	known->tick = tick;
	known->epoch = epoch;
	known->ports = packet->ports;
	known->protocol = packet->protocol;
	known->family = packet->family;
	return true;
}

/*
 * False, and nothing is done, for nobody's place (the unspecified address finds one), the pod's own
 * address, and a flow about which there is more to say.
 */
static __always_inline bool usual_deliver(struct __sk_buff *skb, const struct node_entry *config,
					  const struct attachment_entry *attachment,
					  const struct near_endpoint *near, void *frame,
					  const struct usual_ends *packet, int *verdict)
{
	__u32 ifindex = near->entry.ifindex;

	if (!ifindex || near->entry.slot == attachment->slot ||
	    !usual_flow(config, attachment->id, near->entry.attachment, packet))
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
	struct usual_ends packet;
	__u32 place;

	/* Version 4, no options; no fragment; all there. */
	if (*(const __u8 *)ip != 0x45 || (ip->frag_off & bpf_htons(0x3fff)) || end > skb->len ||
	    !usual_transport(skb, ip->protocol, frame, AFTER_IPV4, end))
		return false;
	/* Zero: the attachment has no address of the family. */
	if (!ip->saddr || ip->saddr != attachment->ipv4.word[3])
		return false;
	place = bpf_ntohl(ip->daddr) % NEAR_PLACES;
	near = near_endpoint.lookup(&place);
	if (!near || near->address.word[3] != ip->daddr)
		return false;
	packet.source[0] = packet.destination[0] = 0;
	packet.source[1] = bpf_htonl(0xffff) | (__u64)ip->saddr << 32;
	packet.destination[1] = bpf_htonl(0xffff) | (__u64)ip->daddr << 32;
	packet.ports = load_32(frame, AFTER_IPV4);
	packet.protocol = ip->protocol;
	packet.family = 4;
	return usual_deliver(skb, config, attachment, near, frame, &packet, verdict);
}

static __always_inline bool usual_ipv6(struct __sk_buff *skb, const struct node_entry *config,
				       const struct attachment_entry *attachment, void *frame,
				       int *verdict)
{
	const __u32 source = NETWORK_OFFSET + offsetof(struct ipv6hdr, saddr);
	const __u32 destination = NETWORK_OFFSET + offsetof(struct ipv6hdr, daddr);
	const struct ipv6hdr *ip = frame + NETWORK_OFFSET;
	__u64 source_0, source_1, destination_0, destination_1;
	const struct near_endpoint *near;
	struct usual_ends packet;
	__u32 end, place;

	if (frame + AFTER_IPV6 + sizeof(struct udphdr) > (void *)(long)skb->data_end)
		return false;
	end = AFTER_IPV6 + bpf_ntohs(ip->payload_len);
	if ((*(const __u8 *)ip & 0xf0) != 0x60 || end > skb->len ||
	    !usual_transport(skb, ip->nexthdr, frame, AFTER_IPV6, end))
		return false;
	source_0 = load_64(frame, source);
	source_1 = load_64(frame, source + 8);
	/* An attachment without IPv6 has zeros, as the second half of no address in use is. */
	if (!source_1 || source_1 != load_64(&attachment->ipv6, 8) ||
	    source_0 != load_64(&attachment->ipv6, 0))
		return false;
	destination_0 = load_64(frame, destination);
	destination_1 = load_64(frame, destination + 8);
	place = NEAR_PLACES + bpf_ntohl(destination_1 >> 32) % NEAR_PLACES;
	near = near_endpoint.lookup(&place);
	if (!near || destination_1 != load_64(&near->address, 8) ||
	    destination_0 != load_64(&near->address, 0))
		return false;
	packet.source[0] = source_0;
	packet.source[1] = source_1;
	packet.destination[0] = destination_0;
	packet.destination[1] = destination_1;
	packet.ports = load_32(frame, AFTER_IPV6);
	packet.protocol = ip->nexthdr;
	packet.family = 6;
	return usual_deliver(skb, config, attachment, near, frame, &packet, verdict);
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
