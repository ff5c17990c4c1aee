/* SPDX-License-Identifier: GPL-2.0 */
/* Flows of which outside sees another end than the pod's: both halves, and the rewriting. */
#include "address.h"
#include "drop.h"
#include "flow.h"
#include "icmp.h"
#include "monitor.h"
#include "node.h"
#include "packet.h"
#include "policy.h"
#include "rewrite.h"
#include "track.h"

/* Addresses to masquerade behind, by the uplink's index; zero: that family has none. */
struct uplink_entry {
	struct address_key ipv4;
	struct address_key ipv6;
};

BPF_F_TABLE("hash", __u32, struct uplink_entry, uplinks, 64, 0);

/* More than the stack of a program has room for; what a CPU works with while it begins a flow. */
struct nat_work {
	struct flow_key inside;
	struct flow_key outside;
	struct flow_key other; /* of the flow that has a port already */
	struct flow_entry entry;
	struct flow_entry alias;
	struct packet quoted;
	struct nat_end pod;
	struct nat_end remote;
	struct nat_end own; /* what outside sees */
};

BPF_F_TABLE("percpu_array", __u32, struct nat_work, nat_work, 1, 0);

static __always_inline struct nat_work *nat_work_lookup(void)
{
	__u32 zero = 0;

	return nat_work.lookup(&zero);
}

static __always_inline bool nat_is_end(const struct flow_entry *flow,
				       const struct address_key *address, __be16 port)
{
	return (flow->flags & FLOW_TRANSLATED) && flow->translated_port == port &&
	       address_equal(&flow->translated, address);
}

/* Whether it is outside's half of the flow of a pod's end. */
static __always_inline bool nat_is_alias(const struct flow_entry *flow,
					 const struct address_key *address, __be16 port)
{
	return (flow->flags & FLOW_ALIAS) && nat_is_end(flow, address, port);
}

/*
 * Removes the half that outside sees if it is this inside entry's, and then the entry, whose key is
 * work->inside: in the other order a port search could already have given the alias to another
 * flow. `remote` is the end that is no pod's.
 */
static __always_inline void nat_remove(struct nat_work *work, const struct flow_entry *flow,
				       const struct nat_end *pod, const struct nat_end *remote)
{
	struct flow_key *inside = &work->inside;
	struct flow_entry *alias;
	__be16 port = remote->port;
	__u32 slot = flow->slot;

	if (flow->flags & FLOW_TRANSLATED) {
		if (inside->protocol == IPPROTO_ICMP || inside->protocol == IPPROTO_ICMPV6)
			port = echo_answerer(flow->translated_port);
		flow_key_of_ends(&work->outside, &flow->translated, flow->translated_port,
				 &remote->address, port, inside->protocol);
		alias = flow_lookup(&work->outside);
		if (alias && nat_is_alias(alias, &pod->address, pod->port))
			flow_delete(&work->outside);
	}
	flow_remove(inside, slot);
}

/*
 * Makes work->alias of the whole inside entry in work->entry. `pod` is the pod's end, `origin` what
 * the alias has there; outside_is_high: the end that began is the alias's higher one.
 */
static __always_inline void nat_make_alias(struct nat_work *work, bool outside_is_high,
					   const struct nat_end *pod, __u32 origin)
{
	struct flow_entry *entry = &work->entry, *alias = &work->alias;

	__builtin_memset(alias, 0, sizeof(*alias));
	alias->created_ns = entry->created_ns;
	alias->last_seen_ns = entry->created_ns;
	alias->translated = pod->address;
	alias->translated_port = pod->port;
	alias->origin = origin;
	alias->target = entry->target;
	alias->slot = FLOW_NO_SLOT;
	alias->epoch = entry->epoch;
	alias->flags = FLOW_TRANSLATED | FLOW_ALIAS | (entry->flags & FLOW_SERVICE) |
		       (outside_is_high ? FLOW_ORIGIN_IS_HIGH : 0);
}

/*
 * Enters the inside half of a flow whose share was taken and whose alias is there; else gives the
 * share back and removes the alias. 0, a drop reason, or FLOW_EXISTS: another flow has the key.
 */
static __always_inline int nat_enter_inside(struct nat_work *work)
{
	struct flow_entry *entry = &work->entry, *found;
	int reason = flow_enter(&work->inside, entry);

	if (!reason)
		return 0;
	flow_give_back(entry->slot);
	/* The same flow, entered by another CPU. */
	if (reason == FLOW_EXISTS) {
		found = flow_lookup(&work->inside);
		if (found && nat_is_end(found, &entry->translated, entry->translated_port))
			return 0;
	}
	flow_delete(&work->outside);
	return reason;
}

/*
 * Enters a translated flow, the alias first: both keys and the whole inside entry are in `work`;
 * for the rest see nat_make_alias(). 0, a drop reason, or FLOW_EXISTS where another flow has one of
 * the keys.
 */
static __always_inline int nat_enter(const struct node_entry *config, struct nat_work *work,
				     bool outside_is_high, const struct nat_end *pod, __u32 origin)
{
	struct flow_entry *found;
	int reason = flow_charge(config, work->entry.slot);

	if (reason)
		return reason;
	nat_make_alias(work, outside_is_high, pod, origin);
	reason = flow_enter(&work->outside, &work->alias);
	if (reason == FLOW_EXISTS) {
		found = flow_lookup(&work->outside);
		/* The same flow's, from another CPU or without its other half. */
		if (found && nat_is_alias(found, &pod->address, pod->port))
			reason = 0;
	}
	if (reason) {
		flow_give_back(work->entry.slot);
		return reason;
	}
	return nat_enter_inside(work);
}

/* Spreads flows over the port range; the same flow always starts at the same place. */
static __always_inline __u32 nat_hash(const struct flow_key *key)
{
	const __u32 *word = (const __u32 *)key;
	__u32 hash = 0x9e3779b9;
	int i;

#pragma unroll
	for (i = 0; i < sizeof(*key) / 4; i++) {
		hash = (hash ^ word[i]) * 0x85ebca6b;
		hash ^= hash >> 15;
	}
	return hash;
}

/*
 * The flow to which a packet from outside belongs, by the alias: its inside entry, whose key goes
 * into work->inside, and the pod's end. NULL: none. `service` is whose the flow is, where
 * FLOW_SERVICE says that there is one.
 */
static __always_inline struct flow_entry *nat_inbound(const struct packet *packet,
						      struct nat_work *work, bool *from_high,
						      struct nat_end *pod, __u32 *service)
{
	struct flow_entry *alias, *flow;

	flow_key_of(&work->outside, packet);
	alias = flow_lookup(&work->outside);
	if (!alias || !(alias->flags & FLOW_ALIAS))
		return NULL;
	pod->address = alias->translated;
	pod->port = alias->translated_port;
	*service = alias->origin;
	*from_high =
		flow_key_of_ends(&work->inside, &packet->source,
				 is_icmp(packet) ? echo_answerer(pod->port) : packet->source_port,
				 &pod->address, pod->port, packet->protocol);
	flow = flow_lookup(&work->inside);
	if (flow && nat_is_end(flow, &packet->destination, packet->destination_port))
		return flow;
	flow_delete(&work->outside);
	return NULL;
}

/* Judges a flow that was found so, in the direction in which it began; 0 or a drop reason. */
static __always_inline int nat_judge(const struct packet *packet, bool from_origin,
				     const struct endpoint_entry *endpoint,
				     const struct nat_end *pod)
{
	struct flow_end inside, outside;

	end_of_endpoint(&inside, endpoint);
	end_outside(&outside);
	if (from_origin)
		return policy_judge(&outside, &packet->source, &inside, &pod->address,
				    packet->protocol, pod->port);
	return policy_judge(&inside, &pod->address, &outside, &packet->source, packet->protocol,
			    packet->source_port);
}
