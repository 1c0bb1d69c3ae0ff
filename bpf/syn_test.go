// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// waiting is how many connections of the world wait for their clients.
func (h *host) waiting(f family) int {
	h.t.Helper()
	if f.v6 {
		return len(readMap[bpf.DatapathFlow6Key, bpf.DatapathSyn6](h, "syns6"))
	}
	return len(readMap[bpf.DatapathFlow4Key, bpf.DatapathSyn4](h, "syns4"))
}

// forget takes all that waits, as more of them would.
func (h *host) forget() {
	h.t.Helper()
	clearMap[bpf.DatapathFlow4Key, bpf.DatapathSyn4](h, "syns4")
	clearMap[bpf.DatapathFlow6Key, bpf.DatapathSyn6](h, "syns6")
}

// A connection from the world is a flow from when its client acknowledges what the container sent.
func TestUnanswered(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, client, dialled := f.addr(alice), at(f.client, 50000), at(f.host, pubAlice)
		in := func(what string, o ...packet.Option) {
			h.t.Helper()
			r := h.expect(what, actRedirect, published, func() result {
				return h.uplink(packet.TCP(client, dialled, append(o, fromOutside)...))
			})
			same(h.t, what, packet.TCP(client, at(a, 80), append(o, routedTo(alice), packet.TTL(63))...), r.out)
		}
		out := func(what string, o ...packet.Option) {
			h.t.Helper()
			r := h.expect(what, actRedirect, toUplink, func() result {
				return h.from(alice, packet.TCP(at(a, 80), client, append(o, toGateway(alice))...))
			})
			same(h.t, what, packet.TCP(dialled, client, append(o, toGateway(alice), packet.TTL(63))...), r.out)
		}
		// state is how many connections wait and how many entries the flow table has.
		state := func(what string, waiting, entries int) {
			h.t.Helper()
			require.Equal(h.t, []int{waiting, entries}, []int{h.waiting(f), h.entries(f)}, what)
			require.EqualValues(h.t, entries, h.gauge()[f.index()], what)
		}
		syn, answer := packet.Flags("S"), packet.Flags("SA")
		run := func(name string, test func(t *testing.T)) {
			t.Run(name, func(t *testing.T) {
				h.t = t
				h.reset()
				test(t)
			})
		}

		run("handshake", func(t *testing.T) {
			in("SYN", syn, packet.Seq(1, 0))
			in("SYN again", syn, packet.Seq(1, 0))
			state("not answered", 1, 0)
			out("SYN-ACK", answer, packet.Seq(7000, 2))
			out("SYN-ACK again", answer, packet.Seq(7000, 2))
			state("not confirmed", 1, 0)
			in("guess below", packet.Flags("A"), packet.Seq(2, 6999))
			in("guess above", packet.Flags("A"), packet.Seq(2, 7000+1<<20))
			state("guessed", 1, 0)
			in("ACK", packet.Flags("A"), packet.Seq(2, 7001))
			state("confirmed", 0, 2)
			h.age(timeout + 1)
			h.sweep("expire")
			state("established, though it rests", 0, 2)
			in("data", packet.Flags("PA"), packet.Payload([]byte("hello")))
			out("data", packet.Flags("PA"), packet.Payload([]byte("world")))
		})
		run("the container made a new answer", func(t *testing.T) {
			in("SYN", syn)
			out("lost", answer, packet.Seq(7000, 1))
			in("SYN again", syn)
			out("SYN-ACK", answer, packet.Seq(1<<31, 1))
			in("of the lost", packet.Flags("A"), packet.Seq(1, 7001))
			state("of the lost", 1, 0)
			in("ACK", packet.Flags("A"), packet.Seq(1, 1<<31+1))
			state("confirmed", 0, 2)
		})
		run("refused", func(t *testing.T) {
			in("SYN", syn)
			out("RST", packet.Flags("RA"))
			in("to be sure", packet.Flags("A"))
			state("refused", 1, 0)
		})
		run("the client gives up", func(t *testing.T) {
			h.drops("before it began", noFlow, "uplink", func() result {
				return h.uplink(packet.TCP(client, dialled, fromOutside, packet.Flags("R")))
			})
			in("SYN", syn)
			out("SYN-ACK", answer)
			in("RST", packet.Flags("R"))
			state("reset", 1, 0)
		})
		run("not its answer", func(t *testing.T) {
			in("SYN", syn)
			h.drops("a neighbour's", spoofed, "container", func() result {
				return h.from(bob, packet.TCP(at(a, 80), client, toGateway(bob), answer))
			})
			in("ACK", packet.Flags("A"))
			state("to the neighbour's", 1, 0)
			r := h.from(alice, packet.TCP(at(a, 80), client, toGateway(alice), syn))
			require.EqualValues(t, actRedirect, r.action)
			from, _ := ports(r.out)
			require.NotEqual(t, uint16(pubAlice), from, "what the container dials itself is masqueraded")
		})
		run("errors about it", func(t *testing.T) {
			in("SYN", syn)
			refusal := h.expect("the container's", actRedirect, toUplink, func() result {
				return h.from(alice, packet.ICMPError(a, f.client, f.unreach, 3, packet.TCP(client, at(a, 80)), toGateway(alice)))
			})
			same(t, "the container's", packet.ICMPError(f.host, f.client, f.unreach, 3, packet.TCP(client, dialled), toGateway(alice), packet.TTL(63)), refusal.out)
			own := packet.ICMPError(f.host, f.client, f.timeExceeded, 0, packet.TCP(client, at(a, 80)), packet.MAC(upMAC, outsideMAC))
			r := h.expect("the stack's", actPass, "", func() result { return h.run("to_uplink", own, skb{Ifindex: uint32(h.up)}) })
			same(t, "the stack's", packet.ICMPError(f.host, f.client, f.timeExceeded, 0, packet.TCP(client, dialled), packet.MAC(upMAC, outsideMAC)), r.out)
			state("errors", 1, 0)
		})
		run("policy changed meanwhile", func(t *testing.T) {
			in("SYN", syn)
			h.bump()
			out("SYN-ACK", answer, packet.Seq(7000, 1))
			h.bump()
			in("ACK", packet.Flags("A"), packet.Seq(1, 7001))
			state("confirmed", 0, 2)
		})
		run("withdrawn meanwhile", func(t *testing.T) {
			in("SYN", syn)
			slot := uint32(portSlot(h, f, pubAlice))
			h.put("port_slots", slot, bpf.DatapathPortSlot{})
			h.bump()
			h.drops("SYN-ACK", staleFlow, "container", func() result {
				return h.from(alice, packet.TCP(at(a, 80), client, toGateway(alice), answer))
			})
			h.put("port_slots", slot, bpf.DatapathPortSlot{Live: 1})
		})
		run("its container goes", func(t *testing.T) {
			in("SYN", syn)
			h.uplink(packet.TCP(client, at(f.host, pubBob), fromOutside))
			h.sweep("purge")
			state("nobody went", 2, 0)
			var was bpf.DatapathEndpoint
			require.NoError(t, h.coll.Maps["endpoint_slots"].Lookup(uint32(alice), &was))
			h.put("endpoint_slots", uint32(alice), bpf.DatapathEndpoint{})
			h.sweep("purge")
			state("the neighbour's waits", 1, 0)
			// Another takes address and slots.
			h.put("endpoint_slots", uint32(alice), was)
			h.bump()
			h.drops("SYN-ACK", noFlow, "container", func() result {
				return h.from(alice, packet.TCP(at(a, 80), client, toGateway(alice), answer))
			})
		})
		run("its port goes", func(t *testing.T) {
			in("SYN", syn)
			slot := uint32(portSlot(h, f, pubAlice))
			h.put("port_slots", slot, bpf.DatapathPortSlot{})
			h.sweep("purge")
			state("withdrawn", 0, 0)
			h.put("port_slots", slot, bpf.DatapathPortSlot{Live: 1})
		})
		run("forgotten", func(t *testing.T) {
			in("SYN", syn)
			h.forget()
			h.drops("SYN-ACK", noFlow, "container", func() result {
				return h.from(alice, packet.TCP(at(a, 80), client, toGateway(alice), answer))
			})
			in("SYN again", syn)
			out("SYN-ACK", answer, packet.Seq(7000, 1))
			h.forget()
			in("ACK", packet.Flags("A"), packet.Seq(1, 7001))
			in("data", packet.Flags("PA"), packet.Seq(1, 7001), packet.Payload([]byte("hello")))
			state("in mid-stream", 1, 0)
			out("its ACK", packet.Flags("A"), packet.Seq(7001, 6))
			in("more", packet.Flags("PA"), packet.Seq(6, 7001), packet.Payload([]byte("world")))
			state("confirmed", 0, 2)
		})
		run("confirmed while tables move", func(t *testing.T) {
			in("SYN", syn)
			out("SYN-ACK", answer, packet.Seq(7000, 1))
			h.setConfig(func(c *bpf.DatapathConfig) { c.HoldUntil = h.now() + 100 })
			in("ACK", packet.Flags("A"), packet.Seq(1, 7001))
			out("the server speaks first", packet.Flags("PA"), packet.Seq(7001, 1), packet.Payload([]byte("220")))
			state("held", 1, 0)
			h.setConfig(func(c *bpf.DatapathConfig) { c.HoldUntil = 0 })
			in("its ACK", packet.Flags("A"), packet.Seq(1, 7004))
			state("confirmed", 0, 2)
		})
		run("by its own address, at a port that is published for the host's", func(t *testing.T) {
			const published = 31
			h.setMode(t, netOne, bpf.DatapathGatewayModeGATEWAY_NAT_UNPROTECTED)
			h.publish(f, f.unspecified, unix.IPPROTO_TCP, 80, alice, 80, published)
			h.connect(f, client, at(a, 80), alice, 80)
			state("confirmed", 0, 2)
			for _, port := range h.flowPorts(f) {
				require.NotEqualValues(t, published, port, "it did not come by that")
			}
			h.bump()
			h.uplink(packet.TCP(client, at(a, 80), fromOutside, packet.Flags("A")))
			state("after a change of policy", 0, 2)
		})
		run("by its own address", func(t *testing.T) {
			h.setMode(t, netOne, bpf.DatapathGatewayModeGATEWAY_NAT_UNPROTECTED)
			h.connect(f, client, at(a, 80), alice, 80)
			state("confirmed", 0, 2)
			h.uplink(packet.TCP(at(f.client, 50001), at(a, 80), fromOutside))
			state("another", 1, 2)
		})
		run("flood", func(t *testing.T) {
			h.connect(f, client, dialled, alice, 80)
			for i := range uint16(4 * waiting) {
				other := at(f.client2, 1024+i)
				r := h.uplink(packet.TCP(other, dialled, fromOutside))
				require.EqualValues(t, actRedirect, r.action)
				h.from(alice, packet.TCP(at(a, 80), other, toGateway(alice), answer, packet.Seq(7000, 1)))
				h.uplink(packet.TCP(other, dialled, fromOutside, packet.Flags("A"), packet.Seq(1, 1<<30)))
			}
			require.LessOrEqual(t, h.waiting(f), waiting)
			require.Equal(t, 2, h.entries(f), "answers to nobody, and guesses")
			in("the established one", packet.Flags("PA"), packet.Payload([]byte("hello")))
			out("the established one", packet.Flags("PA"), packet.Payload([]byte("world")))
			h.connect(f, at(f.client, 50002), dialled, alice, 80)
			require.Equal(t, 4, h.entries(f), "who is there")
		})
	})
}

// flowPorts are the slots of the published ports that the entries of a flow table came by.
func (h *host) flowPorts(f family) (out []uint16) {
	if f.v6 {
		for _, v := range h.flows6() {
			out = append(out, v.F.Port)
		}
		return out
	}
	for _, v := range h.flows4() {
		out = append(out, v.F.Port)
	}
	return out
}

// portSlot is the slot of a published port on any address.
func portSlot(h *host, f family, port uint16) uint16 {
	h.t.Helper()
	var p bpf.DatapathPort
	require.NoError(h.t, h.coll.Maps["ports"].Lookup(bpf.DatapathPortKey{
		Addr: mapAddr(f.unspecified), Port: swap16(port), Proto: unix.IPPROTO_TCP,
	}, &p))
	return p.Slot
}
