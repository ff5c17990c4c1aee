// SPDX-License-Identifier: GPL-2.0
/*
 * Hooks of the root cgroup: what sockets connect and send to. A service's address becomes a
 * backend's before the first packet, and what the process sees becomes the service's again; no
 * packet is translated. Only for namespaces that are ours: nothing else on the host is touched.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>
#include "address.h"
#include "drop.h"
#include "endpoint.h"
#include "monitor.h"
#include "policy.h"
#include "service.h"

/* bcc 0.26 declares them without their parameters or return values. */
static __u64 (*get_netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
/* From Linux 5.18 on (kernel commit b44123b4a3dc). */
static int (*set_retval)(int value) = (void *)BPF_FUNC_set_retval;

#ifndef AF_INET6
#define AF_INET6 10
#endif

#define REFUSED 0
#define GOES_ON 1

/* sk_protocol of multipath TCP, which falls back to the plain one: its services are TCP's. */
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

/* Where a socket is going, or what it is told where something came from. */
struct socket_end {
	struct address_key address;
	__be16 port;
	__u8 protocol;
};

enum translation {
	UNTOUCHED = 0, /* no service */
	TRANSLATED = 1,
	NO_BACKEND = 2,
};

/* The protocol of services' keys; 0: none that services have. */
static __always_inline __u8 service_protocol(__u32 protocol)
{
	if (protocol == IPPROTO_MPTCP)
		return IPPROTO_TCP;
	if (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP)
		return protocol;
	return 0;
}

static __always_inline void read_end4(struct bpf_sock_addr *ctx, struct socket_end *end)
{
	address_map(&end->address, ctx->user_ip4);
	end->port = ctx->user_port;
	end->protocol = service_protocol(ctx->protocol);
}

static __always_inline void read_end6(struct bpf_sock_addr *ctx, struct socket_end *end)
{
	end->address.word[0] = ctx->user_ip6[0];
	end->address.word[1] = ctx->user_ip6[1];
	end->address.word[2] = ctx->user_ip6[2];
	end->address.word[3] = ctx->user_ip6[3];
	end->port = ctx->user_port;
	end->protocol = service_protocol(ctx->protocol);
}

static __always_inline void write_end4(struct bpf_sock_addr *ctx, const struct socket_end *end)
{
	ctx->user_ip4 = end->address.word[3];
	ctx->user_port = end->port;
}

static __always_inline void write_end6(struct bpf_sock_addr *ctx, const struct socket_end *end)
{
	ctx->user_ip6[0] = end->address.word[0];
	ctx->user_ip6[1] = end->address.word[1];
	ctx->user_ip6[2] = end->address.word[2];
	ctx->user_ip6[3] = end->address.word[3];
	ctx->user_port = end->port;
}

/* A pod's address is never a service's, not even where somebody names it as an external IP. */
static __always_inline struct service_entry *socket_service(const struct socket_end *end)
{
	struct address_key address = end->address;
	struct service_entry *service =
		service_lookup(&end->address, end->port, end->protocol, SCOPE_CLUSTER);

	if (service)
		return endpoints.lookup(&address) ? NULL : service;
	if (!node_addresses.lookup(&address))
		return NULL;
	return service_lookup_node_port(&end->address, end->port, end->protocol, SCOPE_NODE);
}

static __always_inline void socket_key_of(struct socket_key *key, __u64 cookie,
					  const struct socket_end *end)
{
	key->cookie = cookie;
	key->backend = end->address;
	key->port = end->port;
	key->protocol = end->protocol;
}

/* What the socket called this backend, from now on. */
static __always_inline void socket_remember(const struct service_entry *service, __u64 cookie,
					    const struct socket_end *end,
					    const struct socket_end *backend)
{
	struct socket_entry called = {
		.address = end->address, .port = end->port, .service = service->id};
	struct socket_key key = {};
	struct socket_entry *known;

	socket_key_of(&key, cookie, backend);
	known = sockets.lookup(&key);
	if (!known || known->service != service->id || known->port != end->port ||
	    !address_equal(&known->address, &end->address))
		sockets.update(&key, &called);
}

/*
 * The kernel sends what an IPv6 socket that is connected to a mapped address sends as if its
 * process had named that address again (net/ipv6/udp.c, udpv6_sendmsg).
 */
static __always_inline bool is_connected_to(struct bpf_sock_addr *ctx, const struct socket_end *end)
{
	struct bpf_sock *sk = ctx->sk;

	return ctx->family == AF_INET6 && address_is_mapped(&end->address) && sk &&
	       sk->dst_ip4 == end->address.word[3] && sk->dst_port == end->port;
}

/* The socket calls it by its own name now: a backend may also be talked to without its service. */
static __always_inline void socket_forget(__u64 cookie, const struct socket_end *end)
{
	struct socket_key key = {};

	socket_key_of(&key, cookie, end);
	if (sockets.lookup(&key))
		sockets.delete(&key);
}

/* The backend that a datagram socket has for this service, as long as it lives. */
static __always_inline bool socket_flow(const struct service_entry *service, __u64 cookie,
					const struct socket_end *end, struct backend_entry *backend)
{
	struct socket_key key = {};
	struct socket_entry *flow;

	socket_key_of(&key, cookie, end);
	flow = socket_flows.lookup(&key);
	if (!flow || flow->service != service->id)
		return false;
	backend->address = flow->address;
	backend->port = flow->port;
	return member_state(service, &backend->address, backend->port);
}

static __always_inline void socket_flow_remember(const struct service_entry *service, __u64 cookie,
						 const struct socket_end *end,
						 const struct backend_entry *backend)
{
	struct socket_entry flow = {
		.address = backend->address, .port = backend->port, .service = service->id};
	struct socket_key key = {};

	socket_key_of(&key, cookie, end);
	socket_flows.update(&key, &flow);
}

/* A backend that takes new flows; where the client's was remembered, that one. */
static __always_inline bool socket_choose(const struct service_entry *service, __u64 namespace,
					  const struct socket_end *end,
					  struct backend_entry *backend)
{
	struct address_key client = {.word = {0, 0, namespace >> 32, namespace}};

	if (service->affinity_s && affinity_backend(service, &client, backend))
		return true;
	if (!service->backends ||
	    !service_backend(service, bpf_get_prandom_u32() % service->backends, &end->address,
			     backend))
		return false;
	if (service->affinity_s)
		affinity_remember(service, &client, backend);
	return true;
}

/* Turns the service's address and port, if they are one's, into a backend's. */
static __always_inline enum translation translate(struct bpf_sock_addr *ctx, __u64 namespace,
						  struct socket_end *end, bool connects)
{
	struct service_entry *service = socket_service(end);
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct backend_entry backend = {};
	struct socket_end chosen = {};
	bool sticks = !connects && end->protocol == IPPROTO_UDP, known;

	if (!service) {
		if (connects || !is_connected_to(ctx, end))
			socket_forget(cookie, end);
		return UNTOUCHED;
	}
	known = sticks && socket_flow(service, cookie, end, &backend);
	if (!known && !socket_choose(service, namespace, end, &backend)) {
		/* A change may have taken the slots away meanwhile. */
		service = socket_service(end);
		if (!service)
			return UNTOUCHED;
		if (!socket_choose(service, namespace, end, &backend))
			return NO_BACKEND;
	}
	if (sticks && !known)
		socket_flow_remember(service, cookie, end, &backend);
	chosen.address = backend.address;
	chosen.port = backend.port;
	chosen.protocol = end->protocol;
	socket_remember(service, cookie, end, &chosen);
	*end = chosen;
	return TRANSLATED;
}

static __always_inline int refuse(__u32 attachment, const struct socket_end *end)
{
	monitor_refusal(attachment, DROP_NO_BACKEND, &end->address, end->port, end->protocol);
	set_retval(-ECONNREFUSED);
	return REFUSED;
}

/* Of connect and sendmsg. */
static __always_inline int go(struct bpf_sock_addr *ctx, bool ipv6, bool connects)
{
	__u64 namespace;
	__u32 *attachment;
	struct socket_end end = {};
	enum translation translation;

	if (ipv6)
		read_end6(ctx, &end);
	else
		read_end4(ctx, &end);
	if (!end.protocol)
		return GOES_ON;
	/*
	 * To a pod of this host: most are found in a few instructions, and whose the socket is need
	 * not be known.
	 */
	if (near_endpoint_lookup(&end.address, address_is_mapped(&end.address) ? 4 : 6)) {
		if (connects || !is_connected_to(ctx, &end))
			socket_forget(bpf_get_socket_cookie(ctx), &end);
		return GOES_ON;
	}
	namespace = get_netns_cookie(ctx);
	attachment = namespaces.lookup(&namespace);
	if (!attachment)
		return GOES_ON;
	translation = translate(ctx, namespace, &end, connects);
	if (translation == NO_BACKEND)
		return refuse(*attachment, &end);
	if (translation == UNTOUCHED)
		return GOES_ON;
	if (ipv6)
		write_end6(ctx, &end);
	else
		write_end4(ctx, &end);
	return GOES_ON;
}

/* Of recvmsg and getpeername: the process sees what it called the backend. */
static __always_inline int tell(struct bpf_sock_addr *ctx, bool ipv6)
{
	struct socket_key key = {};
	struct socket_end end = {};
	struct socket_entry *called;

	/* Of namespaces that are not ours there are no sockets: one look and not two. */
	if (ipv6)
		read_end6(ctx, &end);
	else
		read_end4(ctx, &end);
	if (!end.protocol)
		return GOES_ON;
	socket_key_of(&key, bpf_get_socket_cookie(ctx), &end);
	called = sockets.lookup(&key);
	if (!called)
		return GOES_ON;
	end.address = called->address;
	end.port = called->port;
	if (ipv6)
		write_end6(ctx, &end);
	else
		write_end4(ctx, &end);
	return GOES_ON;
}

int connect4(struct bpf_sock_addr *ctx)
{
	return go(ctx, false, true);
}

int connect6(struct bpf_sock_addr *ctx)
{
	return go(ctx, true, true);
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return go(ctx, false, false);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	return go(ctx, true, false);
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	return tell(ctx, false);
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	return tell(ctx, true);
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	return tell(ctx, false);
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	return tell(ctx, true);
}
