/* SPDX-License-Identifier: GPL-2.0 */
/* Why packets are dropped, counted by name and attachment. */
#include <uapi/linux/pkt_cls.h>
#include "hook.h"

/*
 * Each name without DROP_, in lower case, is the metric's label and what the command line prints;
 * Python reads them from here. New reasons go to the end: pinned counters outlive a program.
 */
enum drop_reason {
	DROP_MALFORMED = 1,	    /* headers cut short or contradicting themselves */
	DROP_SPOOFED_MAC,	    /* source MAC (or ARP sender) is not the attachment's */
	DROP_SPOOFED_ADDRESS,	    /* source address (or ARP sender) is not the attachment's */
	DROP_NOT_IP,		    /* neither IPv4, IPv6 nor ARP */
	DROP_MULTICAST,		    /* to a group or broadcast address */
	DROP_NO_ENDPOINT,	    /* inside a pod range, but nobody has that address */
	DROP_NO_ROUTE,		    /* no route leads there */
	DROP_NOT_UPLINK,	    /* the route leads to a device that is not an uplink */
	DROP_NO_MASQUERADE_ADDRESS, /* the uplink has no address of that family */
	DROP_FRAGMENT,		    /* a later part larger than the path's MTU */
	DROP_NAT_PROTOCOL,	    /* only TCP, UDP and ICMP echo are translated */
	DROP_NAT_NO_PORT,	    /* no free outside port found */
	DROP_ROCE_NO_DEVICE,	    /* RoCE from or to a pod without an RDMA device */
	DROP_ROCE_NOT_PEER,	    /* the queue pair is leased to another peer */
	DROP_ROCE_REVOKED,	    /* the lease was taken back */
	DROP_ROCE_UNLEASED,	    /* a pod in enforce mode, a queue pair without a lease */
	DROP_ROCE_NAT,		    /* RoCE cannot pass NAT: the ICRC covers addresses and ports */
	DROP_NO_ATTACHMENT,	    /* the device is no attachment of ours */
	DROP_NO_NODE,		    /* the agent has not written the node's configuration yet */
	DROP_NO_PROGRAM,	    /* the slot of the program that goes on is empty */
	DROP_FLOW_TABLE_FULL,	    /* no room to track another flow */
	DROP_FLOW_LIMIT,	    /* the pod tracks as many flows as one may */
	DROP_FRAGMENT_UNKNOWN,	/* a later part of a packet whose first part was not let through */
	DROP_ICMP_UNRELATED,	/* an ICMP error about no tracked flow */
	DROP_NEIGHBOUR,		/* ARP or neighbour discovery for others than the next hops */
	DROP_POLICY_EGRESS,	/* the sender's policies do not allow it */
	DROP_POLICY_INGRESS,	/* the receiver's policies do not allow it */
	DROP_NO_BACKEND,	/* the service has none that may be used from here */
	DROP_SERVICE_CONFLICT,	/* another flow has the backend's end already */
	DROP_FRAGMENT_EARLY,	/* a later part before its first one: a copy waits for that */
	DROP_BANDWIDTH_EGRESS,	/* the pod sends more than it may */
	DROP_BANDWIDTH_INGRESS, /* the pod gets more than it may */
};

/* Whose traffic it was: what the attachment sent, or what was for it. */
enum direction {
	FROM_POD = 0,
	TO_POD = 1,
};

struct drop_key {
	__u32 attachment; /* 0: not known */
	__u16 reason;
	__u16 direction;
};

/* Not preallocated: 4096 attachments times 33 reasons, of which few ever occur. */
BPF_F_TABLE("percpu_hash", struct drop_key, __u64, drops, 81920, BPF_F_NO_PREALLOC);

static __always_inline void count_drop(__u32 attachment, __u16 reason, __u16 direction)
{
	struct drop_key key = {
		.attachment = attachment,
		.reason = reason,
		.direction = direction,
	};
	__u64 one = 1;
	__u64 *packets = drops.lookup(&key);

	if (packets)
		*packets += 1;
	else
		drops.update(&key, &one);
}

/*
 * The one exit of what is not let through: few instructions here, the rest is in monitor.c. Of
 * DROP_POLICY_INGRESS and DROP_BANDWIDTH_INGRESS the attachment is the receiver; else the sender
 * or, of what comes from the host or outside, the one for which it was.
 */
static __always_inline int drop(struct __sk_buff *skb, __u32 attachment, enum drop_reason reason)
{
	skb->cb[CB_REASON] = reason;
	skb->cb[CB_ATTACHMENT] = attachment;
	programs.call(skb, HOOK_MONITOR);
	return TC_ACT_SHOT;
}
