//go:build ignore

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Processes of the host's network namespace reach published ports with no proxy: a destination that
 * is a published port on one of the host's addresses becomes the container's address, and reads
 * back as what was dialled. Also notes the ports that the container engine has bound.
 *
 * A socket that dials where a container's masqueraded flow holds its tuple gets an error.
 *
 * Left to the program on lo, because the kernel takes no other destination for them: sockets with a
 * loopback source, sockets bound to a device, and all that passes no hook here (raw sockets,
 * processes outside of the cgroup). An MPTCP socket is redirected but reads back the container's
 * address: the kernel shows its subflow to connect and post_bind, itself to the other hooks.
 */
#include "maps.h"

#include <linux/errno.h>
#include <linux/in.h>
#include <stdbool.h>

#include <bpf/bpf_endian.h>

char _license[] SEC("license") = "Dual BSD/GPL";

#define SOCK_STREAM 1
#define SOCK_DGRAM 2

/* What a program here returns: the call goes on, or fails. */
#define LEAVE 1
#define REFUSE 0

/* What this file did to a socket; sockets without it, nearly all, cost one pointer test. */
struct sock_mark {
	struct sock_peer_key peer; /* the last that was remembered; port 0: none */
	struct reservation_key reserved; /* port 0: none */
	__u32 device_port; /* that it counts for in device_sockets; 0: none */
};
MAP(BPF_MAP_TYPE_SK_STORAGE, sock_marks, int, struct sock_mark, 0, BPF_F_NO_PREALLOC);

/*
 * Returns one of enum port_bits, or 0 for a socket that no published port can serve. The kernel
 * calls none of these hooks for SCTP.
 */
static __always_inline __u8 port_bit(__u32 type, __u32 proto)
{
	if (type == SOCK_STREAM && proto == IPPROTO_TCP)
		return PORT_TCP;
	if (type == SOCK_DGRAM && proto == IPPROTO_UDP)
		return PORT_UDP;
	return 0;
}

static __always_inline struct port_class *find_class(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&port_class, &zero);
}

static __always_inline bool is_host(__u64 netns_cookie)
{
	__u32 zero = 0;
	const struct config *c = bpf_map_lookup_elem(&config, &zero);

	return c && c->netns_cookie == netns_cookie;
}

static __always_inline void map_ip4(struct addr *a, __be32 ip4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = ip4;
}

static __always_inline bool is_ip4(const struct addr *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_same(const struct addr *a, const struct addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

static __always_inline bool is_any(const struct addr *a)
{
	return !a->w[0] && !a->w[1] && (!a->w[2] || a->w[2] == bpf_htonl(0xffff)) && !a->w[3];
}

static __always_inline bool is_loopback(const struct addr *a)
{
	if (is_ip4(a))
		return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->w[0] && !a->w[1] && !a->w[2] && a->w[3] == bpf_htonl(1);
}

static __always_inline bool is_link_local(__be32 w)
{
	return (w & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline void read_ip6(struct addr *a, const struct bpf_sock_addr *ctx)
{
	a->w[0] = ctx->user_ip6[0];
	a->w[1] = ctx->user_ip6[1];
	a->w[2] = ctx->user_ip6[2];
	a->w[3] = ctx->user_ip6[3];
}

static __always_inline void write_ip6(struct bpf_sock_addr *ctx, const struct addr *a)
{
	ctx->user_ip6[0] = a->w[0];
	ctx->user_ip6[1] = a->w[1];
	ctx->user_ip6[2] = a->w[2];
	ctx->user_ip6[3] = a->w[3];
}

static __always_inline void read_source6(struct addr *a, const struct bpf_sock *sk)
{
	a->w[0] = sk->src_ip6[0];
	a->w[1] = sk->src_ip6[1];
	a->w[2] = sk->src_ip6[2];
	a->w[3] = sk->src_ip6[3];
}

/* Most connections of a host are to ports that nobody published: one byte tells. */
static __always_inline bool is_candidate(struct bpf_sock_addr *ctx)
{
	const struct port_class *class = find_class();
	__u32 port = port_index(ctx->user_port);

	return class && class->ports[port] & port_bit(ctx->type, ctx->protocol);
}

/*
 * Returns whether the kernel would deliver dst to the host itself. The unspecified address means
 * loopback and is replaced by it; for a socket with an address it means that one, and it is left.
 */
static __always_inline bool is_local(struct addr *dst, const struct addr *src)
{
	if (is_any(dst)) {
		if (!is_any(src))
			return false;
		dst->w[3] = is_ip4(dst) ? bpf_htonl(0x7f000001) : bpf_htonl(1);
		return true;
	}
	return is_loopback(dst) || bpf_map_lookup_elem(&host_addrs, dst);
}

static __always_inline const struct port *find_port(const struct addr *dst, __be16 number,
						    __u8 proto)
{
	struct port_key key = { .addr = *dst, .port = number, .proto = proto };
	const struct port *port = bpf_map_lookup_elem(&ports, &key);

	if (port)
		return port;
	if (!is_ip4(dst))
		key.addr.w[0] = key.addr.w[1] = key.addr.w[2] = 0;
	key.addr.w[3] = 0;
	return bpf_map_lookup_elem(&ports, &key);
}

static __always_inline bool is_ready(const struct port *port)
{
	__u32 slot = port->endpoint;
	const struct endpoint *ep = bpf_map_lookup_elem(&endpoint_slots, &slot);

	return ep && ep->flags & ENDPOINT_READY;
}

/* Remembers what the socket dialled, so that port's address reads back as it. */
static __always_inline bool remember(struct bpf_sock_addr *ctx, const struct addr *dst,
				     const struct port *port)
{
	struct sock_peer_key key = { .cookie = bpf_get_socket_cookie(ctx),
				     .addr = port->addr,
				     .port = port->port,
				     .proto = ctx->protocol };
	struct sock_peer dialled = { .addr = *dst, .port = ctx->user_port };
	const struct sock_peer *known;
	struct sock_mark *mark;

	mark = bpf_sk_storage_get(&sock_marks, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!mark)
		return false;
	known = bpf_map_lookup_elem(&sock_peers, &key);
	if (known && is_same(&known->addr, dst) && known->port == dialled.port)
		return true;
	mark->peer = key;
	return !bpf_map_update_elem(&sock_peers, &key, &dialled, BPF_ANY);
}

/*
 * The published port to send the socket to instead, remembered; NULL: leave it alone. An IPv6
 * destination that a container with IPv4 only serves needs may_cross and an unbound socket; if that
 * is V6ONLY, the kernel answers ENETUNREACH, as for every mapped address.
 */
static __always_inline const struct port *redirect(struct bpf_sock_addr *ctx, struct addr *dst,
						   const struct addr *src, bool may_cross)
{
	const struct port *port;

	if (!is_host(bpf_get_netns_cookie(ctx)))
		return NULL;
	if (is_loopback(src) || ctx->sk->bound_dev_if || !is_local(dst, src))
		return NULL;
	port = find_port(dst, ctx->user_port, ctx->protocol);
	if (!port || !is_ready(port))
		return NULL;
	if (is_ip4(dst) != is_ip4(&port->addr) && (!may_cross || is_ip4(dst) || !is_any(src)))
		return NULL;
	return remember(ctx, dst, port) ? port : NULL;
}

static __always_inline bool redirect4(struct bpf_sock_addr *ctx, __be32 source)
{
	const struct port *port;
	struct addr src, dst;

	map_ip4(&src, source);
	map_ip4(&dst, ctx->user_ip4);
	port = redirect(ctx, &dst, &src, false);
	if (!port)
		return false;
	ctx->user_ip4 = port->addr.w[3];
	ctx->user_port = port->port;
	return true;
}

static __always_inline bool redirect6(struct bpf_sock_addr *ctx, const struct addr *src,
				      bool may_cross)
{
	const struct port *port;
	struct addr dst;

	read_ip6(&dst, ctx);
	port = redirect(ctx, &dst, src, may_cross);
	if (!port)
		return false;
	write_ip6(ctx, &port->addr);
	ctx->user_port = port->port;
	return true;
}

/* A socket that was bound to a masquerade port, and whom it dials. */
struct claim {
	struct addr remote;
	__be16 remote_port;
	__be16 port;
	__u8 proto;
	__u32 held; /* by a container's flow: the answers would be the container's */
};

static __always_inline void look_at(struct claim *c, const struct addr *own)
{
	const struct flow *flow;

	if (is_ip4(&c->remote)) {
		struct flow4_key key = { .saddr = c->remote.w[3],
					 .daddr = own->w[3],
					 .sport = c->remote_port,
					 .dport = c->port,
					 .proto = c->proto,
					 .hook = HOOK_UPLINK };

		flow = bpf_map_lookup_elem(&flows4, &key);
	} else {
		struct flow6_key key = { .saddr = c->remote,
					 .daddr = *own,
					 .sport = c->remote_port,
					 .dport = c->port,
					 .proto = c->proto,
					 .hook = HOOK_UPLINK };

		flow = bpf_map_lookup_elem(&flows6, &key);
	}
	if (flow && (flow->flags & FLOW_OUT_MASK) == HOOK_CONTAINER)
		c->held = 1;
}

static long look_at_host_addr(void *map __attribute__((unused)), const struct addr *own,
			      struct host_addr *value __attribute__((unused)), struct claim *c)
{
	if (is_ip4(own) == is_ip4(&c->remote))
		look_at(c, own);
	return c->held ? 1 : 0; /* 1: enough */
}

/*
 * Whether a container's flow has the tuple already that the socket is about to connect onto. Only
 * sockets that were bound to a port for masquerading come that far: the kernel's own choice is none.
 * Without an address the socket may get any of the host's.
 */
static __always_inline bool is_held(struct bpf_sock_addr *ctx, const struct addr *src,
				    const struct addr *dst)
{
	__be16 port = bpf_htons(ctx->sk->src_port);
	const struct port_class *class;
	struct claim c = { .remote = *dst };

	if (!port)
		return false;
	class = find_class();
	if (!class || !(class->ports[port_index(port)] & PORT_SNAT) ||
	    !port_bit(ctx->type, ctx->protocol) || !is_host(bpf_get_netns_cookie(ctx)))
		return false;
	c.remote_port = ctx->user_port;
	c.port = port;
	c.proto = ctx->protocol;
	if (is_any(src))
		bpf_for_each_map_elem(&host_addrs, look_at_host_addr, &c, 0);
	else
		look_at(&c, src);
	return c.held;
}

/*
 * Counts a socket that has a masquerade port and is bound to a device. The lookup in a container's packet
 * does not find those, as it asks for the device of the container; and bind's hook does not show the device.
 */
static __always_inline void note_device(struct bpf_sock_addr *ctx)
{
	const struct port_class *class;
	struct sock_mark *mark;
	struct bpf_sock *sk = ctx->sk;
	__u32 *count, port;
	void *whole;

	port = sk->src_port;
	if (!sk->bound_dev_if || !port)
		return;
	class = find_class();
	if (!class || !(class->ports[port_index(bpf_htons(port))] & PORT_SNAT) ||
	    !is_host(bpf_get_netns_cookie(ctx)))
		return;
	/* Of an MPTCP socket this is a subflow, which is never seen to go. */
	whole = bpf_skc_to_mptcp_sock(sk);
	mark = bpf_sk_storage_get(&sock_marks, whole ?: (void *)sk, NULL,
				  BPF_SK_STORAGE_GET_F_CREATE);
	count = bpf_map_lookup_elem(&device_sockets, &port);
	if (mark && count && !__sync_val_compare_and_swap(&mark->device_port, 0, port))
		__sync_fetch_and_add(count, 1);
}

/* What the kernel itself says of a tuple that another socket has. */
static __always_inline int refuse(void)
{
	bpf_set_retval(-EADDRNOTAVAIL);
	return REFUSE;
}

SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	struct addr src, dst;

	if (is_candidate(ctx) && redirect4(ctx, ctx->sk->src_ip4))
		return LEAVE;
	if (ctx->sk->src_port) {
		note_device(ctx);
		map_ip4(&src, ctx->sk->src_ip4);
		map_ip4(&dst, ctx->user_ip4);
		if (is_held(ctx, &src, &dst))
			return refuse();
	}
	return LEAVE;
}

/* Also sees the mapped addresses of IPv6 sockets that dial IPv4. */
SEC("cgroup/connect6")
int sock_connect6(struct bpf_sock_addr *ctx)
{
	struct addr src, dst;

	if (!is_candidate(ctx) && !ctx->sk->src_port)
		return LEAVE;
	read_source6(&src, ctx->sk);
	if (is_candidate(ctx) && redirect6(ctx, &src, true))
		return LEAVE;
	if (ctx->sk->src_port) {
		note_device(ctx);
		read_ip6(&dst, ctx);
		if (is_held(ctx, &src, &dst))
			return refuse();
	}
	return LEAVE;
}

/*
 * Unconnected UDP, that of IPv6 sockets to a mapped address too. The source is the socket's or the
 * message's own (IP_PKTINFO).
 */
SEC("cgroup/sendmsg4")
int sock_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct addr src, dst;

	if (is_candidate(ctx) && redirect4(ctx, ctx->msg_src_ip4))
		return LEAVE;
	if (ctx->sk->src_port) {
		note_device(ctx);
		map_ip4(&src, ctx->msg_src_ip4);
		map_ip4(&dst, ctx->user_ip4);
		if (is_held(ctx, &src, &dst))
			return refuse();
	}
	return LEAVE;
}

/*
 * The kernel refuses a mapped address that was none before, so a container with IPv4 only is out of
 * reach here. A scoped destination has tied the message to a device already.
 */
SEC("cgroup/sendmsg6")
int sock_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct addr src, dst;

	if ((!is_candidate(ctx) && !ctx->sk->src_port) || is_link_local(ctx->user_ip6[0]))
		return LEAVE;
	src.w[0] = ctx->msg_src_ip6[0];
	src.w[1] = ctx->msg_src_ip6[1];
	src.w[2] = ctx->msg_src_ip6[2];
	src.w[3] = ctx->msg_src_ip6[3];
	if (is_candidate(ctx) && redirect6(ctx, &src, false))
		return LEAVE;
	if (ctx->sk->src_port) {
		note_device(ctx);
		read_ip6(&dst, ctx);
		if (is_held(ctx, &src, &dst))
			return refuse();
	}
	return LEAVE;
}

/* What the socket dialled to reach peer; NULL: peer itself. */
static __always_inline const struct sock_peer *find_dialled(struct bpf_sock_addr *ctx,
							    const struct addr *peer)
{
	struct sock_peer_key key = { .addr = *peer,
				     .port = ctx->user_port,
				     .proto = ctx->protocol };

	key.cookie = bpf_get_socket_cookie(ctx);
	return bpf_map_lookup_elem(&sock_peers, &key);
}

static __always_inline bool is_marked(struct bpf_sock_addr *ctx)
{
	return bpf_sk_storage_get(&sock_marks, ctx->sk, NULL, 0);
}

static __always_inline void restore4(struct bpf_sock_addr *ctx)
{
	const struct sock_peer *dialled;
	struct addr peer;

	if (!is_marked(ctx))
		return;
	map_ip4(&peer, ctx->user_ip4);
	dialled = find_dialled(ctx, &peer);
	if (!dialled)
		return;
	ctx->user_ip4 = dialled->addr.w[3];
	ctx->user_port = dialled->port;
}

static __always_inline void restore6(struct bpf_sock_addr *ctx)
{
	const struct sock_peer *dialled;
	struct addr peer;

	if (!is_marked(ctx))
		return;
	read_ip6(&peer, ctx);
	dialled = find_dialled(ctx, &peer);
	if (!dialled)
		return;
	write_ip6(ctx, &dialled->addr);
	ctx->user_port = dialled->port;
}

SEC("cgroup/recvmsg4")
int sock_recvmsg4(struct bpf_sock_addr *ctx)
{
	restore4(ctx);
	return LEAVE;
}

SEC("cgroup/recvmsg6")
int sock_recvmsg6(struct bpf_sock_addr *ctx)
{
	restore6(ctx);
	return LEAVE;
}

SEC("cgroup/getpeername4")
int sock_getpeername4(struct bpf_sock_addr *ctx)
{
	restore4(ctx);
	return LEAVE;
}

SEC("cgroup/getpeername6")
int sock_getpeername6(struct bpf_sock_addr *ctx)
{
	restore6(ctx);
	return LEAVE;
}

#define COMM_SIZE 16

static __always_inline bool is_named(const char comm[COMM_SIZE], const char name[COMM_SIZE])
{
#pragma unroll
	for (int i = 0; i < COMM_SIZE; i++) {
		if (comm[i] != name[i])
			return false;
	}
	return true;
}

static __always_inline bool is_engine(void)
{
	const char daemon[COMM_SIZE] = "dockerd", proxy[COMM_SIZE] = "docker-proxy";
	char comm[COMM_SIZE] = {}; /* Linux 6.1 does not pad the name with zeros */

	if ((__u32)bpf_get_current_uid_gid() || bpf_get_current_comm(comm, sizeof(comm)))
		return false;
	return is_named(comm, daemon) || is_named(comm, proxy);
}

static __always_inline struct reservation *make_reservation(const struct reservation_key *key)
{
	struct reservation *found = bpf_map_lookup_elem(&reservations, key);
	struct reservation none = {};

	if (found)
		return found;
	bpf_map_update_elem(&reservations, key, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&reservations, key);
}

/*
 * Counts one socket in or out, and keeps the port's engine bit set while there are any. Protocols
 * share the byte, hence the atomic access, which has 32 bits; bit is where it is in word. An IPv6
 * socket may take IPv4 too.
 */
static __always_inline void hold(struct reservation *r, __u32 *word, __u32 bit, __u64 now,
				 const bool v6)
{
	bpf_spin_lock(&r->lock);
	r->sockets++;
	r->bound[0] = now;
	if (v6)
		r->bound[1] = now;
	__sync_fetch_and_or(word, bit);
	bpf_spin_unlock(&r->lock);
}

static __always_inline void release(struct reservation *r, __u32 *word, __u32 bit)
{
	bpf_spin_lock(&r->lock);
	if (r->sockets && !--r->sockets)
		__sync_fetch_and_and(word, ~bit);
	bpf_spin_unlock(&r->lock);
}

_Static_assert(__builtin_offsetof(struct port_class, engine) % sizeof(__u32) == 0, "engine");

static __always_inline __u32 *engine_word(struct port_class *class, __u16 port)
{
	return (__u32 *)&class->engine[port & ~3U];
}

static __always_inline __u32 engine_bit(__u16 port, __u8 proto)
{
	return (proto == IPPROTO_TCP ? PORT_TCP : PORT_UDP) << (port & 3) * 8;
}

/*
 * Records the engine's socket. One of MPTCP is never seen to go and leaves its bit behind, which
 * matters no longer than config.reservation_wait.
 */
static __always_inline void reserve(struct bpf_sock *ctx, const bool v6)
{
	__u16 port = ctx->src_port;
	struct reservation_key key = { .port = bpf_htons(port), .proto = ctx->protocol };
	struct port_class *class = find_class();
	struct reservation *r;
	struct sock_mark *mark;

	if (!class || !port_bit(ctx->type, ctx->protocol) || !is_host(bpf_get_netns_cookie(ctx)) ||
	    !is_engine())
		return;
	mark = bpf_sk_storage_get(&sock_marks, ctx, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	r = make_reservation(&key);
	if (!mark || !r || mark->reserved.port)
		return;
	mark->reserved = key;
	hold(r, engine_word(class, port), engine_bit(port, key.proto), bpf_ktime_get_ns(), v6);
}

SEC("cgroup/post_bind4")
int sock_post_bind4(struct bpf_sock *ctx)
{
	reserve(ctx, false);
	return LEAVE;
}

SEC("cgroup/post_bind6")
int sock_post_bind6(struct bpf_sock *ctx)
{
	reserve(ctx, true);
	return LEAVE;
}

/* A marked socket goes: its port is held by one less, and what it dialled needs no remembering. */
SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	struct sock_mark *mark = bpf_sk_storage_get(&sock_marks, ctx, NULL, 0);
	struct port_class *class = find_class();
	struct reservation_key key;
	struct reservation *r;
	__u32 port, *count;

	if (!mark || !class)
		return LEAVE;
	port = mark->device_port;
	count = port ? bpf_map_lookup_elem(&device_sockets, &port) : NULL;
	if (count)
		__sync_fetch_and_add(count, -1);
	if (mark->peer.port)
		bpf_map_delete_elem(&sock_peers, &mark->peer);
	key = mark->reserved;
	if (!key.port)
		return LEAVE;
	r = bpf_map_lookup_elem(&reservations, &key);
	if (!r)
		return LEAVE;
	port = port_index(key.port);
	release(r, engine_word(class, port), engine_bit(port, key.proto));
	return LEAVE;
}
