/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * TCP from the world that belongs to no flow yet. It waits in tables of its own, which may lose any entry,
 * until its client acknowledges what the container sent: who only claims to be at an address has not seen
 * that. So what nobody confirms takes no room from what somebody did.
 */
#pragma once

#include "nat.h"

#define SYN_WINDOW (1 << 20) /* bytes that a client may acknowledge beyond the first seen */

static __always_inline void *syn_table(const bool v6)
{
	return v6 ? (void *)&syns6 : (void *)&syns4;
}

static __always_inline bool syn_concerns(const struct packet *p)
{
	return p->hook == HOOK_UPLINK && p->proto == IPPROTO_TCP;
}

/* The waiting connection that a container's packet answers in, or NULL. A bare SYN is no answer. */
static __always_inline struct flow *syn_find(struct scratch *s, const bool v6)
{
	const struct packet *p = &s->packet;

	if (p->proto != IPPROTO_TCP || !(p->tcp_flags & (TCP_ACK | TCP_RST)))
		return NULL;
	if (v6) {
		flow_key6(&s->key6, &p->saddr, &p->daddr, p->sport, p->dport, p->proto, p->hook);
		return bpf_map_lookup_elem(&syns6, &s->key6);
	}
	flow_key4(&s->key4, &p->saddr, &p->daddr, p->sport, p->dport, p->proto, p->hook);
	return bpf_map_lookup_elem(&syns4, &s->key4);
}

/* Remembers what the container sends in the waiting connection f. */
static __always_inline void syn_answer(struct __sk_buff *skb, const struct packet *p,
				       struct flow *f, const bool v6)
{
	__u32 *seq = v6 ? &((struct syn6 *)f)->seq : &((struct syn4 *)f)->seq;
	__be32 sent;

	if (p->tcp_flags & TCP_RST ||
	    bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, seq), &sent, sizeof(sent)))
		return;
	/* The first of a stream: its client is behind what is on the way to it. */
	if (p->tcp_flags & TCP_SYN || !seq[1] || bpf_ntohl(sent) - seq[0] >= SYN_WINDOW)
		seq[0] = bpf_ntohl(sent);
	seq[1] = 1;
}

/*
 * Whether the packet acknowledges what the container sent in the waiting connection f. While no flow may be
 * opened none does: its client might not send again, so it goes on waiting.
 */
static __always_inline bool syn_confirms(struct __sk_buff *skb, const struct packet *p,
					 const struct config *cfg, const struct flow *f,
					 const bool v6)
{
	const __u32 *seq = v6 ? &((const struct syn6 *)f)->seq : &((const struct syn4 *)f)->seq;
	__be32 ack;

	return (p->tcp_flags & (TCP_SYN | TCP_RST | TCP_ACK)) == TCP_ACK && seq[1] &&
	       !tables_held(cfg) &&
	       !bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, ack_seq), &ack,
				   sizeof(ack)) &&
	       bpf_ntohl(ack) - seq[0] < SYN_WINDOW;
}

/* Whether the packet dials what the waiting connection was dialled as. */
static __always_inline bool syn_same(const struct packet *p, const struct flow *f, const bool v6)
{
	if (f->sport != p->dport)
		return false;
	if (v6)
		return addr_equal(&((const struct flow6 *)f)->saddr, &p->daddr);
	return ((const struct flow4 *)f)->saddr == p->daddr.w[3];
}

/* The waiting connection f is to become the flow of s->plan. */
static __always_inline void syn_confirmed(struct scratch *s, const struct flow *f)
{
	s->plan.confirmed = true;
	s->plan.seen_flags = f->tcp_flags;
	s->plan.seen_packets = f->packets;
	s->plan.seen_bytes = f->bytes;
}

/* It has become one. Where that was refused it still waits, for its client's next packet. */
static __always_inline void syn_forget(struct scratch *s, const bool v6)
{
	const struct packet *p = &s->packet;
	const struct plan *n = &s->plan;

	if (v6) {
		flow_key6(&s->key6, &n->daddr, &p->saddr, n->dport, p->sport, p->proto,
			  HOOK_CONTAINER);
		bpf_map_delete_elem(&syns6, &s->key6);
	} else {
		flow_key4(&s->key4, &n->daddr, &p->saddr, n->dport, p->sport, p->proto,
			  HOOK_CONTAINER);
		bpf_map_delete_elem(&syns4, &s->key4);
	}
}

/*
 * What becomes of s->plan, which a TCP packet of the world would open. 1: it waits, and the packet goes
 * along s->flow4 or s->flow6; 0: it is a flow; -REASON.
 */
static __always_inline int syn_wait_of(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	struct packet *p = &s->packet;
	struct config *cfg = config_get();
	void *key = v6 ? (void *)&s->key6 : (void *)&s->key4;
	struct flow *f;
	__u32 *seq;

	if (!cfg)
		return -REASON_NOT_READY;
	flow_fill_reverse(s, cfg, v6);
	f = bpf_map_lookup_elem(syn_table(v6), key);
	if (f && !syn_same(p, f, v6))
		f = NULL;
	if (f && syn_confirms(skb, p, cfg, f, v6)) {
		syn_confirmed(s, f);
		return 0;
	}
	if (p->tcp_flags & TCP_RST && !f)
		return -REASON_NO_FLOW;
	if (!f && flow_capped(cfg, &s->plan))
		return -REASON_FLOW_CAP;
	/* Another way to the same container port, or the other half of a flow: it is for flow_open(). */
	if (!f && bpf_map_lookup_elem(flow_table(v6), key))
		return 0;
	if (!f || f->generation != (__u16)cfg->generation) {
		if (v6) {
			s->syn6.answer = s->flow6;
			seq = &s->syn6.seq;
		} else {
			s->syn4.answer = s->flow4;
			seq = &s->syn4.seq;
		}
		seq[0] = 0;
		seq[1] = 0;
		if (bpf_map_update_elem(syn_table(v6), key,
					v6 ? (void *)&s->syn6 : (void *)&s->syn4, BPF_ANY))
			return -REASON_FLOW_TABLE_FULL;
	}
	flow_fill_forward(s, cfg, v6);
	return 1;
}

__noinline int syn_wait4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? syn_wait_of(skb, s, false) : -REASON_FLOW_TABLE_FULL;
}

__noinline int syn_wait6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? syn_wait_of(skb, s, true) : -REASON_FLOW_TABLE_FULL;
}
