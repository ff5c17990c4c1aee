/* SPDX-License-Identifier: GPL-2.0 */
/* Masquerading: source NAT of what pods send through an uplink, and the way back. */
#include "address.h"
#include "drop.h"
#include "node.h"
#include "packet.h"

/* Addresses to masquerade behind, by the uplink's index; zero: that family has none. */
struct uplink_entry {
	struct address_key ipv4;
	struct address_key ipv6;
};

BPF_F_TABLE("hash", __u32, struct uplink_entry, uplinks, 64, 0);

/* nat_forward: as the pod sends it. nat_reverse: local is the outside address and port. */
struct nat_tuple {
	struct address_key local;
	struct address_key remote;
	__be16 local_port; /* ICMP echo: its identifier */
	__be16 remote_port;
	__u8 protocol;
	__u8 pad[3];
};

/*
 * nat_forward: to which outside address and port. nat_reverse: to which pod, and how the flow
 * stands.
 */
struct nat_entry {
	struct address_key address;
	__u64 last_seen_ns;
	__u32 attachment;
	__be16 port;
	__u8 closing; /* CLOSING_* */
	__u8 pad;
};

#define CLOSING_BY_POD	  1
#define CLOSING_BY_REMOTE 2
#define CLOSING_BOTH	  3

/*
 * Least recently used entries make room. A lost forward entry finds its reverse entry again, as the
 * search for a port starts at a hash of the same tuple; a lost reverse entry is made again from the
 * forward one.
 */
BPF_F_TABLE("lru_hash", struct nat_tuple, struct nat_entry, nat_forward, 65536, 0);
BPF_F_TABLE("lru_hash", struct nat_tuple, struct nat_entry, nat_reverse, 65536, 0);

#define SECOND_NS 1000000000ULL

/*
 * When the port of another flow may be taken over: RFC 5382 REQ-5, RFC 4787 REQ-5, RFC 5508 REQ-1,
 * Linux' TIME_WAIT.
 */
#define TCP_IDLE_NS    (7440 * SECOND_NS)
#define TCP_CLOSING_NS (60 * SECOND_NS)
#define UDP_IDLE_NS    (300 * SECOND_NS)
#define ICMP_IDLE_NS   (60 * SECOND_NS)

#define PORT_TRIES 16

static __always_inline bool nat_is_stale(const struct nat_entry *entry, __u8 protocol, __u64 now_ns)
{
	__u64 idle_ns = now_ns - entry->last_seen_ns;

	/* Written by another CPU meanwhile. */
	if (now_ns < entry->last_seen_ns)
		return false;
	if (protocol == IPPROTO_TCP)
		return idle_ns > (entry->closing == CLOSING_BOTH ? TCP_CLOSING_NS : TCP_IDLE_NS);
	return idle_ns > (protocol == IPPROTO_UDP ? UDP_IDLE_NS : ICMP_IDLE_NS);
}

static __always_inline void nat_touch(struct nat_entry *entry, const struct packet *packet,
				      __u8 closer, __u64 now_ns)
{
	entry->last_seen_ns = now_ns;
	if (packet->protocol != IPPROTO_TCP)
		return;
	if (packet->tcp_flags & TCP_RST)
		entry->closing = CLOSING_BOTH;
	else if (packet->tcp_flags & TCP_FIN)
		entry->closing |= closer;
	else if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		entry->closing = 0;
}

static __always_inline bool nat_is_echo(const struct packet *packet)
{
	return packet->protocol == (packet->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

/* A socket of the host's own would answer to this outside port. */
static __always_inline bool nat_port_in_use(struct __sk_buff *skb, const struct packet *packet,
					    const struct nat_tuple *outside)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *socket;
	__u32 bytes;

	if (packet->family == 4) {
		tuple.ipv4.saddr = outside->remote.word[3];
		tuple.ipv4.daddr = outside->local.word[3];
		tuple.ipv4.sport = outside->remote_port;
		tuple.ipv4.dport = outside->local_port;
		bytes = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &outside->remote, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &outside->local, 16);
		tuple.ipv6.sport = outside->remote_port;
		tuple.ipv6.dport = outside->local_port;
		bytes = sizeof(tuple.ipv6);
	}
	if (packet->protocol == IPPROTO_TCP)
		socket = bpf_sk_lookup_tcp(skb, &tuple, bytes, -1, 0);
	else if (packet->protocol == IPPROTO_UDP)
		socket = bpf_sk_lookup_udp(skb, &tuple, bytes, -1, 0);
	else
		return false;
	if (!socket)
		return false;
	bpf_sk_release(socket);
	return true;
}

/* Spreads flows over the port range; the same flow always starts at the same place. */
static __always_inline __u32 nat_hash(const struct nat_tuple *tuple)
{
	const __u32 *word = (const __u32 *)tuple;
	__u32 hash = 0x9e3779b9;
	int i;

#pragma unroll
	for (i = 0; i < sizeof(*tuple) / 4; i++) {
		hash = (hash ^ word[i]) * 0x85ebca6b;
		hash ^= hash >> 15;
	}
	return hash;
}

/*
 * Finds an outside port for the flow and enters it into nat_reverse, where BPF_NOEXIST decides
 * between CPUs. Fills outside->local_port.
 */
static __always_inline int nat_find_port(struct __sk_buff *skb, const struct packet *packet,
					 const struct node_entry *config,
					 const struct nat_tuple *inside, struct nat_tuple *outside,
					 struct nat_entry *pod, __u64 now_ns)
{
	__u32 first = config->first_port, last = config->last_port;
	__u32 ports = last - first + 1;
	__u32 hash = nat_hash(inside);
	int i;

	if (last < first || !first)
		return DROP_NAT_NO_PORT;
	for (i = 0; i < PORT_TRIES; i++) {
		struct nat_entry *other;

		/* Not neighbouring ports: a full stretch would stop all tries. */
		outside->local_port = bpf_htons(first + (hash + i * (hash >> 16 | 1)) % ports);
		other = nat_reverse.lookup(outside);
		if (other) {
			if (other->attachment == pod->attachment && other->port == pod->port &&
			    address_equal(&other->address, &pod->address)) {
				nat_touch(other, packet, CLOSING_BY_POD, now_ns);
				return 0;
			}
			if (!nat_is_stale(other, packet->protocol, now_ns))
				continue;
			nat_reverse.delete(outside);
		}
		if (nat_port_in_use(skb, packet, outside))
			continue;
		if (!nat_reverse.insert(outside, pod))
			return 0;
	}
	return DROP_NAT_NO_PORT;
}

/*
 * Changes one end of the packet and its checksums; partial checksums and UDP's 0 are the helpers'
 * care.
 */
static __always_inline int nat_rewrite(struct __sk_buff *skb, const struct packet *packet,
				       bool source, const struct address_key *address, __be16 port)
{
	const struct address_key *old = source ? &packet->source : &packet->destination;
	__be16 old_port =
		source || nat_is_echo(packet) ? packet->source_port : packet->destination_port;
	__u32 checksum, place = packet->transport;
	__u64 flags = 0;
	int error = 0;

	if (packet->protocol == IPPROTO_TCP) {
		checksum = packet->transport + offsetof(struct tcphdr, check);
		place += source ? 0 : 2;
	} else if (packet->protocol == IPPROTO_UDP) {
		checksum = packet->transport + offsetof(struct udphdr, check);
		place += source ? 0 : 2;
		flags = BPF_F_MARK_MANGLED_0;
	} else {
		checksum = packet->transport + offsetof(struct icmphdr, checksum);
		place += 4;
	}

	error |= bpf_l4_csum_replace(skb, checksum, old_port, port, flags | 2);
	if (packet->family == 4) {
		__be32 before = old->word[3], after = address->word[3];

		/* ICMP's checksum has no pseudo header. */
		if (!nat_is_echo(packet))
			error |= bpf_l4_csum_replace(skb, checksum, before, after,
						     flags | BPF_F_PSEUDO_HDR | 4);
		error |= bpf_l3_csum_replace(skb, NETWORK_OFFSET + offsetof(struct iphdr, check),
					     before, after, 4);
		error |= bpf_skb_store_bytes(skb,
					     NETWORK_OFFSET +
						     (source ? offsetof(struct iphdr, saddr)
							     : offsetof(struct iphdr, daddr)),
					     &after, 4, 0);
	} else {
		struct address_key before = *old, after = *address;
		__u32 difference = bpf_csum_diff(&before, 16, &after, 16, 0);

		flags |= BPF_F_PSEUDO_HDR;
		/*
		 * The helper takes the address's change out of a device's sum over the whole packet
		 * (CHECKSUM_COMPLETE), as if a header checksum had made up for it like IPv4's.
		 * Storing with BPF_F_RECOMPUTE_CSUM puts it back; kernel commit ead7f9b8de65 adds a
		 * flag to the same end from 6.16 on.
		 */
		error |= bpf_l4_csum_replace(skb, checksum, 0, difference, flags);
		error |= bpf_skb_store_bytes(skb,
					     NETWORK_OFFSET +
						     (source ? offsetof(struct ipv6hdr, saddr)
							     : offsetof(struct ipv6hdr, daddr)),
					     &after, 16, BPF_F_RECOMPUTE_CSUM);
	}
	error |= bpf_skb_store_bytes(skb, place, &port, 2, 0);
	return error ? DROP_MALFORMED : 0;
}

/* Source NAT behind the uplink's address; 0 or a drop reason. */
static __always_inline int nat_outbound(struct __sk_buff *skb, const struct packet *packet,
					const struct node_entry *config,
					const struct uplink_entry *uplink, __u32 attachment)
{
	struct nat_tuple inside = {.local = packet->source, .remote = packet->destination};
	struct nat_tuple outside = {.remote = packet->destination};
	struct nat_entry entry = {}, pod = {.address = packet->source, .attachment = attachment};
	struct nat_entry *forward, *reverse;
	__u64 now_ns = bpf_ktime_get_ns();
	int reason;

	outside.local = packet->family == 4 ? uplink->ipv4 : uplink->ipv6;
	if (address_is_zero(&outside.local))
		return DROP_NO_MASQUERADE_ADDRESS;
	if (packet->flags & IS_FRAGMENT)
		return DROP_FRAGMENT;
	if (nat_is_echo(packet)) {
		if (packet->icmp_type != (packet->family == 4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST))
			return DROP_NAT_PROTOCOL;
	} else if (packet->protocol == IPPROTO_TCP || packet->protocol == IPPROTO_UDP) {
		inside.remote_port = packet->destination_port;
		outside.remote_port = packet->destination_port;
	} else {
		return DROP_NAT_PROTOCOL;
	}
	inside.local_port = packet->source_port;
	inside.protocol = packet->protocol;
	outside.protocol = packet->protocol;
	pod.port = packet->source_port;
	nat_touch(&pod, packet, CLOSING_BY_POD, now_ns);

	forward = nat_forward.lookup(&inside);
	if (forward && forward->attachment == attachment &&
	    address_equal(&forward->address, &outside.local)) {
		outside.local_port = forward->port;
		reverse = nat_reverse.lookup(&outside);
		if (reverse) {
			if (reverse->attachment == attachment && reverse->port == pod.port &&
			    address_equal(&reverse->address, &pod.address)) {
				nat_touch(reverse, packet, CLOSING_BY_POD, now_ns);
				goto rewrite;
			}
		} else if (!nat_reverse.insert(&outside, &pod)) {
			goto rewrite;
		}
	}
	reason = nat_find_port(skb, packet, config, &inside, &outside, &pod, now_ns);
	if (reason)
		return reason;
	entry.address = outside.local;
	entry.last_seen_ns = now_ns;
	entry.attachment = attachment;
	entry.port = outside.local_port;
	nat_forward.update(&inside, &entry);
rewrite:
	return nat_rewrite(skb, packet, true, &outside.local, outside.local_port);
}

/* The flow that an answer from outside belongs to, or NULL: then it is the host's own. */
static __always_inline struct nat_entry *nat_inbound(const struct packet *packet)
{
	struct nat_tuple outside = {.local = packet->destination, .remote = packet->source};
	struct nat_entry *entry;

	if (packet->flags & IS_FRAGMENT)
		return NULL;
	if (nat_is_echo(packet)) {
		if (packet->icmp_type != (packet->family == 4 ? ICMP_ECHOREPLY : ICMPV6_ECHO_REPLY))
			return NULL;
		outside.local_port = packet->source_port;
	} else if (packet->protocol == IPPROTO_TCP || packet->protocol == IPPROTO_UDP) {
		outside.local_port = packet->destination_port;
		outside.remote_port = packet->source_port;
	} else {
		return NULL;
	}
	outside.protocol = packet->protocol;
	entry = nat_reverse.lookup(&outside);
	if (entry)
		nat_touch(entry, packet, CLOSING_BY_REMOTE, bpf_ktime_get_ns());
	return entry;
}
