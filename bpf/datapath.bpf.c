//go:build ignore

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The TC programs, one a hook, each loaded once and attached to many devices. The way of a packet:
 * parse (packet.h) -> flow (flow.h) -> NAT (nat.h, icmp.h) -> policy (policy.h) -> forward
 * (forward.h), put together in container.h and uplink.h.
 */
#include "lib/container.h"
#include "lib/expire.h"
#include "lib/uplink.h"

char _license[] SEC("license") = "Dual BSD/GPL";

SEC("tc")
int from_container(struct __sk_buff *skb)
{
	return from_container_frame(skb);
}

SEC("tc")
int to_container(struct __sk_buff *skb)
{
	return to_container_frame(skb);
}

SEC("tc")
int from_bridge(struct __sk_buff *skb)
{
	return from_bridge_frame(skb);
}

SEC("tc")
int from_uplink(struct __sk_buff *skb)
{
	return from_uplink_frame(skb, HOOK_UPLINK, true);
}

SEC("tc")
int from_uplink_l3(struct __sk_buff *skb)
{
	return from_uplink_frame(skb, HOOK_UPLINK, false);
}

SEC("tc")
int from_host(struct __sk_buff *skb)
{
	return from_uplink_frame(skb, HOOK_HOST, true);
}

SEC("tc")
int to_uplink(struct __sk_buff *skb)
{
	return to_uplink_frame(skb, true);
}

SEC("tc")
int to_uplink_l3(struct __sk_buff *skb)
{
	return to_uplink_frame(skb, false);
}

/* Deletes what has timed out; arms the timer that does so when nobody calls. */
SEC("syscall")
int expire(struct expire_args *args)
{
	struct sweep s = { .count = true };

	gc_arm();
	sweep_tables(&s);
	*args = s.args;
	return 0;
}

/* Also deletes the flows of endpoints and ports that are gone, and what waits to become one. */
SEC("syscall")
int purge(struct expire_args *args)
{
	struct sweep s = { .purge = true };

	sweep_tables(&s);
	purge_waiting();
	*args = s.args;
	return 0;
}

/* Adds to the gauge what was put into the flow tables from outside. */
SEC("syscall")
int gauge(struct flow_gauge *added)
{
	gauge_add(false, added->entries[0]);
	gauge_add(true, added->entries[1]);
	return 0;
}
