/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Stage 2, flow: find, open, age. A flow is two entries, one a direction, each keyed as the packet is
 * seen at its hook and written only by its own direction. The tables are plain hashes: nothing is
 * evicted but by its own timeout.
 *
 * Both families share the code; `v6` is always a constant, so that each program half is compiled for
 * one of them.
 */
#pragma once

#include "count.h"
#include "lookup.h"

#include <linux/errno.h>

/* What a flow is to become: filled by policy, turned into two entries by flow_open(). */
struct plan {
	struct addr saddr; /* of the opening direction, after rewriting */
	struct addr daddr;
	struct addr nexthop; /* where it leaves by an uplink */
	struct addr reverse_nexthop;
	__u32 ifindex;
	__u32 reverse_ifindex;
	__be16 sport;
	__be16 dport;
	__u16 endpoint; /* slot of the sender */
	__u16 peer; /* slot of the receiver */
	__u16 port; /* slot of the published port */
	__u16 mtu;
	__u16 reverse_mtu;
	__u8 reverse_hook; /* where answers will be seen */
	__u8 flags; /* FLOW_ROUTED, FLOW_SNAT, FLOW_FIB */
	__u8 reverse_flags;
	bool confirmed; /* by a client that has seen the container's answers */
	__u8 seen_flags; /* their TCP flags, packets and bytes */
	__u32 seen_packets;
	__u64 seen_bytes;
	__u8 dmac[6];
	__u8 smac[6];
	__u8 reverse_dmac[6];
	__u8 reverse_smac[6];
};

/* What the kernel's routes are asked. */
struct route_query {
	struct addr from;
	struct addr to;
	struct addr source; /* out: to masquerade with, where asked for */
	__u32 bridge; /* index of the device that the packet enters by */
	bool want_source;
	bool reverse; /* it is the reverse half of the plan that is filled */
};

/* The packet that an ICMP error quotes. */
struct quoted {
	struct packet p;
	__u32 l3; /* offset of its IP header */
	__u32 l4; /* and of what follows it */
	__u32 check; /* offset of its L4 checksum; 0: none, or cut off */
	__sum16 sum; /* and the value */
	__u16 readable; /* it said enough; of a container's errors only */
	struct addr saddr; /* as the quoted packet's own sender knows it */
	struct addr daddr;
};

/*
 * What a program works on: more than fits on the stack, and shared with the functions of the slow
 * path. No other program runs on the CPU before it is done with it.
 */
struct scratch {
	struct packet packet;
	struct packet error; /* kept while it is judged as a packet of its flow */
	struct plan plan;
	struct route_query route;
	__u64 fib[sizeof(struct bpf_fib_lookup) /
		  8]; /* a struct bpf_fib_lookup, which bpf2go cannot name */
	__u32 mark; /* that the packet is judged by where the world dials a container */
	struct bpf_sock_tuple tuple;
	struct quoted quoted;
	struct open_key open;
	struct flow4_key key4; /* of the reverse entry */
	struct flow4_key forward4;
	struct flow6_key key6;
	struct flow6_key forward6;
	struct flow4_key partner4;
	struct flow6_key partner6;
	struct flow4 flow4;
	struct flow6 flow6;
	struct syn4 syn4;
	struct syn6 syn6;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

#define MAX_TAKEOVERS 1024 /* a power of two */

/*
 * Finished flows that somebody is about to delete, by both keys' hash: locks that are only tried. Whoever
 * deletes looks again behind the lock, so that nobody deletes what another has just put there. Pinned: all
 * programs that share the flow tables share it, whoever loaded them.
 */
MAP(BPF_MAP_TYPE_ARRAY, takeovers, __u32, __u32, MAX_TAKEOVERS, 0);

static __always_inline bool takeover_begin(__u32 slot)
{
	__u32 *lock = bpf_map_lookup_elem(&takeovers, &slot);

	return lock && !__sync_val_compare_and_swap(lock, 0, 1);
}

static __always_inline void takeover_end(__u32 slot)
{
	__u32 *lock = bpf_map_lookup_elem(&takeovers, &slot);

	if (lock)
		__sync_lock_test_and_set(lock, 0);
}

/* The expiry that runs when nobody asked for one: with the daemon dead, or when a table fills up. */
struct gc {
	struct bpf_timer timer;
	__u64 called; /* ns: by the daemon */
	__u64 kicked; /* ns: by a full table */
	__u64 armed;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct gc);
} gc SEC(".maps");

#define NSEC_PER_SEC 1000000000ULL
#define GC_PERIOD (10 * NSEC_PER_SEC)
#define GC_DAEMON_SILENT (60 * NSEC_PER_SEC)
#define GC_KICK_GAP (NSEC_PER_SEC / 4)

static __always_inline struct scratch *scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* The scratch with an empty packet for the hook. */
static __always_inline struct scratch *scratch_start(enum hook hook)
{
	struct scratch *s = scratch_get();

	if (!s)
		return NULL;
	__builtin_memset(&s->packet, 0, sizeof(s->packet));
	s->packet.hook = hook;
	return s;
}

/* flow_find() with the key in the scratch: the slow path is short of stack. */
static __always_inline struct flow *flow_find_slow(struct scratch *s, const bool v6)
{
	struct packet *p = &s->packet;

	if (v6) {
		flow_key6(&s->forward6, &p->saddr, &p->daddr, p->sport, p->dport, p->proto,
			  p->hook);
		return bpf_map_lookup_elem(&flows6, &s->forward6);
	}
	flow_key4(&s->forward4, &p->saddr, &p->daddr, p->sport, p->dport, p->proto, p->hook);
	return bpf_map_lookup_elem(&flows4, &s->forward4);
}

static __always_inline __u8 flow_out(const struct flow *f)
{
	return f->flags & FLOW_OUT_MASK;
}

/* IPv4 next hop of an entry that leads to an uplink: it stands where the MACs would. */
static __always_inline __be32 *flow_nexthop4(struct flow *f)
{
	return (__be32 *)f->dmac;
}

/* Key of the other direction's entry. The entry's own key is only needed for the protocol. */
static __always_inline void partner_key4(struct flow4_key *k, const struct flow4 *f, __u8 proto)
{
	k->saddr = f->daddr;
	k->daddr = f->saddr;
	k->sport = f->f.dport;
	k->dport = f->f.sport;
	k->proto = proto;
	k->hook = flow_out(&f->f);
	k->pad = 0;
}

static __always_inline void partner_key6(struct flow6_key *k, const struct flow6 *f, __u8 proto)
{
	k->saddr = f->daddr;
	k->daddr = f->saddr;
	k->sport = f->f.dport;
	k->dport = f->f.sport;
	k->proto = proto;
	k->hook = flow_out(&f->f);
	k->pad = 0;
}

/* Slot of the flow's lock in takeovers; the same for both directions. key must be another copy than the map's own. */
static __always_inline __u32 takeover_slot(const void *key, const struct flow *f, const bool v6)
{
	__u32 addrs, ports;

	if (v6) {
		const struct flow6_key *k = key;
		const struct flow6 *f6 = (const struct flow6 *)f;

		addrs = k->saddr.w[3] + k->daddr.w[3] + f6->saddr.w[3] + f6->daddr.w[3];
		ports = (__u32)k->sport + k->dport + f->sport + f->dport;
	} else {
		const struct flow4_key *k = key;
		const struct flow4 *f4 = (const struct flow4 *)f;

		addrs = k->saddr + k->daddr + f4->saddr + f4->daddr;
		ports = (__u32)k->sport + k->dport + f->sport + f->dport;
	}
	addrs ^= ports * 0x9e3779b1; /* 2^32 over the golden ratio */
	return (addrs ^ addrs >> 10 ^ addrs >> 20) & (MAX_TAKEOVERS - 1);
}

static __always_inline struct flow *flow_partner(const struct flow *f, __u8 proto, const bool v6)
{
	if (!flow_out(f))
		return NULL;
	if (v6) {
		struct flow6_key k;

		partner_key6(&k, (const struct flow6 *)f, proto);
		return bpf_map_lookup_elem(&flows6, &k);
	} else {
		struct flow4_key k;

		partner_key4(&k, (const struct flow4 *)f, proto);
		return bpf_map_lookup_elem(&flows4, &k);
	}
}

static __always_inline void gauge_add(const bool v6, __s64 n)
{
	__u32 zero = 0;
	struct flow_gauge *g = bpf_map_lookup_elem(&flow_gauge, &zero);

	if (g)
		__sync_fetch_and_add(&g->entries[v6], n);
}

/* How far timeouts are shortened: 0 up to 3/4 full, a quarter from there, a 16th from 15/16. */
static __always_inline __u32 table_pressure(const struct config *cfg, const bool v6)
{
	__u32 zero = 0;
	struct flow_gauge *g = bpf_map_lookup_elem(&flow_gauge, &zero);
	__u64 max = cfg->max_flows[v6], used;

	if (!g || g->entries[v6] < 0)
		return 0;
	used = g->entries[v6];
	if (used * 16 >= max * 15)
		return 4;
	if (used * 4 >= max * 3)
		return 2;
	return 0;
}

/*
 * Whether f's reset is beyond doubt; g is the other direction. One from a container is its own, and
 * one that is all that was ever answered refuses. Any other may be forged (RFC 7857 2.2).
 */
static __always_inline bool flow_reset_by(const struct flow *f, const struct flow *g)
{
	return f->tcp_flags & TCP_RST && (flow_out(g) != HOOK_UPLINK || f->packets <= 1);
}

/* Ticks that a flow may rest; f is one direction, g the other or NULL. */
static __always_inline __u32 flow_timeout(const struct timeouts *t, __u8 proto,
					  const struct flow *f, const struct flow *g)
{
	__u8 both = f->tcp_flags | (g ? g->tcp_flags : 0);

	if (proto == IPPROTO_TCP) {
		if (both & TCP_RST)
			return !g || flow_reset_by(f, g) || flow_reset_by(g, f) ? t->tcp_closed :
										  t->tcp_fin;
		if (!flow_out(f)) /* one-sided: re-made by the next packet */
			return both & TCP_FIN ? t->tcp_closed : t->udp;
		if (!g || !g->packets || !f->packets)
			return t->tcp_syn;
		if (f->tcp_flags & g->tcp_flags & TCP_FIN)
			return t->tcp_closed;
		return both & TCP_FIN ? t->tcp_fin : t->tcp_established;
	}
	if (proto == IPPROTO_UDP)
		return g && g->packets && f->packets ? t->udp : t->udp_new;
	if (proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6)
		return t->icmp;
	return t->other;
}

static __always_inline bool flow_expired(const struct config *cfg, __u8 proto, const struct flow *f,
					 const struct flow *g, __u32 now, __u32 pressure)
{
	__u32 last = f->last_seen, limit = flow_timeout(&cfg->timeouts, proto, f, g);

	if (g && (__s32)(g->last_seen - last) > 0)
		last = g->last_seen;
	/* An established flow is shortened only by the harder step: it is a user's. */
	if (pressure && limit == cfg->timeouts.tcp_established)
		pressure = pressure > 2 ? 2 : 0;
	limit >>= pressure;
	/* A packet in each tick keeps any flow. */
	return (__s32)(now - last) > (__s32)(limit ?: 1);
}

/*
 * A tuple held by a flow that is over may be taken by another: it expired, was reset, or its
 * container closed first, so that the far side is not left in TIME_WAIT (RFC 6191).
 */
static __always_inline bool flow_reusable(const struct config *cfg, __u8 proto,
					  const struct flow *f, const struct flow *g, __u32 now,
					  const bool v6)
{
	if (flow_expired(cfg, proto, f, g, now, table_pressure(cfg, v6)))
		return true;
	if (proto != IPPROTO_TCP || !g)
		return false;
	if (flow_reset_by(f, g) || flow_reset_by(g, f))
		return true;
	if (!((f->tcp_flags | g->tcp_flags) & TCP_RST) &&
	    (!(f->tcp_flags & g->tcp_flags & TCP_FIN) || !(g->flags & FLOW_CLOSED_FIRST)))
		return false;
	/*
	 * Quiet for a second at least: the last ACK must be there before another's SYN, and who was
	 * not reset at all has had time to go on.
	 */
	return (__s32)(now - f->last_seen) >= 2 && (__s32)(now - g->last_seen) >= 2;
}

/* Whether it was there. */
static __always_inline bool flow_delete(const void *key, const bool v6)
{
	if (bpf_map_delete_elem(flow_table(v6), key))
		return false;
	gauge_add(v6, -1);
	return true;
}

/* The endpoint that a flow counts for, by either half: who opened it, else whom it reaches. Its slot, or 0. */
static __always_inline __u32 flow_payer(const struct flow *f)
{
	__u32 opener = f->flags & FLOW_ORIGIN ? f->endpoint : f->peer;

	return opener ? opener : f->flags & FLOW_ORIGIN ? f->peer : f->endpoint;
}

static __always_inline void flow_charge(__u32 slot, __s64 n)
{
	struct endpoint_flows *e = slot ? bpf_map_lookup_elem(&endpoint_flows, &slot) : NULL;

	if (e)
		__sync_fetch_and_add(&e->flows, n);
}

/* Whether the endpoint that s->plan counts for may have no more. */
static __always_inline bool flow_capped(const struct config *cfg, const struct plan *n)
{
	__u32 slot = n->endpoint ? n->endpoint : n->peer;
	struct endpoint_flows *e;

	if (!cfg->endpoint_flows || !slot)
		return false;
	e = bpf_map_lookup_elem(&endpoint_flows, &slot);
	return e && e->flows >= (__s64)cfg->endpoint_flows;
}

/* Removes the entry f of key, and its other half where there is one. */
static __always_inline void flow_delete_halves(const void *key, const void *other,
					       const struct flow *f, const bool v6)
{
	/* f may be another flow's afterwards. */
	bool origin = f->flags & FLOW_ORIGIN, gone, other_gone;
	__u32 payer = flow_payer(f);

	other_gone = other && flow_delete(other, v6);
	gone = flow_delete(key, v6);
	if (origin ? gone : other_gone)
		flow_charge(payer, -1);
}

/* Removes both directions. k must be another copy of the key than the map's own. */
static __always_inline void flow_delete_pair(const void *key, const struct flow *f, const bool v6)
{
	if (v6) {
		struct flow6_key other;

		partner_key6(&other, (const struct flow6 *)f,
			     ((const struct flow6_key *)key)->proto);
		flow_delete_halves(key, flow_out(f) ? &other : NULL, f, v6);
	} else {
		struct flow4_key other;

		partner_key4(&other, (const struct flow4 *)f,
			     ((const struct flow4_key *)key)->proto);
		flow_delete_halves(key, flow_out(f) ? &other : NULL, f, v6);
	}
}

/* Removes the flow that the packet found at hook. */
static __always_inline void flow_forget(const struct packet *p, __u8 hook, const struct flow *f,
					const bool v6)
{
	if (v6) {
		struct flow6_key k;

		flow_key6(&k, &p->saddr, &p->daddr, p->sport, p->dport, p->proto, hook);
		flow_delete_pair(&k, f, v6);
	} else {
		struct flow4_key k;

		flow_key4(&k, &p->saddr, &p->daddr, p->sport, p->dport, p->proto, hook);
		flow_delete_pair(&k, f, v6);
	}
}

/* Accounts the packet to its direction. */
static __always_inline void flow_touch(struct __sk_buff *skb, const struct packet *p,
				       struct flow *f)
{
	__u8 sent = f->tcp_flags | p->tcp_flags;
	__u32 now = ticks();

	f->packets++;
	f->bytes += skb->len;
	if (f->last_seen != now)
		f->last_seen = now;
	/* Who goes on has not reset: somebody forged it (RFC 7857 2.2). */
	if (f->tcp_flags & TCP_RST)
		sent = (f->tcp_flags & ~TCP_RST) | p->tcp_flags;
	if (sent != f->tcp_flags)
		f->tcp_flags = sent;
}

/*
 * The rare TCP packets that change what a flow is: a SYN on a finished flow opens it again (the same
 * tuple was reused), and the first FIN names who closed first.
 */
static __always_inline void flow_turn_of(struct flow *f, __u8 tcp_flags, const bool v6)
{
	struct flow *g = flow_partner(f, IPPROTO_TCP, v6);

	if (!g)
		return;
	if (tcp_flags & TCP_FIN) {
		if (!((f->tcp_flags | g->tcp_flags) & TCP_FIN))
			f->flags |= FLOW_CLOSED_FIRST;
	} else if ((f->tcp_flags | g->tcp_flags) & (TCP_FIN | TCP_RST)) {
		/* The one write across directions: nobody sends on a closed connection. */
		f->tcp_flags = 0;
		g->tcp_flags = 0;
		f->flags &= ~FLOW_CLOSED_FIRST;
		g->flags &= ~FLOW_CLOSED_FIRST;
		g->packets = 0;
		f->first_seen = ticks();
	}
}

__noinline int flow_turn4(struct flow4 *f, __u8 tcp_flags)
{
	if (f)
		flow_turn_of(&f->f, tcp_flags, false);
	return 0;
}

__noinline int flow_turn6(struct flow6 *f, __u8 tcp_flags)
{
	if (f)
		flow_turn_of(&f->f, tcp_flags, true);
	return 0;
}

/* The same for any packet of the flow: most are no turn. */
static __always_inline void flow_turn(struct flow *f, __u8 proto, __u8 tcp_flags, const bool v6)
{
	if (proto != IPPROTO_TCP ||
	    (!(tcp_flags & TCP_FIN) && (tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN))
		return;
	if (v6)
		flow_turn6((struct flow6 *)f, tcp_flags);
	else
		flow_turn4((struct flow4 *)f, tcp_flags);
}

static __always_inline void flow_fill(struct flow *f, const struct plan *n, bool reverse,
				      __u32 generation, __u8 hook)
{
	__u32 now = ticks();

	__builtin_memset(f, 0, sizeof(*f));
	f->first_seen = now;
	f->last_seen = now;
	f->generation = generation;
	f->port = n->port;
	if (!reverse) {
		f->ifindex = n->ifindex;
		f->endpoint = n->endpoint;
		f->peer = n->peer;
		f->mtu = n->mtu;
		f->flags = n->flags | n->reverse_hook | FLOW_ORIGIN;
		__builtin_memcpy(f->dmac, n->dmac, 6);
		__builtin_memcpy(f->smac, n->smac, 6);
	} else {
		f->ifindex = n->reverse_ifindex;
		f->endpoint = n->peer;
		f->peer = n->endpoint;
		f->mtu = n->reverse_mtu;
		f->flags = n->reverse_flags | hook;
		f->tcp_flags = n->seen_flags;
		f->packets = n->seen_packets;
		f->bytes = n->seen_bytes;
		__builtin_memcpy(f->dmac, n->reverse_dmac, 6);
		__builtin_memcpy(f->smac, n->reverse_smac, 6);
	}
}

static __always_inline bool plan_rewrites(const struct packet *p, const struct plan *n)
{
	return !addr_equal(&p->saddr, &n->saddr) || !addr_equal(&p->daddr, &n->daddr) ||
	       p->sport != n->sport || p->dport != n->dport;
}

/* The answers' half of the plan's flow: into s->flow4 or s->flow6, its key into s->key4 or s->key6. */
static __always_inline void flow_fill_reverse(struct scratch *s, const struct config *cfg,
					      const bool v6)
{
	const struct packet *p = &s->packet;
	const struct plan *n = &s->plan;

	if (v6) {
		flow_key6(&s->key6, &n->daddr, &n->saddr, n->dport, n->sport, p->proto,
			  n->reverse_hook);
		flow_fill(&s->flow6.f, n, true, cfg->generation, p->hook);
		s->flow6.f.sport = p->dport;
		s->flow6.f.dport = p->sport;
		s->flow6.saddr = p->daddr;
		s->flow6.daddr = p->saddr;
		s->flow6.nexthop = n->reverse_nexthop;
		if (plan_rewrites(p, n))
			s->flow6.f.flags |= FLOW_NAT;
	} else {
		flow_key4(&s->key4, &n->daddr, &n->saddr, n->dport, n->sport, p->proto,
			  n->reverse_hook);
		flow_fill(&s->flow4.f, n, true, cfg->generation, p->hook);
		s->flow4.f.sport = p->dport;
		s->flow4.f.dport = p->sport;
		s->flow4.saddr = p->daddr.w[3];
		s->flow4.daddr = p->saddr.w[3];
		if (p->hook == HOOK_UPLINK)
			*flow_nexthop4(&s->flow4.f) = n->reverse_nexthop.w[3];
		if (plan_rewrites(p, n))
			s->flow4.f.flags |= FLOW_NAT;
	}
}

/* The opening half, into s->flow4 or s->flow6; its key into s->forward4 or s->forward6. */
static __always_inline void flow_fill_forward(struct scratch *s, const struct config *cfg,
					      const bool v6)
{
	const struct packet *p = &s->packet;
	const struct plan *n = &s->plan;

	if (v6) {
		flow_key6(&s->forward6, &p->saddr, &p->daddr, p->sport, p->dport, p->proto,
			  p->hook);
		flow_fill(&s->flow6.f, n, false, cfg->generation, p->hook);
		s->flow6.f.sport = n->sport;
		s->flow6.f.dport = n->dport;
		s->flow6.saddr = n->saddr;
		s->flow6.daddr = n->daddr;
		s->flow6.nexthop = n->nexthop;
		if (plan_rewrites(p, n))
			s->flow6.f.flags |= FLOW_NAT;
	} else {
		flow_key4(&s->forward4, &p->saddr, &p->daddr, p->sport, p->dport, p->proto,
			  p->hook);
		flow_fill(&s->flow4.f, n, false, cfg->generation, p->hook);
		s->flow4.f.sport = n->sport;
		s->flow4.f.dport = n->dport;
		s->flow4.saddr = n->saddr.w[3];
		s->flow4.daddr = n->daddr.w[3];
		if (n->reverse_hook == HOOK_UPLINK)
			*flow_nexthop4(&s->flow4.f) = n->nexthop.w[3];
		if (plan_rewrites(p, n))
			s->flow4.f.flags |= FLOW_NAT;
	}
}

/*
 * Takes the tuple on which answers will come. 0; -EEXIST where a living flow holds it; -E2BIG where
 * the table is full.
 */
static __always_inline int flow_take_reverse_of(struct scratch *s, const bool v6)
{
	const struct packet *p = &s->packet;
	const struct config *cfg = config_get();
	void *table = flow_table(v6), *key, *value, *partner;
	struct flow *held, *g;
	bool same;
	__u32 slot;
	int err; /* not long: map helpers before Linux 6.4 leave the upper half of a negative number 0 */

	if (!cfg)
		return -ENOENT;
	flow_fill_reverse(s, cfg, v6);
	key = v6 ? (void *)&s->key6 : (void *)&s->key4;
	value = v6 ? (void *)&s->flow6 : (void *)&s->flow4;
	err = bpf_map_update_elem(table, key, value, BPF_NOEXIST);
	if (!err) {
		gauge_add(v6, 1);
		return 0;
	}
	if (err != -EEXIST)
		return err;
	held = bpf_map_lookup_elem(table, key);
	if (!held)
		return -EEXIST;
	if (v6) {
		struct flow6 *h = (struct flow6 *)held;

		same = addr_equal(&h->daddr, &p->saddr) && addr_equal(&h->saddr, &p->daddr);
	} else {
		struct flow4 *h = (struct flow4 *)held;

		same = h->daddr == p->saddr.w[3] && h->saddr == p->daddr.w[3];
	}
	same = same && held->dport == p->sport && held->sport == p->dport &&
	       flow_out(held) == p->hook;
	if (!same) {
		/* Keys in the scratch: this is the deepest call, and the stack is short. */
		if (v6) {
			partner_key6(&s->partner6, (struct flow6 *)held, p->proto);
			partner = &s->partner6;
		} else {
			partner_key4(&s->partner4, (struct flow4 *)held, p->proto);
			partner = &s->partner4;
		}
		g = flow_out(held) ? bpf_map_lookup_elem(table, partner) : NULL;
		if (!flow_reusable(cfg, p->proto, held, g, ticks(), v6))
			return -EEXIST;
		slot = takeover_slot(key, held, v6);
		if (!takeover_begin(slot))
			return -EEXIST;
		/* Again: another CPU may have been faster. */
		err = -EEXIST;
		held = bpf_map_lookup_elem(table, key);
		g = held && flow_out(held) ? bpf_map_lookup_elem(table, partner) : NULL;
		if (held && takeover_slot(key, held, v6) == slot &&
		    flow_reusable(cfg, p->proto, held, g, ticks(), v6)) {
			flow_delete_halves(key, g ? partner : NULL, held, v6);
			err = bpf_map_update_elem(table, key, value, BPF_NOEXIST);
			if (!err)
				gauge_add(v6, 1);
		}
		takeover_end(slot);
		return err;
	}
	/* Our own half of a flow whose other half is gone, or another CPU's just now. */
	return bpf_map_update_elem(table, key, value, BPF_EXIST);
}

__noinline int flow_take_reverse4(void)
{
	struct scratch *s = scratch_get();

	return s ? flow_take_reverse_of(s, false) : -EINVAL;
}

__noinline int flow_take_reverse6(void)
{
	struct scratch *s = scratch_get();

	return s ? flow_take_reverse_of(s, true) : -EINVAL;
}

static __always_inline int flow_take_reverse(const bool v6)
{
	return v6 ? flow_take_reverse6() : flow_take_reverse4();
}

/* Adds the opening direction's entry after the reverse was taken; undoes that on failure. */
static __always_inline int flow_add_forward(struct scratch *s, const struct config *cfg,
					    const bool v6)
{
	void *table = flow_table(v6), *key = v6 ? (void *)&s->forward6 : (void *)&s->forward4,
	     *value = v6 ? (void *)&s->flow6 : (void *)&s->flow4;
	int err; /* as above */

	flow_fill_forward(s, cfg, v6);
	err = bpf_map_update_elem(table, key, value, BPF_NOEXIST);
	if (err == -EEXIST)
		return bpf_map_update_elem(table, key, value, BPF_EXIST);
	if (!err) {
		gauge_add(v6, 1);
		flow_charge(flow_payer(value), 1);
	} else if (s->plan.reverse_hook) {
		flow_delete(v6 ? (void *)&s->key6 : (void *)&s->key4, v6);
	}
	return err;
}

/* Asks for an expiry now where a table fills up; at most four a second. */
static __always_inline void gc_kick(const struct config *cfg, const bool v6)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u32 zero = 0;
	struct gc *g;

	if (!table_pressure(cfg, v6))
		return;
	g = bpf_map_lookup_elem(&gc, &zero);
	if (!g || !g->armed || now - g->kicked < GC_KICK_GAP)
		return;
	g->kicked = now;
	bpf_timer_start(&g->timer, 0, 0);
}

/* One-sided entry: the stack's traffic with a container, remembered so that it costs one lookup. */
static __always_inline void flow_open_stack(struct scratch *s, const struct config *cfg,
					    __u32 endpoint, const bool v6)
{
	const struct packet *p = &s->packet;
	struct plan *n = &s->plan;

	__builtin_memset(n, 0, sizeof(*n));
	n->saddr = p->saddr;
	n->daddr = p->daddr;
	n->sport = p->sport;
	n->dport = p->dport;
	n->endpoint = endpoint;
	/* A full table costs lookups here, not packets; so does a container that has its share. */
	if (!flow_capped(cfg, n))
		flow_add_forward(s, cfg, v6);
	gc_kick(cfg, v6);
}
