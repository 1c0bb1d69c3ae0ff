/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * ICMP errors about a flow: they travel against the packet that they quote, so the entry of that
 * direction says how to rewrite them, outside and, mirrored, inside (RFC 5508 section 4).
 */
#pragma once

#include "syn.h"

/* Bytes of the packet's own data; padding behind it is none. 0 or negative. */
static __always_inline long load_data(struct __sk_buff *skb, const struct packet *p, __u32 off,
				      void *to, __u32 len)
{
	if (off + len > (__u32)p->l4 + p->l4_len)
		return -1;
	return bpf_skb_load_bytes(skb, off, to, len);
}

static __always_inline bool is_extension(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	       next == IPPROTO_FRAGMENT || next == IPPROTO_AH;
}

/* Finds what the quoted IPv6 packet carries behind its extension headers. 0, or -1 where it says too little. */
__noinline int quoted_upper(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct quoted *in;

	if (!s)
		return -1;
	in = &s->quoted;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 ext[4]; /* next header, length; of a fragment the offset */

		if (!is_extension(in->p.proto))
			return 0;
		if (load_data(skb, &s->packet, in->l4, ext, sizeof(ext)))
			return -1;
		if (in->p.proto == IPPROTO_FRAGMENT) {
			if (ext[2] || ext[3] & 0xf8) /* not the first: no ports in it */
				return -1;
			in->l4 += 8;
		} else if (in->p.proto == IPPROTO_AH) {
			in->l4 += (ext[1] + 2) * 4;
		} else {
			in->l4 += (ext[1] + 1) * 8;
		}
		in->p.proto = ext[0];
	}
	return is_extension(in->p.proto) ? -1 : 0;
}

/*
 * Reads the quoted packet, as its sender sent it. 0, or -1 where it says too little or was not sent by
 * whom the error goes to.
 */
static __always_inline int parse_quoted(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	const struct packet *p = &s->packet;
	struct quoted *in = &s->quoted;
	struct packet *q = &in->p;
	__be16 ports[2] = {};
	__u8 type;
	int off;

	__builtin_memset(q, 0, sizeof(*q));
	in->l3 = p->l4 + 8;
	if (v6) {
		struct ipv6hdr ip;

		if (load_data(skb, p, in->l3, &ip, sizeof(ip)) || ip.version != 6)
			return -1;
		__builtin_memcpy(&q->saddr, &ip.saddr, sizeof(q->saddr));
		__builtin_memcpy(&q->daddr, &ip.daddr, sizeof(q->daddr));
		q->proto = ip.nexthdr;
		in->l4 = in->l3 + sizeof(ip);
		if (quoted_upper(skb))
			return -1;
	} else {
		struct iphdr ip;

		if (load_data(skb, p, in->l3, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5 ||
		    ip.frag_off & bpf_htons(IP_FRAGMENT_OFFSET))
			return -1;
		addr_from_v4(&q->saddr, ip.saddr);
		addr_from_v4(&q->daddr, ip.daddr);
		q->proto = ip.protocol;
		in->l4 = in->l3 + ip.ihl * 4;
	}
	if (!addr_equal(&p->daddr, &q->saddr))
		return -1;
	in->check = 0;
	if (q->proto == IPPROTO_TCP || q->proto == IPPROTO_UDP || q->proto == IPPROTO_SCTP) {
		if (load_data(skb, p, in->l4, ports, sizeof(ports)))
			return -1;
		q->sport = ports[0];
		q->dport = ports[1];
	} else if (q->proto == (v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
		if (load_data(skb, p, in->l4, &type, 1) || load_data(skb, p, in->l4 + 4, ports, 2))
			return -1;
		if (type == (v6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO))
			q->sport = ports[0];
		else if (type == (v6 ? ICMPV6_ECHO_REPLY : ICMP_ECHOREPLY))
			q->dport = ports[0];
	}
	off = csum_offset(q->proto, v6);
	if (off >= 0 && !load_data(skb, p, in->l4 + off, &in->sum, 2) &&
	    !(q->proto == IPPROTO_UDP && !in->sum))
		in->check = in->l4 + off;
	return 0;
}

/*
 * The entry for the direction that the error travels in; NULL: it is about none of our flows. One about a
 * connection of the world's that waits yet travels as its answers would.
 */
static __always_inline struct flow *quoted_flow(struct scratch *s, enum hook hook, const bool v6)
{
	const struct packet *q = &s->quoted.p;
	void *key = v6 ? (void *)&s->key6 : (void *)&s->key4;
	struct flow *f;

	if (v6)
		flow_key6(&s->key6, &q->daddr, &q->saddr, q->dport, q->sport, q->proto, hook);
	else
		flow_key4(&s->key4, &q->daddr, &q->saddr, q->dport, q->sport, q->proto, hook);
	f = bpf_map_lookup_elem(flow_table(v6), key);
	return f || hook != HOOK_CONTAINER ? f : bpf_map_lookup_elem(syn_table(v6), key);
}

/* Stores a 16-bit word of the error's body and mends the ICMP checksum. 0 or -errno, as all of these. */
static __always_inline long put16(struct __sk_buff *skb, __u32 sum, __u32 off, __be16 from,
				  __be16 to)
{
	if (from == to)
		return 0;
	return bpf_skb_store_bytes(skb, off, &to, 2, 0) |
	       bpf_l4_csum_replace(skb, sum, from, to, 2);
}

static __always_inline long put32(struct __sk_buff *skb, __u32 sum, __u32 off, __be32 from,
				  __be32 to)
{
	if (from == to)
		return 0;
	return bpf_skb_store_bytes(skb, off, &to, 4, 0) |
	       bpf_l4_csum_replace(skb, sum, from, to, 4);
}

static __always_inline long put_outer(struct __sk_buff *skb, const struct packet *p, __u32 sum,
				      bool source, const struct addr *from, const struct addr *to,
				      const bool v6)
{
	__u32 off = p->l3;
	__u64 diff = 0;

	if (addr_equal(from, to))
		return 0;
	if (v6) {
		off += source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr);
		for (int i = 0; i < 4; i++)
			diff = csum_change(diff, from->w[i], to->w[i]);
		return bpf_skb_store_bytes(skb, off, to, sizeof(*to), 0) |
		       l4_csum_change(skb, sum, csum_fold32(diff), BPF_F_PSEUDO_HDR, true);
	}
	off += source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr);
	return bpf_l3_csum_replace(skb, p->l3 + offsetof(struct iphdr, check), from->w[3], to->w[3],
				   4) |
	       bpf_skb_store_bytes(skb, off, &to->w[3], 4, 0);
}

/*
 * Rewrites an error that travels along f. The outer source changes only where it is the quoted
 * packet's receiver or hide is set; a router on the way keeps its own. 0, or the packet is spoiled.
 */
static __always_inline long icmp_rewrite_of(struct __sk_buff *skb, struct scratch *s,
					    const struct flow *f, bool hide, const bool v6)
{
	const struct packet *p = &s->packet;
	struct quoted *in = &s->quoted;
	const struct packet *q = &in->p;
	__u32 sum = p->l4 + offsetof(struct icmp_header, check);
	__u64 addresses = 0, ports = 0;
	long err = 0;

	if (v6) {
		in->saddr = ((const struct flow6 *)f)->daddr;
		in->daddr = ((const struct flow6 *)f)->saddr;
	} else {
		addr_from_v4(&in->saddr, ((const struct flow4 *)f)->daddr);
		addr_from_v4(&in->daddr, ((const struct flow4 *)f)->saddr);
	}
	for (int i = 0; i < 4; i++) {
		addresses = csum_change(addresses, q->saddr.w[i], in->saddr.w[i]);
		addresses = csum_change(addresses, q->daddr.w[i], in->daddr.w[i]);
	}
	ports = csum_change(ports, q->sport, f->dport);
	ports = csum_change(ports, q->dport, f->sport);
	if (v6) {
		/* Verifiers before Linux 6.4 take no loop that is entered by falling through. */
#pragma unroll
		for (int i = 0; i < 4; i++) {
			err |= put32(skb, sum, in->l3 + offsetof(struct ipv6hdr, saddr) + 4 * i,
				     q->saddr.w[i], in->saddr.w[i]);
			err |= put32(skb, sum, in->l3 + offsetof(struct ipv6hdr, daddr) + 4 * i,
				     q->daddr.w[i], in->daddr.w[i]);
		}
	} else {
		__sum16 check;

		err |= put32(skb, sum, in->l3 + offsetof(struct iphdr, saddr), q->saddr.w[3],
			     in->saddr.w[3]);
		err |= put32(skb, sum, in->l3 + offsetof(struct iphdr, daddr), q->daddr.w[3],
			     in->daddr.w[3]);
		if (!bpf_skb_load_bytes(skb, in->l3 + offsetof(struct iphdr, check), &check, 2))
			err |= put16(skb, sum, in->l3 + offsetof(struct iphdr, check), check,
				     csum_apply(check, csum_fold32(addresses)));
	}
	if (q->proto == IPPROTO_TCP || q->proto == IPPROTO_UDP) {
		err |= put16(skb, sum, in->l4, q->sport, f->dport);
		err |= put16(skb, sum, in->l4 + 2, q->dport, f->sport);
	} else if (q->sport != f->dport) {
		err |= put16(skb, sum, in->l4 + 4, q->sport, f->dport);
	} else if (q->dport != f->sport) {
		err |= put16(skb, sum, in->l4 + 4, q->dport, f->sport);
	}
	if (in->check) {
		__u64 diff = ports;
		__sum16 check;

		if (v6 || q->proto != IPPROTO_ICMP)
			diff += addresses;
		check = csum_apply(in->sum, csum_fold32(diff));
		if (!check && q->proto == IPPROTO_UDP)
			check = 0xffff; /* zero would say that there is none */
		err |= put16(skb, sum, in->check, in->sum, check);
	}
	err |= put_outer(skb, p, sum, false, &p->daddr, &in->saddr, v6);
	if (hide || addr_equal(&p->saddr, &q->daddr))
		err |= put_outer(skb, p, sum, true, &p->saddr, &in->daddr, v6);
	return err;
}

__noinline int icmp_rewrite4(struct __sk_buff *skb, struct flow4 *f, bool hide)
{
	struct scratch *s = scratch_get();

	return s && f ? icmp_rewrite_of(skb, s, &f->f, hide, false) : -EINVAL;
}

__noinline int icmp_rewrite6(struct __sk_buff *skb, struct flow6 *f, bool hide)
{
	struct scratch *s = scratch_get();

	return s && f ? icmp_rewrite_of(skb, s, &f->f, hide, true) : -EINVAL;
}

static __always_inline int icmp_rewrite(struct __sk_buff *skb, struct flow *f, bool hide,
					const bool v6)
{
	return v6 ? icmp_rewrite6(skb, (struct flow6 *)f, hide) :
		    icmp_rewrite4(skb, (struct flow4 *)f, hide);
}
