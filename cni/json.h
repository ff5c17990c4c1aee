/*
 * A bounded reader of JSON (RFC 8259) for the CNI executable: checks the whole text and copies out
 * the string values of a few top-level keys. No allocation; nesting is bounded, so recursion is. A
 * key given twice counts with its last value, as in the agent.
 */
#ifndef RDMANET_CNI_JSON_H
#define RDMANET_CNI_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define JSON_DEPTH_MAX 64

enum json_kind {
	JSON_ABSENT,
	JSON_STRING,
	JSON_TOO_LONG, /* a string that does not fit, or one with a NUL in it */
	JSON_OTHER,    /* present, but not a string */
};

struct json_key {
	const char *name;
	char *value; /* NUL-terminated when kind is JSON_STRING */
	size_t room; /* bytes at value */
	enum json_kind kind;
};

struct json_reader {
	const unsigned char *start, *at, *end;
	const char *problem; /* NULL while all is well */
	struct json_key *keys;
	size_t key_count;
};

/* Where a decoded string goes: bytes beyond room are counted, not stored. */
struct json_text {
	char *bytes;
	size_t room, length;
	bool has_nul;
};

static bool json_fail(struct json_reader *r, const char *problem)
{
	if (!r->problem)
		r->problem = problem;
	return false;
}

static bool json_more(const struct json_reader *r, unsigned char byte)
{
	return r->at < r->end && *r->at == byte;
}

static void json_space(struct json_reader *r)
{
	while (r->at < r->end &&
	       (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r'))
		r->at++;
}

/* Length in bytes of the UTF-8 sequence (RFC 3629) at the given place, 0 where there is none. */
static size_t utf8_length(const unsigned char *at, const unsigned char *end)
{
	size_t length, i;
	unsigned char low = 0x80, high = 0xbf;

	if (at >= end)
		return 0;
	if (*at < 0x80)
		return 1;
	if (*at >= 0xc2 && *at <= 0xdf)
		length = 2;
	else if (*at >= 0xe0 && *at <= 0xef)
		length = 3;
	else if (*at >= 0xf0 && *at <= 0xf4)
		length = 4;
	else
		return 0;
	/* Over-long forms, surrogates and what lies beyond U+10FFFF show in the second byte. */
	if (*at == 0xe0)
		low = 0xa0;
	else if (*at == 0xed)
		high = 0x9f;
	else if (*at == 0xf0)
		low = 0x90;
	else if (*at == 0xf4)
		high = 0x8f;
	if ((size_t)(end - at) < length || at[1] < low || at[1] > high)
		return 0;
	for (i = 2; i < length; i++)
		if (at[i] < 0x80 || at[i] > 0xbf)
			return 0;
	return length;
}

static void json_put(struct json_text *text, unsigned char byte)
{
	if (!text)
		return;
	if (text->length < text->room)
		text->bytes[text->length] = (char)byte;
	text->length++;
	if (byte == 0)
		text->has_nul = true;
}

static void json_put_point(struct json_text *text, uint32_t point)
{
	if (point < 0x80) {
		json_put(text, (unsigned char)point);
	} else if (point < 0x800) {
		json_put(text, (unsigned char)(0xc0 | point >> 6));
		json_put(text, (unsigned char)(0x80 | (point & 0x3f)));
	} else if (point < 0x10000) {
		json_put(text, (unsigned char)(0xe0 | point >> 12));
		json_put(text, (unsigned char)(0x80 | (point >> 6 & 0x3f)));
		json_put(text, (unsigned char)(0x80 | (point & 0x3f)));
	} else {
		json_put(text, (unsigned char)(0xf0 | point >> 18));
		json_put(text, (unsigned char)(0x80 | (point >> 12 & 0x3f)));
		json_put(text, (unsigned char)(0x80 | (point >> 6 & 0x3f)));
		json_put(text, (unsigned char)(0x80 | (point & 0x3f)));
	}
}

static bool json_hex4(struct json_reader *r, uint32_t *unit)
{
	int i;

	*unit = 0;
	for (i = 0; i < 4; i++, r->at++) {
		unsigned char c = r->at < r->end ? *r->at : 0;

		if (c >= '0' && c <= '9')
			*unit = *unit << 4 | (uint32_t)(c - '0');
		else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f')
			*unit = *unit << 4 | (uint32_t)((c | 0x20) - 'a' + 10);
		else
			return json_fail(r, "\\u needs four hexadecimal digits");
	}
	return true;
}

static bool json_escape(struct json_reader *r, struct json_text *text)
{
	static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
	unsigned char c = r->at < r->end ? *r->at : 0;
	const char *found = c ? strchr(names, c) : NULL;
	uint32_t unit, low;

	if (found) {
		r->at++;
		json_put(text, (unsigned char)values[found - names]);
		return true;
	}
	if (c != 'u')
		return json_fail(r, "unknown escape in a string");
	r->at++;
	if (!json_hex4(r, &unit))
		return false;
	if (unit >= 0xd800 && unit <= 0xdfff) {
		if (unit >= 0xdc00 || r->end - r->at < 2 || r->at[0] != '\\' || r->at[1] != 'u')
			return json_fail(r, "half of a surrogate pair");
		r->at += 2;
		if (!json_hex4(r, &low))
			return false;
		if (low < 0xdc00 || low > 0xdfff)
			return json_fail(r, "half of a surrogate pair");
		unit = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
	}
	json_put_point(text, unit);
	return true;
}

static bool json_string(struct json_reader *r, struct json_text *text)
{
	size_t length;

	if (!json_more(r, '"'))
		return json_fail(r, "a string is expected");
	r->at++;
	while (r->at < r->end && *r->at != '"') {
		if (*r->at == '\\') {
			r->at++;
			if (!json_escape(r, text))
				return false;
			continue;
		}
		if (*r->at < 0x20)
			return json_fail(r, "control character in a string");
		length = utf8_length(r->at, r->end);
		if (!length)
			return json_fail(r, "a string is not UTF-8");
		for (; length; length--)
			json_put(text, *r->at++);
	}
	if (r->at >= r->end)
		return json_fail(r, "a string does not end");
	r->at++;
	return true;
}

static bool json_digits(struct json_reader *r)
{
	const unsigned char *first = r->at;

	while (r->at < r->end && *r->at >= '0' && *r->at <= '9')
		r->at++;
	return r->at > first || json_fail(r, "a digit is expected");
}

static bool json_number(struct json_reader *r)
{
	if (json_more(r, '-'))
		r->at++;
	if (json_more(r, '0'))
		r->at++;
	else if (!json_digits(r))
		return false;
	if (json_more(r, '.')) {
		r->at++;
		if (!json_digits(r))
			return false;
	}
	if (json_more(r, 'e') || json_more(r, 'E')) {
		r->at++;
		if (json_more(r, '+') || json_more(r, '-'))
			r->at++;
		return json_digits(r);
	}
	return true;
}

static bool json_word(struct json_reader *r, const char *word)
{
	size_t length = strlen(word);

	if ((size_t)(r->end - r->at) < length || memcmp(r->at, word, length) != 0)
		return json_fail(r, "a value is expected");
	r->at += length;
	return true;
}

static bool json_value(struct json_reader *r, int depth, struct json_key *key);

static struct json_key *json_find_key(struct json_reader *r, const struct json_text *name)
{
	size_t i;

	if (name->length > name->room)
		return NULL;
	for (i = 0; i < r->key_count; i++)
		if (strlen(r->keys[i].name) == name->length &&
		    memcmp(r->keys[i].name, name->bytes, name->length) == 0)
			return &r->keys[i];
	return NULL;
}

static bool json_object(struct json_reader *r, int depth)
{
	char name_bytes[32];

	r->at++;
	json_space(r);
	if (json_more(r, '}')) {
		r->at++;
		return true;
	}
	for (;;) {
		struct json_text name = {.bytes = name_bytes, .room = sizeof(name_bytes)};

		json_space(r);
		if (!json_string(r, &name))
			return false;
		json_space(r);
		if (!json_more(r, ':'))
			return json_fail(r, "':' is expected");
		r->at++;
		if (!json_value(r, depth, depth == 1 ? json_find_key(r, &name) : NULL))
			return false;
		json_space(r);
		if (json_more(r, '}')) {
			r->at++;
			return true;
		}
		if (!json_more(r, ','))
			return json_fail(r, "',' or '}' is expected");
		r->at++;
	}
}

static bool json_array(struct json_reader *r, int depth)
{
	r->at++;
	json_space(r);
	if (json_more(r, ']')) {
		r->at++;
		return true;
	}
	for (;;) {
		if (!json_value(r, depth, NULL))
			return false;
		json_space(r);
		if (json_more(r, ']')) {
			r->at++;
			return true;
		}
		if (!json_more(r, ','))
			return json_fail(r, "',' or ']' is expected");
		r->at++;
	}
}

static bool json_value(struct json_reader *r, int depth, struct json_key *key)
{
	json_space(r);
	if (key)
		key->kind = JSON_OTHER;
	if (depth >= JSON_DEPTH_MAX)
		return json_fail(r, "nested too deeply");
	switch (r->at < r->end ? *r->at : 0) {
	case '{':
		return json_object(r, depth + 1);
	case '[':
		return json_array(r, depth + 1);
	case 't':
		return json_word(r, "true");
	case 'f':
		return json_word(r, "false");
	case 'n':
		return json_word(r, "null");
	case '"':
		if (key) {
			struct json_text text = {.bytes = key->value, .room = key->room - 1};

			if (!json_string(r, &text))
				return false;
			key->kind = text.length > text.room || text.has_nul ? JSON_TOO_LONG
									    : JSON_STRING;
			key->value[key->kind == JSON_STRING ? text.length : 0] = '\0';
			return true;
		}
		return json_string(r, NULL);
	default:
		if (r->at < r->end && (*r->at == '-' || (*r->at >= '0' && *r->at <= '9')))
			return json_number(r);
		return json_fail(r, "a value is expected");
	}
}

/* Read one JSON object. False when the text is anything else: problem and at then say what and
 * where. */
static bool json_read(struct json_reader *r, const void *text, size_t length, struct json_key *keys,
		      size_t key_count)
{
	size_t i;

	r->start = r->at = text;
	r->end = r->start + length;
	r->problem = NULL;
	r->keys = keys;
	r->key_count = key_count;
	for (i = 0; i < key_count; i++)
		keys[i].kind = JSON_ABSENT;
	json_space(r);
	if (!json_more(r, '{'))
		return json_fail(r, "an object is expected");
	if (!json_value(r, 0, NULL))
		return false;
	json_space(r);
	return r->at == r->end || json_fail(r, "something follows the object");
}

#endif
