/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * An uplink, where the world comes in, and lo, where the host's own sockets come in that the sock
 * programs left alone (bound to a loopback address, raw, or outside the cgroup). Host traffic that is
 * none of ours pays one array lookup.
 */
#pragma once

#include "forward.h"
#include "fragment.h"

__noinline int uplink_direct4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? plan_direct(skb, s, skb->ifindex, false) : -REASON_DIRECT_ACCESS;
}

__noinline int uplink_direct6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? plan_direct(skb, s, skb->ifindex, true) : -REASON_DIRECT_ACCESS;
}

/* What found no flow, or one of an older policy. A verdict. */
static __always_inline int uplink_judge(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	struct packet *p = &s->packet;
	__u32 zero = 0;
	struct port_class *class = bpf_map_lookup_elem(&port_class, &zero);
	struct config *cfg = config_get();
	struct port *port = NULL;
	int err;

	if (!class || !cfg)
		return PASS;
	if (p->flags & PACKET_ICMP_ERROR && !parse_quoted(skb, s, v6) &&
	    quoted_flow(s, p->hook, v6))
		return VERDICT_ERROR;
	if (!is_host_addr(&p->daddr, v6)) {
		if (p->hook != HOOK_UPLINK || !subnet_of(&p->daddr))
			return PASS;
		/* A container's address is nobody's business outside, unless its network says so. */
		err = v6 ? uplink_direct6(skb) : uplink_direct4(skb);
		if (!err)
			return VERDICT_OPEN;
		/* Netfilter may put the mark on it: to_container has the last word. */
		if (err == -REASON_DIRECT_ACCESS && cfg->accept_mask)
			return let_go(skb, p->hook, FATE_STACK, PASS);
		return drop(skb, p->hook, -err);
	}
	/* A client on the link itself is the host's to answer: a container has no way back to it. */
	if (p->flags & (PACKET_ICMP_ERROR | PACKET_PORTS_LOST) || addr_is_link_local(&p->saddr, v6))
		return PASS;
	if (class->ports[port_index(p->dport)] & port_bit(p->proto))
		port = port_find(p, v6);
	if (port && (!port_serves(port, v6) || host_has_stream(skb, s, v6)))
		return PASS;
	if (!port && !port_reserved(p, cfg, class))
		return PASS;
	if (p->hook == HOOK_UPLINK) {
		if (addr_is_loopback(&p->daddr, v6) || addr_is_loopback(&p->saddr, v6) ||
		    addr_is_this_network(&p->saddr, v6))
			return drop(skb, p->hook, REASON_LOOPBACK_ADDRESS);
		if (bpf_map_lookup_elem(&host_addrs, &p->saddr) || subnet_of(&p->saddr))
			return drop(skb, p->hook, REASON_MARTIAN);
	}
	if (!port)
		return drop(skb, p->hook, REASON_PORT_NOT_READY);
	err = plan_published(skb, s, port, 0, NULL, v6);
	if (err) {
		__u32 key = port->slot;
		struct port_count *c = bpf_map_lookup_elem(&port_stats, &key);

		if (c && err == -REASON_PORT_NOT_READY)
			c->not_ready++;
		return drop(skb, p->hook, -err);
	}
	fragments_lost(p);
	return VERDICT_OPEN;
}

/*
 * Whether an older flow is what its packet would open now. Source and source port are its own: they may
 * have been chosen to tell it from another.
 */
static __always_inline bool flow_as_planned(struct flow *f, const struct plan *n, const bool v6)
{
	struct addr to;

	if (flow_out(f) != n->reverse_hook || f->ifindex != n->ifindex || f->peer != n->peer ||
	    f->port != n->port || f->dport != n->dport || (f->flags ^ n->flags) & FLOW_SNAT)
		return false;
	if (v6)
		to = ((struct flow6 *)f)->daddr;
	else
		addr_from_v4(&to, ((struct flow4 *)f)->daddr);
	return addr_equal(&to, &n->daddr);
}

/* An answer from an uplink, or the stack's own: the opening side is judged where it opens. 0 or -REASON. */
static __always_inline int answer_renew(const struct flow *f)
{
	struct endpoint *peer = endpoint_get(f->peer);
	struct network *net;

	if (!flow_out(f))
		return 0;
	if (!peer || peer->ifindex != f->ifindex)
		return -REASON_STALE_FLOW;
	net = network_get(peer->net);
	return net && net->flags & NETWORK_INTERNAL ? -REASON_INTERNAL : 0;
}

/*
 * The packet that makes a flow of a waiting connection to a published port, under the policy that its SYN was
 * judged by: the plan is that of then. Whether it is one; what is not is judged like any other.
 */
static __always_inline bool uplink_confirms(struct __sk_buff *skb, struct scratch *s,
					    const struct config *cfg, const bool v6)
{
	struct packet *p = &s->packet;
	struct plan *n = &s->plan;
	struct port *port = port_find(p, v6);
	struct endpoint *target;
	struct network *net;
	struct flow *f;
	__u32 slot;
	void *key;

	/* A container's own address may be dialled at a port that is published for all of the host's. */
	if (!port || !port_serves(port, v6) || !is_host_addr(&p->daddr, v6))
		return false;
	plan_start(n, p);
	n->daddr = port->addr;
	n->dport = port->port;
	n->port = port->slot;
	if (v6) {
		flow_key6(&s->key6, &n->daddr, &p->saddr, n->dport, p->sport, p->proto,
			  HOOK_CONTAINER);
		key = &s->key6;
	} else {
		flow_key4(&s->key4, &n->daddr, &p->saddr, n->dport, p->sport, p->proto,
			  HOOK_CONTAINER);
		key = &s->key4;
	}
	f = bpf_map_lookup_elem(syn_table(v6), key);
	if (!f || f->generation != (__u16)cfg->generation || !syn_same(p, f, v6) ||
	    !syn_confirms(skb, p, cfg, f, v6))
		return false;
	slot = port->endpoint;
	target = endpoint_get(slot);
	if (!target || !(target->flags & ENDPOINT_READY))
		return false;
	net = network_get(target->net);
	if (!net)
		return false;
	plan_to_container(n, slot, target, net->mac);
	n->flags |= FLOW_ROUTED;
	n->reverse_hook = HOOK_CONTAINER;
	n->reverse_flags = f->flags & (FLOW_ROUTED | FLOW_FIB);
	n->reverse_ifindex = f->ifindex;
	n->reverse_mtu = f->mtu;
	if (v6)
		n->reverse_nexthop = ((struct flow6 *)f)->nexthop;
	else
		addr_from_v4(&n->reverse_nexthop, *flow_nexthop4(f));
	syn_confirmed(s, f);
	return true;
}

__noinline int uplink_confirms4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct config *cfg = config_get();

	return s && cfg && uplink_confirms(skb, s, cfg, false);
}

__noinline int uplink_confirms6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct config *cfg = config_get();

	return s && cfg && uplink_confirms(skb, s, cfg, true);
}

/* A packet with no flow, or with one that was opened under an older policy. A verdict. */
static __always_inline int uplink_slow(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	struct packet *p = &s->packet;
	struct config *cfg = config_get();
	struct flow *f = NULL;
	__u8 flags = p->tcp_flags;
	int verdict, err;

	if (!cfg)
		return PASS;
	if (!(p->flags & (PACKET_ICMP_ERROR | PACKET_PORTS_LOST | PACKET_NO_FLOW)))
		f = flow_find_slow(s, v6);
	else if (syn_concerns(p) && (flags & (TCP_SYN | TCP_RST | TCP_ACK)) == TCP_ACK &&
		 (v6 ? uplink_confirms6(skb) : uplink_confirms4(skb)))
		return VERDICT_OPEN;
	if (f && (!flow_out(f) || !(f->flags & FLOW_ORIGIN))) {
		err = answer_renew(f);
		if (err) {
			flow_forget(p, p->hook, f, v6);
			return drop(skb, p->hook, -err);
		}
		f->generation = cfg->generation;
		fragments_lost(p);
		return VERDICT_FORWARD;
	}
	s->mark = skb->mark;
	if (f) {
		p->tcp_flags &= ~TCP_RST; /* it may end a flow, though it could not open one */
		/* Its first packet may have had a mark by netfilter, which is behind us. */
		if (!(f->flags & FLOW_NAT))
			s->mark = cfg->accept_mark;
	}
	verdict = uplink_judge(skb, s, v6);
	if (!f)
		return verdict;
	p->tcp_flags = flags;
	if (verdict == VERDICT_OPEN && flow_as_planned(f, &s->plan, v6)) {
		__builtin_memcpy(f->dmac, s->plan.dmac, 6);
		__builtin_memcpy(f->smac, s->plan.smac, 6);
		f->generation = cfg->generation;
		return VERDICT_FORWARD;
	}
	flow_forget(p, p->hook, f, v6);
	if (verdict == VERDICT_OPEN && flags & TCP_RST)
		return drop(skb, p->hook, REASON_NO_FLOW);
	return verdict;
}

__noinline int uplink_slow4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? uplink_slow(skb, s, false) : TC_ACT_SHOT;
}

__noinline int uplink_slow6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? uplink_slow(skb, s, true) : TC_ACT_SHOT;
}

static __always_inline int uplink_ip(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	struct packet *p = &s->packet;
	__u32 zero = 0;
	struct port_class *class = bpf_map_lookup_elem(&port_class, &zero);
	struct config *cfg;
	bool subnet;
	struct flow *f;

	/* What is cut short or absurd is the stack's to refuse: it is not ours until it matches. */
	if (!class || parse_ip(skb, p, v6) < 0)
		return PASS;
	subnet = p->hook == HOOK_UPLINK && maybe_in_subnet(class, &p->daddr, v6);
	if (!subnet && !(p->flags & PACKET_FRAGMENT) &&
	    (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP) &&
	    !port_has(class, p->dport, p->proto, PORT_SNAT | PORT_HELD))
		return PASS;
	if (p->flags & PACKET_NEIGHBOUR && !subnet)
		return PASS;
	if (p->flags & PACKET_FRAGMENT)
		p->flags |= fragment_ports(skb);
	if (!(p->flags & (PACKET_ICMP_ERROR | PACKET_PORTS_LOST))) {
		f = flow_find(p, p->hook, v6);
		cfg = config_get();
		if (f && cfg && f->generation == (__u16)cfg->generation) {
			fragments_lost(p);
			flow_turn(f, p->proto, p->tcp_flags, v6);
			return forward_slow(skb, f, false, v6);
		}
		if (!f)
			p->flags |= PACKET_NO_FLOW;
	}
	return conclude(skb, v6 ? uplink_slow6(skb) : uplink_slow4(skb), v6);
}

/* Anything that neither went straight on nor was plainly none of ours. */
static __always_inline int uplink_frame_of(struct __sk_buff *skb, __u8 hook, const bool ethernet)
{
	struct scratch *s = scratch_start(hook);
	__be16 proto = skb->protocol;

	if (!s)
		return PASS;
	if (ethernet)
		proto = parse_ethernet(skb, &s->packet);
	if (proto == bpf_htons(ETH_P_IP))
		return uplink_ip(skb, s, false);
	if (proto == bpf_htons(ETH_P_IPV6))
		return uplink_ip(skb, s, true);
	return PASS;
}

__noinline int uplink_frame(struct __sk_buff *skb, __u8 hook)
{
	return uplink_frame_of(skb, hook, true);
}

/*
 * Whether a packet without options or extensions is none of ours, by its port and the class of its
 * address. In line: it is all that the host's own traffic pays.
 */
static __always_inline bool uplink_foreign(struct __sk_buff *skb, const __u8 hook, const bool v6)
{
	const __u32 l4 =
		sizeof(struct ethhdr) + (v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	void *start = packet_start(skb), *end = packet_end(skb);
	__be16 *port = start + l4;
	__u32 zero = 0;
	struct port_class *class;
	struct addr daddr = {};
	__u8 proto;

	if (start + l4 + sizeof(struct udphdr) > end)
		return false;
	if (v6) {
		struct ipv6hdr *ip = start + sizeof(struct ethhdr);

		proto = ip->nexthdr;
		daddr.w[0] = ip->daddr.in6_u.u6_addr32[0];
	} else {
		struct iphdr *ip = start + sizeof(struct ethhdr);

		if (*(__u8 *)ip != 0x45 ||
		    ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET))
			return false;
		proto = ip->protocol;
		daddr.w[3] = ip->daddr;
	}
	if (proto != IPPROTO_TCP && proto != IPPROTO_UDP)
		return false;
	class = bpf_map_lookup_elem(&port_class, &zero);
	return class && !port_has(class, port[1], proto, PORT_SNAT | PORT_HELD) &&
	       (hook != HOOK_UPLINK || !maybe_in_subnet(class, &daddr, v6));
}

/* Whether a packet without a flow is for the host: its port may carry a masqueraded flow, and is not published. */
static __always_inline bool uplink_unpublished(const struct packet *p, const __u8 hook,
					       const bool v6)
{
	__u32 zero = 0;
	struct port_class *class = bpf_map_lookup_elem(&port_class, &zero);

	return class && !port_has(class, p->dport, p->proto, 0) &&
	       (hook != HOOK_UPLINK || !maybe_in_subnet(class, &p->daddr, v6));
}

/* A plain packet of a flow that stands; others were told by uplink_foreign(). STRAIGHT_NOT, or the action. */
static __always_inline int uplink_straight(struct __sk_buff *skb, const __u8 hook, const bool v6)
{
	struct packet p = { .hook = hook };
	struct config *cfg = config_get();
	struct flow *f;

	if (!cfg || !parse_plain(skb, &p, v6))
		return STRAIGHT_NOT;
	f = flow_find(&p, hook, v6);
	if (!f)
		return uplink_unpublished(&p, hook, v6) ? PASS : STRAIGHT_NOT;
	if (f->generation != (__u16)cfg->generation)
		return STRAIGHT_NOT;
	flow_turn(f, p.proto, p.tcp_flags, v6);
	return forward(skb, &p, f, false, v6);
}

__noinline int uplink_straight4(struct __sk_buff *skb)
{
	return uplink_straight(skb, HOOK_UPLINK, false);
}

__noinline int host_straight4(struct __sk_buff *skb)
{
	return uplink_straight(skb, HOOK_HOST, false);
}

__noinline int uplink_straight6(struct __sk_buff *skb)
{
	return uplink_straight(skb, HOOK_UPLINK, true);
}

__noinline int host_straight6(struct __sk_buff *skb)
{
	return uplink_straight(skb, HOOK_HOST, true);
}

static __always_inline int from_uplink_frame(struct __sk_buff *skb, const __u8 hook,
					     const bool ethernet)
{
	int action = STRAIGHT_NOT;

	if (skb->mark == MARK_JUDGED && hook == HOOK_HOST) {
		skb->mark = 0;
		return PASS;
	}
	if (skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return PASS;
	if (!ethernet)
		return uplink_frame_of(skb, hook, false);
	if (skb->protocol == bpf_htons(ETH_P_IP) ?
		    uplink_foreign(skb, hook, false) :
		    skb->protocol == bpf_htons(ETH_P_IPV6) && uplink_foreign(skb, hook, true))
		return PASS;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		action = hook == HOOK_HOST ? host_straight4(skb) : uplink_straight4(skb);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		action = hook == HOOK_HOST ? host_straight6(skb) : uplink_straight6(skb);
	return action == STRAIGHT_NOT ? uplink_frame(skb, hook) : action;
}

/*
 * What the host itself sends and no socket lookup can tell of (echo requests, GRE, ESP) claims its
 * tuple: the answers are the host's, even where a container had taken it.
 */
static __always_inline void claim_tuple(struct scratch *s, const bool v6)
{
	const struct packet *p = &s->packet;
	struct config *cfg = config_get();
	struct flow *f;
	void *key, *value;

	if (!cfg || addr_is_multicast(&p->daddr, v6))
		return;
	if (v6) {
		flow_key6(&s->key6, &p->daddr, &p->saddr, p->dport, p->sport, p->proto,
			  HOOK_UPLINK);
		__builtin_memset(&s->flow6, 0, sizeof(s->flow6));
		key = &s->key6;
		value = &s->flow6;
	} else {
		flow_key4(&s->key4, &p->daddr, &p->saddr, p->dport, p->sport, p->proto,
			  HOOK_UPLINK);
		__builtin_memset(&s->flow4, 0, sizeof(s->flow4));
		key = &s->key4;
		value = &s->flow4;
	}
	f = bpf_map_lookup_elem(flow_table(v6), key);
	if (f && !flow_out(f)) {
		f->last_seen = ticks();
		return;
	}
	if (f)
		flow_delete_pair(key, f, v6);
	f = value;
	f->first_seen = ticks();
	f->last_seen = f->first_seen;
	f->generation = cfg->generation;
	f->flags = FLOW_ORIGIN;
	if (!bpf_map_update_elem(flow_table(v6), key, value, BPF_NOEXIST))
		gauge_add(v6, 1);
	gc_kick(cfg, v6);
}

/*
 * What the stack sends by itself that is neither TCP nor UDP. An error about a packet that it saw
 * translated gets the addresses back that its receiver knows. 0, or it is spoiled.
 */
static __always_inline int host_sends_of(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	struct packet *p = &s->packet;
	struct flow *f;

	if (parse_ip(skb, p, v6) < 0 || p->flags & (PACKET_NEIGHBOUR | PACKET_FRAGMENT))
		return 0;
	if (!(p->flags & PACKET_ICMP_ERROR)) {
		/*
		 * An echo reply claims nothing, or anybody could fill the table; nor does what is not
		 * the host's: a macvlan container's or a virtual machine's.
		 */
		if ((p->proto != (v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) || p->sport) &&
		    is_host_addr(&p->saddr, v6))
			claim_tuple(s, v6);
		return 0;
	}
	if (parse_quoted(skb, s, v6))
		return 0;
	f = quoted_flow(s, HOOK_CONTAINER, v6);
	if (f && f->flags & FLOW_NAT && flow_out(f) == HOOK_UPLINK)
		return icmp_rewrite(skb, f, false, v6);
	return 0;
}

__noinline int host_sends4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? host_sends_of(skb, s, false) : 0;
}

__noinline int host_sends6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? host_sends_of(skb, s, true) : 0;
}

static __always_inline int to_uplink_frame(struct __sk_buff *skb, const bool ethernet)
{
	__be16 proto = skb->protocol;
	__u32 l3 = ethernet ? sizeof(struct ethhdr) : 0, in = skb->ingress_ifindex;
	struct config *cfg;
	struct scratch *s;
	int err = 0;

	if (skb->mark == MARK_JUDGED) {
		skb->mark = 0;
		return PASS;
	}
	if (proto != bpf_htons(ETH_P_IP) && proto != bpf_htons(ETH_P_IPV6))
		return PASS;
	if (in && in != LO_IFINDEX) {
		cfg = config_get();
		if (cfg && cfg->flags & (proto == bpf_htons(ETH_P_IP) ? CONFIG_DROP_TRANSIT4 :
									CONFIG_DROP_TRANSIT6))
			return drop(skb, HOOK_TO_UPLINK, REASON_TRANSIT);
		return PASS;
	}
	if (proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = header(skb, l3, sizeof(*ip));

		if (!ip || ip->protocol == IPPROTO_TCP || ip->protocol == IPPROTO_UDP)
			return PASS;
	} else {
		struct ipv6hdr *ip = header(skb, l3, sizeof(*ip));

		if (!ip || ip->nexthdr == IPPROTO_TCP || ip->nexthdr == IPPROTO_UDP)
			return PASS;
	}
	s = scratch_start(HOOK_TO_UPLINK);
	if (!s)
		return PASS;
	s->packet.l3 = l3;
	if (proto == bpf_htons(ETH_P_IP))
		err = host_sends4(skb);
	else
		err = host_sends6(skb);
	return err ? drop(skb, HOOK_TO_UPLINK, REASON_MALFORMED) : PASS;
}
