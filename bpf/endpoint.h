/* SPDX-License-Identifier: GPL-2.0 */
/* Who may send from a veth, who has an address, and the way into a pod. */
#include <uapi/linux/if_packet.h>
#include "address.h"
#include "drop.h"
#include "node.h"

/* Flags of attachments and endpoints. */
#define HAS_DEVICE 1 /* the pod has an RDMA device */
#define ENFORCE	   2 /* no RoCE without a lease */
#define LIMITED	   4 /* limit.h: what it sends (attachments), what it gets (endpoints) */

struct attachment_entry {
	__u32 id;
	__u16 flags;
	__u8 traffic_class; /* of its RoCE packets; the lowest two bits are 0 */
	__u8 pad_class;
	struct address_key ipv4; /* zero: none */
	struct address_key ipv6; /* zero: none */
	__u8 mac[6];
	__u8 pad[2];
	__u32 slot;	   /* of its counters */
	__u32 identity;	   /* of its pod's labels */
	__u32 ingress_set; /* of the policies that select it; 0: none does */
	__u32 egress_set;
};

/* By the index of the host's end of the veth pair. */
BPF_F_TABLE("hash", __u32, struct attachment_entry, attachments, 4096, 0);

struct endpoint_entry {
	__u32 ifindex; /* the host's end of the veth pair */
	__u32 attachment;
	__u32 flags;
	__u8 mac[6];
	__u8 pad[2];
	__u32 slot; /* of its attachment's counters */
	__u32 identity;
	__u32 ingress_set;
	__u32 egress_set;
};

BPF_F_TABLE("hash", struct address_key, struct endpoint_entry, endpoints, 16384, 0);

/*
 * Copies of entries of the two hashes, at the place that the low bits of their key name. Indexes
 * and addresses are given out one after another, so that nearly all have a place of their own, and
 * a look-up is a comparison instead of a hash. Who comes second stays in the hash alone. The agent
 * clears a place before it changes the hash and fills it after; an entry that is being written has
 * another key, or belongs to a pod that is just coming or going. What is LIMITED has no place: the
 * short way (usual.h) is for those that have one, and does not ask.
 */
#define NEAR_PLACES 4096

struct near_attachment {
	__u32 ifindex; /* 0: nobody's place */
	struct attachment_entry entry;
};

BPF_F_TABLE("array", __u32, struct near_attachment, near_attachment, NEAR_PLACES, 0);

struct near_endpoint {
	struct address_key address; /* zero: nobody's place */
	struct endpoint_entry entry;
};

/* First the places of IPv4, then those of IPv6. */
BPF_F_TABLE("array", __u32, struct near_endpoint, near_endpoint, 2 * NEAR_PLACES, 0);

/* NULL: look into the hash. */
static __always_inline struct attachment_entry *near_attachment_lookup(__u32 ifindex)
{
	__u32 place = ifindex % NEAR_PLACES;
	struct near_attachment *near = near_attachment.lookup(&place);

	return near && near->ifindex == ifindex ? &near->entry : NULL;
}

static __always_inline struct attachment_entry *attachment_lookup(__u32 ifindex)
{
	struct attachment_entry *entry = near_attachment_lookup(ifindex);

	return entry ? entry : attachments.lookup(&ifindex);
}

/* NULL: look into the hash. */
static __always_inline struct endpoint_entry *
near_endpoint_lookup(const struct address_key *address, __u8 family)
{
	__u32 place = bpf_ntohl(address->word[3]) % NEAR_PLACES;
	struct near_endpoint *near;

	if (family == 6)
		place += NEAR_PLACES;
	near = near_endpoint.lookup(&place);
	/* The unspecified address is what empty places hold. */
	if (near && near->entry.ifindex && address_equal(&near->address, address))
		return &near->entry;
	return NULL;
}

static __always_inline void copy_mac(void *to, const void *from)
{
	__u16 *target = to;
	const __u16 *source = from;

	target[0] = source[0];
	target[1] = source[1];
	target[2] = source[2];
}

struct ethernet_addresses {
	__u8 destination[6];
	__u8 source[6];
};

static __always_inline int set_ethernet(struct __sk_buff *skb, const __u8 *destination,
					const __u8 *source)
{
	struct ethernet_addresses *frame = (void *)(long)skb->data;
	struct ethernet_addresses addresses;

	if ((void *)(frame + 1) <= (void *)(long)skb->data_end) {
		copy_mac(frame->destination, destination);
		copy_mac(frame->source, source);
		return 0;
	}
	copy_mac(addresses.destination, destination);
	copy_mac(addresses.source, source);
	return bpf_skb_store_bytes(skb, 0, &addresses, sizeof(addresses), 0);
}

/*
 * Straight into the pod's namespace: no queue in between, and no program on the peer's side, so
 * decide before.
 */
static __always_inline int deliver(struct __sk_buff *skb, const struct node_entry *config,
				   const struct endpoint_entry *endpoint)
{
	__u32 ifindex = endpoint->ifindex;

	if (set_ethernet(skb, endpoint->mac, config->gateway_mac))
		return drop(skb, endpoint->attachment, DROP_MALFORMED);
	/*
	 * The receiver's stack ignores what the sending side's device took for another host's.
	 * redirect_peer sets the type itself since kernel commit c43272299488 (6.15).
	 */
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(ifindex, 0);
}

/*
 * To the host's own stack, as if it had come in through rdmanet0, where the routes to the pods
 * point as well.
 */
static __always_inline int deliver_to_host(struct __sk_buff *skb, const struct node_entry *config,
					   __u32 attachment, const __u8 *source)
{
	if (set_ethernet(skb, config->gateway_mac, source))
		return drop(skb, attachment, DROP_MALFORMED);
	return bpf_redirect(config->host_ifindex, BPF_F_INGRESS);
}
