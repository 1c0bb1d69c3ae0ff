/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the data path and the Go side share: the shapes of map keys and values, and the
 * enumerations. bpf2go generates the Go twins, so nothing here is typed twice.
 * Keys have no holes; every struct's size is asserted at the end.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/types.h>

#define MAX_ENDPOINTS 4096
#define MAX_NETWORKS 1024
#define MAX_PORTS 16384
#define SNAT_TRIES 32
#define MAX_LISTENERS 4
#define EVENT_RATE 100 /* drops told a second, by reason and CPU */
#define EVENT_HEAD 128 /* bytes of a packet that are told */
#define EVENT_RING_BYTES (256 * 1024)

/* An address of either family; IPv4 as ::ffff:a.b.c.d. Network byte order. */
struct addr {
	__be32 w[4];
};

/* Why a packet was dropped. The order is ABI: append only. Go derives the names. */
enum reason {
	REASON_NONE,
	REASON_NOT_READY, /* the sender's or receiver's interface has no READY endpoint */
	REASON_PORT_NOT_READY, /* only the engine's reservation socket listens yet */
	REASON_SPOOFED_ADDRESS, /* source address is not the sandbox's */
	REASON_SPOOFED_MAC, /* source MAC is not the endpoint's */
	REASON_LOOPBACK_ADDRESS, /* 127/8, ::1 or 0/8 at a container's interface or an uplink */
	REASON_ISOLATED, /* other network, not allowed */
	REASON_ICC_DISABLED, /* same network, enable_icc=false */
	REASON_INTERNAL, /* internal network */
	REASON_DIRECT_ACCESS, /* container address from outside */
	REASON_UNKNOWN_ENDPOINT, /* address in a container subnet, nobody has it */
	REASON_MALFORMED, /* header truncated or absurd */
	REASON_FRAGMENT_NOT_FOUND, /* its first fragment was not seen */
	REASON_SNAT_EXHAUSTED, /* no free port towards this destination */
	REASON_FLOW_TABLE_FULL,
	REASON_FLOW_COLLISION, /* two flows would look alike to the container */
	REASON_NO_FLOW, /* TCP RST, SYN-ACK or ICMP error that belongs to no flow */
	REASON_STALE_FLOW, /* its endpoint is gone */
	REASON_TRANSIT, /* between foreign devices; forwarding is on only for us */
	REASON_MARTIAN, /* an uplink's packet from one of our own addresses */
	REASON_TOO_BIG, /* over the MTU and must not or cannot be fragmented here */
	REASON_UNSUPPORTED, /* e.g. SCTP port change */
	REASON_NO_ROUTE, /* no way back to the client */
	REASON_NO_MEMORY, /* the kernel refused room for the packet's new header */
	REASON_NOT_PUBLISHED, /* the engine holds the host's port, but it leads nowhere there */
	REASON_FLOW_CAP, /* its container has as many flows as it may */
	REASON_TABLES_MOVING, /* a new flow, while an upgrade copies the flow tables */
	REASON_SPOOFED_ROUTER, /* a router advertisement or redirect, of a container that is no router */
	REASON_DENIED, /* the source is in the deny list */
	REASON_SYN_RATE, /* the source opens connections to published ports too fast */
	REASON_COUNT,
};

/* Where a packet was seen. */
enum hook {
	HOOK_NONE,
	HOOK_CONTAINER, /* ingress of the host-side veth */
	HOOK_UPLINK, /* ingress of an uplink */
	HOOK_HOST, /* ingress of lo: the host to a published port, past the sock hooks */
	HOOK_TO_CONTAINER, /* egress of the host-side veth */
	HOOK_TO_UPLINK, /* egress of an uplink */
	HOOK_BRIDGE, /* ingress of the bridge device */
	HOOK_STRICT, /* the cgroup of the engine's containers (`--strict`) */
	HOOK_SHIELD, /* XDP on an uplink (`--shield`) */
	HOOK_COUNT,
} __attribute__((packed));

/* What became of a packet that was not dropped. */
enum fate {
	FATE_CONTAINER, /* redirected into a container: the fast path */
	FATE_UPLINK, /* redirected out of an uplink: the fast path */
	FATE_LO, /* redirected to the host's loopback */
	FATE_STACK, /* left to the host's stack */
	FATE_BRIDGE, /* left to the bridge: ARP, ND, broadcast, multicast */
	FATE_COUNT,
};

enum endpoint_flags {
	ENDPOINT_READY = 1,
} __attribute__((packed));

enum network_flags {
	NETWORK_NO_ICC = 1,
	NETWORK_MASQUERADE = 2,
	NETWORK_INTERNAL = 4,
} __attribute__((packed));

/* How containers are reached from beyond their network, for one family. */
enum gateway_mode {
	GATEWAY_NAT, /* by published ports on the host's addresses */
	GATEWAY_NAT_UNPROTECTED, /* and by any port of their own addresses */
	GATEWAY_ROUTED, /* by published ports of their own addresses, and ICMP; never masqueraded */
	GATEWAY_ISOLATED, /* not even by the host */
} __attribute__((packed));

/* One interface of one sandbox. Slot 0 stands for "none". */
struct endpoint {
	__u32 ifindex; /* of the host-side veth; 0: the slot is free */
	__u32 sandbox; /* equal for all endpoints of one network namespace */
	__u16 net; /* slot of its network */
	enum endpoint_flags flags;
	__u8 pad;
	__u8 mac[6]; /* of the container's side */
	__u8 pad2[2];
	__be32 addr4; /* 0: none */
	struct addr addr6; /* zero: none */
};

struct network {
	__u32 ifindex; /* of the bridge; 0: the slot is free */
	__u8 mac[6]; /* of the bridge */
	enum network_flags flags;
	enum gateway_mode mode4;
	__u16 mtu; /* bytes, of the bridge */
	enum gateway_mode mode6;
	__u8 pad;
	__be32 gateway4; /* 0: none */
	struct addr gateway6; /* zero: none */
	struct addr source6; /* to masquerade with; zero: the route's */
	__be32 source4; /* the same; 0: the route's */
};

/* A pair of networks that may talk; a < b. */
struct pair {
	__u16 a;
	__u16 b;
};

/*
 * A container's port that may be dialled by its own address: by one other where the network keeps
 * containers apart (links), or by anyone as far as network, device and mark allow it. The value is the
 * published port's slot, 0: none.
 */
struct open_key {
	struct addr saddr; /* zero: anyone */
	struct addr daddr;
	__be16 port;
	__u8 proto;
	__u8 pad;
};

/* A device by which a network's containers may be dialled. */
struct trusted_key {
	__u32 ifindex; /* 0: there is one */
	__u32 net; /* slot */
};

/* LPM key: a container subnet, of either family (IPv4 prefixes are 96 + n long). */
struct subnet_key {
	__u32 prefixlen; /* bits, 0 to 128 */
	struct addr addr;
};

/* LPM key: more sources that an endpoint may send from. */
struct source_key {
	__u32 prefixlen; /* 32 bits of slot and 0 to 128 of addr */
	__u32 endpoint;
	struct addr addr;
};

/* What to masquerade with where the kernel cannot say (before Linux 6.7), by out device. */
struct masquerade_addr {
	__be32 addr4; /* 0: none */
	struct addr addr6; /* zero: none */
};

struct host_addr {
	__u32 ifindex;
};

/* A published port. addr is ::ffff:0.0.0.0 or :: where every host address of the family counts. */
struct port_key {
	struct addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad;
};

struct port {
	struct addr addr; /* of the container */
	__be16 port;
	__u16 endpoint; /* slot; 0: the port leads nowhere */
	__u16 slot; /* of its counters */
	__u16 pad;
};

/* Bits of port_class.ports and port_class.engine. */
enum port_bits {
	PORT_TCP = 1, /* published, some host address */
	PORT_UDP = 2,
	PORT_SCTP = 4,
	PORT_SNAT = 8, /* may carry a masqueraded flow */
	PORT_HELD = 16, /* carries one, adopted from the host's stack */
} __attribute__((packed));

/*
 * The one lookup that all of the host's own traffic pays. The daemon writes ports and subnets, the
 * sock programs write engine, by atomic operations on its words: no byte has two writers.
 */
struct port_class {
	enum port_bits ports[65536]; /* by port, host order */
	enum port_bits engine
		[65536]; /* by port: PORT_TCP, PORT_UDP, PORT_SCTP where the engine holds a reservation */
	__u8 subnets
		[8192]; /* a bit by the first 16 bits of an IPv4 or the fold of an IPv6 address */
};

/* A port that the container engine bound: its reservation socket, until it is published. */
struct reservation_key {
	__be16 port;
	__u8 proto;
	__u8 pad;
};

struct reservation {
	__u64 bound[2]; /* ns, CLOCK_MONOTONIC; of the last socket for IPv4, IPv6; 0: never */
	__u32 sockets; /* that hold it now; 0: released, and the entry stays for the next */
	struct bpf_spin_lock lock; /* makes sockets and the bit of port_class.engine one */
};

struct port_range {
	__u16 first; /* host order */
	__u16 pad;
	__u32 count;
};

enum config_flags {
	CONFIG_DROP_TRANSIT4 = 1, /* IPv4 forwarding is on only for us */
	CONFIG_DROP_TRANSIT6 = 2,
	CONFIG_DIRECT_ROUTING = 4, /* published ports are open by containers' own addresses */
};

/* Ticks of 2^30 ns (1.07 s). */
struct timeouts {
	__u32 tcp_syn;
	__u32 tcp_established;
	__u32 tcp_fin; /* one side closed */
	__u32 tcp_closed; /* both sides closed, or reset */
	__u32 udp_new; /* not yet answered */
	__u32 udp;
	__u32 icmp;
	__u32 other;
};

/* What a later version may add, at the end: -DFLOW_PAD=8 makes one for the tests of upgrades. */
#ifdef FLOW_PAD
#define FLOW_LATER __u8 later[FLOW_PAD];
#else
#define FLOW_LATER
#define FLOW_PAD 0
#endif

/* Fields are only ever added at the end: a daemon also writes that of the programs before it, until they are replaced. */
struct config {
	__u64 netns_cookie; /* of the host's namespace */
	__u32 generation; /* of the policy; the low 16 bits count */
	enum config_flags flags;
	__u32 max_flows[2]; /* entries of flows4, flows6 */
	struct port_range snat[2]; /* masquerade ports; gaps are told by PORT_SNAT */
	__u32 hash_seed;
	__u32 reservation_wait; /* ticks that an engine's bare reservation is protected */
	struct timeouts timeouts;
	__u32 accept_mark; /* of packets that reach any port */
	__u32 accept_mask; /* 0: there are none */
	__u32 endpoint_flows; /* that a container may have in one network; 0: any number */
	__u32 hold_until; /* ticks; no flow is opened until then: the tables are being copied */
	FLOW_LATER
};

/* How a packet looks at its hook: the key of a flow entry. */
struct flow4_key {
	__be32 saddr;
	__be32 daddr;
	__be16 sport; /* echo request: the identifier, echo reply: 0 */
	__be16 dport; /* echo request: 0, echo reply: the identifier */
	__u8 proto;
	enum hook hook;
	__u16 pad;
};

struct flow6_key {
	struct addr saddr;
	struct addr daddr;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 hook;
	__u16 pad;
};

enum flow_flags {
	FLOW_OUT_MASK =
		3, /* enum hook of the partner, which says where to: container, uplink, host; 0: stack */
	FLOW_NAT = 4, /* addresses or ports change */
	FLOW_ROUTED = 8, /* a hop: the TTL goes down */
	FLOW_SNAT = 16, /* holds a masquerade port, or answers one that does */
	FLOW_CLOSED_FIRST = 32, /* this direction's FIN was the first */
	FLOW_ORIGIN = 64, /* this direction opened the flow */
	FLOW_FIB = 128, /* the next hop is the kernel's business */
} __attribute__((packed));

/*
 * One direction of a flow, written only by packets of that direction: what both families share.
 */
struct flow {
	__u64 packets;
	__u64 bytes;
	__u32 first_seen; /* ticks of 2^30 ns, CLOCK_MONOTONIC */
	__u32 last_seen;
	__u32 ifindex; /* out device; 0: the stack */
	__be16 sport; /* after rewriting */
	__be16 dport;
	__u16 generation;
	__u16 endpoint; /* slot of the sender, 0 at an uplink */
	__u16 peer; /* slot of the receiver, 0 towards an uplink */
	__u16 port; /* slot of the published port, 0: none */
	__u16 mtu; /* bytes of the way ahead; 0: not checked */
	__u8 tcp_flags; /* all that this direction sent */
	enum flow_flags flags;
	__u8 dmac[6]; /* IPv4 towards an uplink: the next hop, in the first 4 */
	__u8 smac[6];
};

struct flow4 {
	struct flow f;
	__be32 saddr; /* after rewriting */
	__be32 daddr;
	FLOW_LATER
};

struct flow6 {
	struct flow f;
	struct addr saddr;
	struct addr daddr;
	struct addr nexthop; /* towards an uplink */
	FLOW_LATER
};

/*
 * A TCP connection from the world that its client has not confirmed: the answers' half of the flow that
 * it becomes. Keyed as they are seen at the container.
 */
struct syn4 {
	struct flow4 answer;
	__u32 seq; /* of what the container sent, host order */
	__u32 answered; /* seq holds */
};

struct syn6 {
	struct flow6 answer;
	__u32 seq;
	__u32 answered;
};

struct frag_key {
	struct addr saddr;
	struct addr daddr;
	__u32 id;
	__u32 ifindex; /* the device it came in by */
	__u8 proto;
	__u8 pad[3];
};

struct frag {
	__be16 sport;
	__be16 dport;
	__u32 seen; /* ticks */
	__u32 early; /* fragments that came before the first; ports are known where it is 0 */
};

struct count {
	__u64 packets;
	__u64 bytes;
};

/* Until when each listener's place is taken: ns, CLOCK_MONOTONIC; 0: it is free. */
struct listeners {
	__u64 until[MAX_LISTENERS];
};

/* What of one reason is told: by CPU. */
struct event_bucket {
	__u64 next; /* ns, CLOCK_MONOTONIC: when the next token is due */
	__u64 suppressed; /* drops without a token */
	__u64 lost; /* a listener's ring was full */
};

/* A dropped packet. */
struct event {
	__u64 time; /* ns, CLOCK_MONOTONIC */
	__u32 len; /* bytes, of the whole packet */
	__u32 ifindex; /* the device at whose hook it was */
	__u16 captured; /* bytes of head that count */
	__u8 reason;
	enum hook hook;
	__u8 pad[4];
	__u8 head[EVENT_HEAD]; /* from the link layer, or the network layer where there is none */
};

struct endpoint_count {
	struct count rx; /* into the container */
	struct count tx; /* out of it, forwarded or left to the stack */
	struct count drop; /* sent by it and dropped */
};

struct port_count {
	__u64 connections; /* flows opened */
	struct count rx; /* towards the container */
	struct count tx;
	__u64 not_ready; /* first packets dropped before the port was known */
};

/* A port slot whose port is gone; its flows go with the next purge. */
struct port_slot {
	__u32 live;
};

/* Argument and result of the expire and purge programs. */
struct expire_args {
	__u32 live[2]; /* entries left in flows4, flows6 */
	__u32 deleted[2]; /* entries found dead; each took its partner along */
};

/* Gauge of flow entries, kept on insert and delete only. */
struct flow_gauge {
	__s64 entries[2]; /* flows4, flows6 */
};

/*
 * Flows that an endpoint opened, or that were opened to it from beyond the containers. Kept on insert and
 * delete of the opening half; the daemon's sweeps check it.
 */
struct endpoint_flows {
	__s64 flows;
	__s64 counted; /* by the sweep that runs */
	__s64 off; /* what the sweep before found missing; as much as the next one finds too is corrected */
};

/* What a host process dialled before the sock programs sent it to a container. */
struct sock_peer_key {
	__u64 cookie;
	struct addr addr; /* container's */
	__be16 port;
	__u8 proto;
	__u8 pad[5];
};

struct sock_peer {
	struct addr addr;
	__be16 port;
	__u16 pad;
};

#define ASSERT_SIZE(type, n) _Static_assert(sizeof(struct type) == (n), #type)
ASSERT_SIZE(addr, 16);
ASSERT_SIZE(endpoint, 40);
ASSERT_SIZE(network, 56);
ASSERT_SIZE(open_key, 36);
ASSERT_SIZE(port_key, 20);
ASSERT_SIZE(port, 24);
ASSERT_SIZE(config, 96 + FLOW_PAD);
ASSERT_SIZE(flow4_key, 16);
ASSERT_SIZE(flow6_key, 40);
ASSERT_SIZE(flow, 56);
ASSERT_SIZE(flow4, 64 + FLOW_PAD);
ASSERT_SIZE(flow6, 104 + FLOW_PAD);
ASSERT_SIZE(syn4, 72 + FLOW_PAD);
ASSERT_SIZE(syn6, 112 + FLOW_PAD);
ASSERT_SIZE(frag_key, 44);
ASSERT_SIZE(event, 24 + EVENT_HEAD);
ASSERT_SIZE(sock_peer_key, 32);
