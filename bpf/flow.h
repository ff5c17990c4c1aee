/* SPDX-License-Identifier: GPL-2.0 */
/* Tracked flows: who began, what was judged, how addresses are translated. */
#include "address.h"

/* Both directions of a flow meet the same entry: the lesser end comes first. */
struct flow_key {
	struct address_key low;
	struct address_key high;
	__be16 low_port; /* ICMP echo: its identifier, on both sides */
	__be16 high_port;
	__u8 protocol;
	__u8 pad[3];
};

/* struct flow_entry.flags */
#define FLOW_ORIGIN_IS_HIGH 0x01 /* the end that began is the key's higher one */
#define FLOW_REPLIED	    0x02 /* a packet came the other way */
#define FLOW_TRANSLATED	    0x04 /* translated is what outside sees in the pod's place */
#define FLOW_SERVICE	    0x08 /* began outside, at a NodePort or an external IP */
#define FLOW_ALIAS	    0x10 /* outside's half: translated is the pod's address and port */

/* struct flow_entry.closing: who has sent FIN; both after RST. */
#define FLOW_CLOSING_ORIGIN 0x01
#define FLOW_CLOSING_TARGET 0x02
#define FLOW_CLOSING_BOTH   0x03

struct flow_entry {
	__u64 created_ns; /* of CLOCK_MONOTONIC, as bpf_ktime_get_ns() */
	__u64 last_seen_ns;
	struct address_key translated;
	__u32 origin; /* attachment; 0: the host or outside. Alias of a service: its id */
	__u32 target;
	__u32 slot;  /* of the attachment whose share of the table it takes; FLOW_NO_SLOT: nobody's
		      */
	__u32 epoch; /* of the policy under which it was allowed */
	__be16 translated_port;
	__u8 flags;
	__u8 closing;
	__u8 pad[4];
};

#define FLOW_NO_SLOT 0xffffffff

/* Sized by configuration (tracking.max_flows). */
BPF_F_TABLE("hash", struct flow_key, struct flow_entry, flows, 131072, 0);

/* Flows of each attachment, by its slot: one pod cannot take the table from the others. */
BPF_F_TABLE("array", __u32, __u64, flow_counts, 4096, 0);
