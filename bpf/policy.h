/* SPDX-License-Identifier: GPL-2.0 */
/* Who may begin a flow to whom (Kubernetes' NetworkPolicy). */
#include "address.h"
#include "drop.h"
#include "endpoint.h"
#include "flow.h"
#include "packet.h"

/* Identities; those of pods come after. */
#define IDENTITY_NONE 0 /* neither pod nor host: outside */
#define IDENTITY_HOST 1

/* Peers of a rule: an identity, a prefix's class, or everybody. */
#define PEER_ANY       0
#define PEER_IS_PREFIX 0x80000000

struct prefix_key {
	__u32 bits; /* of the address that count */
	struct address_key address;
};

/* The class of the longest prefix that some policy names. */
BPF_F_TABLE("lpm_trie", struct prefix_key, __u32, prefixes, 65536, BPF_F_NO_PREALLOC);

/* Bits of struct policy_key that count. */
#define POLICY_PEER_BITS     64 /* any protocol */
#define POLICY_PROTOCOL_BITS 80 /* any port of it; up to 16 more are the port's */

struct policy_key {
	__u32 bits;
	__u32 set; /* never 0: that is a pod which no policy selects */
	__u32 peer;
	__u8 protocol;
	__u8 pad;
	__be16 port;
};

/* A match allows; the value is the number of rules that say so. Sized by configuration. */
BPF_F_TABLE("lpm_trie", struct policy_key, __u32, policy, 262144, BPF_F_NO_PREALLOC);

/* The node's own addresses: always allowed, and where NodePorts are. */
BPF_F_TABLE("hash", struct address_key, __u32, node_addresses, 1024, 0);

/* One end of a packet's way, as policy and tracking know it. */
struct flow_end {
	__u32 attachment; /* 0: the host, or outside */
	__u32 slot;	  /* FLOW_NO_SLOT where there is no attachment */
	__u32 identity;
	__u32 ingress_set; /* 0: no policy selects it */
	__u32 egress_set;
};

static __always_inline void end_of_attachment(struct flow_end *end,
					      const struct attachment_entry *attachment)
{
	end->attachment = attachment->id;
	end->slot = attachment->slot;
	end->identity = attachment->identity;
	end->ingress_set = attachment->ingress_set;
	end->egress_set = attachment->egress_set;
}

static __always_inline void end_of_endpoint(struct flow_end *end,
					    const struct endpoint_entry *endpoint)
{
	end->attachment = endpoint->attachment;
	end->slot = endpoint->slot;
	end->identity = endpoint->identity;
	end->ingress_set = endpoint->ingress_set;
	end->egress_set = endpoint->egress_set;
}

/* The host, and everybody outside: policy knows them by their addresses. */
static __always_inline void end_outside(struct flow_end *end)
{
	end->attachment = 0;
	end->slot = FLOW_NO_SLOT;
	end->identity = IDENTITY_NONE;
	end->ingress_set = 0;
	end->egress_set = 0;
}

/*
 * Whether a set allows a peer, for one direction. `port` is that of the end at which the flow was
 * aimed.
 */
static __always_inline bool policy_allows(__u32 set, __u32 identity,
					  const struct address_key *address, __u8 protocol,
					  __be16 port)
{
	struct policy_key key = {
		.bits = sizeof(key) * 8 - 32, .set = set, .protocol = protocol, .port = port};
	struct prefix_key prefix;
	__u32 *class;

	if (!set)
		return true;
	if (identity <= IDENTITY_HOST && node_addresses.lookup((struct address_key *)address))
		return true;
	/* Peer is PEER_ANY. */
	if (policy.lookup(&key))
		return true;
	if (identity) {
		key.peer = identity;
		if (policy.lookup(&key))
			return true;
	}
	prefix.bits = 128;
	prefix.address = *address;
	class = prefixes.lookup(&prefix);
	if (!class)
		return false;
	key.peer = *class | PEER_IS_PREFIX;
	return policy.lookup(&key);
}

/*
 * The policies of who begins. What the host's stack forwards from a pod, by a port mapping, is held
 * to that pod's own as well; to the target it is an address, which might be anybody's.
 */
static __always_inline __u32 policy_egress_set(const struct flow_end *origin,
					       const struct address_key *address)
{
	struct endpoint_entry *endpoint;

	if (origin->attachment)
		return origin->egress_set;
	endpoint = endpoints.lookup((struct address_key *)address);
	return endpoint ? endpoint->egress_set : 0;
}

/*
 * Judges a flow that begins, from its origin to its target: 0, DROP_POLICY_EGRESS (the origin's
 * policies) or DROP_POLICY_INGRESS (the target's).
 */
static __always_inline int policy_judge(const struct flow_end *origin,
					const struct address_key *origin_address,
					const struct flow_end *target,
					const struct address_key *target_address, __u8 protocol,
					__be16 target_port)
{
	if (!policy_allows(policy_egress_set(origin, origin_address), target->identity,
			   target_address, protocol, target_port))
		return DROP_POLICY_EGRESS;
	if (!policy_allows(target->ingress_set, origin->identity, origin_address, protocol,
			   target_port))
		return DROP_POLICY_INGRESS;
	return 0;
}

/*
 * RoCE without a lease: acknowledgements never look like replies, so both ends must be allowed to
 * begin. Per packet, and only where a policy selects one of them.
 */
static __always_inline int policy_judge_roce(const struct packet *packet,
					     const struct flow_end *from, const struct flow_end *to)
{
	__be16 port = bpf_htons(ROCE_PORT);
	int reason;

	if (!(from->ingress_set | from->egress_set | to->ingress_set | to->egress_set))
		return 0;
	reason = policy_judge(from, &packet->source, to, &packet->destination, IPPROTO_UDP, port);
	if (reason)
		return reason;
	return policy_judge(to, &packet->destination, from, &packet->source, IPPROTO_UDP, port);
}
