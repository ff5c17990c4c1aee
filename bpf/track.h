/* SPDX-License-Identifier: GPL-2.0 */
/* Flows between two ends that keep their addresses: looked up, judged where they begin, entered. */
#include "counters.h"
#include "drop.h"
#include "flow.h"
#include "icmp.h"
#include "monitor.h"
#include "node.h"
#include "packet.h"
#include "policy.h"

/*
 * Enters a flow that begins with this packet; 0 or a drop reason. It takes of the origin's share,
 * or, where that is no pod, of the target's.
 */
static __always_inline int flow_begin(struct __sk_buff *skb, const struct node_entry *config,
				      const struct packet *packet, struct flow_key *key,
				      bool from_high, const struct flow_end *origin,
				      const struct flow_end *target, __u32 epoch, __u64 now_ns)
{
	struct flow_entry entry = {.created_ns = now_ns,
				   .last_seen_ns = now_ns,
				   .origin = origin->attachment,
				   .target = target->attachment,
				   .epoch = epoch};
	int reason;

	entry.slot = origin->slot == FLOW_NO_SLOT ? target->slot : origin->slot;
	entry.flags = from_high ? FLOW_ORIGIN_IS_HIGH : 0;
	if (!origin->attachment && !node_addresses.lookup((struct address_key *)&packet->source))
		entry.flags |= FLOW_BY_STACK;
	flow_touch(&entry, packet, true, now_ns);
	reason = flow_charge(config, entry.slot);
	if (reason)
		return reason;
	reason = flow_enter(key, &entry);
	if (!reason) {
		count_flow(origin->slot, target->slot);
		monitor_flow(skb, config, packet, origin->attachment, target->attachment, NULL, 0);
		return 0;
	}
	flow_give_back(entry.slot);
	return reason == FLOW_EXISTS ? 0 : reason;
}

/* Whether the entry is of a flow between these: an address may have gone to another pod. */
static __always_inline bool flow_is_between(const struct flow_entry *flow, bool from_origin,
					    const struct flow_end *from, const struct flow_end *to)
{
	if (flow->flags & (FLOW_TRANSLATED | FLOW_ALIAS))
		return false;
	if (from_origin)
		return flow->origin == from->attachment && flow->target == to->attachment;
	return flow->origin == to->attachment && flow->target == from->attachment;
}

/*
 * Judges a tracked flow in the direction in which it began, by a packet from one end to the other.
 */
static __always_inline int flow_judge(const struct packet *packet, bool from_origin,
				      const struct flow_end *from, const struct flow_end *to)
{
	if (from_origin)
		return policy_judge(from, &packet->source, to, &packet->destination,
				    packet->protocol, packet->destination_port);
	return policy_judge(to, &packet->destination, from, &packet->source, packet->protocol,
			    packet->source_port);
}

/*
 * Whether a packet against the flow's direction has to go to the host's stack: a pod answers. One
 * that comes from there, of no pod, is such an answer that the stack did not know any more.
 */
static __always_inline bool flow_answers_stack(const struct flow_entry *flow, bool from_origin,
					       const struct flow_end *from)
{
	return (flow->flags & FLOW_BY_STACK) && !from_origin &&
	       (!from->attachment || flow->target == from->attachment);
}

/*
 * The policy's epoch. Read it before the ends are: what changes after that has another, and is
 * judged again.
 */
static __always_inline __u32 policy_epoch(const struct node_entry *config)
{
	__u32 epoch = *(const volatile __u32 *)&config->epoch;

	asm volatile("" ::: "memory");
	return epoch;
}

/* FLOW_TO_STACK, or why the answer is dropped. To policy the one that began is an address. */
static __always_inline int flow_answer_stack(struct flow_entry *flow, const struct packet *packet,
					     const struct flow_end *from, __u32 epoch, __u64 now_ns)
{
	struct flow_end stack;
	int reason;

	if (flow->epoch != epoch) {
		end_outside(&stack);
		reason = flow_judge(packet, false, from, &stack);
		if (reason)
			return reason;
		flow->epoch = epoch;
	}
	flow_touch(flow, packet, false, now_ns);
	return FLOW_TO_STACK;
}

/*
 * Tracks and judges a packet: 0, FLOW_TO_STACK, or why it is dropped. A flow that policy forbids by
 * now stays in the table until it is stale: else its next packet from the other end would begin it
 * the other way round.
 */
static __always_inline int flow_pass(struct __sk_buff *skb, const struct node_entry *config,
				     const struct packet *packet, const struct flow_end *from,
				     const struct flow_end *to, __u32 epoch)
{
	__u64 now_ns = flow_clock();
	struct flow_entry *flow;
	struct flow_key key;
	bool from_high, from_origin = true, begins;
	int reason;

	from_high = flow_key_of(&key, packet);
	flow = flow_lookup(&key);
	begins = !flow;
	if (flow) {
		from_origin = flow_from_origin(flow, from_high);
		if (flow_answers_stack(flow, from_origin, from) && !flow_opens(packet) &&
		    !flow_is_stale(flow, packet->protocol, now_ns))
			return flow_answer_stack(flow, packet, from, epoch, now_ns);
		/* The same ends connect anew, or the other way round. */
		begins = !flow_is_between(flow, from_origin, from, to) ||
			 flow_is_stale(flow, packet->protocol, now_ns) ||
			 (flow_opens(packet) && (flow->closing || !from_origin));
	}
	if (begins || flow->epoch != epoch) {
		reason = flow_judge(packet, begins || from_origin, from, to);
		if (reason)
			return reason;
	}
	if (begins) {
		if (flow)
			flow_remove(&key, flow->slot);
		return flow_begin(skb, config, packet, &key, from_high, from, to, epoch, now_ns);
	}
	if (flow->epoch != epoch)
		flow->epoch = epoch;
	flow_touch(flow, packet, from_origin, now_ns);
	return 0;
}

/*
 * An ICMP error about a tracked flow between the same two ends passes against the direction of the
 * packet that it quotes: 0, FLOW_TO_STACK, or why it is dropped.
 */
static __always_inline int flow_pass_error(struct __sk_buff *skb, const struct node_entry *config,
					   const struct packet *packet, const struct flow_end *from,
					   const struct flow_end *to)
{
	struct packet quoted = {};
	struct flow_entry *flow;
	struct flow_key key;
	bool from_origin;
	int reason;

	reason = icmp_quoted(skb, packet, &quoted);
	if (reason)
		return reason;
	from_origin = flow_key_of(&key, &quoted);
	flow = flow_lookup(&key);
	if (!flow)
		return DROP_ICMP_UNRELATED;
	from_origin = flow_from_origin(flow, from_origin);
	if (flow_answers_stack(flow, !from_origin, from))
		return FLOW_TO_STACK;
	if (!flow_is_between(flow, from_origin, to, from))
		return DROP_ICMP_UNRELATED;
	if (flow->epoch == config->epoch)
		return 0;
	return flow_judge(&quoted, from_origin, to, from);
}

/*
 * Whom a drop is counted for: the receiver's own policies are its own. By the packet and not by the
 * flow: an answer that is dropped since its flow is forbidden at the end that answers counts for
 * the one that asked.
 */
static __always_inline __u32 drop_attachment(int reason, const struct flow_end *from,
					     const struct flow_end *to)
{
	if ((reason == DROP_POLICY_INGRESS || reason == DROP_BANDWIDTH_INGRESS) && to->attachment)
		return to->attachment;
	return from->attachment ? from->attachment : to->attachment;
}
