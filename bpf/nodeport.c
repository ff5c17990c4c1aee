// SPDX-License-Identifier: GPL-2.0
/*
 * Goes on from uplink.c with what belongs to no flow: the first packet to a NodePort or an external
 * IP gets a backend on this host, and both halves of its flow. Client and backend keep their
 * addresses, so that policy sees who asks.
 */
#include "counters.h"
#include "drop.h"
#include "endpoint.h"
#include "flow.h"
#include "fragment.h"
#include "hook.h"
#include "limit.h"
#include "monitor.h"
#include "nat.h"
#include "node.h"
#include "packet.h"
#include "policy.h"
#include "rewrite.h"
#include "service.h"
#include "track.h"

#define BACKEND_TRIES 4

static __always_inline struct service_entry *nodeport_service(const struct packet *packet)
{
	struct address_key address = packet->destination;
	struct service_entry *service =
		service_lookup(&address, packet->destination_port, packet->protocol, SCOPE_OUTSIDE);

	if (service || !node_addresses.lookup(&address))
		return service;
	return service_lookup_node_port(&address, packet->destination_port, packet->protocol,
					SCOPE_OUTSIDE);
}

/*
 * The client's backend, where affinity remembers one; else that of the flow's place in the table
 * (Eisenbud et al., NSDI 2016, 3.4): the same one on every node and after a restart.
 */
static __always_inline bool nodeport_choose(const struct node_entry *config,
					    const struct service_entry *service,
					    const struct packet *packet, __u32 hash,
					    struct backend_entry *backend)
{
	__u32 place, *slot;

	if (service->affinity_s && affinity_backend(service, &packet->source, backend))
		return true;
	if (!service->backends || !config->maglev_size)
		return false;
	place = service->maglev_first + hash % config->maglev_size;
	slot = maglev.lookup(&place);
	if (!slot || !service_backend(service, *slot, &packet->destination, backend))
		return false;
	if (service->affinity_s)
		affinity_remember(service, &packet->source, backend);
	return true;
}

/*
 * Enters the flow, of which work->outside is the key that the client knows. Another one may stand
 * in its way: the same client, from the same port, already talks to that backend by another
 * address. 0 or a drop reason.
 */
static __always_inline int nodeport_enter(const struct node_entry *config, struct nat_work *work,
					  const struct packet *packet, bool client_is_high,
					  __u32 service, const struct endpoint_entry *endpoint,
					  __u32 epoch)
{
	struct flow_entry *entry = &work->entry, *other;
	struct flow_key outside = work->outside;
	__u64 now_ns = flow_clock();
	int reason;

	__builtin_memset(entry, 0, sizeof(*entry));
	entry->created_ns = now_ns;
	entry->last_seen_ns = now_ns;
	entry->translated = packet->destination;
	entry->translated_port = packet->destination_port;
	entry->target = endpoint->attachment;
	entry->slot = endpoint->slot;
	entry->epoch = epoch;
	entry->flags = FLOW_TRANSLATED | FLOW_SERVICE;
	if (flow_key_of_ends(&work->inside, &packet->source, packet->source_port,
			     &work->pod.address, work->pod.port, packet->protocol))
		entry->flags |= FLOW_ORIGIN_IS_HIGH;
	flow_touch(entry, packet, true, now_ns);

	other = flow_lookup(&work->inside);
	if (other && (flow_is_stale(other, packet->protocol, now_ns) ||
		      other->closing == FLOW_CLOSING_BOTH)) {
		work->remote.address = packet->source;
		work->remote.port = packet->source_port;
		nat_remove(work, other, &work->pod, &work->remote);
		work->outside = outside;
	}
	reason = nat_enter(config, work, client_is_high, &work->pod, service);
	return reason == FLOW_EXISTS ? DROP_SERVICE_CONFLICT : reason;
}

/* Gives the packet a backend, and its flow both halves; 0 or a drop reason. */
static __always_inline int nodeport_try(const struct packet *packet,
					const struct node_entry *config, struct nat_work *work,
					struct service_entry *service, __u32 hash, __u32 epoch,
					struct endpoint_entry **endpoint)
{
	struct backend_entry backend = {};
	struct flow_end from, to;
	bool client_is_high;
	int reason;

	if (!nodeport_choose(config, service, packet, hash, &backend)) {
		/* A change may have taken the slots away meanwhile. */
		service = nodeport_service(packet);
		if (!service || !nodeport_choose(config, service, packet, hash, &backend))
			return DROP_NO_BACKEND;
	}
	*endpoint = endpoints.lookup(&backend.address);
	if (!*endpoint)
		return DROP_NO_BACKEND;
	/* The pod's device would take it, past the guard. */
	if (packet->protocol == IPPROTO_UDP && backend.port == bpf_htons(ROCE_PORT))
		return DROP_ROCE_NAT;
	work->pod.address = backend.address;
	work->pod.port = backend.port;
	end_outside(&from);
	end_of_endpoint(&to, *endpoint);
	reason = policy_judge(&from, &packet->source, &to, &backend.address, packet->protocol,
			      backend.port);
	if (reason)
		return reason;
	client_is_high = flow_key_of(&work->outside, packet);
	return nodeport_enter(config, work, packet, client_is_high, service->id, *endpoint, epoch);
}

static __always_inline int nodeport_begin(struct __sk_buff *skb, const struct packet *packet,
					  const struct node_entry *config,
					  struct service_entry *service)
{
	struct nat_work *work = nat_work_lookup();
	struct endpoint_entry *endpoint = NULL;
	__u32 epoch, hash;
	int reason, i;

	if (!work)
		return drop(skb, 0, DROP_NO_NODE);
	epoch = policy_epoch(config);
	flow_key_of(&work->outside, packet);
	hash = nat_hash(&work->outside);
	/* Where one backend's end is taken another's may be free. */
	for (i = 0; i < BACKEND_TRIES; i++) {
		reason = nodeport_try(packet, config, work, service, hash + i * (hash >> 16 | 1),
				      epoch, &endpoint);
		if (reason != DROP_SERVICE_CONFLICT || service->affinity_s)
			break;
	}
	if (reason)
		return drop(skb, endpoint ? endpoint->attachment : 0, reason);
	count_flow(FLOW_NO_SLOT, endpoint->slot);
	monitor_flow(skb, config, packet, 0, endpoint->attachment, &work->pod.address,
		     work->pod.port);
	reason = limit_to_pod(skb, packet, endpoint);
	if (reason)
		return drop(skb, endpoint->attachment, reason);
	if (rewrite(skb, packet, false, &work->pod))
		return drop(skb, endpoint->attachment, DROP_MALFORMED);
	fragment_keep(packet);
	count(skb, endpoint->slot, TO_POD, false);
	return deliver(skb, config, endpoint);
}

int nodeport(struct __sk_buff *skb)
{
	struct node_entry *config = node_lookup();
	struct packet *packet = packet_new();
	struct service_entry *service;

	enter(skb, HOOK_NODEPORT);
	if (!config || !packet || parse_ethernet(skb, packet))
		return TC_ACT_UNSPEC;
	if (packet->ethertype != ETH_P_IP && packet->ethertype != ETH_P_IPV6)
		return TC_ACT_UNSPEC;
	if (parse_network(skb, packet) || parse_transport(skb, packet))
		return TC_ACT_UNSPEC;
	/* A later part goes where its first one went: that flow is known, or there is none. */
	if ((packet->flags & (IS_LATER_FRAGMENT | IS_ROCE)) ||
	    (packet->protocol != IPPROTO_TCP && packet->protocol != IPPROTO_UDP))
		return TC_ACT_UNSPEC;
	/* Nothing begins with the end of something. */
	if (packet->protocol == IPPROTO_TCP && (packet->tcp_flags & TCP_RST))
		return TC_ACT_UNSPEC;
	service = nodeport_service(packet);
	if (!service)
		return TC_ACT_UNSPEC;
	return nodeport_begin(skb, packet, config, service);
}
