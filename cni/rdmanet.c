/*
 * rdmanet's CNI executable: hands one CNI call to the agent and its answer to the runtime.
 *
 * CNI specification 1.1.0. stdin holds the network configuration, CNI_* the parameters; stdout gets
 * the spec's result or error, once, and nothing else ever does. The agent is asked with POST
 * /v1/cni over a unix socket: stdin is the body, CNI_* are percent-encoded headers. VERSION needs
 * no agent. DEL without an agent is queued on disk (queue.h). Static, without allocation: hosts
 * have no more than a kernel in common.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>

#include "queue.h"

#define INPUT_SIZE_MAX	   (1024 * 1024)
#define HEAD_SIZE_MAX	   (40 * 1024)
#define VALUE_SIZE_MAX	   8000 /* of a header, encoded: aiohttp's bound is 8190 */
#define CONTAINER_ID_MAX   200	/* with the interface name it is a file name in the queue */
#define TIMEOUT_MS	   60000
#define STATUS_TIMEOUT_MS  10000 /* polled every few seconds: a hung agent shows soon */
#define QUEUE_TIMEOUT_MS   5000
#define DEFAULT_VERSION	   "1.1.0"
#define SUPPORTED_VERSIONS "\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\""

struct parameter {
	const char *name, *header, *value;
};

enum { CONTAINERID, NETNS, IFNAME, ARGS, PATH, PARAMETERS };

static struct parameter parameters[PARAMETERS] = {
	[CONTAINERID] = {"CNI_CONTAINERID", "CNI-ContainerID", ""},
	[NETNS] = {"CNI_NETNS", "CNI-NetNS", ""},
	[IFNAME] = {"CNI_IFNAME", "CNI-IfName", ""},
	[ARGS] = {"CNI_ARGS", "CNI-Args", ""},
	[PATH] = {"CNI_PATH", "CNI-Path", ""},
};

/* versions: index of the oldest version in supported[] that knows the command. */
static const struct command {
	const char *name;
	unsigned needs, since;
	bool result;
} commands[] = {
	{"ADD", 1U << CONTAINERID | 1U << NETNS | 1U << IFNAME, 0, true},
	{"DEL", 1U << CONTAINERID | 1U << IFNAME, 0, false},
	{"CHECK", 1U << CONTAINERID | 1U << NETNS | 1U << IFNAME, 1, false},
	{"GC", 0, 3, false},
	{"STATUS", 0, 3, false},
	{"VERSION", 0, 0, false},
};

static const char *const supported[] = {"0.3.1", "0.4.0", "1.0.0", "1.1.0"};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static char input[INPUT_SIZE_MAX], head_bytes[HEAD_SIZE_MAX];
static struct answer answer;
static struct queue queue;
static char version[64], socket_path[sizeof(((struct sockaddr_un *)0)->sun_path)],
	state_directory[2048];

/* Print the spec's error object (section 5 "Error"); the exit status for it. */
static int fail(enum cni_code code, const char *msg, const char *details)
{
	static char bytes[32 * 1024];
	struct text out = TEXT(bytes);

	put(&out, "{\"cniVersion\":");
	put_json_string(&out, version[0] ? version : DEFAULT_VERSION);
	put(&out, ",\"code\":");
	put_size(&out, code);
	put(&out, ",\"msg\":");
	put_json_string(&out, msg);
	put(&out, ",\"details\":");
	put_json_string(&out, details);
	put(&out, "}\n");
	write_all(STDOUT_FILENO, out.bytes, out.size);
	return 1;
}

/* Semantic Version 2.0 in shape: what may be echoed, and what can be compared at all. */
static bool is_version(const char *text)
{
	int part;

	for (part = 0; part < 3; part++) {
		if (*text < '0' || *text > '9')
			return false;
		/* Section 2 there: numbers have no leading zeros. */
		if (*text == '0' && text[1] >= '0' && text[1] <= '9')
			return false;
		while (*text >= '0' && *text <= '9')
			text++;
		if (part < 2 && *text++ != '.')
			return false;
	}
	if (*text && *text != '-' && *text != '+')
		return false;
	for (; *text; text++)
		if (!strchr("-+.", *text) && !(*text >= '0' && *text <= '9') &&
		    !((*text | 0x20) >= 'a' && (*text | 0x20) <= 'z'))
			return false;
	return true;
}

static bool is_alphanumeric(char c)
{
	return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z');
}

/* Section 2 "Parameters": what CNI_CONTAINERID may look like. */
static bool is_container_id(const char *id)
{
	const char *at;

	if (!is_alphanumeric(*id))
		return false;
	for (at = id; *at; at++)
		if (!is_alphanumeric(*at) && !strchr("_.-", *at))
			return false;
	return at - id <= CONTAINER_ID_MAX;
}

/*
 * What Linux allows as a device's name (dev_valid_name in net/core/dev.c), in ASCII, and takes as
 * it is: of one with %d it makes another.
 */
static bool is_interface_name(const char *name)
{
	const char *at;

	if (!strcmp(name, ".") || !strcmp(name, ".."))
		return false;
	for (at = name; *at; at++)
		if (*at <= ' ' || *at > '~' || strchr("/:%", *at))
			return false;
	return at > name && at - name <= 15;
}

/* Percent-encode (RFC 3986) what a header cannot carry; safe says which printable bytes stay as
 * they are. */
static void put_encoded(struct text *out, const char *value, const char *unsafe)
{
	char escape[4];

	for (; *value; value++) {
		if (*value > ' ' && *value <= '~' && !strchr(unsafe, *value)) {
			put_byte(out, *value);
		} else {
			snprintf(escape, sizeof(escape), "%%%02X", (unsigned char)*value);
			put(out, escape);
		}
	}
}

static void put_header(struct text *out, const char *name, const char *value)
{
	put(out, name);
	put(out, ": ");
	put_encoded(out, value, "%");
	put(out, "\r\n");
}

/* Read CNI_* into parameters. False after the error was printed, with every wrong variable's name
 * in it. */
static bool read_environment(const struct command *command)
{
	static char bytes[VALUE_SIZE_MAX];
	char missing[512] = "", msg[sizeof(missing) + 64];
	struct text list = {.bytes = missing, .room = sizeof(missing) - 1};
	int i;

	for (i = 0; i < PARAMETERS; i++) {
		const char *value = getenv(parameters[i].name);
		struct text encoded = TEXT(bytes);

		parameters[i].value = value ? value : "";
		put_encoded(&encoded, parameters[i].value, "%");
		if ((command->needs & 1U << i && !*parameters[i].value) || encoded.full) {
			put(&list, list.size ? ", " : "");
			put(&list, parameters[i].name);
			put(&list, encoded.full ? " (too long)" : " (missing)");
		}
	}
	if ((command->needs & 1U << CONTAINERID) && *parameters[CONTAINERID].value &&
	    !is_container_id(parameters[CONTAINERID].value)) {
		put(&list, list.size ? ", " : "");
		put(&list, "CNI_CONTAINERID (not a letter or digit followed by at most 199 of "
			   "those, _ . and -)");
	}
	if ((command->needs & 1U << IFNAME) && *parameters[IFNAME].value &&
	    !is_interface_name(parameters[IFNAME].value)) {
		put(&list, list.size ? ", " : "");
		put(&list, "CNI_IFNAME (not 1 to 15 printable characters without /, : and %)");
	}
	if (!list.size)
		return true;
	missing[list.size] = '\0';
	snprintf(msg, sizeof(msg), "Environment variables are missing or invalid: %s", missing);
	fail(CNI_INVALID_ENVIRONMENT, msg, "");
	return false;
}

/* Version, socket and state directory from the network configuration. 0, or the exit status after
 * an error. */
static int read_configuration(const struct command *command, size_t size)
{
	struct json_key keys[] = {
		{.name = "cniVersion", .value = version, .room = sizeof(version)},
		{.name = "socket", .value = socket_path, .room = sizeof(socket_path)},
		{.name = "stateDir", .value = state_directory, .room = sizeof(state_directory)},
	};
	struct json_reader reader;
	char details[256];
	size_t i;

	if (!json_read(&reader, input, size, keys, COUNT(keys))) {
		version[0] = '\0';
		snprintf(details, sizeof(details), "At byte %td of standard input: %s.",
			 reader.at - reader.start, reader.problem);
		return fail(CNI_DECODING_FAILURE, "The network configuration is not a JSON object",
			    details);
	}
	if (keys[0].kind != JSON_ABSENT && (keys[0].kind != JSON_STRING || !is_version(version))) {
		version[0] = '\0';
		return fail(CNI_DECODING_FAILURE,
			    "The network configuration's cniVersion is not a version",
			    "Write it as a string such as \"1.0.0\".");
	}
	if (keys[0].kind == JSON_ABSENT)
		version[0] = '\0';
	if (!strcmp(command->name, "VERSION"))
		return 0;
	for (i = 0; i < COUNT(supported) && strcmp(version, supported[i]) != 0; i++)
		;
	if (i == COUNT(supported) || i < command->since) {
		snprintf(details, sizeof(details), "cniVersion is %s; %s needs %s%s.",
			 version[0] ? version : "missing", command->name, supported[command->since],
			 command->since + 1 < COUNT(supported) ? " or a later one up to 1.1.0"
							       : "");
		return fail(CNI_INCOMPATIBLE_VERSION, "Incompatible CNI version", details);
	}
	for (i = 1; i < COUNT(keys); i++) {
		if (keys[i].kind == JSON_ABSENT)
			continue;
		if (keys[i].kind == JSON_STRING && keys[i].value[0] == '/')
			continue;
		snprintf(details, sizeof(details),
			 "\"%s\" must be an absolute path of at most %zu bytes.", keys[i].name,
			 keys[i].room - 1);
		return fail(CNI_INVALID_CONFIG, "The network configuration is not valid", details);
	}
	if (keys[1].kind == JSON_ABSENT)
		strcpy(socket_path, AGENT_SOCKET);
	if (keys[2].kind == JSON_ABSENT)
		strcpy(state_directory, STATE_DIRECTORY);
	return 0;
}

static int print_version(void)
{
	char bytes[256];
	struct text out = TEXT(bytes);

	put(&out, "{\"cniVersion\":");
	put_json_string(&out, version[0] ? version : DEFAULT_VERSION);
	put(&out, ",\"supportedVersions\":[" SUPPORTED_VERSIONS "]}\n");
	return write_all(STDOUT_FILENO, out.bytes, out.size) ? 0 : 1;
}

static struct request build_request(const struct command *command, size_t input_size)
{
	struct text head = TEXT(head_bytes);
	int i;

	put(&head, "POST /v1/cni HTTP/1.1\r\nHost: rdmanet\r\nContent-Type: application/json\r\n"
		   "Connection: close\r\nContent-Length: ");
	put_size(&head, input_size);
	put(&head, "\r\n");
	put_header(&head, "CNI-Command", command->name);
	for (i = 0; i < PARAMETERS; i++)
		if (*parameters[i].value)
			put_header(&head, parameters[i].header, parameters[i].value);
	put(&head, "\r\n");
	return (struct request){
		.head = head.bytes, .head_size = head.size, .body = input, .body_size = input_size};
}

static int print_answer(void)
{
	if (!write_all(STDOUT_FILENO, answer.body, answer.body_size))
		return 1;
	return answer.status == 200 ? 0 : 1;
}

static int fail_without_agent(enum cni_code code)
{
	char msg[sizeof(answer.why) + sizeof(socket_path) + 64];

	snprintf(msg, sizeof(msg), "The rdmanet agent does not answer on %s: %s", socket_path,
		 answer.why);
	return fail(code, msg,
		    "Start the agent, or set \"socket\" in the network configuration to the socket "
		    "on which it "
		    "listens; `rdmanet doctor` says what this host lacks.");
}

/*
 * DEL with the agent away. The agent listens first and then drains the queue under the lock, so
 * under the lock either it accepts a connection, or it will find what is stored now.
 */
static int queue_delete(const struct request *request, long long deadline_ms)
{
	char name_bytes[256];
	struct text name = {.bytes = name_bytes, .room = sizeof(name_bytes) - 1};
	int fd;

	put(&name, parameters[CONTAINERID].value);
	put_byte(&name, '@');
	put_encoded(&name, parameters[IFNAME].value, "%/");
	name_bytes[name.size] = '\0';
	if (!queue_open(&queue, state_directory, now_ms() + QUEUE_TIMEOUT_MS)) {
		queue_close(&queue);
		return fail(queue.code, "The DEL cannot be queued while the agent is away",
			    queue.why);
	}
	fd = left_ms(deadline_ms) ? agent_connect(socket_path, &answer, deadline_ms) : -1;
	if (fd >= 0) {
		/* Holding the lock while the agent works would stop its own draining. */
		queue_close(&queue);
		if (agent_exchange(fd, request, &answer, false, deadline_ms))
			return print_answer();
		if (!queue_open(&queue, state_directory, now_ms() + QUEUE_TIMEOUT_MS)) {
			queue_close(&queue);
			return fail(queue.code, "The DEL cannot be queued while the agent is away",
				    queue.why);
		}
	}
	if (!queue_store(&queue, name_bytes, request)) {
		queue_close(&queue);
		return fail(queue.code, "The DEL cannot be queued while the agent is away",
			    queue.why);
	}
	queue_close(&queue);
	return 0;
}

static int call_agent(const struct command *command, size_t input_size, long long deadline_ms)
{
	struct request request = build_request(command, input_size);
	int fd = agent_connect(socket_path, &answer, deadline_ms);

	if (fd >= 0 && agent_exchange(fd, &request, &answer, command->result, deadline_ms))
		return print_answer();
	if (!strcmp(command->name, "DEL"))
		return queue_delete(&request, deadline_ms);
	return fail_without_agent(strcmp(command->name, "STATUS") ? CNI_TRY_AGAIN_LATER
								  : CNI_PLUGIN_NOT_AVAILABLE);
}

/* RDMANET_CNI_TIMEOUT_S bounds the whole call, in seconds; 0 when it is not a number from 1 to 600.
 */
static long timeout_ms(const struct command *command)
{
	const char *text = getenv("RDMANET_CNI_TIMEOUT_S");
	char *end;
	long seconds;

	if (!text)
		return strcmp(command->name, "STATUS") ? TIMEOUT_MS : STATUS_TIMEOUT_MS;
	if (*text < '0' || *text > '9')
		return 0;
	errno = 0;
	seconds = strtol(text, &end, 10);
	return errno || *end || seconds < 1 || seconds > 600 ? 0 : seconds * 1000;
}

int main(void)
{
	const char *name = getenv("CNI_COMMAND");
	const struct command *command = NULL;
	long long deadline_ms;
	size_t i, blank;
	ssize_t size;
	int fd, status;

	/* A closed standard descriptor would be given to the socket, and the answer written into
	 * it. */
	for (fd = 0; fd <= STDERR_FILENO; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
			return 1;
	signal(SIGPIPE, SIG_IGN);
	for (i = 0; i < COUNT(commands); i++)
		if (name && !strcmp(name, commands[i].name))
			command = &commands[i];
	if (!command)
		return fail(CNI_INVALID_ENVIRONMENT, "CNI_COMMAND is missing or unknown",
			    "This is a CNI plugin for a container runtime to execute; CNI_COMMAND "
			    "is one of ADD, DEL, "
			    "CHECK, GC, STATUS and VERSION.");
	if (!timeout_ms(command))
		return fail(CNI_INVALID_ENVIRONMENT, "RDMANET_CNI_TIMEOUT_S is invalid",
			    "It is a whole number of seconds from 1 to 600.");
	deadline_ms = now_ms() + timeout_ms(command);
	size = read_all(STDIN_FILENO, input, sizeof(input), deadline_ms);
	if (size < 0)
		return fail(CNI_IO_FAILURE,
			    "The network configuration cannot be read from standard input",
			    errno == EFBIG ? "It has more than 1 MiB." : strerror(errno));
	for (blank = 0; blank < (size_t)size && strchr(" \t\r\n", input[blank]) && input[blank];
	     blank++)
		;
	if (blank == (size_t)size && !strcmp(command->name, "VERSION"))
		return print_version();
	status = read_configuration(command, (size_t)size);
	if (status)
		return status;
	if (!strcmp(command->name, "VERSION"))
		return print_version();
	if (!read_environment(command))
		return 1;
	return call_agent(command, (size_t)size, deadline_ms);
}
