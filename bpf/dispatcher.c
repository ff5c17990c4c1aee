// SPDX-License-Identifier: GPL-2.0
/*
 * What the tc filters hold: nothing but a jump through the pinned array, so that one map update
 * swaps a whole program on all devices at once. They stay when the agent goes or comes back newer.
 */
#include <uapi/linux/pkt_cls.h>

enum hook {
	HOOK_POD = 0,
	HOOK_HOST = 1,
	HOOK_UPLINK = 2,
};

BPF_F_TABLE("prog", __u32, __u32, programs, 8, 0);

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
