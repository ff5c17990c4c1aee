/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How much of kernel traffic an attachment may send and get. Nothing can wait here: what is above
 * is dropped.
 */
#include "counters.h"
#include "drop.h"
#include "endpoint.h"
#include "packet.h"

/*
 * A bucket of burst_bytes that fills at the rate, as a clock (the generic cell rate algorithm,
 * ITU-T I.371 annex A).
 */
struct limit_entry {
	__u64 bits_per_s; /* as asked for; 0: no limit */
	__u64 burst_bytes;
	__u64 byte_time; /* of a byte at that rate, in 1/2^LIMIT_SHIFT ns */
	__u64 burst_ns;	 /* in which an empty bucket fills */
	__u64 next_ns;	 /* when it is full; the agent writes 0 */
};

#define LIMIT_SHIFT 20

/* By slot and direction. */
BPF_F_TABLE("array", __u32, struct limit_entry, limits, 2 * COUNTER_SLOTS, 0);

/*
 * Whether the packet fits, and then it is paid for. CPUs that look at once let one packet each too
 * much through, and those are paid for as well.
 */
static __always_inline bool limit_pass(struct __sk_buff *skb, __u32 slot, enum direction direction)
{
	__u32 place = 2 * slot + direction;
	struct limit_entry *entry = limits.lookup(&place);
	__u64 now_ns, next_ns, cost_ns;

	if (!entry || !entry->bits_per_s)
		return true;
	now_ns = bpf_ktime_get_ns();
	next_ns = entry->next_ns;
	cost_ns = (skb->len * entry->byte_time + (1 << LIMIT_SHIFT) - 1) >> LIMIT_SHIFT;
	if (next_ns <= now_ns) {
		if (cost_ns > entry->burst_ns)
			return false;
		entry->next_ns = now_ns + cost_ns;
		return true;
	}
	if (next_ns + cost_ns > now_ns + entry->burst_ns)
		return false;
	__sync_fetch_and_add(&entry->next_ns, cost_ns);
	return true;
}

/* What goes into a pod: 0 or a drop reason. */
static __always_inline int limit_to_pod(struct __sk_buff *skb, const struct packet *packet,
					const struct endpoint_entry *endpoint)
{
	if ((endpoint->flags & LIMITED) && !(packet->flags & IS_ROCE) &&
	    !limit_pass(skb, endpoint->slot, TO_POD))
		return DROP_BANDWIDTH_INGRESS;
	return 0;
}

/* What a pod sends. */
static __always_inline int limit_from_pod(struct __sk_buff *skb, const struct packet *packet,
					  const struct attachment_entry *attachment)
{
	if ((attachment->flags & LIMITED) && !(packet->flags & IS_ROCE) &&
	    !limit_pass(skb, attachment->slot, FROM_POD))
		return DROP_BANDWIDTH_EGRESS;
	return 0;
}
