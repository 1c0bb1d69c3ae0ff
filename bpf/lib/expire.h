/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Ageing. The daemon runs expire and purge every few seconds as SYSCALL programs; a pinned timer
 * steps in when nobody called for a minute or a table fills up. Deletion re-reads the timestamps of
 * both directions in the live entries, so that no flow is lost to an old snapshot.
 */
#pragma once

#include "flow.h"

struct sweep {
	struct expire_args args;
	struct config *cfg;
	__u32 now;
	__u32 pressure[2];
	bool purge; /* also what belongs to slots that are gone */
	bool count; /* the flows of each endpoint, too */
};

static __always_inline bool slot_gone(__u32 slot)
{
	struct endpoint *ep;

	if (!slot)
		return false;
	ep = bpf_map_lookup_elem(&endpoint_slots, &slot);
	return !ep || !ep->ifindex;
}

static __always_inline bool port_gone(__u32 slot)
{
	struct port_slot *port;

	if (!slot)
		return false;
	port = bpf_map_lookup_elem(&port_slots, &slot);
	return !port || !port->live;
}

static __always_inline bool flow_orphaned(const struct flow *f)
{
	__u32 slot = f->peer;
	struct endpoint *peer;

	if (slot_gone(f->endpoint) || slot_gone(slot) || port_gone(f->port))
		return true;
	if (flow_out(f) != HOOK_CONTAINER)
		return false;
	peer = bpf_map_lookup_elem(&endpoint_slots, &slot);
	return peer && peer->ifindex != f->ifindex; /* it came back on another interface */
}

static __always_inline void sweep_count(const struct sweep *s, const struct flow *f)
{
	__u32 slot = flow_payer(f);
	struct endpoint_flows *e;

	if (!s->count || !(f->flags & FLOW_ORIGIN) || !slot)
		return;
	e = bpf_map_lookup_elem(&endpoint_flows, &slot);
	if (e)
		e->counted++;
}

/*
 * Compares what was counted with what was kept. They differ by what came and went meanwhile, and rightly so;
 * only what two sweeps in a row find alike is an error. What is busy is off by something else each time: as much as
 * both have is mended, and a mistake by it is no larger than what comes and goes during one sweep.
 */
static long settle(void *map __attribute__((unused)), __u32 *key __attribute__((unused)),
		   struct endpoint_flows *e, void *ctx __attribute__((unused)))
{
	__s64 off = e->counted - e->flows, both = 0;

	if (off > 0 && e->off > 0)
		both = off < e->off ? off : e->off;
	else if (off < 0 && e->off < 0)
		both = off > e->off ? off : e->off;
	if (both)
		__sync_fetch_and_add(&e->flows, both);
	e->off = off - both;
	e->counted = 0;
	return 0;
}

#define SWEEP_PURGE 256 /* beside the pressure */

static __always_inline int flow_over_of(const struct flow *f, __u32 proto, __u32 now, __u32 how,
					const bool v6)
{
	const struct config *cfg = config_get();

	if (how & SWEEP_PURGE && flow_orphaned(f))
		return true;
	return cfg && flow_expired(cfg, proto, f, flow_partner(f, proto, v6), now,
				   how & (SWEEP_PURGE - 1));
}

/* Whether an entry is to go. Global functions: they are asked twice, and the verifier walks them once. */
__noinline int flow_over4(const struct flow4 *f, __u32 proto, __u32 now, __u32 how)
{
	return f ? flow_over_of(&f->f, proto, now, how, false) : 0;
}

__noinline int flow_over6(const struct flow6 *f, __u32 proto, __u32 now, __u32 how)
{
	return f ? flow_over_of(&f->f, proto, now, how, true) : 0;
}

static __always_inline bool flow_over(const struct sweep *s, const struct flow *f, __u8 proto,
				      const bool v6)
{
	__u32 how = s->pressure[v6] | (s->purge ? SWEEP_PURGE : 0);

	return v6 ? flow_over6((const struct flow6 *)f, proto, s->now, how) :
		    flow_over4((const struct flow4 *)f, proto, s->now, how);
}

static __always_inline void sweep_flow(struct sweep *s, const void *key, const struct flow *f,
				       __u8 proto, const bool v6)
{
	__u32 slot;
	bool held;

	if (!flow_over(s, f, proto, v6))
		goto live;
	slot = takeover_slot(key, f, v6);
	held = takeover_begin(slot);
	/* Somebody takes its tuple right now. What is gone must be gone, though, before its slot is used. */
	if (!held && !s->purge)
		goto live;
	/* Again: by now it may be another's, or a packet may have come. */
	f = bpf_map_lookup_elem(flow_table(v6), key);
	if (f && flow_over(s, f, proto, v6)) {
		flow_delete_pair(key, f, v6);
		s->args.deleted[v6]++;
	} else if (f) {
		s->args.live[v6]++;
		sweep_count(s, f);
	}
	if (held)
		takeover_end(slot);
	return;
live:
	s->args.live[v6]++;
	sweep_count(s, f);
}

static long sweep_flow4(void *map __attribute__((unused)), struct flow4_key *key, struct flow4 *f,
			struct sweep *s)
{
	struct flow4_key k = *key;

	sweep_flow(s, &k, &f->f, k.proto, false);
	return 0;
}

static long sweep_flow6(void *map __attribute__((unused)), struct flow6_key *key, struct flow6 *f,
			struct sweep *s)
{
	struct flow6_key k = *key;

	sweep_flow(s, &k, &f->f, k.proto, true);
	return 0;
}

static __always_inline void sweep_tables(struct sweep *s)
{
	struct flow_gauge *g;
	__u32 zero = 0;

	s->now = bpf_ktime_get_ns() >> 30; /* the coarse clock is not for SYSCALL programs */
	s->cfg = config_get();
	if (!s->cfg)
		return;
	s->pressure[0] = table_pressure(s->cfg, false);
	s->pressure[1] = table_pressure(s->cfg, true);
	/* An empty table is not walked: its buckets alone are megabytes. */
	g = bpf_map_lookup_elem(&flow_gauge, &zero);
	if (!g || g->entries[0])
		bpf_for_each_map_elem(&flows4, sweep_flow4, s, 0);
	if (!g || g->entries[1])
		bpf_for_each_map_elem(&flows6, sweep_flow6, s, 0);
	if (s->count)
		bpf_for_each_map_elem(&endpoint_flows, settle, s, 0);
}

static long purge_syn4(void *map __attribute__((unused)), struct flow4_key *key, struct syn4 *syn,
		       void *ctx __attribute__((unused)))
{
	struct flow4_key k = *key;

	if (flow_orphaned(&syn->answer.f))
		bpf_map_delete_elem(&syns4, &k);
	return 0;
}

static long purge_syn6(void *map __attribute__((unused)), struct flow6_key *key, struct syn6 *syn,
		       void *ctx __attribute__((unused)))
{
	struct flow6_key k = *key;

	if (flow_orphaned(&syn->answer.f))
		bpf_map_delete_elem(&syns6, &k);
	return 0;
}

/* Deletes what waits for a client, of endpoints and ports that are gone: their slots will be others'. */
static __always_inline void purge_waiting(void)
{
	bpf_for_each_map_elem(&syns4, purge_syn4, NULL, 0);
	bpf_for_each_map_elem(&syns6, purge_syn6, NULL, 0);
}

static int gc_fire(void *map __attribute__((unused)), __u32 *key __attribute__((unused)),
		   struct gc *g)
{
	__u64 now = bpf_ktime_get_ns();
	struct sweep s = { .purge = false };

	if (now - g->called > GC_DAEMON_SILENT || now - g->kicked < GC_PERIOD / 2)
		sweep_tables(&s);
	bpf_timer_start(&g->timer, GC_PERIOD, 0);
	return 0;
}

/* Arms the timer and has it call this load's gc_fire, whoever armed it before. */
static __always_inline void gc_arm(void)
{
	__u32 zero = 0;
	struct gc *g = bpf_map_lookup_elem(&gc, &zero);

	if (!g)
		return;
	g->called = bpf_ktime_get_ns();
	if (!g->armed) {
		bpf_timer_init(&g->timer, &gc, 1 /* CLOCK_MONOTONIC */);
		g->armed = 1;
	}
	bpf_timer_set_callback(&g->timer, gc_fire);
	bpf_timer_start(&g->timer, GC_PERIOD, 0);
}
