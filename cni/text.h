/*
 * What every part of the CNI executable uses: bounded text, the monotonic deadline, and the one
 * answer on stdout.
 */
#ifndef RDMANET_CNI_TEXT_H
#define RDMANET_CNI_TEXT_H

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "json.h"

/* The error codes of CNI 1.1.0 that this executable gives by itself (section 5 "Error", section 2
 * "STATUS"). */
enum cni_code {
	CNI_INCOMPATIBLE_VERSION = 1,
	CNI_INVALID_ENVIRONMENT = 4,
	CNI_IO_FAILURE = 5,
	CNI_DECODING_FAILURE = 6,
	CNI_INVALID_CONFIG = 7,
	CNI_TRY_AGAIN_LATER = 11,
	CNI_PLUGIN_NOT_AVAILABLE = 50,
};

/* Text under construction. What does not fit sets full and is left out; size counts bytes. */
struct text {
	char *bytes;
	size_t room, size;
	bool full;
};

#define TEXT(array)                                                                                \
	{                                                                                          \
		.bytes = (array), .room = sizeof(array)                                            \
	}

static void put_byte(struct text *text, char byte)
{
	if (text->size < text->room)
		text->bytes[text->size++] = byte;
	else
		text->full = true;
}

static void put(struct text *text, const char *string)
{
	for (; *string; string++)
		put_byte(text, *string);
}

static void put_size(struct text *text, size_t number)
{
	char digits[24];

	snprintf(digits, sizeof(digits), "%zu", number);
	put(text, digits);
}

/* A JSON string from any bytes; what is not UTF-8 becomes U+FFFD, so that the answer always is
 * JSON. */
static void put_json_string(struct text *text, const char *string)
{
	const unsigned char *at = (const unsigned char *)string, *end = at + strlen(string);
	char escape[8];
	size_t length;

	put_byte(text, '"');
	while (at < end) {
		length = utf8_length(at, end);
		if (!length) {
			put(text, "\\ufffd");
			at++;
		} else if (*at < 0x20 || *at == 0x7f) {
			snprintf(escape, sizeof(escape), "\\u%04x", *at++);
			put(text, escape);
		} else {
			if (*at == '"' || *at == '\\')
				put_byte(text, '\\');
			for (; length; length--)
				put_byte(text, (char)*at++);
		}
	}
	put_byte(text, '"');
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int left_ms(long long deadline_ms)
{
	long long left = deadline_ms - now_ms();

	return left <= 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left;
}

/* Wait until the descriptor is ready for events. False with errno ETIMEDOUT when the deadline
 * passes first. */
static bool wait_for(int fd, short events, long long deadline_ms)
{
	struct pollfd item = {.fd = fd, .events = events};
	int ready;

	do {
		ready = poll(&item, 1, left_ms(deadline_ms));
	} while (ready < 0 && errno == EINTR);
	if (ready == 0)
		errno = ETIMEDOUT;
	return ready > 0;
}

static bool write_all(int fd, const char *bytes, size_t size)
{
	while (size) {
		ssize_t written = write(fd, bytes, size);

		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			return false;
		bytes += written;
		size -= (size_t)written;
	}
	return true;
}

/* Read a descriptor to its end. The size, or -1 with errno set (EFBIG: more than room, ETIMEDOUT:
 * too slow). */
static ssize_t read_all(int fd, char *bytes, size_t room, long long deadline_ms)
{
	size_t size = 0;
	char beyond;

	for (;;) {
		bool full = size == room;
		ssize_t got;

		if (!wait_for(fd, POLLIN, deadline_ms))
			return -1;
		got = full ? read(fd, &beyond, 1) : read(fd, bytes + size, room - size);
		if (got < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (got < 0)
			return -1;
		if (got == 0)
			return (ssize_t)size;
		if (full) {
			errno = EFBIG;
			return -1;
		}
		size += (size_t)got;
	}
}

#endif
