// SPDX-License-Identifier: GPL-2.0
/*
 * Where every packet ends that is not let through: drop() jumps here. Counts it and, while somebody
 * reads, says whose it was; what the packet looks like is read again.
 */
#include "drop.h"
#include "endpoint.h"
#include "monitor.h"
#include "node.h"
#include "packet.h"

static __always_inline void show_drop(struct __sk_buff *skb, __u32 attachment, __u32 reason,
				      __u8 direction)
{
	struct packet packet = {};
	struct event *event;
	struct attachment_entry *from = NULL;
	struct endpoint_entry *to = NULL;
	__u32 hook = skb->cb[CB_HOOK];

	/* As far as it can be read. */
	if (!parse_ethernet(skb, &packet) &&
	    (packet.ethertype == ETH_P_IP || packet.ethertype == ETH_P_IPV6) &&
	    !parse_network(skb, &packet)) {
		to = endpoints.lookup(&packet.destination);
		parse_transport(skb, &packet);
	}
	if (hook == HOOK_POD || hook == HOOK_OUTSIDE)
		from = attachment_lookup(skb->ifindex);
	event = event_reserve(EVENT_DROP);
	if (!event)
		return;
	event_describe(event, &packet);
	event->reason = reason;
	event->bytes = skb->len;
	event->hook = hook;
	event->direction = direction;
	if (from)
		event->attachment = from->id;
	if (direction == TO_POD && attachment)
		event->peer = attachment;
	else if (to)
		event->peer = to->attachment;
	events.ringbuf_submit(event, 0);
}

int monitor(struct __sk_buff *skb)
{
	__u32 reason = skb->cb[CB_REASON], attachment = skb->cb[CB_ATTACHMENT];
	__u8 direction = direction_of(skb->cb[CB_HOOK], reason);
	struct node_entry *config = node_lookup();

	count_drop(attachment, reason, direction);
	if (config && config->monitor)
		show_drop(skb, attachment, reason, direction);
	return TC_ACT_SHOT;
}
