/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Stage 3, NAT: rewriting, and the choice of masquerade ports. Checksums change by the difference
 * of what was rewritten, so a wrong one stays wrong by as much (RFC 1624), and a partial one partial.
 */
#pragma once

#include "flow.h"

#ifndef BPF_F_IPV6
#define BPF_F_IPV6 (1ULL << 7) /* since Linux 6.16: keeps CHECKSUM_COMPLETE right */
#endif

/* One's complement sum of a 32-bit word, kept in 64 bits; fold with csum_fold32(). */
static __always_inline __u64 csum_change(__u64 sum, __u32 from, __u32 to)
{
	return sum + (__u32)~from + to;
}

static __always_inline __u32 csum_fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return sum;
}

static __always_inline __u16 csum_fold16(__u64 sum)
{
	sum = csum_fold32(sum);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* A checksum field after its data changed by diff (RFC 1624, equation 3). */
static __always_inline __sum16 csum_apply(__sum16 check, __u32 diff)
{
	return ~csum_fold16((__u64)(__u16)~check + diff);
}

/* Offset of the L4 checksum in its header; -1 where the protocol has none that NAT touches. */
static __always_inline int csum_offset(__u8 proto, const bool v6)
{
	switch (proto) {
	case IPPROTO_TCP:
		return offsetof(struct tcphdr, check);
	case IPPROTO_UDP:
		return offsetof(struct udphdr, check);
	case IPPROTO_ICMP:
		return v6 ? -1 : (int)offsetof(struct icmp_header, check);
	case IPPROTO_ICMPV6:
		return v6 ? (int)offsetof(struct icmp_header, check) : -1;
	}
	return -1;
}

static __always_inline long l4_csum_change(struct __sk_buff *skb, __u32 off, __u32 diff,
					   __u64 flags, const bool v6)
{
	if (v6 && (flags & BPF_F_PSEUDO_HDR) &&
	    !bpf_l4_csum_replace(skb, off, 0, diff, flags | BPF_F_IPV6))
		return 0;
	return bpf_l4_csum_replace(skb, off, 0, diff, flags);
}

/*
 * Writes what the flow entry says into the packet: addresses, ports or identifier, and the TTL one
 * lower where hop is set. Packet pointers are stale afterwards. 0 or -REASON.
 */
static __always_inline int nat_rewrite(struct __sk_buff *skb, const struct packet *p,
				       const struct flow *f, bool hop, const bool v6)
{
	/* open: what no checksum in the packet makes up for, for CHECKSUM_COMPLETE */
	__u64 addresses = 0, ports = 0, open = 0;
	int check = csum_offset(p->proto, v6);
	bool l4 = !(p->flags & PACKET_NO_L4), pseudo = v6 || p->proto != IPPROTO_ICMP;
	__u64 flags;

	if (!(f->flags & FLOW_NAT) && !hop)
		return 0;
	if (v6) {
		const struct flow6 *f6 = (const struct flow6 *)f;
		struct ipv6hdr *ip = header(skb, p->l3, sizeof(*ip));

		if (!ip)
			return -REASON_MALFORMED;
		if (hop) {
			__u16 old = *(__u16 *)&ip->nexthdr;

			ip->hop_limit--;
			open = csum_change(open, old, *(__u16 *)&ip->nexthdr);
		}
		if (!(f->flags & FLOW_NAT))
			goto out;
		for (int i = 0; i < 4; i++) {
			addresses = csum_change(addresses, p->saddr.w[i], f6->saddr.w[i]);
			addresses = csum_change(addresses, p->daddr.w[i], f6->daddr.w[i]);
		}
		__builtin_memcpy(&ip->saddr, &f6->saddr, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &f6->daddr, sizeof(ip->daddr));
	} else {
		const struct flow4 *f4 = (const struct flow4 *)f;
		struct iphdr *ip = header(skb, p->l3, sizeof(*ip));
		__u64 own = 0;

		if (!ip)
			return -REASON_MALFORMED;
		if (f->flags & FLOW_NAT) {
			addresses = csum_change(addresses, p->saddr.w[3], f4->saddr);
			addresses = csum_change(addresses, p->daddr.w[3], f4->daddr);
			ip->saddr = f4->saddr;
			ip->daddr = f4->daddr;
			own = addresses;
		}
		if (hop) {
			__u16 old = *(__u16 *)&ip->ttl;

			ip->ttl--;
			own = csum_change(own, old, *(__u16 *)&ip->ttl);
		}
		ip->check = csum_apply(ip->check, csum_fold32(own));
		if (!(f->flags & FLOW_NAT))
			return 0;
	}
	if (!l4)
		goto unsummed;
	if (p->sport != f->sport || p->dport != f->dport) {
		if (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP) {
			__be16 *port = header(skb, p->l4, 4);

			if (!port)
				return -REASON_MALFORMED;
			port[0] = f->sport;
			port[1] = f->dport;
		} else if (p->proto == IPPROTO_ICMP || p->proto == IPPROTO_ICMPV6) {
			__be16 *id = header(skb, p->l4 + 4, 2);

			if (!id)
				return -REASON_MALFORMED;
			*id = p->sport == f->sport ? f->dport : f->sport;
		} else {
			return -REASON_UNSUPPORTED;
		}
		ports = csum_change(ports, p->sport, f->sport);
		ports = csum_change(ports, p->dport, f->dport);
	}
	if (check < 0)
		goto unsummed;
	/* UDP: none stays none, and a sum that comes out as zero is sent as ones (RFC 768). */
	if (p->proto == IPPROTO_UDP) {
		__sum16 *sum = header(skb, p->l4 + check, sizeof(*sum));

		if (!sum)
			return -REASON_MALFORMED;
		if (!*sum)
			goto unsummed;
	}
	flags = p->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	if (pseudo && addresses)
		l4_csum_change(skb, p->l4 + check, csum_fold32(addresses), flags | BPF_F_PSEUDO_HDR,
			       v6);
	if (ports)
		l4_csum_change(skb, p->l4 + check, csum_fold32(ports), flags, v6);
	goto out;
unsummed:
	open += (v6 ? addresses : 0) + ports; /* IPv4's header sums its own addresses */
out:
	if (open)
		bpf_csum_update(skb, csum_fold32(open));
	return 0;
}

/* Jenkins' one-at-a-time over words: stable for one (protocol, address, port). */
static __always_inline __u32 hash_word(__u32 h, __u32 w)
{
	h += w;
	h += h << 10;
	h ^= h >> 6;
	return h;
}

static __always_inline __u32 nat_hash(const struct packet *p, __u32 seed)
{
	__u32 h = hash_word(seed, p->proto);

	for (int i = 0; i < 4; i++)
		h = hash_word(h, p->saddr.w[i]);
	h = hash_word(h, p->sport);
	h += h << 3;
	h ^= h >> 11;
	h += h << 15;
	return h;
}

/* Whether a host socket would take an answer on the tuple: then it is not ours to use. */
static __always_inline bool host_socket_owns(struct __sk_buff *skb, struct scratch *s, __be16 port,
					     const bool v6)
{
	const struct packet *p = &s->packet;
	const struct plan *n = &s->plan;
	struct bpf_sock_tuple *t = &s->tuple;
	__u32 size, number = bpf_ntohs(port), *bound;
	struct bpf_sock *sk;

	bound = bpf_map_lookup_elem(&device_sockets, &number);
	if (bound && *bound)
		return true;
	if (v6) {
		__builtin_memcpy(t->ipv6.saddr, &n->daddr, sizeof(t->ipv6.saddr));
		__builtin_memcpy(t->ipv6.daddr, &n->saddr, sizeof(t->ipv6.daddr));
		t->ipv6.sport = n->dport;
		t->ipv6.dport = port;
		size = sizeof(t->ipv6);
	} else {
		t->ipv4.saddr = n->daddr.w[3];
		t->ipv4.daddr = n->saddr.w[3];
		t->ipv4.sport = n->dport;
		t->ipv4.dport = port;
		size = sizeof(t->ipv4);
	}
	if (p->proto == IPPROTO_TCP)
		sk = bpf_sk_lookup_tcp(skb, t, size, BPF_F_CURRENT_NETNS, 0);
	else if (p->proto == IPPROTO_UDP)
		sk = bpf_sk_lookup_udp(skb, t, size, BPF_F_CURRENT_NETNS, 0);
	else
		return false;
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/*
 * Whether a TCP packet in mid-stream is for a connection that ends in a socket of the host, such as
 * docker-proxy's: it began before the port was ours, and would be reset in a container.
 */
static __always_inline bool host_has_stream(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	const struct packet *p = &s->packet;
	struct bpf_sock_tuple *t = &s->tuple;
	struct bpf_sock *sk;
	bool stream;
	__u32 size;

	if (p->proto != IPPROTO_TCP || (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return false;
	if (v6) {
		__builtin_memcpy(t->ipv6.saddr, &p->saddr, sizeof(t->ipv6.saddr));
		__builtin_memcpy(t->ipv6.daddr, &p->daddr, sizeof(t->ipv6.daddr));
		t->ipv6.sport = p->sport;
		t->ipv6.dport = p->dport;
		size = sizeof(t->ipv6);
	} else {
		t->ipv4.saddr = p->saddr.w[3];
		t->ipv4.daddr = p->daddr.w[3];
		t->ipv4.sport = p->sport;
		t->ipv4.dport = p->dport;
		size = sizeof(t->ipv4);
	}
	sk = bpf_skc_lookup_tcp(skb, t, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	stream = sk->state != BPF_TCP_LISTEN;
	bpf_sk_release(sk);
	return stream;
}

/* Masquerade port number index of the configured ranges, host order; 0 where it must not be used. */
static __always_inline __u16 snat_port(const struct config *cfg, const struct port_class *class,
				       __u32 index)
{
	__u32 port;

	if (index < cfg->snat[0].count)
		port = cfg->snat[0].first + index;
	else
		port = cfg->snat[1].first + (index - cfg->snat[0].count);
	port &= 0xffff;
	return class->ports[port] & PORT_SNAT ? port : 0;
}

/*
 * Takes a source port for the plan: the first candidate depends on the sender's own (protocol,
 * address, port) only, so that one socket keeps one outer port towards all destinations (RFC 4787
 * REQ-1). any: every port from 1024 up will do, no host socket can be meant. 0 or -REASON.
 */
static __always_inline int nat_take_port_of(struct __sk_buff *skb, struct scratch *s, bool any,
					    const bool v6)
{
	const struct packet *p = &s->packet;
	const struct config *cfg = config_get();
	struct plan *n = &s->plan;
	__u32 zero = 0, total, h, tries, stride;
	const struct port_class *class = bpf_map_lookup_elem(&port_class, &zero);
	bool icmp = p->proto == (v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP);
	long err = -EEXIST;
	__u64 *found;

	if (!class || !cfg)
		return -REASON_SNAT_EXHAUSTED;
	h = nat_hash(p, cfg->hash_seed);
	if (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP && !(icmp && p->sport)) {
		/* No port that may change: by address alone, and one flow a destination. */
		err = flow_take_reverse(v6);
		tries = 0;
		goto out;
	}
	total = icmp ? 65535 : any ? 64512 : cfg->snat[0].count + cfg->snat[1].count;
	if (!total)
		return -REASON_SNAT_EXHAUSTED;
	stride = (h >> 16) | 1;
	for (tries = 0; tries < SNAT_TRIES; tries++) {
		__u32 index = (h + tries * stride) % total;
		__u16 port;

		if (icmp)
			port = index + 1;
		else if (any)
			port = 1024 + index;
		else
			port = snat_port(cfg, class, index);
		if (!port)
			continue;
		if (!icmp && !any && host_socket_owns(skb, s, bpf_htons(port), v6))
			continue;
		n->sport = bpf_htons(port);
		err = flow_take_reverse(v6);
		if (err != -EEXIST && err != -EBUSY)
			break;
	}
out:
	found = bpf_map_lookup_elem(&snat_stats, &tries);
	if (found)
		(*found)++;
	if (!err)
		return 0;
	return err == -EEXIST || err == -EBUSY ? -REASON_SNAT_EXHAUSTED : -REASON_FLOW_TABLE_FULL;
}

__noinline int nat_take_port4(struct __sk_buff *skb, bool any)
{
	struct scratch *s = scratch_get();

	return s ? nat_take_port_of(skb, s, any, false) : -REASON_SNAT_EXHAUSTED;
}

__noinline int nat_take_port6(struct __sk_buff *skb, bool any)
{
	struct scratch *s = scratch_get();

	return s ? nat_take_port_of(skb, s, any, true) : -REASON_SNAT_EXHAUSTED;
}

/* Whether the flow tables are being copied. */
static __always_inline bool tables_held(const struct config *cfg)
{
	return cfg->hold_until && (__s32)(cfg->hold_until - ticks()) > 0;
}

static __always_inline int flow_open_of(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	const struct packet *p = &s->packet;
	const struct config *cfg = config_get();
	bool ports = p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP, any = false;
	int err = -EEXIST;

	if (!cfg)
		return -REASON_NOT_READY;
	/* It would be in one of two tables. Its sender tries again. */
	if (tables_held(cfg))
		return -REASON_TABLES_MOVING;
	if (flow_capped(cfg, &s->plan))
		return -REASON_FLOW_CAP;
	/* Also where there is no room for this one: its sender's next try shall find some. */
	gc_kick(cfg, v6);
	if (!(s->plan.flags & FLOW_SNAT)) {
		err = flow_take_reverse(v6);
		/* Two ways to the same container port from one client port: tell them apart. */
		if (err == -EEXIST && !ports)
			return -REASON_FLOW_COLLISION;
		any = true;
	}
	if (err == -EEXIST) {
		err = v6 ? nat_take_port6(skb, any) : nat_take_port4(skb, any);
		if (err)
			return any && err == -REASON_SNAT_EXHAUSTED ? -REASON_FLOW_COLLISION : err;
	}
	return err || flow_add_forward(s, cfg, v6) ? -REASON_FLOW_TABLE_FULL : 0;
}

__noinline int flow_open4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? flow_open_of(skb, s, false) : -REASON_FLOW_TABLE_FULL;
}

__noinline int flow_open6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? flow_open_of(skb, s, true) : -REASON_FLOW_TABLE_FULL;
}

/* Opens the flow that s->plan says. 0 or -REASON. */
static __always_inline int flow_open(struct __sk_buff *skb, const bool v6)
{
	return v6 ? flow_open6(skb) : flow_open4(skb);
}
