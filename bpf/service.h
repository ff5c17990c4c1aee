/* SPDX-License-Identifier: GPL-2.0 */
/* Services: which backends stand behind an address and a port. */
#include "address.h"

/* Who asks; the address is zero for NodePorts. */
enum service_scope {
	SCOPE_CLUSTER = 0, /* sockets: ClusterIPs and external IPs */
	SCOPE_NODE = 1,	   /* sockets: NodePorts, at one of the node's addresses */
	SCOPE_OUTSIDE = 2, /* the uplink: NodePorts and external IPs */
};

struct service_key {
	struct address_key address;
	__be16 port;
	__u8 protocol;
	__u8 scope;
};

/* struct service_entry.flags */
#define SERVICE_HAS_MEMBERS 1 /* members tells which backends live: affinity and UDP */

struct service_entry {
	__u32 id;
	__u32 generation;
	__u32 backends;	    /* slots 0 to backends - 1 of this generation */
	__u32 affinity_s;   /* 0: none */
	__u32 maglev_first; /* scope OUTSIDE: where its places begin */
	__u32 flags;
};

BPF_F_TABLE("hash", struct service_key, struct service_entry, services, 262144, BPF_F_NO_PREALLOC);

struct backend_key {
	__u32 service;
	__u32 generation;
	__u32 slot;
};

struct backend_entry {
	struct address_key address;
	__be16 port;
	__u16 pad;
};

BPF_F_TABLE("hash", struct backend_key, struct backend_entry, backends, 524288, BPF_F_NO_PREALLOC);

struct member_key {
	struct address_key address;
	__u32 service;
	__be16 port;
	__u16 pad;
};

#define MEMBER_READY	   1
#define MEMBER_TERMINATING 2 /* keeps its flows, gets no new ones */

BPF_F_TABLE("hash", struct member_key, __u32, members, 524288, BPF_F_NO_PREALLOC);

/* Each place is the slot of a backend; node.maglev_size places for each service of scope OUTSIDE.
 */
BPF_F_TABLE("array", __u32, __u32, maglev, 522752, 0);

/* Which backend a client had: sessionAffinity ClientIP. Sockets' clients are their namespaces. */
struct affinity_key {
	struct address_key client; /* sockets: the namespace's cookie in the last two words */
	__u32 service;
};

struct affinity_entry {
	struct address_key address;
	__be16 port;
	__u16 pad[3];
	__u64 last_used_ns;
};

BPF_F_TABLE("lru_hash", struct affinity_key, struct affinity_entry, affinity, 65536, 0);

/* What a socket called the backend that it talks to, for recvmsg and getpeername. */
struct socket_key {
	__u64 cookie;
	struct address_key backend;
	__be16 port;
	__u8 protocol;
	__u8 pad[5];
};

struct socket_entry {
	struct address_key address; /* of the service */
	__be16 port;
	__u16 pad;
	__u32 service;
};

BPF_F_TABLE("lru_hash", struct socket_key, struct socket_entry, sockets, 65536, 0);

/* The backend that an unconnected datagram socket got for a service: key as above, with the
 * service's. */
BPF_F_TABLE("lru_hash", struct socket_key, struct socket_entry, socket_flows, 65536, 0);

/* Network namespaces whose sockets see services, by cookie; the attachment, or 0 for the host. */
BPF_F_TABLE("hash", __u64, __u32, namespaces, 8192, 0);

static __always_inline struct service_entry *service_lookup(const struct address_key *address,
							    __be16 port, __u8 protocol, __u8 scope)
{
	struct service_key key = {
		.address = *address, .port = port, .protocol = protocol, .scope = scope};

	return services.lookup(&key);
}

/* As service_lookup, of a NodePort: the address is zero, and only its family counts. */
static __always_inline struct service_entry *
service_lookup_node_port(const struct address_key *address, __be16 port, __u8 protocol, __u8 scope)
{
	struct address_key zero = {};

	if (address_is_mapped(address))
		address_map(&zero, 0);
	return service_lookup(&zero, port, protocol, scope);
}

/* MEMBER_READY, MEMBER_TERMINATING, or 0: gone, or a service whose members are not told. */
static __always_inline __u32 member_state(const struct service_entry *service,
					  const struct address_key *address, __be16 port)
{
	struct member_key key = {.address = *address, .service = service->id, .port = port};
	__u32 *state;

	if (!(service->flags & SERVICE_HAS_MEMBERS))
		return 0;
	state = members.lookup(&key);
	return state ? *state : 0;
}

/* Whether a backend of a service whose members are told still lives; so for all of UDP. */
static __always_inline bool member_lives(__u32 service, const struct address_key *address,
					 __be16 port)
{
	struct member_key key = {.address = *address, .service = service, .port = port};

	return members.lookup(&key);
}

/* The backend that the client had, as long as it takes new flows and the time has not run out. */
static __always_inline bool affinity_backend(const struct service_entry *service,
					     const struct address_key *client,
					     struct backend_entry *backend)
{
	struct affinity_key key = {.client = *client, .service = service->id};
	__u64 now_ns = bpf_ktime_get_ns();
	struct affinity_entry *entry = affinity.lookup(&key);

	if (!entry || now_ns > entry->last_used_ns + service->affinity_s * 1000000000ULL)
		return false;
	backend->address = entry->address;
	backend->port = entry->port;
	if (member_state(service, &backend->address, backend->port) != MEMBER_READY)
		return false;
	entry->last_used_ns = now_ns;
	return true;
}

static __always_inline void affinity_remember(const struct service_entry *service,
					      const struct address_key *client,
					      const struct backend_entry *backend)
{
	struct affinity_key key = {.client = *client, .service = service->id};
	struct affinity_entry entry = {.address = backend->address,
				       .port = backend->port,
				       .last_used_ns = bpf_ktime_get_ns()};

	affinity.update(&key, &entry);
}

/*
 * The backend of a slot, for a flow to an address of that family. False where there is none: the
 * service may have another generation by now.
 */
static __always_inline bool service_backend(const struct service_entry *service, __u32 slot,
					    const struct address_key *address,
					    struct backend_entry *backend)
{
	struct backend_key key = {
		.service = service->id, .generation = service->generation, .slot = slot};
	struct backend_entry *found = backends.lookup(&key);

	if (!found || address_is_mapped(&found->address) != address_is_mapped(address))
		return false;
	*backend = *found;
	return true;
}
