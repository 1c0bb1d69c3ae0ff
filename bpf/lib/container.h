/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A container's interface: what it sends (from_container) and what the stack sends it (to_container). */
#pragma once

#include "forward.h"
#include "fragment.h"

/* Ethernet ARP for IPv4, RFC 826. */
struct arp {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
};

/* The READY endpoint behind the interface and its slot, or NULL. */
static __always_inline struct endpoint *endpoint_of_link(__u32 ifindex, __u32 *slot)
{
	__u32 *found = bpf_map_lookup_elem(&links, &ifindex);
	struct endpoint *ep;

	if (!found)
		return NULL;
	*slot = *found;
	ep = endpoint_get(*slot);
	if (!ep || ep->ifindex != ifindex || !(ep->flags & ENDPOINT_READY))
		return NULL;
	return ep;
}

static __always_inline int drop_from(struct __sk_buff *skb, __u32 slot, __u32 reason)
{
	if (slot)
		count_endpoint_drop(skb, slot);
	return drop(skb, HOOK_CONTAINER, reason);
}

/*
 * Whether the interface may claim the address to its neighbours: its endpoint's own, and before that is
 * READY any that is nobody else's.
 */
static __always_inline bool speaks_for(struct __sk_buff *skb, struct endpoint *ep, __u32 slot,
				       struct addr *a, const bool v6)
{
	struct endpoint *other;
	struct addr k = *a; /* a key must not be an argument before 6.2 */

	if (ep)
		return owns_address(ep, slot, a, v6);
	other = endpoint_get(endpoint_by_addr(&k));
	return other ? other->ifindex == skb->ifindex : !bpf_map_lookup_elem(&host_addrs, &k);
}

/* Options of a neighbour discovery message that are looked at; the kernel sends two at most. */
#define MAX_NEIGHBOUR_OPTIONS 8

/*
 * What neighbour discovery (RFC 4861) may not say: for another's address, with another's MAC, or as a
 * router. Who may send from any address (allowed ::/0) is one. 0 or a reason.
 */
static __always_inline int neighbour_reason(struct __sk_buff *skb, struct endpoint *ep, __u32 slot)
{
	struct scratch *s = scratch_get();
	struct source_key any = { .prefixlen = 160 };
	struct addr target;
	struct packet *p;
	__u32 off, end;
	__u8 type = 0, option[8], *mac;

	if (!s)
		return REASON_NOT_READY;
	p = &s->packet;
	if (p->proto != IPPROTO_ICMPV6)
		return 0;
	if (!ep && !addr_is_zero(&p->saddr) && !speaks_for(skb, ep, slot, &p->saddr, true))
		return REASON_SPOOFED_ADDRESS;
	if (bpf_skb_load_bytes(skb, p->l4, &type, 1))
		return REASON_MALFORMED;
	off = p->l4 + sizeof(struct icmp_header);
	switch (type) {
	case ICMPV6_ROUTER_ADVERTISEMENT:
	case ICMPV6_REDIRECT:
		any.endpoint = slot;
		return ep && bpf_map_lookup_elem(&allowed_sources, &any) ? 0 :
									   REASON_SPOOFED_ROUTER;
	case ICMPV6_ROUTER_SOLICITATION:
		break;
	case ICMPV6_NEIGHBOUR_SOLICITATION:
	case ICMPV6_NEIGHBOUR_ADVERTISEMENT:
		if (bpf_skb_load_bytes(skb, off, &target, sizeof(target)))
			return REASON_MALFORMED;
		/* A solicitation from nowhere claims its target (RFC 4862 5.4). */
		if ((type == ICMPV6_NEIGHBOUR_ADVERTISEMENT || addr_is_zero(&p->saddr)) &&
		    !speaks_for(skb, ep, slot, &target, true))
			return REASON_SPOOFED_ADDRESS;
		off += sizeof(target);
		break;
	default:
		return 0;
	}
	mac = ep ? ep->mac : p->smac;
	end = (__u32)p->l4 + p->l4_len;
	for (int i = 0; i < MAX_NEIGHBOUR_OPTIONS; i++) {
		if (off + sizeof(option) > end)
			return 0;
		if (bpf_skb_load_bytes(skb, off, option, sizeof(option)) || !option[1])
			return REASON_MALFORMED;
		/* Source or target link-layer address. */
		if ((option[0] == 1 || option[0] == 2) && !mac_equal(option + 2, mac))
			return REASON_SPOOFED_MAC;
		off += option[1] * 8;
	}
	return off + sizeof(option) > end ? 0 : REASON_MALFORMED;
}

/* Drops neighbour discovery that lies: not 0. */
__noinline int neighbour_lies(struct __sk_buff *skb)
{
	__u32 slot = 0;
	struct endpoint *ep = endpoint_of_link(skb->ifindex, &slot);
	int reason = neighbour_reason(skb, ep, slot);

	if (reason)
		drop_from(skb, slot, reason);
	return reason;
}

/*
 * Anything but IP. ARP keeps the link alive before the endpoint is READY, but never speaks for
 * another; the rest is the link's, where neighbours may talk. Not in line, for the stack's sake.
 */
__noinline int container_link(struct __sk_buff *skb, __be16 proto)
{
	struct scratch *s = scratch_get();
	__u32 slot = 0;
	struct endpoint *ep = endpoint_of_link(skb->ifindex, &slot);
	struct packet *p;
	struct network *net;

	if (!s)
		return drop_from(skb, slot, REASON_NOT_READY);
	p = &s->packet;
	if (proto == bpf_htons(ETH_P_ARP)) {
		struct arp *arp = header(skb, sizeof(struct ethhdr), sizeof(*arp));
		struct addr sender;
		__be32 ip;

		if (!arp)
			return drop_from(skb, slot, REASON_MALFORMED);
		if (!mac_equal(arp->sender_mac, p->smac) || (ep && !mac_equal(p->smac, ep->mac)))
			return drop_from(skb, slot, REASON_SPOOFED_MAC);
		__builtin_memcpy(&ip, arp->sender_ip, 4);
		addr_from_v4(&sender, ip);
		if (ip && !speaks_for(skb, ep, slot, &sender, false))
			return drop_from(skb, slot, REASON_SPOOFED_ADDRESS);
		return to_bridge(skb);
	}
	if (!ep)
		return drop_from(skb, slot, REASON_NOT_READY);
	net = network_get(ep->net);
	if (!net || net->flags & NETWORK_NO_ICC)
		return drop_from(skb, slot, REASON_ICC_DISABLED);
	if (!mac_equal(p->smac, ep->mac))
		return drop_from(skb, slot, REASON_SPOOFED_MAC);
	return to_bridge(skb);
}

/* What a container sends on its own link to a neighbour's MAC. */
static __always_inline int container_l2(struct __sk_buff *skb, struct scratch *s, __u32 slot,
					struct endpoint *ep, struct network *net)
{
	struct packet *p = &s->packet;
	__u32 peer_slot = endpoint_by_addr(&p->daddr);
	struct endpoint *peer = endpoint_get(peer_slot);
	int err;

	if (net->flags & NETWORK_NO_ICC && !linked())
		return drop_from(skb, slot, REASON_ICC_DISABLED);
	/* A neighbour that routes for it, or errors and lost fragments: the bridge knows the way. */
	if (!peer || peer->net != ep->net || !mac_equal(p->dmac, peer->mac) ||
	    p->flags & (PACKET_ICMP_ERROR | PACKET_PORTS_LOST))
		return to_neighbours(skb);
	if (!(peer->flags & ENDPOINT_READY))
		return drop_from(skb, slot, REASON_NOT_READY);
	err = plan_between(s, slot, ep, net, peer_slot, peer, true);
	return err ? drop_from(skb, slot, -err) : VERDICT_OPEN;
}

static __always_inline bool masquerades(const struct network *net, const bool v6)
{
	return net->flags & NETWORK_MASQUERADE && mode_of(net, v6) != GATEWAY_ROUTED;
}

/* Out into the world: the kernel's route, masqueraded where the network says so. A verdict. */
static __always_inline int container_egress(struct __sk_buff *skb, struct scratch *s, __u32 slot,
					    const struct endpoint *ep, const struct network *net,
					    const bool v6)
{
	bool masquerade = masquerades(net, v6);
	bool source = v6 ? !addr_is_zero(&net->source6) : net->source4 != 0;
	const struct packet *p = &s->packet;
	struct plan *n = &s->plan;

	plan_start(n, p);
	n->flags = FLOW_ROUTED;
	n->reverse_flags = FLOW_ROUTED;
	plan_back_to_container(n, slot, ep, net->mac);
	s->route.from = p->saddr;
	s->route.to = p->daddr;
	s->route.bridge = net->ifindex;
	s->route.want_source = masquerade && !source;
	s->route.reverse = false;
	switch (route(skb, v6)) {
	case ROUTE_OK:
		break;
	case ROUTE_STACK:
		count_endpoint_tx(skb, slot);
		return to_stack(skb, HOOK_CONTAINER);
	default:
		return drop_from(skb, slot, REASON_NO_ROUTE);
	}
	if (source) {
		if (v6)
			s->route.source = net->source6;
		else
			addr_from_v4(&s->route.source, net->source4);
	}
	if (masquerade && (v6 ? addr_is_zero(&s->route.source) : !s->route.source.w[3]))
		return drop_from(skb, slot, REASON_NO_ROUTE);
	/* Nor does an answer to a SYN open a flow: that one has been forgotten. */
	if (p->tcp_flags & TCP_RST || (p->tcp_flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK))
		return drop_from(skb, slot, REASON_NO_FLOW);
	/* An echo reply that nobody asked for: its answers would be the host's echo requests. */
	if (masquerade && p->dport && p->proto == (v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return drop_from(skb, slot, REASON_NO_FLOW);
	n->reverse_hook = HOOK_UPLINK;
	if (masquerade) {
		n->saddr = s->route.source;
		n->flags |= FLOW_SNAT;
	}
	return VERDICT_OPEN;
}

/* Whether the published port that the flow came by still leads where it goes. */
static __always_inline bool port_leads(const struct packet *p, const struct flow *f, const bool v6)
{
	__u32 slot = f->port;
	struct port_slot *live = bpf_map_lookup_elem(&port_slots, &slot);
	struct port *port;

	if (!live || !live->live)
		return false;
	if (!(f->flags & FLOW_ORIGIN))
		return true;
	port = port_find(p, v6);
	return port && port->slot == slot && port->endpoint == f->peer;
}

/*
 * An entry made under an older policy or route: judged again. 1: still good; 0: gone, the packet
 * opens a flow anew; -REASON: no longer allowed.
 */
static __always_inline int flow_renew(struct __sk_buff *skb, struct flow *f, struct scratch *s,
				      const struct config *cfg, const struct endpoint *ep,
				      const struct network *net, const bool v6)
{
	struct endpoint *owner = endpoint_get(f->endpoint), *peer;
	const struct packet *p = &s->packet;
	struct plan *n = &s->plan;
	struct addr from;
	int err;

	if (!owner || owner->sandbox != ep->sandbox)
		return 0;
	if (f->port && f->flags & FLOW_NAT && !port_leads(p, f, v6))
		return f->flags & FLOW_ORIGIN ? 0 : -REASON_STALE_FLOW;
	switch (flow_out(f)) {
	case HOOK_CONTAINER:
		peer = endpoint_get(f->peer);
		if (!peer || peer->ifindex != f->ifindex)
			return 0;
		/* Judged as its first packet was: by who opened it. */
		if (f->port && f->flags & FLOW_NAT)
			break;
		if (f->flags & FLOW_ORIGIN)
			err = check_isolation(s, owner, peer, false, v6);
		else
			err = check_isolation(s, peer, owner, true, v6);
		if (err)
			return err;
		break;
	case HOOK_UPLINK:
		if (v6) {
			from = ((struct flow6 *)f)->saddr;
			s->route.to = ((struct flow6 *)f)->daddr;
		} else {
			addr_from_v4(&from, ((struct flow4 *)f)->saddr);
			addr_from_v4(&s->route.to, ((struct flow4 *)f)->daddr);
		}
		if (!f->port && net->flags & NETWORK_INTERNAL)
			return -REASON_INTERNAL;
		/* Opened from outside, to its own address. */
		if (!(f->flags & (FLOW_ORIGIN | FLOW_NAT))) {
			open_of(s, true);
			if (lets_in(owner->net, ANY_DEVICE, cfg->accept_mark, v6) < 0)
				return -REASON_DIRECT_ACCESS;
		}
		/* Masquerading was switched on or off. */
		if (f->flags & FLOW_ORIGIN && !(f->flags & FLOW_SNAT) == masquerades(net, v6))
			return 0;
		n->flags = 0;
		s->route.from = f->flags & FLOW_SNAT ? p->saddr : from;
		s->route.bridge = net->ifindex;
		s->route.want_source = false;
		s->route.reverse = false;
		if (route(skb, v6) != ROUTE_OK)
			return 0;
		/* The address it was masqueraded with is no longer ours. */
		if (f->flags & FLOW_SNAT && !is_host_addr(&from, v6) &&
		    !(v6 ? addr_equal(&from, &net->source6) : from.w[3] == net->source4))
			return 0;
		f->ifindex = n->ifindex;
		f->mtu = n->mtu;
		f->flags = (f->flags & ~FLOW_FIB) | (n->flags & FLOW_FIB);
		if (v6)
			((struct flow6 *)f)->nexthop = n->nexthop;
		else
			*flow_nexthop4(f) = n->nexthop.w[3];
		break;
	case HOOK_HOST:
		break;
	default:
		return 0;
	}
	f->generation = cfg->generation;
	return 1;
}

__noinline int read_quoted4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? parse_quoted(skb, s, false) : -1;
}

__noinline int read_quoted6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? parse_quoted(skb, s, true) : -1;
}

static __always_inline void read_quoted(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	s->quoted.readable = !(v6 ? read_quoted6(skb) : read_quoted4(skb));
}

/* The flow of its own sandbox that a container's ICMP error is about, or NULL. */
static __always_inline struct flow *container_quoted_flow(struct scratch *s,
							  const struct endpoint *ep, const bool v6)
{
	struct endpoint *owner;
	struct flow *f;

	if (!s->quoted.readable)
		return NULL;
	f = quoted_flow(s, HOOK_CONTAINER, v6);
	if (!f || !flow_out(f))
		return NULL;
	owner = endpoint_get(f->endpoint);
	return owner && owner->sandbox == ep->sandbox ? f : NULL;
}

/* Makes the packet one of the flow that the error is about, in the error's direction; s->error is the error. */
static __always_inline void packet_from_quoted(struct scratch *s)
{
	const struct packet *q = &s->quoted.p;
	struct packet *p = &s->packet;

	s->error = *p;
	p->saddr = q->daddr;
	p->daddr = q->saddr;
	p->sport = q->dport;
	p->dport = q->sport;
	p->proto = q->proto;
	p->flags &= ~PACKET_ICMP_ERROR;
}

/* The first packet of a flow, or one that needs another look. A verdict. */
static __always_inline int container_slow(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	__u32 slot = 0, zero = 0, peer_slot;
	struct endpoint *ep = endpoint_of_link(skb->ifindex, &slot), *peer;
	struct port_class *class = bpf_map_lookup_elem(&port_class, &zero);
	struct config *cfg = config_get();
	struct packet *p = &s->packet;
	bool error = p->flags & PACKET_ICMP_ERROR, isolated;
	struct network *net;
	struct flow *f = NULL;
	int err;

	if (!ep) {
		if (!(p->flags & PACKET_NEIGHBOUR) ||
		    !(addr_is_multicast(&p->daddr, v6) || addr_is_link_local(&p->daddr, v6)))
			return drop_from(skb, slot, REASON_NOT_READY);
		return to_bridge(skb);
	}
	net = network_get(ep->net);
	if (!cfg || !class || !net)
		return drop_from(skb, slot, REASON_NOT_READY);
	isolated = mode_of(net, v6) == GATEWAY_ISOLATED;
	if (!mac_equal(p->smac, ep->mac))
		return drop_from(skb, slot, REASON_SPOOFED_MAC);
	err = check_source(p, ep, slot, v6);
	if (err)
		return drop_from(skb, slot, -err);
	if (addr_is_loopback(&p->daddr, v6) || addr_is_this_network(&p->daddr, v6))
		return drop_from(skb, slot, REASON_LOOPBACK_ADDRESS);
	if (p->flags & PACKET_NEIGHBOUR) {
		if (addr_is_multicast(&p->daddr, v6) || addr_is_link_local(&p->daddr, v6) ||
		    bpf_map_lookup_elem(&host_addrs, &p->daddr))
			return to_bridge(skb);
		if (!mac_equal(p->dmac, net->mac))
			return to_neighbours(skb);
		/* The rest is for the gateway to route: judged like any other packet. */
	}
	if (error) {
		f = container_quoted_flow(s, ep, v6);
		/* Errors say something about packets that went to it; others' are forged (RFC 5927). */
		if (!f && (!addr_equal(&p->daddr, &s->quoted.p.saddr) ||
			   !owns_address(ep, slot, &s->quoted.p.daddr, v6)))
			return drop_from(skb, slot, REASON_NO_FLOW);
	}
	/* To all of the link, or said to be: the stack takes what is for the host whatever its MAC. */
	if (addr_is_multicast(&p->daddr, v6) ||
	    (mac_is_group(p->dmac) && (isolated || !bpf_map_lookup_elem(&host_addrs, &p->daddr))))
		return isolated ? to_neighbours(skb) : to_bridge(skb);
	if (isolated && mac_equal(p->dmac, net->mac))
		return drop_from(skb, slot, REASON_INTERNAL);
	if (addr_is_link_local(&p->daddr, v6)) {
		if (net->flags & NETWORK_NO_ICC && !mac_equal(p->dmac, net->mac))
			return drop_from(skb, slot, REASON_ICC_DISABLED);
		return to_bridge(skb);
	}
	if (!error && !(p->flags & (PACKET_PORTS_LOST | PACKET_NO_FLOW)))
		f = flow_find(p, HOOK_CONTAINER, v6) ?: syn_find(s, v6);
	if (f) {
		struct endpoint *owner = endpoint_get(f->endpoint);

		err = 1;
		if (f->generation != (__u16)cfg->generation || !owner ||
		    owner->sandbox != ep->sandbox) {
			if (error)
				packet_from_quoted(s);
			err = flow_renew(skb, f, s, cfg, ep, net, v6);
			if (error)
				s->packet = s->error;
		}
		if (err == 1)
			return error ? VERDICT_ERROR : VERDICT_FORWARD;
		if (!error) /* its flow is left to the flow's own packets */
			flow_forget(p, HOOK_CONTAINER, f, v6);
		if (err)
			return drop_from(skb, slot, -err);
	}
	if (!mac_is_group(p->dmac) && !mac_equal(p->dmac, net->mac))
		return container_l2(skb, s, slot, ep, net);

	if (bpf_map_lookup_elem(&host_addrs, &p->daddr)) {
		bool whole = !(p->flags & (PACKET_ICMP_ERROR | PACKET_PORTS_LOST));
		struct port *port = NULL;

		if (whole && !addr_is_link_local(&p->saddr, v6) &&
		    class->ports[port_index(p->dport)] & port_bit(p->proto))
			port = port_find(p, v6);
		if (port && host_has_stream(skb, s, v6)) {
			/* Not remembered: the same tuple may dial anew. */
			count_endpoint_tx(skb, slot);
			return to_stack(skb, HOOK_CONTAINER);
		}
		if (!port || !port_serves(port, v6)) {
			if (!port && whole && port_reserved(p, cfg, class))
				return drop_from(skb, slot, REASON_PORT_NOT_READY);
			/* The relay would serve whoever asks. */
			if (port && net->flags & NETWORK_INTERNAL)
				return drop_from(skb, slot, REASON_INTERNAL);
			if (whole)
				flow_open_stack(s, cfg, slot, v6);
			count_endpoint_tx(skb, slot);
			return to_stack(skb, HOOK_CONTAINER);
		}
		err = plan_published(skb, s, port, slot, ep, v6);
		return err ? drop_from(skb, slot, -err) : VERDICT_OPEN;
	}
	peer_slot = endpoint_by_addr(&p->daddr);
	if (peer_slot) {
		peer = endpoint_get(peer_slot);
		if (!peer || !(peer->flags & ENDPOINT_READY))
			return drop_from(skb, slot, REASON_NOT_READY);
		err = check_isolation(s, ep, peer, false, v6);
		if (err)
			return drop_from(skb, slot, -err);
	} else {
		peer_slot = subnet_of(&p->daddr);
		if (peer_slot)
			return drop_from(skb, slot,
					 peer_slot == ep->net ? REASON_UNKNOWN_ENDPOINT :
								REASON_ISOLATED);
		if (net->flags & NETWORK_INTERNAL)
			return drop_from(skb, slot, REASON_INTERNAL);
		peer = NULL;
	}
	if (p->flags & PACKET_PORTS_LOST)
		return drop_from(skb, slot, REASON_FRAGMENT_NOT_FOUND);
	if (p->flags & PACKET_ICMP_ERROR)
		return drop_from(skb, slot, REASON_NO_FLOW);
	if (addr_is_link_local(&p->saddr, v6)) {
		/* It does not leave its link; the stack says so (RFC 4443 3.1). */
		count_endpoint_tx(skb, slot);
		return to_stack(skb, HOOK_CONTAINER);
	}
	if (!peer)
		return container_egress(skb, s, slot, ep, net, v6);
	err = plan_between(s, slot, ep, net, peer_slot, peer, false);
	return err ? drop_from(skb, slot, -err) : VERDICT_OPEN;
}

__noinline int container_slow4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? container_slow(skb, s, false) : TC_ACT_SHOT;
}

__noinline int container_slow6(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? container_slow(skb, s, true) : TC_ACT_SHOT;
}

static __always_inline int container_ip(struct __sk_buff *skb, struct scratch *s, const bool v6)
{
	struct packet *p = &s->packet;
	struct config *cfg = config_get();
	int err = parse_ip(skb, p, v6);
	struct endpoint *ep;
	struct flow *f, *waiting = NULL;

	if (err < 0)
		return drop(skb, HOOK_CONTAINER, -err);
	if (!cfg)
		return drop(skb, HOOK_CONTAINER, REASON_NOT_READY);
	if (p->flags & PACKET_FRAGMENT)
		p->flags |= fragment_ports(skb);
	if (v6 && p->flags & PACKET_NEIGHBOUR && neighbour_lies(skb))
		return TC_ACT_SHOT;
	if (p->flags & PACKET_ICMP_ERROR)
		read_quoted(skb, s, v6);
	if (!(p->flags & (PACKET_ICMP_ERROR | PACKET_NEIGHBOUR | PACKET_PORTS_LOST))) {
		f = flow_find_slow(s, v6);
		if (!f)
			f = waiting = syn_find(s, v6);
		if (!f)
			p->flags |= PACKET_NO_FLOW;
		if (f && f->generation == (__u16)cfg->generation) {
			ep = endpoint_get(f->endpoint);
			/* Whose address it is was settled when the flow was opened. */
			if (ep && ep->ifindex == skb->ifindex && mac_equal(p->smac, ep->mac) &&
			    ep->flags & ENDPOINT_READY) {
				if (waiting)
					syn_answer(skb, p, f, v6);
				else
					flow_turn(f, p->proto, p->tcp_flags, v6);
				return forward_slow(skb, f, false, v6);
			}
		}
	}
	return conclude(skb, v6 ? container_slow6(skb) : container_slow4(skb), v6);
}

/*
 * The protocol in the frame's header, in network order, which is written to scratch; 0 in a VLAN, or
 * -REASON_MALFORMED. Not in line, for the stack's sake.
 */
__noinline int container_protocol(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	__be16 proto, tci = bpf_htons(skb->vlan_tci);
	bool tagged = skb->vlan_present;

	if (!s)
		return -REASON_MALFORMED;
	proto = parse_ethernet(skb, &s->packet);
	/* What a netkit passes on goes by skb->protocol, which is the sender's word (packet(7)). */
	if (!proto || (by_netkit(skb) && skb->protocol != proto))
		return -REASON_MALFORMED;
	if (!tagged && (proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD))) {
		tagged = true;
		if (bpf_skb_load_bytes(skb, sizeof(struct ethhdr), &tci, sizeof(tci)))
			return -REASON_MALFORMED;
	}
	if (!tagged)
		return proto;
	/* A tag of no VLAN: the stack takes it off and what it hides for untagged. */
	return tci & bpf_htons(VLAN_ID) ? 0 : -REASON_MALFORMED;
}

/* Anything that did not go straight on. */
__noinline int container_frame(struct __sk_buff *skb)
{
	struct scratch *s = scratch_start(HOOK_CONTAINER);
	int proto;

	if (!s)
		return drop(skb, HOOK_CONTAINER, REASON_NOT_READY);
	proto = container_protocol(skb);
	if (proto < 0)
		return drop(skb, HOOK_CONTAINER, -proto);
	if (proto == bpf_htons(ETH_P_IP))
		return container_ip(skb, s, false);
	if (proto == bpf_htons(ETH_P_IPV6))
		return container_ip(skb, s, true);
	return container_link(skb, proto);
}

/* A plain packet of a flow that stands: straight on. STRAIGHT_NOT, or the action. */
static __always_inline int container_straight(struct __sk_buff *skb, const bool v6)
{
	struct packet p = { .hook = HOOK_CONTAINER };
	struct config *cfg = config_get();
	struct endpoint *ep;
	struct flow *f;

	if (!cfg || !parse_plain(skb, &p, v6))
		return STRAIGHT_NOT;
	f = flow_find(&p, HOOK_CONTAINER, v6);
	if (!f || f->generation != (__u16)cfg->generation)
		return STRAIGHT_NOT;
	ep = endpoint_get(f->endpoint);
	/* Whose address it is was settled when the flow was opened. */
	if (!ep || ep->ifindex != skb->ifindex || !mac_equal(p.smac, ep->mac) ||
	    !(ep->flags & ENDPOINT_READY))
		return STRAIGHT_NOT;
	flow_turn(f, p.proto, p.tcp_flags, v6);
	return forward(skb, &p, f, false, v6);
}

/* Not in line: both families in one function need more stack than the long way leaves over. */
__noinline int container_straight6(struct __sk_buff *skb)
{
	return container_straight(skb, true);
}

static __always_inline int from_container_frame(struct __sk_buff *skb)
{
	int action = STRAIGHT_NOT;

	if (!skb->vlan_present) {
		if (skb->protocol == bpf_htons(ETH_P_IP))
			action = container_straight(skb, false);
		else if (skb->protocol == bpf_htons(ETH_P_IPV6))
			action = container_straight6(skb);
	}
	return action == STRAIGHT_NOT ? container_frame(skb) : action;
}

/*
 * The world's packet by the stack, which from_uplink left the last word to its mark. Its flow is opened as
 * if from_uplink had: that forwards what follows, and answers are not masqueraded. 0 or -REASON.
 */
static __always_inline int marked_of(struct __sk_buff *skb, const bool v6)
{
	struct scratch *s = scratch_start(HOOK_UPLINK);
	int err;

	if (!s || !parse_ethernet(skb, &s->packet) || parse_ip(skb, &s->packet, v6) < 0)
		return -REASON_MALFORMED;
	if (s->packet.flags & PACKET_NO_L4)
		s->packet.flags |= PACKET_PORTS_LOST;
	s->mark = skb->mark;
	if (s->packet.tcp_flags & TCP_RST)
		return -REASON_NO_FLOW;
	err = plan_direct(skb, s, skb->ingress_ifindex, v6);
	return err ? err : flow_open(skb, v6);
}

__noinline int marked4(struct __sk_buff *skb)
{
	return marked_of(skb, false);
}

__noinline int marked6(struct __sk_buff *skb)
{
	return marked_of(skb, true);
}

/*
 * What the stack says about a packet that it saw translated, to the container that sent it: as the
 * container knows it. 0, or the packet is spoiled.
 */
static __always_inline int stack_error_of(struct __sk_buff *skb, const bool v6)
{
	struct scratch *s = scratch_start(HOOK_TO_CONTAINER);
	struct flow *f;

	if (!s)
		return 0;
	s->packet.l3 = sizeof(struct ethhdr);
	if (parse_ip(skb, &s->packet, v6) < 0 || parse_quoted(skb, s, v6))
		return 0;
	f = quoted_flow(s, HOOK_CONTAINER, v6);
	if (!f || !(f->flags & FLOW_NAT) || flow_out(f) != HOOK_CONTAINER)
		return 0;
	return icmp_rewrite(skb, f, false, v6);
}

__noinline int stack_error4(struct __sk_buff *skb)
{
	return stack_error_of(skb, false);
}

__noinline int stack_error6(struct __sk_buff *skb)
{
	return stack_error_of(skb, true);
}

/* What reaches a container by the stack or the bridge: its host, its neighbours, nobody else. */
static __always_inline int to_container_ip(struct __sk_buff *skb, struct packet *p, const bool v6)
{
	__u32 slot = 0, from_slot = 0, in = skb->ingress_ifindex;
	struct endpoint *ep = endpoint_of_link(skb->ifindex, &slot), *from;
	struct config *cfg;
	struct network *net;
	int err = parse_ip(skb, p, v6);

	if (err < 0)
		return drop(skb, HOOK_TO_CONTAINER, -err);
	if (p->flags & PACKET_NEIGHBOUR)
		return let_go(skb, HOOK_TO_CONTAINER, FATE_BRIDGE, PASS);
	if (!ep)
		return drop(skb, HOOK_TO_CONTAINER, REASON_NOT_READY);
	if (addr_is_loopback(&p->saddr, v6) || addr_is_loopback(&p->daddr, v6) ||
	    (!v6 && addr_is_this_network(&p->daddr, v6)))
		return drop(skb, HOOK_TO_CONTAINER, REASON_LOOPBACK_ADDRESS);
	net = network_get(ep->net);
	if (!net)
		return drop(skb, HOOK_TO_CONTAINER, REASON_NOT_READY);
	if (in && in != LO_IFINDEX) {
		from = endpoint_of_link(in, &from_slot);
		if (!from) {
			if (bpf_map_lookup_elem(&links, &in))
				return drop(skb, HOOK_TO_CONTAINER, REASON_NOT_READY);
			cfg = config_get();
			err = -REASON_DIRECT_ACCESS;
			if (cfg && cfg->accept_mask)
				err = v6 ? marked6(skb) : marked4(skb);
			/* The bridge's own index: routed by the host between its networks. */
			if (err)
				return drop(skb, HOOK_TO_CONTAINER, -err);
			count_endpoint_rx(skb, slot);
			return let_go(skb, HOOK_TO_CONTAINER, FATE_STACK, PASS);
		}
		if (from->net != ep->net)
			return drop(skb, HOOK_TO_CONTAINER, REASON_ISOLATED);
		if (net->flags & NETWORK_NO_ICC)
			return drop(skb, HOOK_TO_CONTAINER, REASON_ICC_DISABLED);
	} else if (mode_of(net, v6) == GATEWAY_ISOLATED) {
		return drop(skb, HOOK_TO_CONTAINER, REASON_INTERNAL);
	} else if (p->flags & PACKET_ICMP_ERROR && (v6 ? stack_error6(skb) : stack_error4(skb))) {
		return drop(skb, HOOK_TO_CONTAINER, REASON_MALFORMED);
	}
	count_endpoint_rx(skb, slot);
	return let_go(skb, HOOK_TO_CONTAINER, in ? FATE_BRIDGE : FATE_STACK, PASS);
}

static __always_inline int to_container_frame(struct __sk_buff *skb)
{
	struct packet p = { .hook = HOOK_TO_CONTAINER };
	__be16 proto;

	if (skb->mark == MARK_DELIVERED) {
		skb->mark = 0;
		return PASS;
	}
	proto = parse_ethernet(skb, &p);
	if (!proto)
		return drop(skb, HOOK_TO_CONTAINER, REASON_MALFORMED);
	if (skb->mark == MARK_JUDGED) {
		skb->mark = 0;
		/* Sent on by from_host, which judged it; a neighbour's frame was not, for its receivers. */
		if (skb->ingress_ifindex == LO_IFINDEX)
			return PASS;
	}
	if (proto == bpf_htons(ETH_P_IP))
		return to_container_ip(skb, &p, false);
	if (proto == bpf_htons(ETH_P_IPV6))
		return to_container_ip(skb, &p, true);
	return let_go(skb, HOOK_TO_CONTAINER, FATE_BRIDGE, PASS);
}

/* The bridge device: only what from_container has judged comes up to the host. */
static __always_inline int from_bridge_frame(struct __sk_buff *skb)
{
	struct packet p = { .hook = HOOK_BRIDGE };
	__be16 proto;

	if (skb->mark == MARK_JUDGED) {
		skb->mark = 0;
		return PASS;
	}
	proto = parse_ethernet(skb, &p);
	if (proto == bpf_htons(ETH_P_IP) || proto == bpf_htons(ETH_P_IPV6))
		return drop(skb, HOOK_BRIDGE, REASON_NOT_READY);
	return let_go(skb, HOOK_BRIDGE, FATE_BRIDGE, PASS);
}
