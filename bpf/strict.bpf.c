//go:build ignore

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Strict mode: what the processes of the engine's containers send and receive, at the cgroup that all
 * of them run below. Each inherits these programs before its first instruction, whatever the daemon
 * does and whatever devices its network has: an address may be used only in the namespace of a READY
 * endpoint that has it. Packet sockets (AF_PACKET) do not come by here.
 */
#include "event.h"

#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <stdbool.h>

#include <bpf/bpf_endian.h>

char _license[] SEC("license") = "Dual BSD/GPL";

#define LO_IFINDEX 1 /* in every namespace */
#define PASS 1
#define DROP 0 /* the sender sees EPERM */

/* LPM key: where a READY endpoint may be. The cookie stands in two words, lest there be a hole. */
struct strict_key {
	__u32 prefixlen; /* 64 bits of cookie and 0 to 128 of addr */
	__u32 cookie[2]; /* of the sandbox's namespace; the low word first */
	struct addr addr;
};
_Static_assert(sizeof(struct strict_key) == 28, "strict_key");

MAP(BPF_MAP_TYPE_LPM_TRIE, strict_sources, struct strict_key, __u8, 16384, BPF_F_NO_PREALLOC);

/* The namespace that a socket was made in, which it never leaves. */
struct strict_mark {
	__u64 cookie;
};
MAP(BPF_MAP_TYPE_SK_STORAGE, strict_marks, int, struct strict_mark, 0,
    BPF_F_NO_PREALLOC | BPF_F_CLONE);

static __noinline int refuse(struct __sk_buff *skb)
{
	__u32 key = REASON_NOT_READY * HOOK_COUNT + HOOK_STRICT;
	struct count *c = bpf_map_lookup_elem(&drops, &key);

	if (c) {
		c->packets++;
		c->bytes += skb->len;
	}
	tell_drop(skb, HOOK_STRICT, REASON_NOT_READY);
	return DROP;
}

/* The sandbox's own address in a packet: its source on the way out, its destination on the way in. */
static __always_inline bool read_own(struct __sk_buff *skb, bool out, struct addr *a)
{
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		a->w[0] = 0;
		a->w[1] = 0;
		a->w[2] = bpf_htonl(0xffff);
		return !bpf_skb_load_bytes(skb, out ? 12 : 16, &a->w[3], 4);
	}
	return !bpf_skb_load_bytes(skb, out ? 8 : 24, a, sizeof(*a));
}

/* A socket that was made before these programs were there: nothing tells its namespace. */
static __always_inline bool is_known(const struct addr *a)
{
	const struct endpoint *ep;
	__u32 *slot;

	if (bpf_map_lookup_elem(&host_addrs, a))
		return true;
	slot = bpf_map_lookup_elem(&endpoints, a);
	if (!slot)
		return false;
	ep = bpf_map_lookup_elem(&endpoint_slots, slot);
	return ep && ep->ifindex && ep->flags & ENDPOINT_READY;
}

static __always_inline int judge(struct __sk_buff *skb, bool out)
{
	struct strict_key key = { .prefixlen = 64 + 128 };
	const struct strict_mark *mark = NULL;
	const struct config *cfg;
	struct bpf_sock *sk;
	__u32 zero = 0;

	if (skb->ifindex == LO_IFINDEX)
		return PASS;
	/* Broadcast and multicast do not leave the link that they came by. */
	if (!out && skb->pkt_type != PACKET_HOST)
		return PASS;
	if (!read_own(skb, out, &key.addr))
		return refuse(skb);
	sk = skb->sk;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk)
		mark = bpf_sk_storage_get(&strict_marks, sk, NULL, 0);
	if (!mark)
		return is_known(&key.addr) ? PASS : refuse(skb);
	cfg = bpf_map_lookup_elem(&config, &zero);
	if (cfg && cfg->netns_cookie == mark->cookie)
		return PASS; /* it shares the host's namespace */
	key.cookie[0] = (__u32)mark->cookie;
	key.cookie[1] = mark->cookie >> 32;
	return bpf_map_lookup_elem(&strict_sources, &key) ? PASS : refuse(skb);
}

SEC("cgroup_skb/egress")
int strict_egress(struct __sk_buff *skb)
{
	return judge(skb, true);
}

SEC("cgroup_skb/ingress")
int strict_ingress(struct __sk_buff *skb)
{
	return judge(skb, false);
}

SEC("cgroup/sock_create")
int strict_sock_create(struct bpf_sock *ctx)
{
	struct strict_mark *mark =
		bpf_sk_storage_get(&strict_marks, ctx, NULL, BPF_SK_STORAGE_GET_F_CREATE);

	if (mark)
		mark->cookie = bpf_get_netns_cookie(ctx);
	return PASS;
}
