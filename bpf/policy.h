/* SPDX-License-Identifier: GPL-2.0 */
/* Who may begin a flow to whom (Kubernetes' NetworkPolicy). */
#include "address.h"

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
