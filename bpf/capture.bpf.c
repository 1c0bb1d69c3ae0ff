//go:build ignore

/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the TC programs see, for `bpfnet capture`. These programs are attached to the entry and exit of
 * those (fentry, fexit) while somebody captures: a path that nobody looks at holds no instruction for it.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char _license[] SEC("license") = "Dual BSD/GPL";

#define HEAD \
	128 /* no header that the data path writes is further in: an ICMPv6 error's inner ports end at 118 */
#define MAX_PARTIES 65536

/* The kernel's own, as far as they are read here; the loader looks up where the members are. */
struct net_device {
	int ifindex;
} __attribute__((preserve_access_index));

struct sk_buff {
	unsigned int len;
	unsigned int data_len; /* bytes that are not in the linear part */
	struct net_device *dev;
	unsigned char *head;
	unsigned char *data;
	__u16 network_header; /* from head */
} __attribute__((preserve_access_index));

struct party {
	__u8 addr[16]; /* IPv4 as ::ffff:a.b.c.d */
};

/* A packet's way through one program. */
struct pass {
	__u64 time; /* ns, CLOCK_MONOTONIC: when it came in */
	__u32 before; /* bytes, of the packet as it came in */
	__u32 after; /* as it went out */
	__u32 ifindex; /* the device at whose hook it was */
	__s32 verdict; /* what the program returned */
	__u16 captured; /* bytes of head that count */
	__u8 program;
	__u8 reason; /* enum reason: why it was dropped; 0: it was not */
	__u8 wanted;
	__u8 pad[3];
	__u8 head
		[HEAD]; /* as it came in, from the link layer, or the network layer where there is none */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pass);
} capture_passes SEC(".maps");

/* What is captured follows its `struct pass`. */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} capture_events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PARTIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct party);
	__type(value, __u8);
} capture_parties SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PARTIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u8);
} capture_links SEC(".maps");

/* Set by the loader. */
volatile const __u8 capture_program; /* which one this is attached to */
volatile const __u32 capture_bytes = 256; /* of a packet, at most */
volatile const bool capture_by_party; /* only packets of an address or a device in the maps above */
volatile const __be16 capture_port; /* only packets from or to it; 0: any */
volatile const __u8 capture_reason; /* only packets dropped for it; 0: any */

static __always_inline struct pass *current_pass(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&capture_passes, &key);
}

static __always_inline bool is_party(const struct party *p)
{
	return bpf_map_lookup_elem(&capture_parties, p);
}

/* Whether the packet as it is now is from or to whom the capture is about. */
static __always_inline bool is_wanted(struct sk_buff *skb)
{
	struct party from = {}, to = {};
	const unsigned char *ip;
	__be16 ports[2] = {};
	__u8 start[40];
	__u32 l4 = 0;
	__u8 proto;

	if (!capture_by_party && !capture_port)
		return true;
	ip = skb->head + skb->network_header;
	if (bpf_probe_read_kernel(start, sizeof(start), ip) && bpf_probe_read_kernel(start, 20, ip))
		return false;
	if (start[0] >> 4 == 4) {
		from.addr[10] = from.addr[11] = to.addr[10] = to.addr[11] = 0xff;
		__builtin_memcpy(from.addr + 12, start + 12, 4);
		__builtin_memcpy(to.addr + 12, start + 16, 4);
		proto = start[9];
		/* Fragments but for the first have no ports (RFC 791). */
		if (!(start[6] & 0x1f) && !start[7])
			l4 = (start[0] & 15) * 4;
	} else if (start[0] >> 4 == 6) {
		__builtin_memcpy(from.addr, start + 8, 16);
		__builtin_memcpy(to.addr, start + 24, 16);
		proto = start[6];
		l4 = 40;
	} else {
		proto = 0;
	}
	if (capture_port) {
		if (!l4 ||
		    (proto != IPPROTO_TCP && proto != IPPROTO_UDP && proto != IPPROTO_SCTP) ||
		    bpf_probe_read_kernel(ports, sizeof(ports), ip + l4) ||
		    (ports[0] != capture_port && ports[1] != capture_port))
			return false;
	}
	if (capture_by_party) {
		__u32 ifindex = skb->dev->ifindex;

		return bpf_map_lookup_elem(&capture_links, &ifindex) || is_party(&from) ||
		       is_party(&to);
	}
	return true;
}

/* Where a TC program begins. */
SEC("fentry")
int capture_enter(__u64 *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx[0];
	struct pass *p = current_pass();
	__u32 n;

	if (!p)
		return 0;
	p->time = bpf_ktime_get_ns();
	p->before = skb->len;
	p->ifindex = skb->dev->ifindex;
	p->program = capture_program;
	p->reason = 0;
	p->wanted = is_wanted(skb);
	n = skb->len - skb->data_len;
	if (n > HEAD)
		n = HEAD;
	p->captured = n;
	if (bpf_probe_read_kernel(p->head, n, skb->data))
		p->captured = 0;
	return 0;
}

/* Where drop() begins: it is called at most once a packet. */
SEC("fentry")
int capture_drop(__u64 *ctx)
{
	struct pass *p = current_pass();

	if (p)
		p->reason = ctx[2];
	return 0;
}

/* Where a TC program ends. The packet is as the program leaves it, and is freed or sent on after this. */
SEC("fexit")
int capture_leave(__u64 *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx[0];
	struct pass *p = current_pass();
	__u64 n = skb->len;

	if (!p || (capture_reason && p->reason != capture_reason) ||
	    (!p->wanted && !is_wanted(skb)))
		return 0;
	p->after = n;
	p->verdict = (int)ctx[1];
	if (n > capture_bytes)
		n = capture_bytes;
	bpf_skb_output(skb, &capture_events, BPF_F_CURRENT_CPU | n << 32, p, sizeof(*p));
	return 0;
}
