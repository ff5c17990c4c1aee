/* SPDX-License-Identifier: GPL-2.0 */
/* Packets and bytes of each attachment. */

enum direction {
	FROM_POD = 0,
	TO_POD = 1,
};

struct counter_key {
	__u32 attachment;
	__u8 direction;
	__u8 roce;
	__u8 pad[2];
};

struct counter_entry {
	__u64 packets;
	__u64 bytes; /* Ethernet header included */
};

/* Four for each of 4096 attachments. */
BPF_F_TABLE("percpu_hash", struct counter_key, struct counter_entry, counters, 16384,
	    BPF_F_NO_PREALLOC);

static __always_inline void count(struct __sk_buff *skb, __u32 attachment, __u8 direction,
				  bool roce)
{
	struct counter_key key = {.attachment = attachment, .direction = direction, .roce = roce};
	struct counter_entry first = {};
	struct counter_entry *entry = counters.lookup(&key);
	__u32 segments = skb->gso_segs;

	if (!segments)
		segments = 1;
	if (entry) {
		entry->packets += segments;
		entry->bytes += skb->len;
		return;
	}
	first.packets = segments;
	first.bytes = skb->len;
	counters.update(&key, &first);
}
