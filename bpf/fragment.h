/* SPDX-License-Identifier: GPL-2.0 */
/* Ports for the later parts of fragmented packets: what the first one said, once it was let
 * through. */
#include "address.h"

struct fragment_key {
	struct address_key source;
	struct address_key destination;
	__u32 identification; /* as in the packet */
	__u8 protocol;
	__u8 pad[3];
};

struct fragment_entry {
	__be16 source_port;
	__be16 destination_port;
	__u32 destination_qpn; /* where IS_ROCE */
	__u8 flags;	       /* of struct packet: IS_ROCE */
	__u8 pad[3];
};

BPF_F_TABLE("lru_hash", struct fragment_key, struct fragment_entry, fragments, 16384, 0);
