/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Stage 1, parse: from bytes to struct packet. Every length is compared before use, in the order of
 * the layers. A header that does not hold what it says is malformed, never guessed at.
 */
#pragma once

#include "maps.h"

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>

/* Farthest header that is looked at, from the start of the frame; a mask. */
#define MAX_OFFSET 0x7ff
/* IPv6 extension headers that are walked before the packet counts as absurd. */
#define MAX_EXTENSIONS 6

#define IP_DONT_FRAGMENT 0x4000
#define IP_MORE_FRAGMENTS 0x2000
#define IP_FRAGMENT_OFFSET 0x1fff

#define VLAN_ID 0x0fff /* of a tag, IEEE 802.1Q */

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define PACKET_HOST 0 /* skb->pkt_type */

/* linux/icmp.h draws in the C library's socket headers: the few values that matter here. */
#define ICMP_ECHOREPLY 0 /* RFC 792 */
#define ICMP_DEST_UNREACH 3
#define ICMP_SOURCE_QUENCH 4
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMPV6_ECHO_REQUEST 128 /* RFC 4443; below are the errors */
#define ICMPV6_ECHO_REPLY 129
#define ICMPV6_ROUTER_SOLICITATION 133 /* RFC 4861; below 137 the others */
#define ICMPV6_ROUTER_ADVERTISEMENT 134
#define ICMPV6_NEIGHBOUR_SOLICITATION 135
#define ICMPV6_NEIGHBOUR_ADVERTISEMENT 136
#define ICMPV6_REDIRECT 137

/* The first eight bytes of ICMP and ICMPv6 alike. */
struct icmp_header {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be16 id; /* of an echo */
	__be16 sequence;
};

#ifndef IPPROTO_SCTP
#define IPPROTO_SCTP 132
#endif

enum packet_flags {
	PACKET_FRAGMENT = 1, /* part of a fragmented datagram */
	PACKET_NO_L4 = 2, /* not its first part: no ports in it */
	PACKET_PORTS_LOST = 4, /* and its first part was not seen */
	PACKET_ICMP_ERROR = 8,
	PACKET_NEIGHBOUR = 16, /* ND or MLD that no router has seen: the link's business */
	PACKET_DONT_FRAGMENT = 32,
	PACKET_NO_FLOW = 64, /* looked up, and there is none */
};

struct packet {
	struct addr saddr;
	struct addr daddr;
	__be16 sport; /* ICMP echo request: the identifier */
	__be16 dport; /* ICMP echo reply: the identifier */
	__u16 l3; /* offsets from skb->data */
	__u16 l4;
	__u8 proto;
	enum hook hook;
	__u8 flags; /* enum packet_flags */
	__u8 tcp_flags;
	__u8 ttl;
	__u8 l4_header; /* bytes: TCP's or UDP's own */
	__u8 dmac[6];
	__u8 smac[6];
	__u16 l4_len; /* bytes after l4; 0xffff: more than fits */
	__u32 frag_id;
	__u32 overtaken; /* later fragments that came before this first one */
};

static __always_inline void addr_from_v4(struct addr *a, __be32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = v4;
}

static __always_inline bool addr_is_v4(const struct addr *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

static __always_inline bool addr_is_zero(const struct addr *a)
{
	return !(a->w[0] | a->w[1] | a->w[2] | a->w[3]);
}

/* 127/8, 0/8; ::1. The unspecified addresses are for the caller to allow. */
static __always_inline bool addr_is_loopback(const struct addr *a, const bool v6)
{
	if (v6)
		return !(a->w[0] | a->w[1] | a->w[2]) && a->w[3] == bpf_htonl(1);
	return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

static __always_inline bool addr_is_this_network(const struct addr *a, const bool v6)
{
	if (v6)
		return addr_is_zero(a);
	return !(a->w[3] & bpf_htonl(0xff000000));
}

static __always_inline bool addr_is_link_local(const struct addr *a, const bool v6)
{
	return v6 && (a->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline bool addr_is_multicast(const struct addr *a, const bool v6)
{
	if (v6)
		return (a->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
	return (a->w[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) ||
	       a->w[3] == bpf_htonl(0xffffffff);
}

/* Broadcast or multicast, IEEE 802 8.2. */
static __always_inline bool mac_is_group(const __u8 *mac)
{
	return mac[0] & 1;
}

static __always_inline bool mac_equal(const __u8 *a, const __u8 *b)
{
	__u8 diff = 0;

	for (int i = 0; i < 6; i++)
		diff |= a[i] ^ b[i];
	return !diff;
}

/* The same stage for XDP: define CONTEXT before including this. */
#ifndef CONTEXT
#define CONTEXT struct __sk_buff
#define CONTEXT_LINEAR(skb, len) (!bpf_skb_pull_data(skb, len))
#define CONTEXT_LEN(skb) ((skb)->len)
#define CONTEXT_SEGMENTS(skb) ((skb)->gso_segs)
#endif

/*
 * The packet's ends, read in assembly: the compiler would otherwise keep the addresses of the two
 * context fields, which the verifier does not allow to be dereferenced.
 */
static __always_inline void *packet_start(const CONTEXT *skb)
{
	void *p;

	asm volatile("%[p] = *(u32 *)(%[skb] + %[off])"
		     : [p] "=r"(p)
		     : [skb] "r"(skb), [off] "i"(offsetof(CONTEXT, data)));
	return p;
}

static __always_inline void *packet_end(const CONTEXT *skb)
{
	void *p;

	asm volatile("%[p] = *(u32 *)(%[skb] + %[off])"
		     : [p] "=r"(p)
		     : [skb] "r"(skb), [off] "i"(offsetof(CONTEXT, data_end)));
	return p;
}

/* A pointer to len bytes at off, made linear first if need be; NULL where the packet is shorter. */
static __always_inline void *header(CONTEXT *skb, __u32 off, const __u32 len)
{
	void *p = packet_start(skb);

	/* In assembly: the compiler knows the bound already, the verifier has forgotten it. */
	asm volatile("%[off] &= %[max]" : [off] "+r"(off) : [max] "i"(MAX_OFFSET));
	p += off;
	/* One pointer for check and use: the verifier knows nothing of sums. */
	asm volatile("" : "+r"(p));
	if (p + len <= packet_end(skb))
		return p;
	if (!CONTEXT_LINEAR(skb, off + len))
		return NULL;
	p = packet_start(skb);
	p += off;
	asm volatile("" : "+r"(p));
	return p + len <= packet_end(skb) ? p : NULL;
}

/* Reads MACs and the EtherType (returned, network order; 0 where the frame is too short). */
static __always_inline __be16 parse_ethernet(CONTEXT *skb, struct packet *p)
{
	struct ethhdr *eth = header(skb, 0, sizeof(*eth));

	if (!eth)
		return 0;
	__builtin_memcpy(p->dmac, eth->h_dest, 6);
	__builtin_memcpy(p->smac, eth->h_source, 6);
	p->l3 = sizeof(*eth);
	return eth->h_proto;
}

/* Ports, TCP flags and ICMP types. 0, or -REASON_MALFORMED. */
static __always_inline int parse_l4(CONTEXT *skb, struct packet *p, const bool v6)
{
	if (p->flags & PACKET_NO_L4)
		return 0;
	if (p->proto == IPPROTO_TCP) {
		struct tcphdr *tcp;

		if (p->l4_len < sizeof(*tcp) || !(tcp = header(skb, p->l4, sizeof(*tcp))))
			return -REASON_MALFORMED;
		if (tcp->doff < 5 || (!(p->flags & PACKET_FRAGMENT) && tcp->doff * 4 > p->l4_len))
			return -REASON_MALFORMED;
		p->sport = tcp->source;
		p->dport = tcp->dest;
		p->tcp_flags = ((__u8 *)tcp)[13];
		p->l4_header = tcp->doff * 4;
	} else if (p->proto == IPPROTO_UDP) {
		struct udphdr *udp;

		if (p->l4_len < sizeof(*udp) || !(udp = header(skb, p->l4, sizeof(*udp))))
			return -REASON_MALFORMED;
		p->l4_header = sizeof(*udp);
		p->sport = udp->source;
		p->dport = udp->dest;
	} else if (!v6 && p->proto == IPPROTO_ICMP) {
		struct icmp_header *icmp;

		if (p->l4_len < sizeof(*icmp) || !(icmp = header(skb, p->l4, sizeof(*icmp))))
			return -REASON_MALFORMED;
		switch (icmp->type) {
		case ICMP_ECHO:
			p->sport = icmp->id;
			break;
		case ICMP_ECHOREPLY:
			p->dport = icmp->id;
			break;
		case ICMP_DEST_UNREACH:
		case ICMP_SOURCE_QUENCH:
		case ICMP_TIME_EXCEEDED:
		case ICMP_PARAMETERPROB:
			p->flags |= PACKET_ICMP_ERROR;
			break;
		}
	} else if (v6 && p->proto == IPPROTO_ICMPV6) {
		struct icmp_header *icmp;

		if (p->l4_len < sizeof(*icmp) || !(icmp = header(skb, p->l4, sizeof(*icmp))))
			return -REASON_MALFORMED;
		switch (icmp->type) {
		case ICMPV6_ECHO_REQUEST:
			p->sport = icmp->id;
			break;
		case ICMPV6_ECHO_REPLY:
			p->dport = icmp->id;
			break;
		case 130 ... 132: /* MLD, RFC 2710 */
		case 143: /* MLDv2, RFC 3810 */
			if (p->ttl == 1)
				p->flags |= PACKET_NEIGHBOUR;
			break;
		case 133 ... 137: /* ND, RFC 4861 */
			if (p->ttl == 255)
				p->flags |= PACKET_NEIGHBOUR;
			break;
		default:
			if (icmp->type < 128)
				p->flags |= PACKET_ICMP_ERROR;
		}
	} else if (p->proto == IPPROTO_SCTP) {
		__be16 *ports;

		if (p->l4_len < 12 || !(ports = header(skb, p->l4, 4)))
			return -REASON_MALFORMED;
		p->sport = ports[0];
		p->dport = ports[1];
	}
	return 0;
}

static __always_inline int parse_v4(CONTEXT *skb, struct packet *p)
{
	struct iphdr *ip = header(skb, p->l3, sizeof(*ip));
	__u32 room = CONTEXT_LEN(skb) - p->l3, hl, total;
	__u16 frag;

	if (!ip || ip->version != 4 || ip->ihl < 5)
		return -REASON_MALFORMED;
	hl = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (!total && CONTEXT_SEGMENTS(skb)) /* BIG TCP */
		total = room;
	if (total < hl || total > room)
		return -REASON_MALFORMED;
	addr_from_v4(&p->saddr, ip->saddr);
	addr_from_v4(&p->daddr, ip->daddr);
	p->proto = ip->protocol;
	p->ttl = ip->ttl;
	p->l4 = p->l3 + hl;
	total -= hl;
	p->l4_len = total > 0xffff ? 0xffff : total;
	frag = bpf_ntohs(ip->frag_off);
	/* Beyond what a datagram may be, once put together. */
	if ((frag & IP_FRAGMENT_OFFSET) * 8 + total + hl > 0xffff && frag & IP_FRAGMENT_OFFSET)
		return -REASON_MALFORMED;
	if (frag & IP_DONT_FRAGMENT)
		p->flags |= PACKET_DONT_FRAGMENT;
	if (frag & (IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET)) {
		p->flags |= PACKET_FRAGMENT;
		p->frag_id = ip->id;
		if (frag & IP_FRAGMENT_OFFSET)
			p->flags |= PACKET_NO_L4;
	}
	return parse_l4(skb, p, false);
}

/* Walks to the upper layer, RFC 8200 section 4. */
static __always_inline int parse_v6(CONTEXT *skb, struct packet *p)
{
	struct ipv6hdr *ip = header(skb, p->l3, sizeof(*ip));
	__u32 room = CONTEXT_LEN(skb) - p->l3 - sizeof(*ip), payload, off;
	__u8 next;

	if (!ip || ip->version != 6)
		return -REASON_MALFORMED;
	payload = bpf_ntohs(ip->payload_len);
	if (!payload && CONTEXT_SEGMENTS(skb))
		payload = room;
	if (payload > room)
		return -REASON_MALFORMED;
	__builtin_memcpy(&p->saddr, &ip->saddr, sizeof(p->saddr));
	__builtin_memcpy(&p->daddr, &ip->daddr, sizeof(p->daddr));
	/* IPv4 addresses in this form are ours; nobody may send them (RFC 4942 2.2). */
	if (addr_is_v4(&p->saddr) || addr_is_v4(&p->daddr))
		return -REASON_MALFORMED;
	p->flags |= PACKET_DONT_FRAGMENT;
	p->ttl = ip->hop_limit;
	next = ip->nexthdr;
	off = p->l3 + sizeof(*ip);
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 *ext;
		__u32 len;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			break;
		if (p->flags & PACKET_NO_L4)
			break;
		if (payload < 8 || off > MAX_OFFSET - 8)
			return -REASON_MALFORMED;
		ext = header(skb, off, 8);
		if (!ext)
			return -REASON_MALFORMED;
		if (next == IPPROTO_FRAGMENT) {
			__u16 frag = bpf_ntohs(*(__be16 *)(ext + 2));

			len = 8;
			if ((frag & 0xfff8) + payload - len > 0xffff)
				return -REASON_MALFORMED;
			if (frag & 0xfff9) { /* offset or more to come; else atomic, RFC 6946 */
				p->flags |= PACKET_FRAGMENT;
				p->frag_id = *(__u32 *)(ext + 4);
				if (frag & 0xfff8)
					p->flags |= PACKET_NO_L4;
			}
		} else if (next == IPPROTO_AH) {
			len = (ext[1] + 2) * 4;
		} else {
			len = (ext[1] + 1) * 8;
		}
		if (len > payload)
			return -REASON_MALFORMED;
		next = ext[0];
		off += len;
		payload -= len;
	}
	if (off > MAX_OFFSET - 20)
		return -REASON_MALFORMED;
	if (!(p->flags & PACKET_NO_L4) &&
	    (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	     next == IPPROTO_FRAGMENT || next == IPPROTO_AH))
		return -REASON_MALFORMED;
	p->proto = next;
	p->l4 = off;
	p->l4_len = payload > 0xffff ? 0xffff : payload;
	return parse_l4(skb, p, true);
}

static __always_inline int parse_ip(CONTEXT *skb, struct packet *p, const bool v6)
{
	return v6 ? parse_v6(skb, p) : parse_v4(skb, p);
}

/* What the programs' straight ways return where a packet must go the long way; no action of TC. */
#define STRAIGHT_NOT (-2)

/*
 * Reads a plain packet: Ethernet, IP without options or extension headers, whole, TCP or UDP, its headers
 * in the linear part. False: it is something else, or malformed; the long way tells. Nothing is changed.
 */
static __always_inline bool parse_plain(CONTEXT *skb, struct packet *p, const bool v6)
{
	const __u32 l4 =
		sizeof(struct ethhdr) + (v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	void *start = packet_start(skb), *end = packet_end(skb);
	__u32 room = CONTEXT_LEN(skb) - l4, payload;
	struct ethhdr *eth = start;
	__be16 *port = start + l4;

	if (start + l4 + sizeof(struct udphdr) > end)
		return false;
	if (v6) {
		struct ipv6hdr *ip = start + sizeof(*eth);

		if (eth->h_proto != bpf_htons(ETH_P_IPV6) || ip->version != 6)
			return false;
		payload = bpf_ntohs(ip->payload_len);
		p->proto = ip->nexthdr;
		p->ttl = ip->hop_limit;
		__builtin_memcpy(&p->saddr, &ip->saddr, sizeof(p->saddr));
		__builtin_memcpy(&p->daddr, &ip->daddr, sizeof(p->daddr));
	} else {
		struct iphdr *ip = start + sizeof(*eth);

		if (eth->h_proto != bpf_htons(ETH_P_IP) || *(__u8 *)ip != 0x45 ||
		    ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET))
			return false;
		payload = bpf_ntohs(ip->tot_len) - sizeof(*ip);
		p->proto = ip->protocol;
		p->ttl = ip->ttl;
		if (ip->frag_off & bpf_htons(IP_DONT_FRAGMENT))
			p->flags = PACKET_DONT_FRAGMENT;
		addr_from_v4(&p->saddr, ip->saddr);
		addr_from_v4(&p->daddr, ip->daddr);
	}
	/* Also where payload is negative. */
	if (payload > room)
		return false;
	if (p->proto == IPPROTO_TCP) {
		struct tcphdr *tcp = start + l4;

		if (start + l4 + sizeof(*tcp) > end || tcp->doff < 5 || tcp->doff * 4 > payload)
			return false;
		p->tcp_flags = ((__u8 *)tcp)[13];
		p->l4_header = tcp->doff * 4;
	} else if (p->proto == IPPROTO_UDP) {
		if (payload < sizeof(struct udphdr))
			return false;
		p->l4_header = sizeof(struct udphdr);
	} else {
		return false;
	}
	if (v6)
		p->flags = PACKET_DONT_FRAGMENT;
	p->sport = port[0];
	p->dport = port[1];
	p->l3 = sizeof(*eth);
	p->l4 = l4;
	__builtin_memcpy(p->smac, eth->h_source, 6);
	return true;
}
