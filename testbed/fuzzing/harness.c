/*
 * Runs the CNI executable's main() on one input after another, in a process of its own each: without
 * an exec, so that a thousand inputs take a second or two, and with the places in its code that each
 * one reaches (gcc's -fsanitize-coverage=trace-pc) in a shared file.
 *
 * Inputs come by standard input: three lengths, then environment (texts with NUL behind each),
 * standard input and the agent's answer (length 0: there is no agent). Answers go to standard
 * output: wait status, length of what it printed, that, and the same of its standard error.
 * Everything happens below the directory named first, which is the root directory from the start.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PLACES	   65536
#define TIMEOUT_S  20
#define PART_MAX   (1 << 21)
#define OUTPUT_MAX (1 << 21)
#define AGENT	   "/run/rdmanet/agent.sock"

int plugin_main(int count, char **arguments);

static unsigned char *places;
static char parts[3][PART_MAX], output[OUTPUT_MAX];
static uint32_t sizes[3];

void __sanitizer_cov_trace_pc(void)
{
	uintptr_t place = (uintptr_t)__builtin_return_address(0);

	if (places)
		places[(place ^ place >> 16) % PLACES] = 1;
}

static void must(int done, const char *what)
{
	if (done)
		return;
	perror(what);
	exit(2);
}

/* Whether there was something before the end. */
static int take(void *bytes, size_t size)
{
	for (char *at = bytes; size;) {
		ssize_t got = read(STDIN_FILENO, at, size);

		if (got <= 0)
			return 0;
		at += got;
		size -= got;
	}
	return 1;
}

static void give(const void *bytes, size_t size)
{
	for (const char *at = bytes; size;) {
		ssize_t put = write(STDOUT_FILENO, at, size);

		must(put > 0, "write");
		at += put;
		size -= put;
	}
}

static void give_file(int file)
{
	ssize_t got = pread(file, output, sizeof(output), 0);
	uint32_t size = got < 0 ? 0 : got;

	give(&size, sizeof(size));
	give(output, size);
	close(file);
}

/* The agent: says what it is to say, whatever it is asked, and reads until the other end closes. */
static pid_t serve(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = AGENT};
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	must(!bind(listener, (struct sockaddr *)&address, sizeof(address)), "bind");
	must(!listen(listener, 1), "listen");
	pid_t pid = fork();
	must(pid >= 0, "fork");
	if (pid) {
		close(listener);
		return pid;
	}
	int line = accept(listener, NULL, NULL);
	ssize_t ignored = send(line, parts[2], sizes[2], MSG_NOSIGNAL);
	shutdown(line, SHUT_WR);
	do
		ignored = read(line, output, sizeof(output));
	while (ignored > 0);
	_exit(0);
}

static void run(char *name, int out, int error)
{
	int in = memfd_create("stdin", 0);
	char *arguments[] = {name, NULL};

	must(write(in, parts[1], sizes[1]) == (ssize_t)sizes[1], "stdin");
	lseek(in, 0, SEEK_SET);
	must(dup2(in, 0) >= 0 && dup2(out, 1) >= 0 && dup2(error, 2) >= 0, "dup2");
	close(in);
	close(out);
	close(error);
	clearenv();
	for (uint32_t at = 0; at < sizes[0]; at += strlen(parts[0] + at) + 1)
		if (strchr(parts[0] + at, '='))
			putenv(parts[0] + at);
	alarm(TIMEOUT_S);
	exit(plugin_main(1, arguments));
}

int main(int count, char **arguments)
{
	must(count == 3, "harness DIRECTORY PLACES");
	int file = open(arguments[2], O_RDWR);
	places = mmap(NULL, PLACES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	must(places != MAP_FAILED, "mmap");
	must(!chroot(arguments[1]) && !chdir("/"), "chroot");
	while (take(sizes, sizeof(sizes))) {
		must(sizes[0] < PART_MAX && sizes[1] <= PART_MAX && sizes[2] <= PART_MAX, "sizes");
		for (int part = 0; part < 3; part++)
			if (!take(parts[part], sizes[part]))
				return 0;
		parts[0][sizes[0]] = 0;
		int out = memfd_create("stdout", 0), error = memfd_create("stderr", 0), status;
		pid_t agent = sizes[2] ? serve() : 0;
		pid_t child = fork();
		must(child >= 0, "fork");
		if (!child)
			run(arguments[0], out, error);
		must(waitpid(child, &status, 0) == child, "waitpid");
		if (agent) {
			kill(agent, SIGKILL);
			waitpid(agent, NULL, 0);
			unlink(AGENT);
		}
		give(&status, sizeof(status));
		give_file(out);
		give_file(error);
	}
	return 0;
}
