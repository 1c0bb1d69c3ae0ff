/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Counters: every packet that a program judges ends in exactly one of drop() and count_fate(). */
#pragma once

#include "event.h"
#include "packet.h"

/* Seconds in units of 2^30 ns (1.07 s): a shift is cheaper than a division. */
static __always_inline __u32 ticks(void)
{
	return bpf_ktime_get_coarse_ns() >> 30;
}

static __always_inline void count_add(struct count *c, __u32 bytes)
{
	c->packets++;
	c->bytes += bytes;
}

__noinline int drop(struct __sk_buff *skb, enum hook hook, enum reason reason)
{
	__u32 key = reason * HOOK_COUNT + hook;
	struct count *c = bpf_map_lookup_elem(&drops, &key);

	if (c)
		count_add(c, skb->len);
	tell_drop(skb, hook, reason);
	return TC_ACT_SHOT;
}

static __always_inline void count_fate(struct __sk_buff *skb, enum hook hook, enum fate fate)
{
	__u32 key = fate * HOOK_COUNT + hook;
	struct count *c = bpf_map_lookup_elem(&fates, &key);

	if (c)
		count_add(c, skb->len);
}

__noinline int let_go(struct __sk_buff *skb, enum hook hook, enum fate fate, int action)
{
	count_fate(skb, hook, fate);
	return action;
}

static __always_inline void count_endpoint_drop(struct __sk_buff *skb, __u32 slot)
{
	struct endpoint_count *c = bpf_map_lookup_elem(&endpoint_stats, &slot);

	if (c)
		count_add(&c->drop, skb->len);
}

static __always_inline void count_endpoint_tx(struct __sk_buff *skb, __u32 slot)
{
	struct endpoint_count *c = bpf_map_lookup_elem(&endpoint_stats, &slot);

	if (c)
		count_add(&c->tx, skb->len);
}

static __always_inline void count_endpoint_rx(struct __sk_buff *skb, __u32 slot)
{
	struct endpoint_count *c = bpf_map_lookup_elem(&endpoint_stats, &slot);

	if (c)
		count_add(&c->rx, skb->len);
}
