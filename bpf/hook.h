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
	HOOK_MONITOR = 5,  /* a packet that was dropped, while somebody watches */
};

BPF_F_TABLE("prog", __u32, __u32, programs, 16, 0);
