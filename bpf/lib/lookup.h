/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the tables say: lookups that want nothing but a packet's parse, of TC programs and of XDP alike. */
#pragma once

#include "packet.h"

static __always_inline struct config *config_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

static __always_inline void *flow_table(const bool v6)
{
	return v6 ? (void *)&flows6 : (void *)&flows4;
}

static __always_inline void flow_key4(struct flow4_key *k, const struct addr *s,
				      const struct addr *d, __be16 sport, __be16 dport, __u8 proto,
				      __u8 hook)
{
	k->saddr = s->w[3];
	k->daddr = d->w[3];
	k->sport = sport;
	k->dport = dport;
	k->proto = proto;
	k->hook = hook;
	k->pad = 0;
}

static __always_inline void flow_key6(struct flow6_key *k, const struct addr *s,
				      const struct addr *d, __be16 sport, __be16 dport, __u8 proto,
				      __u8 hook)
{
	k->saddr = *s;
	k->daddr = *d;
	k->sport = sport;
	k->dport = dport;
	k->proto = proto;
	k->hook = hook;
	k->pad = 0;
}

/* The entry for the packet as it is seen at hook; NULL if it opens or belongs to no flow. */
static __always_inline struct flow *flow_find(const struct packet *p, __u8 hook, const bool v6)
{
	if (v6) {
		struct flow6_key k;

		flow_key6(&k, &p->saddr, &p->daddr, p->sport, p->dport, p->proto, hook);
		return bpf_map_lookup_elem(&flows6, &k);
	} else {
		struct flow4_key k;

		flow_key4(&k, &p->saddr, &p->daddr, p->sport, p->dport, p->proto, hook);
		return bpf_map_lookup_elem(&flows4, &k);
	}
}

static __always_inline struct endpoint *endpoint_get(__u32 slot)
{
	struct endpoint *ep = bpf_map_lookup_elem(&endpoint_slots, &slot);

	return ep && ep->ifindex ? ep : NULL;
}

static __always_inline struct network *network_get(__u32 slot)
{
	return bpf_map_lookup_elem(&network_slots, &slot);
}

/* The endpoint that has the address: its slot, or 0. */
static __always_inline __u32 endpoint_by_addr(const struct addr *a)
{
	__u32 *slot = bpf_map_lookup_elem(&endpoints, a);

	return slot ? *slot : 0;
}

static __always_inline bool is_host_addr(const struct addr *a, const bool v6)
{
	return addr_is_loopback(a, v6) || bpf_map_lookup_elem(&host_addrs, a);
}

/* The container network that the address belongs to: its slot, or 0. */
static __always_inline __u32 subnet_of(const struct addr *a)
{
	struct subnet_key k = { .prefixlen = 128, .addr = *a };
	__u32 *net = bpf_map_lookup_elem(&subnets, &k);

	return net ? *net : 0;
}

/* Whether the address may lie in a container subnet: no lookup beyond that of port_class. */
static __always_inline bool maybe_in_subnet(const struct port_class *class, const struct addr *a,
					    const bool v6)
{
	__u32 bit;

	if (v6)
		bit = (a->w[0] >> 16) ^ (a->w[0] & 0xffff);
	else
		bit = a->w[3];
	/* In assembly: before Linux 6.5 the verifier does not know what an exclusive or leaves. */
	asm volatile("%[bit] &= 0xffff" : [bit] "+r"(bit));
	return class->subnets[bit >> 3] & (1 << (bit & 7));
}

static __always_inline enum gateway_mode mode_of(const struct network *net, const bool v6)
{
	return v6 ? net->mode6 : net->mode4;
}

/* Whether the network of the slot may be dialled by a device; 0: by any. */
static __always_inline bool trusts(__u32 slot, __u32 ifindex)
{
	struct trusted_key k = { .ifindex = ifindex, .net = slot };

	return bpf_map_lookup_elem(&trusted, &k);
}

static __always_inline bool mark_accepted(const struct config *cfg, __u32 mark)
{
	return cfg->accept_mask && (mark & cfg->accept_mask) == cfg->accept_mark;
}

/*
 * Whether the network of slot net lets in a flow from beyond it, to a container's own address. open
 * names whom, and is changed; the flow came by a device and had a mark. The published port's slot
 * (0: none), or -1.
 */
static __always_inline int lets_in_of(struct open_key *open, __u32 slot, __u32 ifindex, __u32 mark,
				      const bool v6)
{
	const struct network *net = network_get(slot);
	const struct config *cfg = config_get();
	__u32 *found;

	if (!net || !cfg || net->flags & NETWORK_INTERNAL)
		return -1;
	if (mode_of(net, v6) == GATEWAY_NAT_UNPROTECTED || mark_accepted(cfg, mark))
		return 0;
	if (mode_of(net, v6) == GATEWAY_ROUTED) {
		if (open->proto == (v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
			return 0;
	} else if (!(cfg->flags & CONFIG_DIRECT_ROUTING) && !trusts(slot, ifindex)) {
		return -1;
	}
	__builtin_memset(&open->saddr, 0, sizeof(open->saddr));
	found = bpf_map_lookup_elem(&open_ports, open);
	return found ? *found & 0xffff : -1;
}

static __always_inline __u8 port_bit(__u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:
		return PORT_TCP;
	case IPPROTO_UDP:
		return PORT_UDP;
	case IPPROTO_SCTP:
		return PORT_SCTP;
	}
	return 0;
}

/* The published port that the packet dials: exact address first, then any. */
static __always_inline struct port *port_find(const struct packet *p, const bool v6)
{
	struct port_key k = { .addr = p->daddr, .port = p->dport, .proto = p->proto };
	struct port *port = bpf_map_lookup_elem(&ports, &k);

	if (!port) {
		k.addr.w[3] = 0;
		if (v6) {
			k.addr.w[0] = 0;
			k.addr.w[1] = 0;
			k.addr.w[2] = 0;
		}
		port = bpf_map_lookup_elem(&ports, &k);
	}
	return port;
}

/*
 * Whether packets can be sent there: not from IPv6 to a container without. Those are for the stack,
 * where the relay or docker-proxy has the port's socket. What leads nowhere is for nobody.
 */
static __always_inline bool port_serves(const struct port *port, const bool v6)
{
	return !port->endpoint || addr_is_v4(&port->addr) != v6;
}

/* Whether port_class has the protocol's bit set for the port, or one of others. */
static __always_inline bool port_has(const struct port_class *class, __be16 port, __u8 proto,
				     __u8 others)
{
	__u32 dport = port_index(port);

	return (class->ports[dport] | class->engine[dport]) & (port_bit(proto) | others);
}
