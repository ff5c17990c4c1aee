/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Ports for the later parts of fragmented packets: what the first one said, once it was let
 * through. Later parts that come before it wait (parts.c; RFC 4787 REQ-14).
 */
#include "address.h"
#include "drop.h"
#include "packet.h"

struct fragment_key {
	struct address_key source;
	struct address_key destination;
	__u32 identification; /* as in the packet */
	__u8 protocol;	      /* IPv6: 0, a later part's own is ignored (RFC 8200 4.5) */
	__u8 pad[3];
};

/* The first part has come. It is not let through, or not yet, or it is none of ours. */
#define FIRST_CAME 128

struct fragment_entry {
	__be16 source_port;
	__be16 destination_port;
	__u32 destination_qpn; /* where IS_ROCE */
	__u32 source_qpn;      /* where IS_DATAGRAM */
	__u8 flags;	       /* of struct packet: IS_ROCE, IS_DATAGRAM; or FIRST_CAME alone */
	__u8 protocol;
	__u8 pad[2];
};

BPF_F_TABLE("lru_hash", struct fragment_key, struct fragment_entry, fragments, 16384, 0);

/* Copies of parts whose first one has not come; a full stretch is written over. */
struct waiting_part {
	__u64 number;	/* no two have the same; 0: it is being written */
	__u64 previous; /* number of the one before it, of the same packet; 0: none */
	__u64 since_ns;
	__u32 bytes;
	__u8 pad[4];
	__u8 frame[2048];
};

#define WAITING_BYTES  sizeof(((struct waiting_part *)0)->frame)
#define WAITING_PLACES 512 /* 1 MiB */

BPF_F_TABLE("array", __u32, struct waiting_part, waiting_parts, WAITING_PLACES, 0);

/* The number of the last one that came. */
BPF_F_TABLE("lru_hash", struct fragment_key, __u64, waiting, 4096, 0);

static __always_inline void fragment_key_of(struct fragment_key *key, const struct packet *packet)
{
	key->source = packet->source;
	key->destination = packet->destination;
	key->identification = packet->identification;
	key->protocol = packet->family == 4 ? packet->protocol : 0;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
}

/*
 * Call once a packet was let through, with its addresses as it came: the later parts of a first
 * part go the same way from now on. Of other packets nothing is kept.
 */
static __always_inline void fragment_keep(const struct packet *packet)
{
	struct fragment_key key;
	struct fragment_entry entry = {};

	if ((packet->flags & (IS_FRAGMENT | IS_LATER_FRAGMENT)) != IS_FRAGMENT)
		return;
	fragment_key_of(&key, packet);
	entry.source_port = packet->source_port;
	entry.destination_port = packet->destination_port;
	entry.destination_qpn = packet->destination_qpn;
	entry.source_qpn = packet->source_qpn;
	entry.flags = packet->flags & (IS_ROCE | IS_DATAGRAM);
	entry.protocol = packet->protocol;
	fragments.update(&key, &entry);
}

/*
 * Bytes of the transport header, RoCE's and its datagrams' included, by which a packet is judged.
 */
static __always_inline __u32 judged_bytes(const struct packet *packet)
{
	if (packet->flags & IS_DATAGRAM)
		return 28;
	if (packet->flags & IS_ROCE)
		return 20;
	return packet->protocol == IPPROTO_TCP ? sizeof(struct tcphdr) : 8;
}

/*
 * Gives a later part what its first one said, and then it is judged as that was. 0,
 * DROP_FRAGMENT_EARLY, DROP_FRAGMENT_UNKNOWN where the first one was not let through, or
 * DROP_MALFORMED for a part that would write over what its first one was judged by (RFC 3128).
 */
static __always_inline int fragment_join(struct packet *packet)
{
	struct fragment_key key;
	struct fragment_entry *first;

	if (!(packet->flags & IS_LATER_FRAGMENT))
		return 0;
	fragment_key_of(&key, packet);
	first = fragments.lookup(&key);
	if (!first)
		return DROP_FRAGMENT_EARLY;
	if (first->flags & FIRST_CAME)
		return DROP_FRAGMENT_UNKNOWN;
	packet->source_port = first->source_port;
	packet->destination_port = first->destination_port;
	packet->destination_qpn = first->destination_qpn;
	packet->source_qpn = first->source_qpn;
	packet->flags |= first->flags;
	packet->protocol = first->protocol;
	return packet->fragment_offset < judged_bytes(packet) ? DROP_MALFORMED : 0;
}

/*
 * Call after parse_transport() where packets come in: joins later parts, and has early ones wait. A
 * first part goes on once those that wait for it have been put behind it. 0 or a drop reason.
 */
static __always_inline int fragment_meet(struct __sk_buff *skb, struct packet *packet)
{
	struct fragment_entry came = {.flags = FIRST_CAME};
	struct fragment_key key;
	int reason;

	if (!(packet->flags & IS_FRAGMENT))
		return 0;
	if (packet->flags & IS_LATER_FRAGMENT) {
		reason = fragment_join(packet);
		if (reason == DROP_FRAGMENT_EARLY)
			programs.call(skb, HOOK_PARTS);
		return reason;
	}
	fragment_key_of(&key, packet);
	fragments.update(&key, &came);
	if (waiting.lookup(&key))
		programs.call(skb, HOOK_PARTS);
	return 0;
}
