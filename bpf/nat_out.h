/* SPDX-License-Identifier: GPL-2.0 */
/* What pods send to the host and through uplinks: tracked, judged, and behind which outside port.
 */
#include "address.h"
#include "counters.h"
#include "drop.h"
#include "flow.h"
#include "icmp.h"
#include "monitor.h"
#include "nat.h"
#include "node.h"
#include "packet.h"
#include "policy.h"
#include "rewrite.h"
#include "track.h"

#define PORT_TRIES	24
#define TAKE_OVER_TRIES 4 /* of these, when all others were in vain */

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

/*
 * Whether work->outside can be had, which is this alias's key: its flow is stale, or gone, and what
 * is left of it has been removed.
 */
static __always_inline bool nat_take_over(const struct packet *packet, struct nat_work *work,
					  const struct flow_entry *alias, const struct nat_end *own,
					  __u64 now_ns)
{
	__be16 port =
		is_icmp(packet) ? echo_answerer(alias->translated_port) : packet->destination_port;
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
	flow_delete(&work->outside);
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
	__be16 remote_port = is_icmp(packet) ? echo_answerer(port) : packet->destination_port;
	struct flow_entry *other;

	work->own.port = port;
	work->outside.high_port = own_is_high ? port : remote_port;
	work->outside.low_port = own_is_high ? remote_port : port;
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
	__be16 port =
		is_icmp(packet) ? echo_answerer(flow->translated_port) : packet->destination_port;
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
 * Tracks and judges what a pod sends to the host or through an uplink: 0, FLOW_TO_STACK or a drop
 * reason. On 0
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
		if (flow_answers_stack(flow, from_origin, from))
			return FLOW_TO_STACK;
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
	if (!reason) {
		count_flow(from->slot, FLOW_NO_SLOT);
		monitor_flow(skb, config, packet, from->attachment, 0,
			     masquerade ? &seen->address : NULL, seen->port);
	}
	return reason;
}

/*
 * An ICMP error that a pod sends about a flow with the host or somebody outside, as that one knows
 * the flow; 0, FLOW_TO_STACK or a drop reason.
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
	if (flow_answers_stack(flow, !from_origin, from))
		return FLOW_TO_STACK;
	if (!(flow->flags & FLOW_TRANSLATED))
		return 0;
	seen.address = flow->translated;
	seen.port = flow->translated_port;
	return rewrite_error(skb, packet, quoted, false, quoted->destination_port, &seen);
}
