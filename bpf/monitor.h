/* SPDX-License-Identifier: GPL-2.0 */
/* What `rdmanet monitor` reads: drops and new flows, only while somebody does (node.monitor). */
#include "address.h"

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
	__u32 peer;	  /* to which it goes */
	__u32 bytes;
	__be16 source_port;
	__be16 destination_port;
	__be16 translated_port;
	__u8 protocol;
	__u8 direction; /* enum direction */
	__u8 hook;	/* enum hook */
	__u8 tcp_flags;
	__u8 pad[2];
};

/* Pages; what does not fit is lost and counted in events_lost. */
BPF_RINGBUF_OUTPUT(events, 64);
BPF_F_TABLE("array", __u32, __u64, events_lost, 1, 0);
