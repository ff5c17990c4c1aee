/* SPDX-License-Identifier: GPL-2.0 */
/* Which RoCE packets may reach which queue pair. */
#include "address.h"
#include "drop.h"
#include "endpoint.h"
#include "packet.h"

enum guard_state {
	GUARD_GRANTED = 1,
	GUARD_REVOKED = 2,
	GUARD_DATAGRAM = 3, /* leased, to whom is in datagrams: an unreliable datagram queue pair */
};

/* QPNs start near 16 on every device and collide: the address belongs to the key. */
struct guard_key {
	struct address_key address; /* of the packet's destination */
	__u32 qpn;		    /* the packet's destination QPN, host byte order */
};

struct guard_entry {
	__u64 lease;
	__u64 packets;
	__u64 bytes;
	struct address_key peer_address; /* the only source that may send to this queue pair */
	__u32 peer_qpn; /* told by the lease; packets of reliable connections do not carry it */
	__u32 state;
};

BPF_F_TABLE("hash", struct guard_key, struct guard_entry, guard, 65536, 0);

/* An unreliable datagram queue pair has many peers, and its packets say from which they are. */
struct datagram_key {
	struct address_key destination;
	__u32 qpn;
	struct address_key source;
	__u32 source_qpn;
};

struct datagram_entry {
	__u64 lease;
	__u64 packets;
	__u64 bytes;
};

/* Not preallocated: two for each lease of such a queue pair, which few hosts have. */
BPF_F_TABLE("hash", struct datagram_key, struct datagram_entry, datagrams, 65536,
	    BPF_F_NO_PREALLOC);

/* A packet to a leased queue pair for unreliable datagrams. */
static __always_inline int guard_judge_datagram(struct __sk_buff *skb, const struct packet *packet)
{
	struct datagram_key key = {.destination = packet->destination,
				   .qpn = packet->destination_qpn,
				   .source = packet->source,
				   .source_qpn = packet->source_qpn};
	struct datagram_entry *entry;

	if (!(packet->flags & IS_DATAGRAM))
		return DROP_ROCE_NOT_PEER;
	entry = datagrams.lookup(&key);
	if (!entry)
		return DROP_ROCE_NOT_PEER;
	__sync_fetch_and_add(&entry->packets, 1);
	__sync_fetch_and_add(&entry->bytes, skb->len);
	return 0;
}

#define GUARD_UNLEASED -1

/*
 * Judges a RoCE packet: 0 where a lease lets it pass, GUARD_UNLEASED where the policy decides, or a
 * drop reason. Flags are those of the source's attachment and the destination's endpoint; the host
 * itself counts as having a device. Connection management (QPN 1) and multicast (0xffffff) have no
 * entry and go the way of all unleased queue pairs.
 */
static __always_inline int guard_judge(struct __sk_buff *skb, const struct packet *packet,
				       __u32 source_flags, __u32 destination_flags)
{
	struct guard_key key = {.address = packet->destination, .qpn = packet->destination_qpn};
	struct guard_entry *entry;

	if (!(source_flags & destination_flags & HAS_DEVICE))
		return DROP_ROCE_NO_DEVICE;
	entry = guard.lookup(&key);
	if (!entry)
		return (source_flags | destination_flags) & ENFORCE ? DROP_ROCE_UNLEASED
								    : GUARD_UNLEASED;
	if (entry->state == GUARD_DATAGRAM)
		return guard_judge_datagram(skb, packet);
	if (entry->state != GUARD_GRANTED)
		return DROP_ROCE_REVOKED;
	if (!address_equal(&entry->peer_address, &packet->source) || (packet->flags & IS_DATAGRAM))
		return DROP_ROCE_NOT_PEER;
	__sync_fetch_and_add(&entry->packets, 1);
	__sync_fetch_and_add(&entry->bytes, skb->len);
	return 0;
}
