/*
 * One HTTP/1.1 request to the agent over its unix socket, with a bounded answer and a bounded wait.
 */
#ifndef RDMANET_CNI_AGENT_H
#define RDMANET_CNI_AGENT_H

#include <fcntl.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include "text.h"

#define AGENT_SOCKET	   "/run/rdmanet/agent.sock"
#define CONNECT_TIMEOUT_MS 2000
#define ANSWER_HEAD_MAX	   (16 * 1024)
#define ANSWER_BODY_MAX	   (1024 * 1024)

struct request {
	const char *head, *body;
	size_t head_size, body_size;
};

struct answer {
	char bytes[ANSWER_HEAD_MAX + ANSWER_BODY_MAX];
	size_t size;
	int status; /* HTTP */
	const char *body;
	size_t body_size;
	char why[160]; /* what went wrong, for a sentence, when there is no answer */
};

static bool no_answer(struct answer *answer, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(answer->why, sizeof(answer->why), format, arguments);
	va_end(arguments);
	return false;
}

/* A connected non-blocking descriptor, or -1 with why set. */
static int agent_connect(const char *path, struct answer *answer, long long deadline_ms)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), failed,
	    left = left_ms(deadline_ms);
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval wait;

	if (fd < 0) {
		no_answer(answer, "socket: %s", strerror(errno));
		return -1;
	}
	/*
	 * A full backlog makes a non-blocking connect on a unix socket fail at once and a blocking
	 * one wait for as long as the send time-out says (unix_stream_connect in
	 * net/unix/af_unix.c); 0 would mean for ever.
	 */
	if (left > CONNECT_TIMEOUT_MS)
		left = CONNECT_TIMEOUT_MS;
	if (left < 1)
		left = 1;
	wait.tv_sec = left / 1000;
	wait.tv_usec = left % 1000 * 1000;
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	do {
		failed = connect(fd, (struct sockaddr *)&address, sizeof(address));
	} while (failed && errno == EINTR);
	if (failed || fcntl(fd, F_SETFL, O_NONBLOCK)) {
		no_answer(answer, "%s",
			  errno == EAGAIN ? "it does not accept connections" : strerror(errno));
		close(fd);
		return -1;
	}
	return fd;
}

static bool agent_send(int fd, const char *bytes, size_t size, long long deadline_ms)
{
	while (size) {
		ssize_t sent = send(fd, bytes, size, MSG_NOSIGNAL);

		if (sent >= 0) {
			bytes += sent;
			size -= (size_t)sent;
		} else if (errno == EAGAIN) {
			if (!wait_for(fd, POLLOUT, deadline_ms))
				return false;
		} else if (errno != EINTR) {
			return false;
		}
	}
	return true;
}

/* RFC 9112 section 6: the length comes from Content-Length alone; the agent never uses a transfer
 * coding. */
static bool agent_read_head(struct answer *answer, const char *head_end, size_t *length)
{
	const char *line = answer->bytes, *next;
	const char *digits;
	bool have_length = false;

	if (head_end - line < 12 || memcmp(line, "HTTP/1.", 7) != 0 || line[8] != ' ')
		return false;
	answer->status = 0;
	for (line += 9; line < answer->bytes + 12; line++) {
		if (*line < '0' || *line > '9')
			return false;
		answer->status = answer->status * 10 + (*line - '0');
	}
	for (; line < head_end; line = next) {
		next = memchr(line, '\n', (size_t)(head_end - line));
		next = next ? next + 1 : head_end;
		if (head_end - line >= 18 && !strncasecmp(line, "Transfer-Encoding:", 18))
			return false;
		if (head_end - line < 15 || strncasecmp(line, "Content-Length:", 15))
			continue;
		if (have_length)
			return false;
		have_length = true;
		*length = 0;
		for (line += 15; line < next && (*line == ' ' || *line == '\t'); line++)
			;
		for (digits = line; line < next && *line >= '0' && *line <= '9'; line++) {
			*length = *length * 10 + (size_t)(*line - '0');
			if (*length > ANSWER_BODY_MAX)
				return false;
		}
		if (line == digits || (line < next && *line != '\r'))
			return false;
	}
	return have_length;
}

static bool agent_receive(int fd, struct answer *answer, long long deadline_ms)
{
	size_t length = 0, head_size = 0, look;

	answer->size = 0;
	while (!head_size || answer->size < head_size + length) {
		ssize_t got;

		if (!head_size && answer->size >= ANSWER_HEAD_MAX)
			return no_answer(answer, "its answer is not HTTP");
		if (!wait_for(fd, POLLIN, deadline_ms))
			return no_answer(answer, "no answer in time");
		got = recv(fd, answer->bytes + answer->size, sizeof(answer->bytes) - answer->size,
			   0);
		if (got < 0 && (errno == EAGAIN || errno == EINTR))
			continue;
		if (got < 0)
			return no_answer(answer, "%s", strerror(errno));
		if (got == 0)
			return no_answer(answer, "it closed the connection without a whole answer");
		look = answer->size < 3 ? 0 : answer->size - 3;
		answer->size += (size_t)got;
		for (; !head_size && look + 4 <= answer->size; look++)
			if (!memcmp(answer->bytes + look, "\r\n\r\n", 4))
				head_size = look + 4;
		if (head_size && !answer->body) {
			/* The last line keeps its line end: it is what ends a Content-Length. */
			if (head_size > ANSWER_HEAD_MAX ||
			    !agent_read_head(answer, answer->bytes + head_size - 2, &length))
				return no_answer(answer, "its answer is not HTTP with a length");
			answer->body = answer->bytes + head_size;
			answer->body_size = length;
		}
	}
	return true;
}

/* The spec's words for both ends: a result object or nothing on 200, an error object with msg
 * otherwise. */
static bool agent_answer_fits(struct answer *answer, bool wants_result)
{
	struct json_reader reader;
	char msg[2];
	struct json_key keys[] = {{.name = "msg", .value = msg, .room = sizeof(msg)}};

	if (answer->status == 200 && !wants_result && !answer->body_size)
		return true;
	if (!json_read(&reader, answer->body, answer->body_size, keys, 1) ||
	    (answer->status != 200 && keys[0].kind != JSON_STRING && keys[0].kind != JSON_TOO_LONG))
		return no_answer(answer, "it answered HTTP %d without a CNI %s", answer->status,
				 answer->status == 200 ? "result" : "error");
	return true;
}

/* Hand over the request on a connected descriptor, which this closes. False with why set. */
static bool agent_exchange(int fd, const struct request *request, struct answer *answer,
			   bool wants_result, long long deadline_ms)
{
	bool answered;

	answer->body = NULL;
	/* An agent that refuses early closes before it has read all: its answer is still there to
	 * be read. */
	if (agent_send(fd, request->head, request->head_size, deadline_ms))
		agent_send(fd, request->body, request->body_size, deadline_ms);
	answered = agent_receive(fd, answer, deadline_ms);
	close(fd);
	return answered && agent_answer_fits(answer, wants_result);
}

#endif
