/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragments: only the first carries ports; it leaves them here for those that follow it. */
#pragma once

#include "flow.h"

#define FRAGMENT_TICKS 30 /* as the kernel's ipfrag_time */

/*
 * Gives a later fragment the ports of its first. Returns flags to add: PACKET_PORTS_LOST or none. Those
 * that come before their first by an uplink may be the host's own: it has them, and they are
 * remembered, to be counted as lost when the first shows that they were a container's.
 */
__noinline int fragment_ports(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct frag_key k = {};
	struct frag f = {};
	struct packet *p;
	struct frag *seen;

	if (!s)
		return 0;
	p = &s->packet;
	k.saddr = p->saddr;
	k.daddr = p->daddr;
	k.id = p->frag_id;
	k.ifindex = skb->ifindex;
	k.proto = p->proto;
	f.seen = ticks();
	seen = bpf_map_lookup_elem(&frags, &k);
	if (seen && f.seen - seen->seen > FRAGMENT_TICKS)
		seen = NULL;
	if (!(p->flags & PACKET_NO_L4)) {
		f.sport = p->sport;
		f.dport = p->dport;
		if (seen)
			p->overtaken = seen->early;
		bpf_map_update_elem(&frags, &k, &f, BPF_ANY);
		return 0;
	}
	if (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP && p->proto != IPPROTO_ICMP &&
	    p->proto != IPPROTO_ICMPV6 && p->proto != IPPROTO_SCTP)
		return 0;
	if (seen && !seen->early) {
		p->sport = seen->sport;
		p->dport = seen->dport;
		return 0;
	}
	if (p->hook == HOOK_UPLINK) {
		f.early = seen ? seen->early + 1 : 1;
		bpf_map_update_elem(&frags, &k, &f, BPF_ANY);
	}
	return PACKET_PORTS_LOST;
}

/* The packet's flow is a container's: so were the fragments that overtook it, and they are lost. */
static __always_inline void fragments_lost(const struct packet *p)
{
	__u32 key = REASON_FRAGMENT_NOT_FOUND * HOOK_COUNT + HOOK_UPLINK;
	struct count *c;

	if (!p->overtaken)
		return;
	c = bpf_map_lookup_elem(&drops, &key);
	if (c)
		c->packets += p->overtaken;
}
