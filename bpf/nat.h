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

#define PORT_TRIES	16
#define TAKE_OVER_TRIES 4 /* of these, when all others were in vain */

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
		/* Echo: the identifier is on both sides. */
		if (inside->protocol == IPPROTO_ICMP || inside->protocol == IPPROTO_ICMPV6)
			port = flow->translated_port;
		flow_key_of_ends(&work->outside, &flow->translated, flow->translated_port,
				 &remote->address, port, inside->protocol);
		alias = flow_lookup(&work->outside);
		if (alias && nat_is_alias(alias, &pod->address, pod->port))
			flows.delete(&work->outside);
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
	flows.delete(&work->outside);
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

/* A socket of the host's own would answer to this outside port; those in TIME_WAIT too. */
static __always_inline bool nat_port_in_use(struct __sk_buff *skb, const struct packet *packet,
					    const struct nat_end *own)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *socket;
	__u32 bytes;

	if (packet->family == 4) {
		tuple.ipv4.saddr = packet->destination.word[3];
		tuple.ipv4.daddr = own->address.word[3];
		tuple.ipv4.sport = packet->destination_port;
		tuple.ipv4.dport = own->port;
		bytes = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &packet->destination, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &own->address, 16);
		tuple.ipv6.sport = packet->destination_port;
		tuple.ipv6.dport = own->port;
		bytes = sizeof(tuple.ipv6);
	}
	if (packet->protocol == IPPROTO_TCP)
		socket = (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &tuple, bytes, -1, 0);
	else if (packet->protocol == IPPROTO_UDP)
		socket = bpf_sk_lookup_udp(skb, &tuple, bytes, -1, 0);
	else
		return false;
	if (!socket)
		return false;
	bpf_sk_release(socket);
	return true;
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
 * Whether work->outside can be had, which is this alias's key: its flow is stale, or gone, and what
 * is left of it has been removed.
 */
static __always_inline bool nat_take_over(const struct packet *packet, struct nat_work *work,
					  const struct flow_entry *alias, const struct nat_end *own,
					  __u64 now_ns)
{
	__be16 port = is_icmp(packet) ? alias->translated_port : packet->destination_port;
	struct flow_entry *flow;

	if (!(alias->flags & FLOW_ALIAS))
		return false;
	flow_key_of_ends(&work->other, &alias->translated, alias->translated_port,
			 &packet->destination, port, packet->protocol);
	flow = flow_lookup(&work->other);
	if (flow && nat_is_end(flow, &own->address, own->port)) {
		if (!flow_is_stale(flow, packet->protocol, now_ns))
			return false;
		flow_remove(&work->other, flow->slot);
	}
	flows.delete(&work->outside);
	return true;
}

/*
 * Makes one try for an outside port: 0, the alias is entered; FLOW_EXISTS: it cannot be
 * had; or a drop reason. `take_over`: also from a stale flow.
 */
static __always_inline int nat_try_port(struct __sk_buff *skb, const struct packet *packet,
					struct nat_work *work, bool own_is_high, __be16 port,
					bool take_over, __u64 now_ns)
{
	struct flow_entry *other;

	work->own.port = port;
	if (own_is_high || is_icmp(packet))
		work->outside.high_port = port;
	if (!own_is_high || is_icmp(packet))
		work->outside.low_port = port;
	/* Its answers would come in as RoCE. */
	if (port == bpf_htons(ROCE_PORT))
		return FLOW_EXISTS;
	other = flow_lookup(&work->outside);
	if (other) {
		/* This very flow's, without its other half. */
		if (nat_is_alias(other, &packet->source, packet->source_port))
			return 0;
		if (!take_over || !nat_take_over(packet, work, other, &work->own, now_ns))
			return FLOW_EXISTS;
	}
	if (nat_port_in_use(skb, packet, &work->own))
		return FLOW_EXISTS;
	return flow_enter(&work->outside, &work->alias);
}

/*
 * Enters a flow that a pod begins through an uplink, work->entry: finds an outside port, which goes
 * into translated_port. The address is there already. 0 or a drop reason.
 */
static __always_inline int nat_begin(struct __sk_buff *skb, const struct packet *packet,
				     const struct node_entry *config, struct nat_work *work,
				     __u64 now_ns)
{
	__u32 first = config->first_port, last = config->last_port;
	__u32 ports = last - first + 1;
	__u32 hash = nat_hash(&work->inside);
	struct flow_entry *entry = &work->entry;
	bool own_is_high;
	int reason, i;

	if (last < first || !first)
		return DROP_NAT_NO_PORT;
	reason = flow_charge(config, entry->slot);
	if (reason)
		return reason;
	work->pod.address = packet->source;
	work->pod.port = packet->source_port;
	work->own.address = entry->translated;
	own_is_high = flow_key_of_ends(&work->outside, &entry->translated, 0, &packet->destination,
				       packet->destination_port, packet->protocol);
	nat_make_alias(work, own_is_high, &work->pod, entry->origin);
	/* Not neighbouring ports: a full stretch would stop all tries. */
	for (i = 0; i < PORT_TRIES; i++) {
		reason = nat_try_port(skb, packet, work, own_is_high,
				      bpf_htons(first + (hash + i * (hash >> 16 | 1)) % ports),
				      i >= PORT_TRIES - TAKE_OVER_TRIES, now_ns);
		if (reason != FLOW_EXISTS)
			break;
	}
	if (reason) {
		flow_give_back(entry->slot);
		return reason == FLOW_EXISTS ? DROP_NAT_NO_PORT : reason;
	}
	entry->translated_port = work->own.port;
	reason = nat_enter_inside(work);
	return reason == FLOW_EXISTS ? DROP_NAT_NO_PORT : reason;
}

/* The same of one that keeps its addresses. */
static __always_inline int nat_begin_untranslated(const struct node_entry *config,
						  struct nat_work *work)
{
	int reason = flow_charge(config, work->entry.slot);

	if (reason)
		return reason;
	reason = flow_enter(&work->inside, &work->entry);
	if (!reason)
		return 0;
	flow_give_back(work->entry.slot);
	return reason == FLOW_EXISTS ? 0 : reason;
}

/* Whether outside's half of a pod's flow is there. */
static __always_inline bool nat_has_alias(const struct packet *packet, struct nat_work *work,
					  const struct flow_entry *flow)
{
	__be16 port = is_icmp(packet) ? flow->translated_port : packet->destination_port;
	struct flow_entry *alias;

	flow_key_of_ends(&work->outside, &flow->translated, flow->translated_port,
			 &packet->destination, port, packet->protocol);
	alias = flow_lookup(&work->outside);
	return alias && nat_is_alias(alias, &packet->source, packet->source_port);
}

/* TCP, UDP, and what begins an ICMP echo. */
static __always_inline bool nat_can_translate(const struct packet *packet)
{
	if (packet->protocol == IPPROTO_TCP || packet->protocol == IPPROTO_UDP)
		return true;
	if (!is_icmp(packet))
		return false;
	return (packet->flags & IS_LATER_FRAGMENT) ||
	       packet->icmp_type == (packet->family == 4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST);
}

/*
 * Tracks and judges what a pod sends to the host or through an uplink: 0 or a drop reason. On 0
 * `seen` is what the other end sees in the pod's place, or stays zero: the pod itself.
 * `masquerade`: flows that begin are translated, behind `own`; zero: this family has none.
 */
static __always_inline int nat_outbound(struct __sk_buff *skb, const struct packet *packet,
					const struct node_entry *config,
					const struct flow_end *from, bool masquerade,
					const struct address_key *own, __u32 epoch,
					struct nat_end *seen)
{
	struct nat_work *work = nat_work_lookup();
	struct flow_entry *flow, *entry;
	__u64 now_ns = flow_clock();
	struct flow_end to;
	bool from_high, from_origin = true, begins;
	int reason;

	if (!work)
		return DROP_NO_NODE;
	end_outside(&to);
	from_high = flow_key_of(&work->inside, packet);
	flow = flow_lookup(&work->inside);
	begins = !flow;
	if (flow) {
		bool translated = flow->flags & FLOW_TRANSLATED;

		from_origin = flow_from_origin(flow, from_high);
		begins = (from_origin ? flow->origin : flow->target) != from->attachment ||
			 (from_origin ? flow->target : flow->origin) ||
			 (flow->flags & FLOW_ALIAS) ||
			 flow_is_stale(flow, packet->protocol, now_ns) ||
			 (flow_opens(packet) && (flow->closing || !from_origin)) ||
			 (translated && !nat_has_alias(packet, work, flow));
		/* The node's configuration, or its address, is another one by now. */
		if (from_origin && (translated != masquerade ||
				    (translated && !address_equal(&flow->translated, own))))
			begins = true;
	}
	if (begins || flow->epoch != epoch) {
		reason = flow_judge(packet, begins || from_origin, from, &to);
		if (reason)
			return reason;
	}
	if (!begins) {
		if (flow->epoch != epoch)
			flow->epoch = epoch;
		flow_touch(flow, packet, from_origin, now_ns);
		if (flow->flags & FLOW_TRANSLATED) {
			seen->address = flow->translated;
			seen->port = flow->translated_port;
		}
		return 0;
	}
	if (masquerade) {
		if (address_is_zero(own))
			return DROP_NO_MASQUERADE_ADDRESS;
		if (!nat_can_translate(packet))
			return DROP_NAT_PROTOCOL;
	}
	if (flow) {
		work->pod.address = packet->source;
		work->pod.port = packet->source_port;
		work->remote.address = packet->destination;
		work->remote.port = packet->destination_port;
		nat_remove(work, flow, &work->pod, &work->remote);
	}
	entry = &work->entry;
	__builtin_memset(entry, 0, sizeof(*entry));
	entry->created_ns = now_ns;
	entry->origin = from->attachment;
	entry->slot = from->slot;
	entry->epoch = epoch;
	entry->flags = from_high ? FLOW_ORIGIN_IS_HIGH : 0;
	flow_touch(entry, packet, true, now_ns);
	if (masquerade) {
		entry->flags |= FLOW_TRANSLATED;
		entry->translated = *own;
		reason = nat_begin(skb, packet, config, work, now_ns);
		seen->address = *own;
		seen->port = entry->translated_port;
	} else {
		reason = nat_begin_untranslated(config, work);
	}
	if (!reason)
		monitor_flow(skb, config, packet, from->attachment, 0,
			     masquerade ? &seen->address : NULL, seen->port);
	return reason;
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
	*from_high = flow_key_of_ends(&work->inside, &packet->source,
				      is_icmp(packet) ? pod->port : packet->source_port,
				      &pod->address, pod->port, packet->protocol);
	flow = flow_lookup(&work->inside);
	if (flow && nat_is_end(flow, &packet->destination, packet->destination_port))
		return flow;
	flows.delete(&work->outside);
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

/*
 * An ICMP error that a pod sends about a flow with the host or somebody outside, as that one knows
 * the flow; 0 or a drop reason.
 */
static __always_inline int nat_outbound_error(struct __sk_buff *skb, const struct packet *packet,
					      const struct flow_end *from, __u32 epoch)
{
	struct nat_work *work = nat_work_lookup();
	struct packet *quoted;
	struct flow_entry *flow;
	struct nat_end seen;
	struct flow_end to;
	bool from_origin;
	int reason;

	if (!work)
		return DROP_NO_NODE;
	quoted = &work->quoted;
	__builtin_memset(quoted, 0, sizeof(*quoted));
	reason = icmp_quoted(skb, packet, quoted);
	if (reason)
		return reason;
	from_origin = flow_key_of(&work->inside, quoted);
	flow = flow_lookup(&work->inside);
	/* A pod is no router: what it tells of was sent to itself. */
	if (!flow || (flow->flags & FLOW_ALIAS) ||
	    !address_equal(&quoted->destination, &packet->source))
		return DROP_ICMP_UNRELATED;
	from_origin = flow_from_origin(flow, from_origin);
	if ((from_origin ? flow->target : flow->origin) != from->attachment)
		return DROP_ICMP_UNRELATED;
	if (flow->epoch != epoch) {
		end_outside(&to);
		reason = flow_judge(quoted, from_origin, &to, from);
		if (reason)
			return reason;
	}
	if (!(flow->flags & FLOW_TRANSLATED))
		return 0;
	seen.address = flow->translated;
	seen.port = flow->translated_port;
	return rewrite_error(skb, packet, quoted, false, quoted->destination_port, &seen);
}
