/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Stage 4, policy: who a packet is from, where it may go, and the plan of its flow. Only packets
 * that found no flow come here.
 */
#pragma once

#include "nat.h"

#ifndef BPF_FIB_LOOKUP_SKIP_NEIGH
#define BPF_FIB_LOOKUP_SKIP_NEIGH (1U << 2)
#endif
#ifndef BPF_FIB_LOOKUP_SRC
#define BPF_FIB_LOOKUP_SRC (1U << 4)
#endif

#define LO_IFINDEX 1 /* of every network namespace */

static __always_inline bool may_talk(__u16 a, __u16 b)
{
	struct pair k = { .a = a < b ? a : b, .b = a < b ? b : a };

	return bpf_map_lookup_elem(&pairs, &k);
}

#define ANY_DEVICE 0 /* by whichever trusted one it came: an open flow is judged again */

__noinline int lets_in4(__u32 slot, __u32 ifindex, __u32 mark)
{
	struct scratch *s = scratch_get();

	return s ? lets_in_of(&s->open, slot, ifindex, mark, false) : -1;
}

__noinline int lets_in6(__u32 slot, __u32 ifindex, __u32 mark)
{
	struct scratch *s = scratch_get();

	return s ? lets_in_of(&s->open, slot, ifindex, mark, true) : -1;
}

static __always_inline int lets_in(__u32 slot, __u32 ifindex, __u32 mark, const bool v6)
{
	return v6 ? lets_in6(slot, ifindex, mark) : lets_in4(slot, ifindex, mark);
}

/* Puts into s->open whom the packet dials; back: whom the sender of its answer dialled. */
static __always_inline void open_of(struct scratch *s, bool back)
{
	const struct packet *p = &s->packet;
	struct open_key *k = &s->open;

	k->saddr = back ? p->daddr : p->saddr;
	k->daddr = back ? p->saddr : p->daddr;
	k->port = back ? p->sport : p->dport;
	k->proto = p->proto;
	k->pad = 0;
}

/*
 * Whether a link opens what s->packet does, where containers are kept apart: it dials a linked port, or
 * comes from one.
 */
static __always_inline bool link_opens(struct scratch *s)
{
	open_of(s, false);
	if (bpf_map_lookup_elem(&open_ports, &s->open))
		return true;
	open_of(s, true);
	return bpf_map_lookup_elem(&open_ports, &s->open);
}

__noinline int linked(void)
{
	struct scratch *s = scratch_get();

	return s && link_opens(s);
}

/*
 * Whether only the engine's reservation socket can be behind the port: it was bound moments ago, for
 * the packet's family, and the port is not published yet. The sender will try again.
 */
static __always_inline bool port_reserved(const struct packet *p, const struct config *cfg,
					  const struct port_class *class)
{
	struct reservation_key k = { .port = p->dport, .proto = p->proto };
	struct reservation *r;
	__u64 bound;

	if (!(class->engine[port_index(p->dport)] & port_bit(p->proto)))
		return false;
	if (p->proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return false;
	r = bpf_map_lookup_elem(&reservations, &k);
	if (!r)
		return false;
	bound = r->bound[!addr_is_v4(&p->daddr)];
	return bound && ticks() - (__u32)(bound >> 30) <= cfg->reservation_wait;
}

/* Whether the sandbox of ep has the address or is allowed it. */
static __always_inline bool owns_address_of(const struct endpoint *ep, __u32 slot,
					    const struct addr *a, const bool v6)
{
	struct source_key k = { .prefixlen = 160, .endpoint = slot, .addr = *a };
	struct endpoint *other;

	if (v6 ? addr_equal(a, &ep->addr6) : a->w[3] == ep->addr4)
		return true;
	if (addr_is_link_local(a, v6)) {
		/* its EUI-64 address, RFC 4291 appendix A */
		__u32 high = ((__u32)(ep->mac[0] ^ 2) << 24) | ((__u32)ep->mac[1] << 16) |
			     ((__u32)ep->mac[2] << 8) | 0xff;
		__u32 low = 0xfe000000 | ((__u32)ep->mac[3] << 16) | ((__u32)ep->mac[4] << 8) |
			    ep->mac[5];

		if (a->w[2] == bpf_htonl(high) && a->w[3] == bpf_htonl(low))
			return true;
	}
	other = endpoint_get(
		endpoint_by_addr(&k.addr)); /* a key must not be an argument before 6.2 */
	if (other && other->sandbox == ep->sandbox)
		return true;
	return bpf_map_lookup_elem(&allowed_sources, &k);
}

__noinline bool owns_address4(struct endpoint *ep, __u32 slot, struct addr *a)
{
	return ep && a && owns_address_of(ep, slot, a, false);
}

__noinline bool owns_address6(struct endpoint *ep, __u32 slot, struct addr *a)
{
	return ep && a && owns_address_of(ep, slot, a, true);
}

static __always_inline bool owns_address(struct endpoint *ep, __u32 slot, struct addr *a,
					 const bool v6)
{
	return v6 ? owns_address6(ep, slot, a) : owns_address4(ep, slot, a);
}

/* Whether the sandbox of ep may send from the packet's source. 0 or -REASON. */
static __always_inline int check_source(struct packet *p, struct endpoint *ep, __u32 slot,
					const bool v6)
{
	if (addr_is_loopback(&p->saddr, v6))
		return -REASON_LOOPBACK_ADDRESS;
	if (addr_is_this_network(&p->saddr, v6)) {
		/* DAD and MLD; DHCP (RFC 2131 4.1) */
		if (v6 ? p->flags & PACKET_NEIGHBOUR :
			 p->saddr.w[3] == 0 && p->proto == IPPROTO_UDP &&
				    p->dport == bpf_htons(67) &&
				    p->daddr.w[3] == bpf_htonl(0xffffffff))
			return 0;
		return -REASON_LOOPBACK_ADDRESS;
	}
	return owns_address(ep, slot, &p->saddr, v6) ? 0 : -REASON_SPOOFED_ADDRESS;
}

enum route_result {
	ROUTE_OK,
	ROUTE_STACK, /* the stack has an answer: no route, prohibited, or it is the host's own */
	ROUTE_NONE, /* only the stack could send it, and would do so untranslated */
};

/*
 * The kernel's route of a packet that enters by a bridge: device, next hop, MTU, and the address to
 * masquerade with. Reads s->route, writes the opening or the reverse half of s->plan.
 */
static __always_inline int route_of(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	struct route_query *q = &s->route;
	struct bpf_fib_lookup *fib = (struct bpf_fib_lookup *)s->fib;
	struct masquerade_addr *addr;
	struct plan *n = &s->plan;
	bool stack_hop = false, own = false;
	struct addr hop;
	__u32 mtu = 1; /* a packet that fits: the device's own is what comes back */
	long err;

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = q->bridge;
	fib->tot_len = 1; /* asks for the MTU */
	if (v6) {
		fib->family = 10; /* AF_INET6 */
		__builtin_memcpy(fib->ipv6_src, &q->from, sizeof(fib->ipv6_src));
		__builtin_memcpy(fib->ipv6_dst, &q->to, sizeof(fib->ipv6_dst));
	} else {
		fib->family = 2; /* AF_INET */
		fib->ipv4_src = q->from.w[3];
		fib->ipv4_dst = q->to.w[3];
	}
	err = bpf_fib_lookup(skb, fib, sizeof(*fib),
			     BPF_FIB_LOOKUP_SKIP_NEIGH | (q->want_source ? BPF_FIB_LOOKUP_SRC : 0));
	if (err == -EINVAL) { /* before Linux 6.7 */
		err = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
		if (fib->mtu_result == 1)
			fib->mtu_result = 0; /* no neighbour yet: it did not come to the MTU */
		own = q->want_source;
	}
	if (err >= BPF_FIB_LKUP_RET_BLACKHOLE && err <= BPF_FIB_LKUP_RET_FWD_DISABLED)
		return ROUTE_STACK;
	if (err != BPF_FIB_LKUP_RET_SUCCESS && err != BPF_FIB_LKUP_RET_NO_NEIGH)
		return ROUTE_NONE;
	if (v6) {
		__builtin_memcpy(&hop, fib->ipv6_dst, sizeof(hop));
		__builtin_memcpy(&q->source, fib->ipv6_src, sizeof(q->source));
	} else {
		stack_hop = fib->family != 2; /* IPv4 through an IPv6 hop, RFC 5549 */
		addr_from_v4(&hop, fib->ipv4_dst);
		addr_from_v4(&q->source, fib->ipv4_src);
	}
	if (own) {
		addr = bpf_map_lookup_elem(&masquerade_addrs, &fib->ifindex);
		if (!addr || (v6 ? addr_is_zero(&addr->addr6) : !addr->addr4))
			return ROUTE_NONE;
		if (v6)
			q->source = addr->addr6;
		else
			addr_from_v4(&q->source, addr->addr4);
	}
	/*
	 * The device's: what the host has learned of the path beyond does not bind the stack when it
	 * forwards, so it would send on untranslated what is only to be answered.
	 */
	if (!bpf_check_mtu(skb, fib->ifindex, &mtu, 0, 0) && mtu <= 0xffff)
		fib->mtu_result = mtu;
	if (q->reverse) {
		n->reverse_ifindex = fib->ifindex;
		n->reverse_nexthop = hop;
		n->reverse_mtu = fib->mtu_result;
		if (stack_hop)
			n->reverse_flags |= FLOW_FIB;
	} else {
		n->ifindex = fib->ifindex;
		n->nexthop = hop;
		n->mtu = fib->mtu_result;
		if (stack_hop)
			n->flags |= FLOW_FIB;
	}
	return ROUTE_OK;
}

__noinline int route4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? route_of(skb, s, false) : ROUTE_NONE;
}

__noinline int route6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? route_of(skb, s, true) : ROUTE_NONE;
}

static __always_inline int route(struct __sk_buff *skb, const bool v6)
{
	return v6 ? route6(skb) : route4(skb);
}

/* The opening half towards a container. */
static __always_inline void plan_to_container(struct plan *n, __u32 slot, const struct endpoint *ep,
					      const __u8 *smac)
{
	n->ifindex = ep->ifindex;
	n->peer = slot;
	__builtin_memcpy(n->dmac, ep->mac, 6);
	__builtin_memcpy(n->smac, smac, 6);
}

/* The reverse half back into the container that opened. */
static __always_inline void plan_back_to_container(struct plan *n, __u32 slot,
						   const struct endpoint *ep, const __u8 *smac)
{
	n->reverse_hook = HOOK_CONTAINER;
	n->reverse_ifindex = ep->ifindex;
	n->endpoint = slot;
	__builtin_memcpy(n->reverse_dmac, ep->mac, 6);
	__builtin_memcpy(n->reverse_smac, smac, 6);
}

static __always_inline void plan_start(struct plan *n, const struct packet *p)
{
	__builtin_memset(n, 0, sizeof(*n));
	n->saddr = p->saddr;
	n->daddr = p->daddr;
	n->sport = p->sport;
	n->dport = p->dport;
}

/* Has the container see its gateway as the sender, as docker-proxy would. 0 or -REASON. */
static __always_inline int plan_from_gateway(struct plan *n, const struct network *net,
					     const bool v6)
{
	if (v6 ? addr_is_zero(&net->gateway6) : !net->gateway4)
		return -REASON_NO_ROUTE;
	if (v6)
		n->saddr = net->gateway6;
	else
		addr_from_v4(&n->saddr, net->gateway4);
	n->flags |= FLOW_SNAT;
	return 0;
}

/* A flow from the world into a container of the network, dialled as addr. 0 or -REASON. */
static __always_inline int plan_from_world(struct __sk_buff *skb, struct scratch *s, __u32 slot,
					   const struct endpoint *target, const struct network *net,
					   const bool v6)
{
	struct plan *n = &s->plan;

	plan_to_container(n, slot, target, net->mac);
	n->flags |= FLOW_ROUTED;
	n->reverse_hook = HOOK_CONTAINER;
	n->reverse_flags |= FLOW_ROUTED;
	s->route.from = s->packet.daddr;
	s->route.to = s->packet.saddr;
	s->route.bridge = net->ifindex;
	s->route.want_source = false;
	s->route.reverse = true;
	return route(skb, v6) == ROUTE_OK ? 0 : -REASON_NO_ROUTE;
}

/*
 * A flow to a published port. ep and slot are the sender's where it is a container. 0 or -REASON.
 */
static __always_inline int plan_published(struct __sk_buff *skb, struct scratch *s,
					  const struct port *port, __u32 slot,
					  const struct endpoint *ep, const bool v6)
{
	const struct packet *p = &s->packet;
	struct plan *n = &s->plan;
	__u32 target_slot = port->endpoint;
	struct endpoint *target = endpoint_get(target_slot);
	struct network *net, *own;

	if (!target_slot)
		return -REASON_NOT_PUBLISHED;
	if (!target || !(target->flags & ENDPOINT_READY))
		return -REASON_PORT_NOT_READY;
	net = network_get(target->net);
	if (!net)
		return -REASON_PORT_NOT_READY;
	if (p->proto == IPPROTO_SCTP && port->port != p->dport)
		return -REASON_UNSUPPORTED;
	if (p->tcp_flags & TCP_RST && !syn_concerns(p))
		return -REASON_NO_FLOW;
	plan_start(n, p);
	n->daddr = port->addr;
	n->dport = port->port;
	n->port = port->slot;
	plan_to_container(n, target_slot, target, net->mac);
	if (ep) {
		own = network_get(ep->net);
		if (!own)
			return -REASON_NOT_READY;
		if (own->flags & NETWORK_INTERNAL)
			return -REASON_INTERNAL;
		n->flags |= FLOW_ROUTED;
		n->reverse_flags |= FLOW_ROUTED;
		plan_back_to_container(n, slot, ep, own->mac);
		/* It would not take its own address for a caller's. */
		if (ep->sandbox == target->sandbox)
			return plan_from_gateway(n, net, v6);
	} else if (p->hook == HOOK_HOST) {
		n->reverse_hook = HOOK_CONTAINER;
		n->reverse_ifindex = LO_IFINDEX;
		n->mtu = net->mtu; /* lo lets pass what the container's device would not */
		if (addr_is_loopback(&p->saddr, v6))
			return plan_from_gateway(n, net, v6);
	} else {
		return plan_from_world(skb, s, target_slot, target, net, v6);
	}
	return 0;
}

/*
 * A flow from the world to a container's own address. 0 or -REASON; -REASON_DIRECT_ACCESS: its network
 * does not let it in.
 */
static __always_inline int plan_direct(struct __sk_buff *skb, struct scratch *s, __u32 ifindex,
				       const bool v6)
{
	const struct packet *p = &s->packet;
	__u32 slot = endpoint_by_addr(&p->daddr);
	struct endpoint *target = endpoint_get(slot);
	struct network *net;
	int port;

	if (!target)
		return -REASON_DIRECT_ACCESS;
	net = network_get(target->net);
	if (!net)
		return -REASON_DIRECT_ACCESS;
	open_of(s, false);
	port = lets_in(target->net, ifindex, s->mark, v6);
	if (port < 0)
		return -REASON_DIRECT_ACCESS;
	if (!(target->flags & ENDPOINT_READY))
		return -REASON_NOT_READY;
	if (addr_is_loopback(&p->saddr, v6) || addr_is_this_network(&p->saddr, v6))
		return -REASON_LOOPBACK_ADDRESS;
	/* A link-local source does not leave its link, RFC 4291 2.5.6. */
	if (bpf_map_lookup_elem(&host_addrs, &p->saddr) || subnet_of(&p->saddr) ||
	    (v6 && addr_is_link_local(&p->saddr, v6)))
		return -REASON_MARTIAN;
	if (p->flags & PACKET_PORTS_LOST)
		return -REASON_FRAGMENT_NOT_FOUND;
	if (p->flags & PACKET_ICMP_ERROR)
		return -REASON_NO_FLOW;
	plan_start(&s->plan, p);
	s->plan.port = port;
	return plan_from_world(skb, s, slot, target, net, v6);
}

/*
 * A flow between two containers by their own addresses; the policy has allowed it. l2: they share
 * the link and see each other's MAC.
 */
static __always_inline int plan_between(struct scratch *s, __u32 slot, const struct endpoint *ep,
					const struct network *net, __u32 peer_slot,
					const struct endpoint *peer, bool l2)
{
	const struct packet *p = &s->packet;
	struct plan *n = &s->plan;

	plan_start(n, p);
	if (l2) {
		plan_to_container(n, peer_slot, peer, ep->mac);
		plan_back_to_container(n, slot, ep, peer->mac);
	} else {
		struct network *peer_net = network_get(peer->net);

		if (!peer_net)
			return -REASON_NOT_READY;
		n->flags |= FLOW_ROUTED;
		n->reverse_flags |= FLOW_ROUTED;
		plan_to_container(n, peer_slot, peer, peer_net->mac);
		plan_back_to_container(n, slot, ep, net->mac);
	}
	return 0;
}

/*
 * Whether container a may open a flow to container b by their own addresses: that of s->packet, or,
 * with back, the one that s->packet answers in. 0 or -REASON.
 */
static __always_inline int check_isolation(struct scratch *s, const struct endpoint *a,
					   const struct endpoint *b, bool back, const bool v6)
{
	struct network *net_a = network_get(a->net), *net_b = network_get(b->net);

	if (!net_a || !net_b)
		return -REASON_NOT_READY;
	if (a->net == b->net)
		return net_a->flags & NETWORK_NO_ICC && a != b && !linked() ? -REASON_ICC_DISABLED :
									      0;
	if ((net_a->flags | net_b->flags) & NETWORK_INTERNAL)
		return -REASON_INTERNAL;
	if (may_talk(a->net, b->net))
		return 0;
	open_of(s, back);
	return lets_in(b->net, net_a->ifindex, 0, v6) < 0 ? -REASON_ISOLATED : 0;
}
