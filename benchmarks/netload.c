// SPDX-License-Identifier: GPL-2.0
/*
 * The load of the question datapath: one program for every contender, so that all do the same work.
 *
 *     netload WORK SERVER_NETNS CLIENT_NETNS ADDRESS WARMUP COUNT [PORT CALLED CALLED_PORT]
 *
 * A server in one network namespace answers a client in another (or the same) one, at a free port
 * of ADDRESS; or at PORT, and the client calls another address and port, behind which it is:
 *
 *     tcp-rr      one byte there, one byte back, on one connection
 *     tcp-crr     the same with a connection for each, closed by the server
 *     udp-rr      one byte there, one byte back, in datagrams
 *     tcp-stream  COUNT is KiB, sent as fast as they go; answered by one byte when all have come
 *
 * Sockets block, TCP_NODELAY is on, nothing else is tuned. After WARMUP transactions, COUNT are
 * timed in blocks (CLOCK_MONOTONIC). Standard output gets the median block's nanoseconds for each:
 * what else the machine does now and then falls into single blocks. Standard error gets a sentence
 * when something failed (exit status 1).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_S   300
#define CHUNK_BYTES (64 * 1024)
#define KIB_BYTES   1024
#define BLOCKS	    9

union address {
	struct sockaddr any;
	struct sockaddr_in ipv4;
	struct sockaddr_in6 ipv6;
};

struct load {
	const char *name;
	int type;
	void (*serve)(int fd, long warmup, long count);
	void (*ask)(int fd, const union address *server, long count);
};

static char chunk[CHUNK_BYTES];

static void enter(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || setns(fd, CLONE_NEWNET))
		err(1, "cannot enter %s", path);
	close(fd);
}

/*
 * Without TIME_WAIT, whose end a minute later would be work in another contender's turn. The
 * handshakes stay whole.
 */
static void forget_closed_connections(void)
{
	static const char file[] = "/proc/sys/net/ipv4/tcp_max_tw_buckets";
	int fd = open(file, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, "0", 1) != 1)
		err(1, "cannot write %s", file);
	close(fd);
}

static socklen_t length_of(const union address *address)
{
	return address->any.sa_family == AF_INET ? sizeof(address->ipv4) : sizeof(address->ipv6);
}

static union address parse_address(const char *text)
{
	union address address = {};

	if (inet_pton(AF_INET, text, &address.ipv4.sin_addr) == 1)
		address.any.sa_family = AF_INET;
	else if (inet_pton(AF_INET6, text, &address.ipv6.sin6_addr) == 1)
		address.any.sa_family = AF_INET6;
	else
		errx(1, "%s is no address", text);
	return address;
}

static int open_socket(const union address *address, int type)
{
	int one = 1, fd = socket(address->any.sa_family, type | SOCK_CLOEXEC, 0);

	if (fd < 0)
		err(1, "socket");
	if (type == SOCK_STREAM && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		err(1, "TCP_NODELAY");
	return fd;
}

static void set_port(union address *address, long port)
{
	if (address->any.sa_family == AF_INET)
		address->ipv4.sin_port = htons(port);
	else
		address->ipv6.sin6_port = htons(port);
}

/* Where it has no port, at a free one, which is written into the address. */
static int open_server(union address *address, int type)
{
	socklen_t length = length_of(address);
	int one = 1, fd = open_socket(address, type);

	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)))
		err(1, "SO_REUSEADDR");
	if (bind(fd, &address->any, length) || getsockname(fd, &address->any, &length))
		err(1, "cannot bind the server's address");
	if (type == SOCK_STREAM && listen(fd, 128))
		err(1, "listen");
	return fd;
}

static int open_client(const union address *server, int type)
{
	int fd = open_socket(server, type);

	if (connect(fd, &server->any, length_of(server)))
		err(1, "cannot connect to the server");
	return fd;
}

static int accept_client(int listener)
{
	int one = 1, fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		err(1, "accept");
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		err(1, "TCP_NODELAY");
	return fd;
}

static void put_byte(int fd)
{
	if (send(fd, "x", 1, MSG_NOSIGNAL) != 1)
		err(1, "send");
}

static bool get_byte(int fd)
{
	char byte;
	ssize_t got = recv(fd, &byte, 1, 0);

	if (got < 0)
		err(1, "recv");
	return got == 1;
}

static void get_answer(int fd)
{
	if (!get_byte(fd))
		errx(1, "the server closed the connection");
}

static void serve_rr(int listener, long warmup, long count)
{
	int fd = accept_client(listener);

	(void)warmup;
	(void)count;
	while (get_byte(fd))
		put_byte(fd);
}

static void ask_rr(int fd, const union address *server, long count)
{
	(void)server;
	while (count--) {
		put_byte(fd);
		get_answer(fd);
	}
}

static void serve_crr(int listener, long warmup, long count)
{
	(void)warmup;
	(void)count;
	for (;;) {
		int fd = accept_client(listener);

		if (get_byte(fd))
			put_byte(fd);
		close(fd);
	}
}

static void ask_crr(int unused, const union address *server, long count)
{
	(void)unused;
	while (count--) {
		int fd = open_client(server, SOCK_STREAM);

		put_byte(fd);
		get_answer(fd);
		if (get_byte(fd))
			errx(1, "the server sent more than its answer");
		close(fd);
	}
}

static void serve_udp(int fd, long warmup, long count)
{
	union address client;
	char byte;

	(void)warmup;
	(void)count;
	for (;;) {
		socklen_t length = sizeof(client);

		if (recvfrom(fd, &byte, 1, 0, &client.any, &length) != 1)
			err(1, "recvfrom");
		if (sendto(fd, &byte, 1, 0, &client.any, length) != 1)
			err(1, "sendto");
	}
}

static void take(int fd, long kib)
{
	long left = kib * KIB_BYTES;

	while (left) {
		ssize_t got = recv(fd, chunk, left < CHUNK_BYTES ? left : CHUNK_BYTES, 0);

		if (got <= 0)
			err(1, "the stream ended early");
		left -= got;
	}
	put_byte(fd);
}

static void serve_stream(int listener, long warmup, long count)
{
	int fd = accept_client(listener);

	take(fd, warmup);
	for (int i = 0; i < BLOCKS; i++)
		take(fd, count / BLOCKS);
	get_byte(fd);
}

static void ask_stream(int fd, const union address *server, long count)
{
	long left = count * KIB_BYTES;

	(void)server;
	while (left) {
		size_t want = left < CHUNK_BYTES ? left : CHUNK_BYTES;
		ssize_t sent = send(fd, chunk, want, MSG_NOSIGNAL);

		if (sent < 0)
			err(1, "send");
		left -= sent;
	}
	get_answer(fd);
}

static const struct load loads[] = {
	{"tcp-rr", SOCK_STREAM, serve_rr, ask_rr},
	{"tcp-crr", SOCK_STREAM, serve_crr, ask_crr},
	{"udp-rr", SOCK_DGRAM, serve_udp, ask_rr},
	{"tcp-stream", SOCK_STREAM, serve_stream, ask_stream},
};

static const struct load *find_load(const char *name)
{
	for (size_t i = 0; i < sizeof(loads) / sizeof(loads[0]); i++)
		if (!strcmp(loads[i].name, name))
			return &loads[i];
	errx(1, "%s is no work: tcp-rr, tcp-crr, udp-rr or tcp-stream", name);
}

static long positive(const char *text)
{
	char *end;
	long number = strtol(text, &end, 10);

	if (*end || number <= 0)
		errx(1, "%s is no positive number", text);
	return number;
}

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	double first = *(const double *)a, second = *(const double *)b;

	return (first > second) - (first < second);
}

int main(int argc, char **argv)
{
	const struct load *load;
	union address address;
	long warmup, count;
	double blocks_ns[BLOCKS];
	pid_t server;
	int fd;

	if (argc != 7 && argc != 10)
		errx(1, "usage: netload WORK SERVER_NETNS CLIENT_NETNS ADDRESS WARMUP COUNT"
			" [PORT CALLED CALLED_PORT]");
	load = find_load(argv[1]);
	address = parse_address(argv[4]);
	if (argc == 10)
		set_port(&address, positive(argv[7]));
	warmup = positive(argv[5]);
	count = positive(argv[6]);
	if (count < BLOCKS)
		errx(1, "COUNT is %d at least", BLOCKS);
	alarm(TIMEOUT_S); /* a lost datagram is never sent again */

	enter(argv[2]);
	forget_closed_connections();
	fd = open_server(&address, load->type);
	server = fork();
	if (server < 0)
		err(1, "fork");
	if (!server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		load->serve(fd, warmup, count);
		_exit(0);
	}
	close(fd);

	if (argc == 10) {
		address = parse_address(argv[8]);
		set_port(&address, positive(argv[9]));
	}
	enter(argv[3]);
	forget_closed_connections();
	fd = load->ask == ask_crr ? -1 : open_client(&address, load->type);
	load->ask(fd, &address, warmup);
	for (int i = 0; i < BLOCKS; i++) {
		double began_ns = now_ns();

		load->ask(fd, &address, count / BLOCKS);
		blocks_ns[i] = now_ns() - began_ns;
	}
	qsort(blocks_ns, BLOCKS, sizeof(blocks_ns[0]), compare);
	printf("%.3f\n", blocks_ns[BLOCKS / 2] / (count / BLOCKS));

	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
	return 0;
}
