// SPDX-License-Identifier: GPL-2.0
/*
 * Not for packets: the agent runs it (BPF_PROG_TEST_RUN) on what it has found in the table of flows
 * and thinks is over. Here that is looked at again and removed in the same moment, so that a packet
 * that comes meanwhile finds a flow with both its halves or none.
 */
#include "flow.h"
#include "hook.h"
#include "nat.h"
#include "packet.h"

/* Behind a frame's header, one behind another, COLLECT_AT_ONCE at most. */
struct candidate {
	struct flow_key key;
	__u32 origin; /* these of whose ends has gone: it is over if it is theirs still */
	__u32 target;
	__u32 gone; /* 0: neither, it is over if it is stale */
	__u32 pad;
};

#define COLLECT_AT_ONCE 16
/* Halves are entered one after the other: a younger one may still be waiting for the other. */
#define COLLECT_HALF_S 5

/* Of a test run, which packets on this CPU may interrupt: not theirs. */
BPF_F_TABLE("percpu_array", __u32, struct nat_work, collect_work, 1, 0);

static __always_inline void end_of_key(struct nat_end *end, const struct flow_key *key, bool high)
{
	copy_address(&end->address, high ? key->high.word : key->low.word);
	end->port = high ? key->high_port : key->low_port;
}

/* Whether outside's half, whose key is work->outside, has lost the other one. */
static __always_inline bool is_orphan(struct nat_work *work, const struct flow_entry *alias,
				      __u64 now_ns)
{
	const struct flow_key *key = &work->outside;
	bool own_is_high = !!(alias->flags & FLOW_ORIGIN_IS_HIGH) ^ !!(alias->flags & FLOW_SERVICE);
	__be16 port;
	struct flow_entry *flow;

	if ((__s64)(now_ns - alias->created_ns) < (__s64)(COLLECT_HALF_S * NS_PER_S))
		return false;
	end_of_key(&work->own, key, own_is_high);
	end_of_key(&work->remote, key, !own_is_high);
	port = work->remote.port;
	if (key->protocol == IPPROTO_ICMP || key->protocol == IPPROTO_ICMPV6)
		port = echo_answerer(alias->translated_port);
	flow_key_of_ends(&work->inside, &alias->translated, alias->translated_port,
			 &work->remote.address, port, key->protocol);
	flow = flow_lookup(&work->inside);
	return !flow || !nat_is_end(flow, &work->own.address, work->own.port);
}

/* True: it was over, and is gone with its other half. */
static __always_inline bool collect_one(struct nat_work *work, const struct candidate *candidate,
					__u64 now_ns)
{
	struct flow_entry *flow;
	bool pod_is_high;

	work->inside = candidate->key;
	flow = flow_lookup(&work->inside);
	if (!flow)
		return false;
	if (flow->flags & FLOW_ALIAS) {
		work->outside = candidate->key;
		if (!is_orphan(work, flow, now_ns))
			return false;
		flow_delete(&work->outside);
		return true;
	}
	if (candidate->gone) {
		if (flow->origin != candidate->origin || flow->target != candidate->target)
			return false;
	} else if (!flow_is_stale(flow, work->inside.protocol, now_ns)) {
		return false;
	}
	pod_is_high = !!(flow->flags & FLOW_ORIGIN_IS_HIGH) ^ !!(flow->flags & FLOW_SERVICE);
	end_of_key(&work->pod, &work->inside, pod_is_high);
	end_of_key(&work->remote, &work->inside, !pod_is_high);
	nat_remove(work, flow, &work->pod, &work->remote);
	return true;
}

/* A bit for each candidate that was over, the lowest one the first's. */
int collect(struct __sk_buff *skb)
{
	struct candidate candidate;
	struct nat_work *work;
	__u64 now_ns = flow_clock();
	__u32 zero = 0, removed = 0, i;

	work = collect_work.lookup(&zero);
	if (!work)
		return 0;
#pragma nounroll
	for (i = 0; i < COLLECT_AT_ONCE; i++) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + i * sizeof(candidate), &candidate,
				       sizeof(candidate)))
			break;
		if (collect_one(work, &candidate, now_ns))
			removed |= 1U << i;
	}
	return removed;
}
