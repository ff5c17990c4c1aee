/* SPDX-License-Identifier: GPL-2.0 */
/* The address key: one key type for both IP families in every map. */

/*
 * IPv6 as it is, IPv4 mapped (RFC 4291 2.5.5.2), exactly as a RoCE GID is written; network byte
 * order.
 */
struct address_key {
	__be32 word[4];
};

static __always_inline bool address_equal(const struct address_key *a, const struct address_key *b)
{
	return !((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) |
		 (a->word[3] ^ b->word[3]));
}

static __always_inline void copy_address(struct address_key *to, const __be32 *from)
{
	to->word[0] = from[0];
	to->word[1] = from[1];
	to->word[2] = from[2];
	to->word[3] = from[3];
}

static __always_inline bool address_is_zero(const struct address_key *a)
{
	return !(a->word[0] | a->word[1] | a->word[2] | a->word[3]);
}

static __always_inline bool address_is_mapped(const struct address_key *a)
{
	return !(a->word[0] | a->word[1]) && a->word[2] == bpf_htonl(0xffff);
}

static __always_inline void address_map(struct address_key *key, __be32 ipv4)
{
	key->word[0] = 0;
	key->word[1] = 0;
	key->word[2] = bpf_htonl(0xffff);
	key->word[3] = ipv4;
}

/* Multicast and the limited broadcast: what no single endpoint can be. */
static __always_inline bool address_is_group(const struct address_key *a)
{
	__u32 first;

	if (!address_is_mapped(a))
		return (bpf_ntohl(a->word[0]) >> 24) == 0xff;
	first = bpf_ntohl(a->word[3]);
	return (first >> 28) == 0xe || first == 0xffffffff;
}

/*
 * Addresses that mean something on one host or link only and are never routed (RFC 6890):
 * unspecified, loopback and link-local ones. For IPv6 mapped addresses as well: on the wire they
 * would meet the map key of an IPv4 endpoint.
 */
static __always_inline bool address_is_local_scope(const struct address_key *a, __u8 family)
{
	__u32 first = bpf_ntohl(a->word[0]);

	if (family == 4) {
		first = bpf_ntohl(a->word[3]);
		return (first >> 24) == 0 || (first >> 24) == 127 || (first >> 16) == 0xa9fe;
	}
	if (!(a->word[0] | a->word[1]))
		return address_is_mapped(a) || (!a->word[2] && bpf_ntohl(a->word[3]) <= 1);
	return (first >> 22) == (0xfe800000 >> 22);
}
