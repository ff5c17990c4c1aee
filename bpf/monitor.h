/* SPDX-License-Identifier: GPL-2.0 */
/* What `rdmanet monitor` reads: drops and new flows, only while somebody does (node.monitor). */
#include "address.h"
#include "drop.h"
#include "node.h"
#include "packet.h"

enum event_kind {
	EVENT_DROP = 1,
	EVENT_FLOW = 2, /* a flow was entered */
};

struct event {
	__u64 time_ns; /* as bpf_ktime_get_ns() */
	struct address_key source;
	struct address_key destination;
	struct address_key translated; /* of a new flow; zero: none */
	__u32 kind;
	__u32 reason;	  /* of a drop */
	__u32 attachment; /* that sent it; 0: the host, outside, or not known */
	__u32 peer;	  /* for which it was; the same */
	__u32 bytes;
	__be16 source_port;
	__be16 destination_port;
	__be16 translated_port;
	__u8 protocol;
	__u8 direction; /* enum direction */
	__u8 hook;	/* enum hook: where it was */
	__u8 tcp_flags;
	__u16 ethertype; /* host byte order; 0: the headers could not be read */
};

/* Pages; what does not fit is lost and counted in events_lost. */
BPF_RINGBUF_OUTPUT(events, 256);
BPF_F_TABLE("array", __u32, __u64, events_lost, 1, 0);

/* Of this the struct's layout is read when an artifact is opened; it stays empty. */
BPF_F_TABLE("array", __u32, struct event, event_layout, 1, 0);

/* Not on the stack, which callers need; NULL: no room, and counted. */
static __always_inline struct event *event_reserve(enum event_kind kind)
{
	struct event *event = events.ringbuf_reserve(sizeof(struct event));
	__u64 *lost;
	__u32 zero = 0;

	if (!event) {
		lost = events_lost.lookup(&zero);
		if (lost)
			__sync_fetch_and_add(lost, 1);
		return NULL;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = bpf_ktime_get_ns();
	event->kind = kind;
	return event;
}

static __always_inline void event_describe(struct event *event, const struct packet *packet)
{
	event->source = packet->source;
	event->destination = packet->destination;
	event->source_port = packet->source_port;
	event->destination_port = packet->destination_port;
	event->protocol = packet->protocol;
	event->tcp_flags = packet->tcp_flags;
	event->ethertype = packet->ethertype;
}

static __always_inline __u8 direction_of(__u32 hook, __u32 reason)
{
	if (reason == DROP_POLICY_INGRESS || reason == DROP_BANDWIDTH_INGRESS)
		return TO_POD;
	return hook == HOOK_POD || hook == HOOK_OUTSIDE || hook == HOOK_SOCKET ? FROM_POD : TO_POD;
}

/* A flow was entered, of which this is the first packet; translated may be NULL. */
static __always_inline void monitor_flow(struct __sk_buff *skb, const struct node_entry *config,
					 const struct packet *packet, __u32 origin, __u32 target,
					 const struct address_key *translated,
					 __be16 translated_port)
{
	struct event *event;

	if (!config->monitor)
		return;
	event = event_reserve(EVENT_FLOW);
	if (!event)
		return;
	event_describe(event, packet);
	event->attachment = origin;
	event->peer = target;
	event->bytes = skb->len;
	event->hook = skb->cb[CB_HOOK];
	event->direction = direction_of(event->hook, 0);
	if (translated) {
		event->translated = *translated;
		event->translated_port = translated_port;
	}
	events.ringbuf_submit(event, 0);
}

/* A socket that asks for what it cannot have: no packet, and no source address yet. */
static __always_inline void monitor_refusal(__u32 attachment, enum drop_reason reason,
					    const struct address_key *destination, __be16 port,
					    __u8 protocol)
{
	struct node_entry *config = node_lookup();
	struct event *event;

	count_drop(attachment, reason, FROM_POD);
	if (!config || !config->monitor)
		return;
	event = event_reserve(EVENT_DROP);
	if (!event)
		return;
	event->destination = *destination;
	event->destination_port = port;
	event->protocol = protocol;
	event->ethertype = address_is_mapped(destination) ? ETH_P_IP : ETH_P_IPV6;
	event->reason = reason;
	event->attachment = attachment;
	event->hook = HOOK_SOCKET;
	event->direction = FROM_POD;
	events.ringbuf_submit(event, 0);
}
