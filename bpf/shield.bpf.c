//go:build ignore

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The shield: XDP on an uplink, before the kernel has made anything of a frame. It drops what the deny
 * list names, what from_uplink would drop as direct access, and SYNs to published ports beyond their
 * source's rate. What it does not understand, and what belongs to something established, it passes:
 * from_uplink and the stack judge it.
 */
#include <linux/bpf.h>

/* The stage "parse" is from_uplink's own, so that both read a packet alike. */
#define CONTEXT struct xdp_md
#define CONTEXT_LINEAR(ctx, len) false /* XDP has no other part to read from */
#define CONTEXT_LEN(ctx) ((__u32)bpf_xdp_get_buff_len(ctx))
#define CONTEXT_SEGMENTS(ctx) 0

#include "lookup.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define MAX_DENIED 65536
/* enum in the kernel's net/tcp_states.h */
#define SOCKET_ESTABLISHED 1
#define SOCKET_LISTEN 10

/* An uplink that the shield is on. */
struct shield_device {
	__u8 mac[6]; /* frames to others are none of the host's */
	__u8 pad[2];
};

struct shield_config {
	__u64 syn_interval; /* ns from one SYN of a source to its next, in the long run; 0: any */
	__u64 syn_burst; /* ns: how far a source may run ahead */
};

/* LPM keys of the deny list: each family in a trie of its own, lest ::/0 be everybody. */
struct deny4_key {
	__u32 prefixlen; /* bits, 0 to 32 */
	__be32 addr;
};

struct deny6_key {
	__u32 prefixlen; /* bits, 0 to 128 */
	struct addr addr;
};

/* Filled by the daemon. The value is the prefix's index into shield_hits. */
MAP(BPF_MAP_TYPE_LPM_TRIE, shield_deny4, struct deny4_key, __u32, MAX_DENIED, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_LPM_TRIE, shield_deny6, struct deny6_key, __u32, MAX_DENIED, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, shield_devices, __u32, struct shield_device, 1024, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_ARRAY, shield_config, __u32, struct shield_config, 1, 0);

/* Kept by the data path: packets dropped, and when a source's SYNs so far would have been due. */
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, shield_hits, __u32, __u64, MAX_DENIED, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, shield_sources, struct addr, __u64, 65536, 0);

static __always_inline bool is_opening(const struct packet *p)
{
	return p->proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/*
 * XDP_DROP, counted; XDP_PASS where the frame is not for the host's MAC, as a macvlan's or what a port
 * of a bridge hears.
 */
static __always_inline int shield_drop(struct xdp_md *ctx, const struct packet *p,
				       enum reason reason)
{
	__u32 ifindex = ctx->ingress_ifindex, key = reason * HOOK_COUNT + HOOK_SHIELD;
	struct shield_device *dev = bpf_map_lookup_elem(&shield_devices, &ifindex);
	struct count *c;

	if (!dev || !mac_equal(p->dmac, dev->mac))
		return XDP_PASS;
	c = bpf_map_lookup_elem(&drops, &key);
	if (c) {
		c->packets++;
		c->bytes += CONTEXT_LEN(ctx);
	}
	return XDP_DROP;
}

/* Whether a socket of the host has the packet's connection. */
static __always_inline bool host_connected(struct xdp_md *ctx, const struct packet *p,
					   const bool v6)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;
	bool connected;
	__u32 size;

	if (v6) {
		__builtin_memcpy(t.ipv6.saddr, &p->saddr, sizeof(t.ipv6.saddr));
		__builtin_memcpy(t.ipv6.daddr, &p->daddr, sizeof(t.ipv6.daddr));
		t.ipv6.sport = p->sport;
		t.ipv6.dport = p->dport;
		size = sizeof(t.ipv6);
	} else {
		t.ipv4.saddr = p->saddr.w[3];
		t.ipv4.daddr = p->daddr.w[3];
		t.ipv4.sport = p->sport;
		t.ipv4.dport = p->dport;
		size = sizeof(t.ipv4);
	}
	if (p->proto == IPPROTO_TCP) {
		sk = bpf_skc_lookup_tcp(ctx, &t, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return false;
		connected = sk->state != SOCKET_LISTEN;
	} else {
		sk = bpf_sk_lookup_udp(ctx, &t, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return false;
		connected = sk->state == SOCKET_ESTABLISHED;
	}
	bpf_sk_release(sk);
	return connected;
}

/*
 * Whether the packet may belong to what stands already. Errors and neighbour discovery are about
 * others, and later fragments name no port: they count as such.
 */
static __always_inline bool is_established(struct xdp_md *ctx, const struct packet *p,
					   const struct port_class *class, const bool v6)
{
	const bool ported = p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP;

	if (p->flags & (PACKET_NO_L4 | PACKET_ICMP_ERROR | PACKET_NEIGHBOUR))
		return true;
	if (is_opening(p))
		return false;
	if ((!ported || port_has(class, p->dport, p->proto, PORT_SNAT | PORT_HELD) ||
	     maybe_in_subnet(class, &p->daddr, v6)) &&
	    flow_find(p, HOOK_UPLINK, v6))
		return true;
	return ported && host_connected(ctx, p, v6);
}

/* Whether from_uplink would drop it as direct access. */
static __always_inline bool is_direct(struct xdp_md *ctx, const struct packet *p,
				      const struct port_class *class, const bool v6)
{
	struct open_key open = { .daddr = p->daddr, .port = p->dport, .proto = p->proto };
	const struct config *cfg = config_get();
	struct endpoint *target;

	if (!cfg || cfg->accept_mask || !maybe_in_subnet(class, &p->daddr, v6))
		return false;
	if (p->flags & (PACKET_NO_L4 | PACKET_ICMP_ERROR | PACKET_NEIGHBOUR) ||
	    is_host_addr(&p->daddr, v6) || !subnet_of(&p->daddr))
		return false;
	target = endpoint_get(endpoint_by_addr(&p->daddr));
	if (target && lets_in_of(&open, target->net, ctx->ingress_ifindex, 0, v6) >= 0)
		return false;
	return !flow_find(p, HOOK_UPLINK, v6);
}

/*
 * Whether the source opens connections to published ports faster than it may: a source's SYNs are due
 * one interval after the other, and each may come early by up to the burst. IPv6 sources count by
 * their /64, of which one sender has all.
 */
static __always_inline bool is_too_fast(const struct packet *p, const struct port_class *class,
					const bool v6)
{
	struct addr source = p->saddr;
	const struct shield_config *cfg;
	__u64 now, next, *due;
	__u32 zero = 0;

	cfg = bpf_map_lookup_elem(&shield_config, &zero);
	if (!cfg || !cfg->syn_interval || !is_opening(p) ||
	    !(class->ports[port_index(p->dport)] & PORT_TCP) || !is_host_addr(&p->daddr, v6) ||
	    !port_find(p, v6))
		return false;
	if (v6) {
		source.w[2] = 0;
		source.w[3] = 0;
	}
	now = bpf_ktime_get_coarse_ns();
	due = bpf_map_lookup_elem(&shield_sources, &source);
	next = (due && *due > now ? *due : now) + cfg->syn_interval;
	if (next - now > cfg->syn_burst)
		return true;
	if (due)
		*due = next;
	else
		bpf_map_update_elem(&shield_sources, &source, &next, BPF_ANY);
	return false;
}

static __always_inline __u32 *deny_find(const struct packet *p, const bool v6)
{
	if (v6) {
		struct deny6_key k = { .prefixlen = 128, .addr = p->saddr };

		return bpf_map_lookup_elem(&shield_deny6, &k);
	} else {
		struct deny4_key k = { .prefixlen = 32, .addr = p->saddr.w[3] };

		return bpf_map_lookup_elem(&shield_deny4, &k);
	}
}

static __always_inline int shield_ip(struct xdp_md *ctx, struct packet *p, const bool v6)
{
	int err = parse_ip(ctx, p, v6), action;
	__u32 zero = 0, *denied;
	struct port_class *class = bpf_map_lookup_elem(&port_class, &zero);
	__u64 *hits;

	if (!class)
		return XDP_PASS;
	denied = deny_find(p, v6);
	/* What is malformed is nobody's; unless its headers are where XDP cannot look. */
	if (denied && (err ? ctx->data_end - ctx->data == CONTEXT_LEN(ctx) :
			     !is_established(ctx, p, class, v6))) {
		action = shield_drop(ctx, p, REASON_DENIED);
		hits = bpf_map_lookup_elem(&shield_hits, denied);
		if (hits && action == XDP_DROP)
			++*hits;
		return action;
	}
	if (err)
		return XDP_PASS;
	if (is_direct(ctx, p, class, v6))
		return shield_drop(ctx, p, REASON_DIRECT_ACCESS);
	if (is_too_fast(p, class, v6))
		return shield_drop(ctx, p, REASON_SYN_RATE);
	return XDP_PASS;
}

SEC("xdp.frags")
int shield(struct xdp_md *ctx)
{
	struct packet p = { .hook = HOOK_SHIELD };
	__be16 proto = parse_ethernet(ctx, &p);

	if (proto == bpf_htons(ETH_P_IP))
		return shield_ip(ctx, &p, false);
	if (proto == bpf_htons(ETH_P_IPV6))
		return shield_ip(ctx, &p, true);
	return XDP_PASS; /* ARP; and what has a VLAN's tag belongs to that VLAN's device */
}
