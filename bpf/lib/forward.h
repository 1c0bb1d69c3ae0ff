/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Stage 5, forward: carry out what the flow entry says, or leave the packet to stack or bridge. */
#pragma once

#include "icmp.h"
#include "policy.h"

/*
 * Set on a packet that one of our programs has judged, for the next of them that sees it; cleared
 * there. Containers cannot set it: a mark does not cross network namespaces.
 */
#define MARK_JUDGED 0xb9f00000
/* Likewise, and judged for the container that it is redirected to, from a netkit. */
#define MARK_DELIVERED 0xb9f00001

/* tcx, netkit: let the next program run; clsact: go on. */
#define PASS TC_ACT_UNSPEC

/*
 * A netkit's program runs while the container sends, as if the frame had come to the host's end, which
 * has not received it yet.
 */
static __always_inline bool by_netkit(const struct __sk_buff *skb)
{
	return !skb->ingress_ifindex;
}

static __always_inline int to_stack(struct __sk_buff *skb, __u8 hook)
{
	if (hook == HOOK_CONTAINER)
		skb->mark = MARK_JUDGED;
	return let_go(skb, hook, FATE_STACK, PASS);
}

static __always_inline int to_bridge(struct __sk_buff *skb)
{
	skb->mark = MARK_JUDGED;
	return let_go(skb, HOOK_CONTAINER, FATE_BRIDGE, PASS);
}

/*
 * To the bridge's other ports only. No mark: what reaches the host under another MAC than the
 * gateway's, such as that of the host-side interface, stops at from_bridge.
 */
static __always_inline int to_neighbours(struct __sk_buff *skb)
{
	return let_go(skb, HOOK_CONTAINER, FATE_BRIDGE, PASS);
}

/* Bytes of the IP packet, or of the largest one that a GSO packet is cut into. */
static __always_inline __u32 network_size(const struct __sk_buff *skb, const struct packet *p)
{
	if (skb->gso_size)
		return skb->gso_size + p->l4_header + p->l4 - p->l3;
	return skb->len - p->l3;
}

static __always_inline void count_flow(struct __sk_buff *skb, const struct flow *f)
{
	__u32 slot;

	slot = f->endpoint;
	if (slot)
		count_endpoint_tx(skb, slot);
	slot = f->peer;
	if (slot)
		count_endpoint_rx(skb, slot);
	slot = f->port;
	if (slot) {
		struct port_count *c = bpf_map_lookup_elem(&port_stats, &slot);

		if (c)
			count_add(f->flags & FLOW_ORIGIN ? &c->rx : &c->tx, skb->len);
	}
}

/* Writes the MACs; makes room for the header first where the device had none. 0 or -REASON. */
static __always_inline int write_ethernet(struct __sk_buff *skb, const struct packet *p,
					  const struct flow *f, const bool v6)
{
	struct ethhdr *eth;

	if (!p->l3 && bpf_skb_change_head(skb, sizeof(*eth), 0))
		return -REASON_NO_MEMORY;
	eth = header(skb, 0, sizeof(*eth));
	if (!eth)
		return -REASON_MALFORMED;
	__builtin_memcpy(eth->h_dest, f->dmac, 6);
	__builtin_memcpy(eth->h_source, f->smac, 6);
	if (!p->l3)
		eth->h_proto = v6 ? bpf_htons(ETH_P_IPV6) : bpf_htons(ETH_P_IP);
	return 0;
}

/*
 * Sets the don't-fragment bit of a packet that is too big and goes to the stack: its answer, which
 * would not come otherwise, has the sender make smaller ones, as RFC 1191 has it. A first fragment is
 * made to look whole, or connection tracking would wait for the others. 0 or negative.
 */
__noinline int forbid_fragments(struct __sk_buff *skb, __u32 l3)
{
	struct iphdr *ip = header(skb, l3, sizeof(*ip));
	__be16 old;

	if (!ip)
		return -1;
	old = ip->frag_off;
	ip->frag_off = bpf_htons(IP_DONT_FRAGMENT);
	ip->check = csum_apply(ip->check, csum_fold32(csum_change(0, old, ip->frag_off)));
	return 0;
}

/*
 * Forwards the packet by its flow entry. rewritten: addresses and ports were written already (ICMP
 * errors). Counts and returns the action.
 */
static __always_inline int forward(struct __sk_buff *skb, const struct packet *p, struct flow *f,
				   bool rewritten, const bool v6)
{
	bool routed = f->flags & FLOW_ROUTED;
	__u8 out = flow_out(f), hook = p->hook;
	struct bpf_redir_neigh hop = {};
	__u32 ifindex = f->ifindex;
	struct endpoint *peer;
	int err = 0;

	if (!out) {
		flow_touch(skb, p, f);
		count_flow(skb, f);
		return to_stack(skb, hook);
	}
	if (routed && p->ttl <= 1) {
		/*
		 * The stack answers: to a container as if we were not here, else to what it sees. A
		 * published port is ours: untranslated, the host's own sockets would take it.
		 */
		bool dials = f->port && f->flags & FLOW_ORIGIN;

		if ((hook != HOOK_CONTAINER || dials) && !rewritten)
			err = nat_rewrite(skb, p, f, false, v6);
		return err ? drop(skb, hook, -err) : to_stack(skb, hook);
	}
	if (out == HOOK_CONTAINER) {
		peer = endpoint_get(f->peer);
		if (!peer || peer->ifindex != ifindex || !(peer->flags & ENDPOINT_READY))
			return drop(skb, hook, REASON_STALE_FLOW);
		if (hook == HOOK_HOST && f->mtu && network_size(skb, p) > f->mtu)
			return drop(skb, hook, REASON_TOO_BIG);
	} else if (out == HOOK_UPLINK && f->mtu && network_size(skb, p) > f->mtu) {
		if (!(p->flags & PACKET_DONT_FRAGMENT) &&
		    (p->flags & PACKET_NO_L4 || forbid_fragments(skb, p->l3)))
			return drop(skb, hook, REASON_TOO_BIG);
		return to_stack(skb, hook);
	}
	if (!rewritten) /* an error keeps no flow alive, RFC 5508 section 4.2 */
		flow_touch(skb, p, f);
	count_flow(skb, f);
	if (rewritten) {
		struct flow bare = { .flags = 0 };

		err = nat_rewrite(skb, p, &bare, routed, v6);
	} else {
		err = nat_rewrite(skb, p, f, routed, v6);
	}
	if (err)
		return drop(skb, hook, -err);

	if (out == HOOK_CONTAINER) {
		err = write_ethernet(skb, p, f, v6);
		if (err)
			return drop(skb, hook, -err);
		count_fate(skb, hook, FATE_CONTAINER);
		if (hook == HOOK_HOST) {
			skb->mark = MARK_JUDGED;
			return bpf_redirect(ifindex, 0);
		}
		/* bpf_redirect_peer() wants a frame that was received. */
		if (hook == HOOK_CONTAINER && by_netkit(skb)) {
			skb->mark = MARK_DELIVERED;
			return bpf_redirect(ifindex, 0);
		}
		/* A bridge port sees every frame as for another host. */
		if (skb->pkt_type != PACKET_HOST)
			bpf_skb_change_type(skb, PACKET_HOST);
		return bpf_redirect_peer(ifindex, 0);
	}
	if (out == HOOK_HOST) {
		struct ethhdr *eth = header(skb, 0, sizeof(*eth));

		if (!eth)
			return drop(skb, hook, REASON_MALFORMED);
		__builtin_memset(eth->h_dest, 0, 6);
		__builtin_memset(eth->h_source, 0, 6);
		skb->mark = MARK_JUDGED;
		count_fate(skb, hook, FATE_LO);
		return bpf_redirect(ifindex, BPF_F_INGRESS);
	}
	skb->mark = MARK_JUDGED;
	count_fate(skb, hook, FATE_UPLINK);
	if (f->flags & FLOW_FIB)
		return bpf_redirect_neigh(ifindex, NULL, 0, 0);
	if (v6) {
		hop.nh_family = 10;
		__builtin_memcpy(hop.ipv6_nh, &((struct flow6 *)f)->nexthop, sizeof(hop.ipv6_nh));
	} else {
		hop.nh_family = 2;
		hop.ipv4_nh = *flow_nexthop4(f);
	}
	return bpf_redirect_neigh(ifindex, &hop, sizeof(hop), 0);
}

__noinline int forward4(struct __sk_buff *skb, struct flow4 *f, bool rewritten)
{
	struct scratch *s = scratch_get();

	return s && f ? forward(skb, &s->packet, &f->f, rewritten, false) : TC_ACT_SHOT;
}

__noinline int forward6(struct __sk_buff *skb, struct flow6 *f, bool rewritten)
{
	struct scratch *s = scratch_get();

	return s && f ? forward(skb, &s->packet, &f->f, rewritten, true) : TC_ACT_SHOT;
}

/* The same off the straight way: one copy a family. */
static __always_inline int forward_slow(struct __sk_buff *skb, struct flow *f, bool rewritten,
					const bool v6)
{
	return v6 ? forward6(skb, (struct flow6 *)f, rewritten) :
		    forward4(skb, (struct flow4 *)f, rewritten);
}

/* What the slow path decides, beside the actions of TC. */
enum verdict {
	VERDICT_OPEN = 64, /* open the flow of s->plan, then forward */
	VERDICT_FORWARD, /* along the flow that exists */
	VERDICT_ERROR, /* it is an ICMP error about the flow that s->quoted names */
};

static __always_inline int conclude_of(struct __sk_buff *skb, struct scratch *s, int verdict,
				       const bool v6)
{
	struct packet *p = &s->packet;
	struct port_count *c;
	struct flow *f;
	__u32 slot;
	int err;

	if (verdict == VERDICT_ERROR) {
		f = quoted_flow(s, p->hook, v6);
		if (!f)
			return drop(skb, p->hook, REASON_NO_FLOW);
		/* A container's own error leaves by an uplink under the flow's address. */
		if (f->flags & FLOW_NAT &&
		    icmp_rewrite(skb, f, p->hook == HOOK_CONTAINER && flow_out(f) == HOOK_UPLINK,
				 v6))
			return drop(skb, p->hook, REASON_MALFORMED);
		return forward_slow(skb, f, true, v6);
	}
	if (verdict == VERDICT_OPEN && syn_concerns(p) && !s->plan.confirmed) {
		err = v6 ? syn_wait6(skb) : syn_wait4(skb);
		if (err < 0)
			return drop(skb, p->hook, -err);
		if (err)
			return forward_slow(skb, v6 ? &s->flow6.f : &s->flow4.f, false, v6);
	}
	if (verdict == VERDICT_OPEN) {
		err = flow_open(skb, v6);
		if (err) {
			slot = s->plan.endpoint;
			if (slot)
				count_endpoint_drop(skb, slot);
			return drop(skb, p->hook, -err);
		}
		if (s->plan.confirmed)
			syn_forget(s, v6);
		slot = s->plan.port;
		c = slot ? bpf_map_lookup_elem(&port_stats, &slot) : NULL;
		if (c)
			c->connections++;
	} else if (verdict != VERDICT_FORWARD) {
		return verdict;
	}
	f = flow_find_slow(s, v6);
	if (!f && verdict == VERDICT_FORWARD) {
		f = syn_find(s, v6);
		if (f)
			syn_answer(skb, p, f, v6);
	}
	if (!f)
		return drop(skb, p->hook, REASON_FLOW_TABLE_FULL);
	flow_turn(f, p->proto, p->tcp_flags, v6);
	return forward_slow(skb, f, false, v6);
}

__noinline int conclude4(struct __sk_buff *skb, int verdict)
{
	struct scratch *s = scratch_get();

	return s ? conclude_of(skb, s, verdict, false) : TC_ACT_SHOT;
}

__noinline int conclude6(struct __sk_buff *skb, int verdict)
{
	struct scratch *s = scratch_get();

	return s ? conclude_of(skb, s, verdict, true) : TC_ACT_SHOT;
}

/* Carries the slow path's verdict out. */
static __always_inline int conclude(struct __sk_buff *skb, int verdict, const bool v6)
{
	return v6 ? conclude6(skb, verdict) : conclude4(skb, verdict);
}
