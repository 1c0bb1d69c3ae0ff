/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Drops as they happen, for those who listen: each has a ring of its own. Without them nothing is written. */
#pragma once

#include "maps.h"

#define NS_PER_SEC 1000000000ULL
#define EVENT_GAP (NS_PER_SEC / EVENT_RATE)

/* A token bucket by its next arrival: it holds EVENT_RATE tokens, a second's worth. */
static __always_inline bool event_token(struct event_bucket *b, __u64 now)
{
	if (b->next + NS_PER_SEC < now)
		b->next = now - NS_PER_SEC;
	if (b->next > now) {
		b->suppressed++;
		return false;
	}
	b->next += EVENT_GAP;
	return true;
}

/* No inlining: so the object's types tell Go the event's shape. */
static __noinline int event_fill(struct __sk_buff *skb, struct event *e, __u64 now, enum hook hook,
				 enum reason reason)
{
	__u32 n = skb->len, last;

	if (n > sizeof(e->head))
		n = sizeof(e->head);
	e->time = now;
	e->len = skb->len;
	e->ifindex = skb->ifindex;
	e->captured = n;
	e->reason = reason;
	e->hook = hook;
	last = n - 1;
	/* The compiler knows that it is in bounds; older verifiers have to be told, and that no read is empty. */
	asm volatile("%[last] &= %[mask]" : [last] "+r"(last) : [mask] "i"(sizeof(e->head) - 1));
	if (bpf_skb_load_bytes(skb, 0, e->head, last + 1))
		e->captured = 0;
	return 0;
}

static __always_inline void tell_drop(struct __sk_buff *skb, enum hook hook, enum reason reason)
{
	const struct listeners *l;
	struct event_bucket *b;
	__u32 key = 0, i;
	__u64 now;

	l = bpf_map_lookup_elem(&listeners, &key);
	if (!l || !(l->until[0] | l->until[1] | l->until[2] | l->until[3]))
		return;
	_Static_assert(MAX_LISTENERS == 4, "all are asked");
	key = reason;
	b = bpf_map_lookup_elem(&event_buckets, &key);
	now = bpf_ktime_get_ns();
	if (!b || !event_token(b, now))
		return;
	for (i = 0; i < MAX_LISTENERS; i++) {
		struct event *e;
		void *ring;

		/* One that was killed left its place as it was. */
		if (l->until[i] < now)
			continue;
		key = i;
		ring = bpf_map_lookup_elem(&event_rings, &key);
		if (!ring)
			continue;
		e = bpf_ringbuf_reserve(ring, sizeof(*e), 0);
		if (!e) {
			b->lost++;
			continue;
		}
		event_fill(skb, e, now, hook, reason);
		bpf_ringbuf_submit(e, 0);
	}
}
