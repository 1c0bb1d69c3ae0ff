/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragments: only the first carries ports; it leaves them here for those that follow it. */
#pragma once

#include "flow.h"

#define FRAGMENT_TICKS 30 /* as the kernel's ipfrag_time */

/* Gives a later fragment the ports of its first. Returns flags to add: PACKET_PORTS_LOST or none. */
__noinline int fragment_ports(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct frag_key k = {};
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
	if (!(p->flags & PACKET_NO_L4)) {
		struct frag f = { .sport = p->sport, .dport = p->dport, .seen = ticks() };

		bpf_map_update_elem(&frags, &k, &f, BPF_ANY);
		return 0;
	}
	if (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP && p->proto != IPPROTO_ICMP &&
	    p->proto != IPPROTO_ICMPV6 && p->proto != IPPROTO_SCTP)
		return 0;
	seen = bpf_map_lookup_elem(&frags, &k);
	if (!seen || ticks() - seen->seen > FRAGMENT_TICKS)
		return PACKET_PORTS_LOST;
	p->sport = seen->sport;
	p->dport = seen->dport;
	return 0;
}
