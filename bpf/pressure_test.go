// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"cmp"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/internal/promise"
)

const flowCap = bpf.DatapathReasonREASON_FLOW_CAP

// charged is how many flows the data path has for an endpoint.
func (h *host) charged(slot int) int64 {
	h.t.Helper()
	var e bpf.DatapathEndpointFlows
	require.NoError(h.t, h.coll.Maps["endpoint_flows"].Lookup(uint32(slot), &e))
	return e.Flows
}

// opened counts the flows in the tables by who pays for them: the opener, else the container that they reach.
func (h *host) opened() map[int]int64 {
	h.t.Helper()
	out := make(map[int]int64)
	add := func(flags bpf.DatapathFlowFlags, from, to uint16) {
		if flags&bpf.DatapathFlowFlagsFLOW_ORIGIN != 0 {
			out[int(cmp.Or(from, to))]++
		}
	}
	for _, v := range h.flows4() {
		add(v.F.Flags, v.F.Endpoint, v.F.Peer)
	}
	for _, v := range h.flows6() {
		add(v.F.Flags, v.F.Endpoint, v.F.Peer)
	}
	return out
}

// A container has as many flows as it may, whoever opens them; all others are as before.
func TestFlowCap(t *testing.T) {
	const limit = 5
	h := newHost(t, 1024)
	h.setConfig(func(c *bpf.DatapathConfig) { c.EndpointFlows = limit })
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		a, b := f.addr(alice), f.addr(bob)
		world := func(slot, i int) []byte {
			return packet.TCP(at(f.addr(slot), uint16(40000+i)), at(f.client2, 443), toGateway(slot))
		}
		h.connect(f, at(f.client, 50000), at(f.host, pubAlice), alice, 80)
		h.from(alice, packet.UDP(at(a, 1), at(b, 53), toNeighbour(alice, bob)))
		h.from(alice, packet.UDP(at(a, 1), at(f.host, 53), toGateway(alice)))
		for i := range limit - 3 {
			h.expect("within", actRedirect, toUplink, func() result { return h.from(alice, world(alice, i)) })
		}
		require.EqualValues(t, limit, h.charged(alice), "from the world, to a neighbour, to the host, to the world")
		require.Zero(t, h.charged(bob), "who is dialled by a container does not pay")

		h.drops("to the world", flowCap, "container", func() result { return h.from(alice, world(alice, limit)) })
		h.drops("to a neighbour", flowCap, "container", func() result {
			return h.from(alice, packet.UDP(at(a, 2), at(b, 53), toNeighbour(alice, bob)))
		})
		h.drops("from the world", flowCap, "uplink", func() result {
			return h.uplink(packet.TCP(at(f.client, 50001), at(f.host, pubAlice), fromOutside))
		})
		h.drops("from the world, UDP", flowCap, "uplink", func() result {
			return h.uplink(packet.UDP(at(f.client, 50001), at(f.host, pubAlice), fromOutside))
		})
		require.Zero(t, h.waiting(f), "what would be refused does not wait")
		entries := h.entries(f)
		h.expect("to the host, which has its own limits", actPass, toStack, func() result {
			return h.from(alice, packet.UDP(at(a, 2), at(f.host, 53), toGateway(alice)))
		})
		require.Equal(t, entries, h.entries(f), "not remembered")
		h.expect("what is open", actRedirect, toUplink, func() result { return h.from(alice, world(alice, 0)) })
		h.expect("what is open, from the world", actRedirect, published, func() result {
			return h.uplink(packet.TCP(at(f.client, 50000), at(f.host, pubAlice), fromOutside, packet.Flags("PA"), packet.Payload([]byte("hello"))))
		})
		h.expect("another container", actRedirect, toUplink, func() result { return h.from(bob, world(bob, 0)) })
		h.expect("another container to this one", actRedirect, toContainer, func() result {
			return h.from(bob, packet.UDP(at(b, 3), at(a, 53), toNeighbour(bob, alice)))
		})

		h.age(timeoutUp + 1)
		h.sweep("expire")
		h.sweep("expire") // an entry may be passed over where its neighbour was deleted
		require.Zero(t, h.charged(alice))
		h.expect("room again", actRedirect, toUplink, func() result { return h.from(alice, world(alice, limit)) })
	})
	promise.Kept(t, promise.Pressure, "With `--endpoint-flows`, a container that has all its flows gets no more (`flow_cap`); its own go on, and so do all other containers.",
		"%d flows", limit)
}

// What is kept on insert and delete is what a walk over the tables finds, after any sequence of them; an error in
// it is mended by the second sweep that sees it.
func TestFlowCount(t *testing.T) {
	h := newHost(t, 256)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	check := func(what string) {
		t.Helper()
		want := h.opened()
		for slot := range places {
			require.Equal(t, want[slot], h.charged(slot), "%s: slot %d", what, slot)
		}
	}
	for step := range 3000 {
		f := families[random.IntN(2)]
		a, b, client := f.addr(alice), f.addr(bob), at(f.client, uint16(50000+random.IntN(20)))
		port := uint16(40000 + random.IntN(20))
		flags := packet.Flags([]string{"S", "SA", "A", "FA", "R", "PA"}[random.IntN(6)])
		switch random.IntN(9) {
		case 0:
			h.from(alice, packet.TCP(at(a, port), at(f.client2, 443), toGateway(alice), flags))
		case 1:
			h.from(bob, packet.UDP(at(b, port), at(a, 53), toNeighbour(bob, alice)))
		case 2:
			h.uplink(packet.TCP(client, at(f.host, pubAlice), fromOutside, flags))
		case 3:
			h.from(alice, packet.TCP(at(a, 80), client, toGateway(alice), flags))
		case 4:
			h.from(alice, packet.TCP(at(a, port), at(f.host, pubAlice), toGateway(alice), flags))
		case 5:
			h.from(alice, packet.UDP(at(a, port), at(f.host, 53), toGateway(alice)))
		case 6:
			h.uplink(packet.UDP(client, at([]netip.Addr{f.host, f.host1}[random.IntN(2)], pubAlice), fromOutside))
		case 7:
			h.bump()
		case 8:
			h.age(uint32(random.IntN(timeout)))
			h.sweep([]string{"expire", "purge"}[random.IntN(2)])
		}
		if step%50 == 0 {
			check("in between")
		}
	}
	check("at the end")

	h.t = t
	h.reset()
	f := families[0]
	h.from(alice, packet.UDP(at(f.addr(alice), 1), at(f.addr(bob), 53), toNeighbour(alice, bob)))
	h.put("endpoint_flows", uint32(alice), bpf.DatapathEndpointFlows{Flows: 7})
	h.put("endpoint_flows", uint32(bob), bpf.DatapathEndpointFlows{Flows: -2})
	h.sweep("expire")
	require.EqualValues(t, 7, h.charged(alice), "it may have changed during the sweep")
	h.sweep("expire")
	check("mended")

	// Where flows come and go meanwhile, no two sweeps find the same: here it is what was kept that moves.
	for _, kept := range []int64{1000, -1000} {
		h.put("endpoint_flows", uint32(alice), bpf.DatapathEndpointFlows{Flows: kept})
		for _, noise := range []int64{3, -2, 5} {
			h.sweep("expire")
			var e bpf.DatapathEndpointFlows
			require.NoError(t, h.coll.Maps["endpoint_flows"].Lookup(uint32(alice), &e))
			e.Flows += noise
			h.put("endpoint_flows", uint32(alice), e)
		}
		require.InDelta(t, 1, h.charged(alice), 10, "as many as it has, but for what came and went")
		h.sweep("expire")
		h.sweep("expire")
		check("mended when it rests")
	}
}

// Towards one destination all masquerade ports are taken.
func TestPortsExhausted(t *testing.T) {
	h := newHost(t, 4096)
	h.setSNAT(20000, 8)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		a := f.addr(alice)
		out := func(i int, to netip.Addr) result {
			return h.from(alice, packet.UDP(at(a, uint16(1000+i)), at(to, 53), toGateway(alice)))
		}
		open := map[int]uint16{}
		refused := 0
		for i := range 64 {
			if r := out(i, f.client2); r.action == actRedirect {
				open[i], _ = ports(r.out)
			} else {
				refused++
			}
		}
		require.NotZero(t, refused)
		require.LessOrEqual(t, len(open), 8)
		for i := range 64 {
			if open[i] == 0 {
				h.drops("another", snatExhausted, "container", func() result { return out(i, f.client2) })
				continue
			}
			r := h.expect("an open one", actRedirect, toUplink, func() result { return out(i, f.client2) })
			port, _ := ports(r.out)
			require.Equal(t, open[i], port)
			back := h.expect("its answers", actRedirect, published, func() result {
				return h.uplink(packet.UDP(at(f.client2, 53), at(f.host, port), fromOutside, packet.Payload([]byte("answer"))))
			})
			same(t, "its answers", packet.UDP(at(f.client2, 53), at(a, uint16(1000+i)), routedTo(alice), packet.TTL(63), packet.Payload([]byte("answer"))), back.out)
		}
		h.expect("to another destination", actRedirect, toUplink, func() result { return out(0, f.client) })
		h.expect("the host's own", actPass, "", func() result {
			return h.uplink(packet.UDP(at(f.client2, 53), at(f.host, 40000), fromOutside))
		})
	})
	promise.Kept(t, promise.Pressure, "When all masquerade ports towards a destination are taken, new flows to it are refused (`snat_exhausted`); open ones, other destinations and the host go on.",
		"%d ports", 8)
}

// First fragments of datagrams that never come to an end.
func TestFragmentFlood(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		a, client := f.addr(alice), at(f.client, 50000)
		h.connect(f, client, at(f.host, pubAlice), alice, 80)
		data := packet.Payload(make([]byte, 64))
		for id := range uint32(20000) {
			whole := packet.UDP(at(f.client2, 7), at(f.host, pubAlice), fromOutside, data)
			h.uplink(packet.Fragment(whole, 32, id+1)[id%2])
		}
		require.LessOrEqual(t, len(readMap[bpf.DatapathFragKey, bpf.DatapathFrag](h, "frags")), 8192)
		require.LessOrEqual(t, h.entries(f), 4, "it is one flow")
		in := packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.Flags("PA"), packet.Payload([]byte("hello")))
		r := h.expect("an established flow", actRedirect, published, func() result { return h.uplink(in) })
		same(t, "an established flow", packet.TCP(client, at(a, 80), routedTo(alice), packet.TTL(63), packet.Flags("PA"), packet.Payload([]byte("hello"))), r.out)
		for _, part := range packet.Fragment(packet.UDP(client, at(f.host, pubAlice), fromOutside, data), 32, 70000) {
			h.expect("a whole datagram's fragments", actRedirect, published, func() result { return h.uplink(part) })
		}
		h.expect("the host's own", actPass, "", func() result {
			return h.uplink(packet.TCP(client, at(f.host, 22), fromOutside))
		})
	})
	promise.Kept(t, promise.Pressure, "A flood of fragments ends no flow: established ones go on, datagrams that arrive whole are delivered, and so is the host's traffic.",
		"%d fragments of as many datagrams", 20000)
}
