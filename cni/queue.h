/*
 * DEL while the agent is away: pending/CONTAINERID@IFNAME holds the request exactly as it would
 * have gone over the socket, so that the agent replays it through the code that reads requests. A
 * name per attachment makes the queue idempotent: a runtime that repeats its DEL replaces its
 * entry. Entries appear whole (written, synced, renamed).
 */
#ifndef RDMANET_CNI_QUEUE_H
#define RDMANET_CNI_QUEUE_H

#include <dirent.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "agent.h"

#define STATE_DIRECTORY	     "/var/lib/rdmanet"
#define QUEUE_ENTRIES_MAX    4096
#define QUEUE_ENTRY_SIZE_MAX (64 * 1024)
#define QUEUE_LOCK_RETRY_MS  5

struct queue {
	int directory, lock;
	char path[PATH_MAX];
	char why[PATH_MAX + 128];
	enum cni_code code; /* what why means to the runtime */
};

static bool queue_fail(struct queue *queue, enum cni_code code, const char *what)
{
	queue->code = code;
	snprintf(queue->why, sizeof(queue->why), "%s: %s: %s", queue->path, what, strerror(errno));
	return false;
}

/* Open the directory, making it where it is missing, and take its lock. False with why set. */
static bool queue_open(struct queue *queue, const char *state_directory, long long deadline_ms)
{
	queue->directory = queue->lock = -1;
	snprintf(queue->path, sizeof(queue->path), "%s", state_directory);
	if (mkdir(queue->path, 0700) && errno != EEXIST)
		return queue_fail(queue, CNI_IO_FAILURE, "cannot be made");
	if (snprintf(queue->path, sizeof(queue->path), "%s/pending", state_directory) >=
	    (int)sizeof(queue->path)) {
		errno = ENAMETOOLONG;
		return queue_fail(queue, CNI_INVALID_CONFIG, "\"stateDir\"");
	}
	if (mkdir(queue->path, 0700) && errno != EEXIST)
		return queue_fail(queue, CNI_IO_FAILURE, "cannot be made");
	queue->directory = open(queue->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (queue->directory < 0)
		return queue_fail(queue, CNI_IO_FAILURE, "cannot be opened");
	queue->lock =
		openat(queue->directory, "lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (queue->lock < 0)
		return queue_fail(queue, CNI_IO_FAILURE, "lock cannot be opened");
	/* flock has no time-out of its own; who holds this lock (an agent that drains) lets go in
	 * milliseconds. */
	while (flock(queue->lock, LOCK_EX | LOCK_NB)) {
		if (errno != EWOULDBLOCK && errno != EINTR)
			return queue_fail(queue, CNI_IO_FAILURE, "lock cannot be taken");
		if (!left_ms(deadline_ms)) {
			errno = ETIMEDOUT;
			return queue_fail(queue, CNI_TRY_AGAIN_LATER,
					  "lock is held by another process");
		}
		poll(NULL, 0, QUEUE_LOCK_RETRY_MS);
	}
	return true;
}

static void queue_close(struct queue *queue)
{
	if (queue->lock >= 0)
		close(queue->lock);
	if (queue->directory >= 0)
		close(queue->directory);
	queue->directory = queue->lock = -1;
}

/* Entries other than the named one; names of entries alone contain '@'. -1 with errno set. */
static long queue_count_others(struct queue *queue, const char *name)
{
	int fd = openat(queue->directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *directory = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;
	long count = 0;

	if (!directory) {
		if (fd >= 0)
			close(fd);
		return -1;
	}
	for (errno = 0; (entry = readdir(directory)); errno = 0)
		if (strchr(entry->d_name, '@') && strcmp(entry->d_name, name) != 0)
			count++;
	if (errno)
		count = -1;
	closedir(directory);
	return count;
}

/* The whole entry on disk, or false with errno set and nothing there. */
static bool queue_write(struct queue *queue, const char *name, const struct request *request)
{
	/* One temporary name for all is enough under the lock, and a crash leaves at most one
	 * behind. */
	int fd = openat(queue->directory, ".new",
			O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	int error = 0;

	if (fd < 0)
		return false;
	if (!write_all(fd, request->head, request->head_size) ||
	    !write_all(fd, request->body, request->body_size) || fsync(fd))
		error = errno;
	if (close(fd) && !error)
		error = errno;
	if (!error &&
	    (renameat(queue->directory, ".new", queue->directory, name) || fsync(queue->directory)))
		error = errno;
	if (error)
		unlinkat(queue->directory, ".new", 0);
	errno = error;
	return !error;
}

/* Store the request under the lock; it is on disk when this returns true. False with why set. */
static bool queue_store(struct queue *queue, const char *name, const struct request *request)
{
	long others = queue_count_others(queue, name);
	bool stored;

	if (others < 0)
		return queue_fail(queue, CNI_IO_FAILURE, "cannot be listed");
	errno = ENOSPC;
	if (others >= QUEUE_ENTRIES_MAX)
		return queue_fail(queue, CNI_TRY_AGAIN_LATER,
				  "4096 DELs are waiting for the agent already");
	errno = EFBIG;
	if (request->head_size + request->body_size > QUEUE_ENTRY_SIZE_MAX)
		return queue_fail(queue, CNI_TRY_AGAIN_LATER,
				  "a DEL of more than 64 KiB is not queued");
	stored = queue_write(queue, name, request);
	/* The disk is full: what the agent keeps for this (rdmanet/reserve.py) is given up. */
	if (!stored && errno == ENOSPC) {
		if (!unlinkat(queue->directory, "../reserve", 0))
			stored = queue_write(queue, name, request);
		else
			errno = ENOSPC;
	}
	if (!stored)
		return queue_fail(queue, CNI_IO_FAILURE, "cannot be written to");
	return true;
}

#endif
