// SPDX-License-Identifier: GPL-2.0
/*
 * Goes on from pod.c, host.c and uplink.c with parts of packets that come out of order. Of a later
 * part that is early a copy is kept. When its first one comes, that is put into the same device's
 * queue again, and all copies behind it: each of them comes in anew, in order, and is judged then.
 */
#include "drop.h"
#include "endpoint.h"
#include "flow.h"
#include "fragment.h"
#include "hook.h"
#include "packet.h"

/* The largest datagram has as many parts of an Ethernet's MTU. */
#define WAITING_OF_ONE 45
/* Reordering takes milliseconds; identifications come again. */
#define WAITING_NS (2 * NS_PER_S)

/* How many have waited, on each CPU. */
BPF_F_TABLE("percpu_array", __u32, __u64, waited, 1, 0);

/* A CPU's own stretch begins somewhere else than its neighbours'. */
static __always_inline struct waiting_part *part_of(__u64 number)
{
	__u32 place = ((number >> 16) + (number & 0xffff) * 61) % WAITING_PLACES;

	return waiting_parts.lookup(&place);
}

/* Keeps a copy: DROP_FRAGMENT_EARLY, or DROP_FRAGMENT_UNKNOWN where there is no room for it. */
static __always_inline int part_wait(struct __sk_buff *skb, struct fragment_key *key)
{
	__u64 bytes = skb->len;
	__u32 zero = 0;
	__u64 *count = waited.lookup(&zero), *last = waiting.lookup(key), number;
	struct waiting_part *part;

	if (!count || bytes < ETH_HLEN)
		return DROP_FRAGMENT_UNKNOWN;
	/* Else the compiler asks for both bounds at once, which the verifier does not follow. */
	asm volatile("" : "+r"(bytes));
	if (bytes > WAITING_BYTES)
		return DROP_FRAGMENT_UNKNOWN;
	*count += 1;
	number = *count << 16 | (bpf_get_smp_processor_id() & 0xffff);
	part = part_of(number);
	if (!part)
		return DROP_FRAGMENT_UNKNOWN;
	*(volatile __u64 *)&part->number = 0;
	if (bpf_skb_load_bytes(skb, 0, part->frame, bytes))
		return DROP_FRAGMENT_UNKNOWN;
	part->bytes = bytes;
	part->since_ns = flow_clock();
	part->previous = last ? *last : 0;
	*(volatile __u64 *)&part->number = number;
	waiting.update(key, &number);
	return DROP_FRAGMENT_EARLY;
}

/* Makes the packet the part of that number; how many bytes, or 0: it is gone, or too old. */
static __always_inline __u32 part_restore(struct __sk_buff *skb, struct waiting_part *part,
					  __u64 number, __u64 now_ns)
{
	__u64 bytes = part->bytes;

	if (*(volatile __u64 *)&part->number != number || bytes < ETH_HLEN ||
	    now_ns - part->since_ns > WAITING_NS)
		return 0;
	asm volatile("" : "+r"(bytes));
	if (bytes > WAITING_BYTES)
		return 0;
	/* To grow takes a device's sum over the whole packet away. */
	if (bpf_skb_change_tail(skb, WAITING_BYTES, 0) || bpf_skb_change_tail(skb, bytes, 0) ||
	    bpf_skb_store_bytes(skb, 0, part->frame, bytes, 0))
		return 0;
	/* Another CPU may have written over it meanwhile. */
	return *(volatile __u64 *)&part->number == number ? bytes : 0;
}

int parts(struct __sk_buff *skb)
{
	struct packet *packet = packet_new();
	__u32 hook = skb->cb[CB_HOOK], ifindex = skb->ifindex, attachment = 0;
	struct attachment_entry *sender;
	struct endpoint_entry *endpoint;
	struct waiting_part *part;
	struct fragment_key key;
	__u64 now_ns = flow_clock(), number = 0, *last;
	int i;

	/* The hook stays the one that it came from. */
	if (!packet || parse_ethernet(skb, packet) || parse_network(skb, packet))
		return drop(skb, 0, DROP_MALFORMED);
	fragment_key_of(&key, packet);
	if (packet->flags & IS_LATER_FRAGMENT) {
		sender = hook == HOOK_POD ? attachment_lookup(ifindex) : NULL;
		endpoint = endpoints.lookup(&packet->destination);
		if (sender)
			attachment = sender->id;
		else if (endpoint)
			attachment = endpoint->attachment;
		return drop(skb, attachment, part_wait(skb, &key));
	}

	last = waiting.lookup(&key);
	if (last)
		number = *last;
	waiting.delete(&key);
	if (bpf_clone_redirect(skb, ifindex, BPF_F_INGRESS))
		return drop(skb, 0, DROP_FRAGMENT_UNKNOWN);
	for (i = 0; i < WAITING_OF_ONE && number; i++) {
		part = part_of(number);
		if (!part || !part_restore(skb, part, number, now_ns))
			break;
		number = part->previous;
		if (bpf_clone_redirect(skb, ifindex, BPF_F_INGRESS))
			break;
	}
	return TC_ACT_STOLEN;
}
