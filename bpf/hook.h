/* SPDX-License-Identifier: GPL-2.0 */
/* The programs for packets, and their slots in the pinned array. */

enum hook {
	/* Entered by a filter, through a dispatcher. */
	HOOK_POD = 0,
	HOOK_HOST = 1,
	HOOK_UPLINK = 2,
	/* Entered by a tail call from those, which hands nothing over but the packet. */
	HOOK_OUTSIDE = 3,  /* a pod's packet to no pod of this host: to the host, or out */
	HOOK_NODEPORT = 4, /* from outside, to a NodePort or an external IP */
	HOOK_MONITOR = 5,  /* a packet that is dropped: counted and, while somebody reads, shown */
	HOOK_PARTS = 6,	   /* a later part that came before its first one, or that first one */
	HOOK_COLLECT = 7,  /* run by the agent: no packet comes there */
	/* In no slot. */
	HOOK_SOCKET = 8, /* on the root cgroup: connect, sendmsg */
};

/* As many as ever: dispatchers outlive versions, and hold this map. */
BPF_F_TABLE("prog", __u32, __u32, programs, 8, 0);

/* What skb->cb says to the program that comes next. */
#define CB_HOOK	      0
#define CB_REASON     1
#define CB_ATTACHMENT 2

/* Each program for packets does this first. */
static __always_inline void enter(struct __sk_buff *skb, enum hook hook)
{
	skb->cb[CB_HOOK] = hook;
}
