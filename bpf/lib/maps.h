/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The maps, one owner each: the daemon fills the tables, the data path keeps the state.
 * All are pinned by name; sizes of flows4 and flows6 are set by the loader.
 */
#pragma once

#include "types.h"

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define MAP(map_type, map_name, key_type, value_type, entries, map_flag) \
	struct {                                                         \
		__uint(type, map_type);                                  \
		__uint(max_entries, entries);                            \
		__uint(map_flags, map_flag);                             \
		__uint(pinning, LIBBPF_PIN_BY_NAME);                     \
		__type(key, key_type);                                   \
		__type(value, value_type);                               \
	} map_name SEC(".maps")

/* Filled by the daemon. */
MAP(BPF_MAP_TYPE_ARRAY, config, __u32, struct config, 1, 0);
MAP(BPF_MAP_TYPE_ARRAY, endpoint_slots, __u32, struct endpoint, MAX_ENDPOINTS, 0);
MAP(BPF_MAP_TYPE_ARRAY, network_slots, __u32, struct network, MAX_NETWORKS, 0);
MAP(BPF_MAP_TYPE_ARRAY, port_slots, __u32, struct port_slot, MAX_PORTS, 0);
MAP(BPF_MAP_TYPE_HASH, endpoints, struct addr, __u32, 2 * MAX_ENDPOINTS, 0);
MAP(BPF_MAP_TYPE_HASH, links, __u32, __u32, MAX_ENDPOINTS, 0);
MAP(BPF_MAP_TYPE_HASH, ports, struct port_key, struct port, 65536, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, pairs, struct pair, __u8, 16384, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, open_ports, struct open_key, __u32, 65536, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, trusted, struct trusted_key, __u8, 16384, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, host_addrs, struct addr, struct host_addr, 8192, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, masquerade_addrs, __u32, struct masquerade_addr, 4096, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_LPM_TRIE, subnets, struct subnet_key, __u32, 2 * MAX_NETWORKS, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_LPM_TRIE, allowed_sources, struct source_key, __u8, 16384, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_ARRAY, port_class, __u32, struct port_class, 1, BPF_F_MMAPABLE);

/* Kept by the data path. */
MAP(BPF_MAP_TYPE_HASH, flows4, struct flow4_key, struct flow4, 1024, 0);
MAP(BPF_MAP_TYPE_HASH, flows6, struct flow6_key, struct flow6, 1024, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, syns4, struct flow4_key, struct syn4, 65536, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, syns6, struct flow6_key, struct syn6, 32768, 0);
MAP(BPF_MAP_TYPE_ARRAY, flow_gauge, __u32, struct flow_gauge, 1, 0);
MAP(BPF_MAP_TYPE_ARRAY, endpoint_flows, __u32, struct endpoint_flows, MAX_ENDPOINTS, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, frags, struct frag_key, struct frag, 8192, 0);
MAP(BPF_MAP_TYPE_HASH, reservations, struct reservation_key, struct reservation, 65536,
    BPF_F_NO_PREALLOC);
/* Sockets of the host on a masquerade port that are bound to a device, by port: no lookup finds them there. */
MAP(BPF_MAP_TYPE_ARRAY, device_sockets, __u32, __u32, 65536, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, sock_peers, struct sock_peer_key, struct sock_peer, 65536, 0);

/* Counters: per CPU and monotonic. */
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, drops, __u32, struct count, REASON_COUNT *HOOK_COUNT, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, fates, __u32, struct count, FATE_COUNT *HOOK_COUNT, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, endpoint_stats, __u32, struct endpoint_count, MAX_ENDPOINTS, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, port_stats, __u32, struct port_count, MAX_PORTS, 0);
/* Masquerade ports found at the n-th try; the last counts exhaustion. */
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, snat_stats, __u32, __u64, SNAT_TRIES + 1, 0);

/* Whom drops are told, written by the listeners themselves, and each one's ring. */
MAP(BPF_MAP_TYPE_ARRAY, listeners, __u32, struct listeners, 1, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, event_buckets, __u32, struct event_bucket, REASON_COUNT, 0);
struct event_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENT_RING_BYTES);
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_LISTENERS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__array(values, struct event_ring);
} event_rings SEC(".maps");

/*
 * Index of a port into the arrays of struct port_class. Verifiers before Linux 6.5 do not know that a
 * swapped half-word is one, and the compiler knows too well.
 */
static __always_inline __u32 port_index(__be16 port)
{
	__u32 index = bpf_ntohs(port);

	asm volatile("%[index] &= 0xffff" : [index] "+r"(index));
	return index;
}
