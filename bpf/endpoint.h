/* SPDX-License-Identifier: GPL-2.0 */
/* Who may send from a veth, who has an address, and the way into a pod. */
#include <uapi/linux/if_packet.h>
#include "address.h"
#include "drop.h"
#include "node.h"

/* Flags of attachments and endpoints. */
#define HAS_DEVICE 1 /* the pod has an RDMA device */
#define ENFORCE	   2 /* no RoCE without a lease */

struct attachment_entry {
	__u32 id;
	__u32 flags;
	struct address_key ipv4; /* zero: none */
	struct address_key ipv6; /* zero: none */
	__u8 mac[6];
	__u8 pad[2];
};

/* By the index of the host's end of the veth pair. */
BPF_F_TABLE("hash", __u32, struct attachment_entry, attachments, 4096, 0);

struct endpoint_entry {
	__u32 ifindex; /* the host's end of the veth pair */
	__u32 attachment;
	__u32 flags;
	__u8 mac[6];
	__u8 pad[2];
};

BPF_F_TABLE("hash", struct address_key, struct endpoint_entry, endpoints, 16384, 0);

struct ethernet_addresses {
	__u8 destination[6];
	__u8 source[6];
};

static __always_inline int set_ethernet(struct __sk_buff *skb, const __u8 *destination,
					const __u8 *source)
{
	struct ethernet_addresses addresses;

	__builtin_memcpy(addresses.destination, destination, 6);
	__builtin_memcpy(addresses.source, source, 6);
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
		return drop(endpoint->attachment, DROP_MALFORMED);
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
		return drop(attachment, DROP_MALFORMED);
	return bpf_redirect(config->host_ifindex, BPF_F_INGRESS);
}
