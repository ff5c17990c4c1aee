// SPDX-License-Identifier: GPL-2.0
/*
 * What the tc filters hold: nothing but a jump through the pinned array, so that one map update
 * swaps a whole program on all devices at once. They stay when the agent goes or comes back newer.
 */
#include <uapi/linux/pkt_cls.h>
#include "hook.h"

/* Nothing from a pod goes unjudged. */
int dispatch_pod(struct __sk_buff *skb)
{
	programs.call(skb, HOOK_POD);
	return TC_ACT_SHOT;
}

int dispatch_host(struct __sk_buff *skb)
{
	programs.call(skb, HOOK_HOST);
	return TC_ACT_SHOT;
}

/* The host's own traffic does not depend on us. */
int dispatch_uplink(struct __sk_buff *skb)
{
	programs.call(skb, HOOK_UPLINK);
	return TC_ACT_UNSPEC;
}
