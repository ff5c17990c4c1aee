/* SPDX-License-Identifier: GPL-2.0 */
/* Tracked flows: who began, what was judged, how addresses are translated. */
#include "address.h"
#include "drop.h"
#include "node.h"
#include "packet.h"

/*
 * Both directions of a flow meet the same entry: the lesser end comes first, by the bytes of its
 * address, then of its port.
 */
struct flow_key {
	struct address_key low;
	struct address_key high;
	__be16 low_port; /* as in struct packet */
	__be16 high_port;
	__u8 protocol;
	__u8 pad[3];
};

/* struct flow_entry.flags */
#define FLOW_ORIGIN_IS_HIGH 0x01 /* the end that began is the key's higher one */
#define FLOW_REPLIED	    0x02 /* a packet came the other way */
#define FLOW_TRANSLATED	    0x04 /* translated is what outside sees in the pod's place */
#define FLOW_SERVICE	    0x08 /* began outside, at a NodePort or an external IP */
#define FLOW_ALIAS	    0x10 /* outside's half: translated is the pod's address and port */
#define FLOW_BY_STACK	    0x20 /* forwarded by the host's stack, which may have translated it */

/* struct flow_entry.closing: who has sent FIN; both after RST. */
#define FLOW_CLOSING_ORIGIN 0x01
#define FLOW_CLOSING_TARGET 0x02
#define FLOW_CLOSING_BOTH   0x03

struct flow_entry {
	__u64 created_ns; /* of CLOCK_MONOTONIC_COARSE, as flow_clock() */
	__u64 last_seen_ns;
	struct address_key translated;
	__u32 origin; /* attachment; 0: the host or outside. Alias of a service: its
			 id */
	__u32 target;
	__u32 slot;  /* of the attachment whose share of the table it takes;
		      * FLOW_NO_SLOT: nobody's
		      */
	__u32 epoch; /* of the policy under which it was allowed */
	__be16 translated_port;
	__u8 flags;
	__u8 closing;
	__u8 pad[4];
};

#define FLOW_NO_SLOT 0xffffffff

/* Sized by configuration (tracking.max_flows). */
BPF_F_TABLE("hash", struct flow_key, struct flow_entry, flows, 131072, 0);

/*
 * What was the table until a moment ago: while a swap makes it anew, its programs are given the old
 * one here (rdmanet/datapath/loader.py). Else it is empty.
 */
BPF_F_TABLE("hash", struct flow_key, struct flow_entry, flows_before, 1, 0);

/* Flows of each attachment, by its slot: one pod cannot take the table from the others. */
BPF_F_TABLE("array", __u32, __u64, flow_counts, 4096, 0);

/*
 * After so many seconds without a packet a flow is stale: RFC 5382 REQ-5, Linux' TIME_WAIT; RFC
 * 4787 REQ-5; RFC 5508 REQ-1. FLOW_TIMEOUTS_S in rdmanet/datapath/tables.py is compared with these.
 */
#define FLOW_TCP_ESTABLISHED_S 7440
#define FLOW_TCP_OPENING_S     240
#define FLOW_TCP_CLOSING_S     60
#define FLOW_UDP_REPLIED_S     300 /* and all others that are neither TCP nor ICMP */
#define FLOW_UDP_OPENING_S     120
#define FLOW_ICMP_S	       60
/* No flow is stale before. */
#define FLOW_LEAST_S 60

#define NS_PER_S 1000000000ULL

/* Cheap: the time of the last timer tick. bcc 0.26 does not declare it. */
static __u64 (*flow_clock)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;

/* The order of two addresses, as memcmp() has it: below, above or equal to 0. */
static __always_inline int address_order(const struct address_key *a, const struct address_key *b)
{
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		__u32 left = bpf_ntohl(a->word[i]), right = bpf_ntohl(b->word[i]);

		if (left != right)
			return left < right ? -1 : 1;
	}
	return 0;
}

/* Fills the key of a packet from one end to another. True: the source is its higher end. */
static __always_inline bool flow_key_of_ends(struct flow_key *key, const struct address_key *source,
					     __be16 source_port,
					     const struct address_key *destination,
					     __be16 destination_port, __u8 protocol)
{
	int order = address_order(source, destination);

	key->protocol = protocol;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
	if (order > 0 || (!order && bpf_ntohs(source_port) > bpf_ntohs(destination_port))) {
		copy_address(&key->low, destination->word);
		copy_address(&key->high, source->word);
		key->low_port = destination_port;
		key->high_port = source_port;
		return true;
	}
	copy_address(&key->low, source->word);
	copy_address(&key->high, destination->word);
	key->low_port = source_port;
	key->high_port = destination_port;
	return false;
}

/* The key of a packet as it is. True: its source is the key's higher end. */
static __always_inline bool flow_key_of(struct flow_key *key, const struct packet *packet)
{
	return flow_key_of_ends(key, &packet->source, packet->source_port, &packet->destination,
				packet->destination_port, packet->protocol);
}

/* NULL: not tracked. Another CPU may remove it at any time. */
static __always_inline struct flow_entry *flow_lookup(struct flow_key *key)
{
	struct flow_entry *flow = flows.lookup(key), *before;

	if (flow)
		return flow;
	before = flows_before.lookup(key);
	if (!before)
		return NULL;
	flows.insert(key, before);
	flow = flows.lookup(key);
	return flow ? flow : before;
}

/* Whether a packet goes in the direction in which the flow began. */
static __always_inline bool flow_from_origin(const struct flow_entry *flow, bool from_high)
{
	return from_high == !!(flow->flags & FLOW_ORIGIN_IS_HIGH);
}

static __always_inline __u32 flow_timeout_s(const struct flow_entry *flow, __u8 protocol)
{
	bool replied = flow->flags & FLOW_REPLIED;

	if (protocol == IPPROTO_TCP) {
		if (flow->closing == FLOW_CLOSING_BOTH)
			return FLOW_TCP_CLOSING_S;
		return replied ? FLOW_TCP_ESTABLISHED_S : FLOW_TCP_OPENING_S;
	}
	if (protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6)
		return FLOW_ICMP_S;
	return replied ? FLOW_UDP_REPLIED_S : FLOW_UDP_OPENING_S;
}

/* Whether it has been idle so long that it is worth nothing any more. */
static __always_inline bool flow_is_stale(const struct flow_entry *flow, __u8 protocol,
					  __u64 now_ns)
{
	/* Signed: another CPU may have written a later tick meanwhile. */
	__s64 idle_ns = now_ns - flow->last_seen_ns;

	return idle_ns > (__s64)(flow_timeout_s(flow, protocol) * NS_PER_S);
}

/* The first segment of a connection. */
static __always_inline bool flow_opens(const struct packet *packet)
{
	return packet->protocol == IPPROTO_TCP &&
	       (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* What a packet that passes says about its flow. Writes only what changes. */
static __always_inline void flow_touch(struct flow_entry *flow, const struct packet *packet,
				       bool from_origin, __u64 now_ns)
{
	if (flow->last_seen_ns != now_ns)
		flow->last_seen_ns = now_ns;
	if (!from_origin && !(flow->flags & FLOW_REPLIED))
		flow->flags |= FLOW_REPLIED;
	if (packet->protocol != IPPROTO_TCP)
		return;
	if (packet->tcp_flags & TCP_RST)
		flow->closing = FLOW_CLOSING_BOTH;
	else if (packet->tcp_flags & TCP_FIN)
		flow->closing |= from_origin ? FLOW_CLOSING_ORIGIN : FLOW_CLOSING_TARGET;
	else if (flow->closing && from_origin && flow_opens(packet))
		flow->closing = 0;
}

/* Takes one flow of the slot's share; 0 or a drop reason. */
static __always_inline int flow_charge(const struct node_entry *config, __u32 slot)
{
	__u64 *count = flow_counts.lookup(&slot);

	/* FLOW_NO_SLOT: nobody's. */
	if (!count)
		return 0;
	/* As many too many as there are CPUs, at worst. */
	if (config->max_flows_per_pod && *count >= config->max_flows_per_pod)
		return DROP_FLOW_LIMIT;
	__sync_fetch_and_add(count, 1);
	return 0;
}

static __always_inline void flow_give_back(__u32 slot)
{
	__u64 *count = flow_counts.lookup(&slot);

	if (count && *count)
		__sync_fetch_and_add(count, -1);
}

#define FLOW_EXISTS -1

/*
 * Not a drop reason: what the host's stack has forwarded (a port mapping of iptables) it has to see
 * the answers to.
 */
#define FLOW_TO_STACK -2

/*
 * Enters what the caller has charged; 0, FLOW_EXISTS when another CPU was faster, or
 * DROP_FLOW_TABLE_FULL.
 */
static __always_inline int flow_enter(struct flow_key *key, struct flow_entry *entry)
{
	int error = flows.insert(key, entry);

	if (!error)
		return 0;
	return error == -17 /* EEXIST */ ? FLOW_EXISTS : DROP_FLOW_TABLE_FULL;
}

/* 0: it was there. */
static __always_inline int flow_delete(struct flow_key *key)
{
	flows_before.delete(key);
	return flows.delete(key);
}

/* Gives the share back if there was such an entry: whoever removes it first does. */
static __always_inline void flow_remove(struct flow_key *key, __u32 slot)
{
	if (!flow_delete(key))
		flow_give_back(slot);
}
