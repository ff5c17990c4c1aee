/* SPDX-License-Identifier: GPL-2.0 */
/* Packets and bytes of each attachment. */
#include "drop.h"

#define COUNTER_SLOTS 4096

/* Two for each direction: IP and RoCE. Bytes with the Ethernet header. */
struct counter_entry {
	__u64 packets[4];
	__u64 bytes[4];
};

/*
 * By the attachment's slot: an array that each CPU has for itself is reached in a few instructions,
 * where hashing an attachment's id twice a packet was a tenth of the way from pod to pod.
 */
BPF_F_TABLE("percpu_array", __u32, struct counter_entry, counters, COUNTER_SLOTS, 0);

/* Flows that were entered, by direction: begun by the attachment, or by another end with it. */
struct begun_entry {
	__u64 flows[2];
};

BPF_F_TABLE("percpu_array", __u32, struct begun_entry, flows_begun, COUNTER_SLOTS, 0);

/* Slots that are none are nobody's. */
static __always_inline void count_flow(__u32 origin_slot, __u32 target_slot)
{
	struct begun_entry *entry = flows_begun.lookup(&origin_slot);

	if (entry)
		entry->flows[FROM_POD] += 1;
	entry = flows_begun.lookup(&target_slot);
	if (entry)
		entry->flows[TO_POD] += 1;
}

static __always_inline __u64 segments_of(struct __sk_buff *skb)
{
	__u64 segments = skb->gso_segs;

	return segments ? segments : 1;
}

static __always_inline void count(struct __sk_buff *skb, __u32 slot, __u8 direction, bool roce)
{
	struct counter_entry *entry = counters.lookup(&slot);
	__u32 place = direction * 2 + roce;

	if (!entry)
		return;
	entry->packets[place] += segments_of(skb);
	entry->bytes[place] += skb->len;
}

/* From one pod to another, no RoCE. */
static __always_inline void count_both(struct __sk_buff *skb, __u32 from_slot, __u32 to_slot)
{
	struct counter_entry *from = counters.lookup(&from_slot);
	struct counter_entry *to = counters.lookup(&to_slot);
	__u64 segments = segments_of(skb), bytes = skb->len;

	if (!from || !to)
		return;
	from->packets[FROM_POD * 2] += segments;
	from->bytes[FROM_POD * 2] += bytes;
	to->packets[TO_POD * 2] += segments;
	to->bytes[TO_POD * 2] += bytes;
}
