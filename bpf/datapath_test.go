// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes a network namespace and loads BPF programs (see datapath_host_test.go).
//
// The TC programs one by one, by test runs over packets: each is given what its hook would see, and
// its action, the counter it moved and the packet it left are compared with what they ought to be.
// Round trips hand one program's packet to the next.
package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// A drop's counter, for tables.
func dropped(r bpf.DatapathReason, hook string) string { return reasonName(r) + " " + hook }

const (
	toContainer = "fate container container"
	toUplink    = "fate uplink container"
	toStack     = "fate stack container"
	toBridge    = "fate bridge container"
	published   = "fate container uplink"
)

// packetCase is one packet at one program, on empty flow tables.
type packetCase struct {
	name    string
	program string
	ctx     skb
	in      []byte
	action  int32
	count   string // the one counter that moves; "": none
	out     []byte // nil: as it came in
	setup   func()
}

func (h *host) check(t *testing.T, cases []packetCase) {
	t.Helper()
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h.t = t
			h.reset()
			if c.setup != nil {
				c.setup()
			}
			r := h.expect(c.name, c.action, c.count, func() result { return h.run(c.program, c.in, c.ctx) })
			if c.action == actShot {
				return
			}
			want := c.out
			if want == nil {
				want = c.in
			}
			same(t, c.name, want, r.out)
		})
	}
}

// fromCase is a packet that an endpoint sends.
func (h *host) fromCase(name string, slot int, in []byte, action int32, count string, out []byte) packetCase {
	return packetCase{
		name: name, program: "from_container", ctx: skb{Ifindex: uint32(h.links[slot])},
		in: in, action: action, count: count, out: out,
	}
}

func (h *host) uplinkCase(name string, in []byte, action int32, count string, out []byte) packetCase {
	return packetCase{
		name: name, program: "from_uplink", ctx: skb{Ifindex: uint32(h.up)},
		in: in, action: action, count: count, out: out,
	}
}

// MACs of a packet from an endpoint to its gateway, to a neighbour, and from outside to the uplink.
func toGateway(slot int) packet.Option {
	return packet.MAC(macOf(slot), bridgeMAC(places[slot].network))
}

func toNeighbour(slot, peer int) packet.Option { return packet.MAC(macOf(slot), macOf(peer)) }

func routedTo(slot int) packet.Option {
	return packet.MAC(bridgeMAC(places[slot].network), macOf(slot))
}

var fromOutside = packet.MAC(outsideMAC, upMAC)

func forFamilies(t *testing.T, f func(t *testing.T, fam family)) {
	t.Helper()
	for _, fam := range families {
		t.Run(fam.name, func(t *testing.T) { f(t, fam) })
	}
}

const (
	notReady      = bpf.DatapathReasonREASON_NOT_READY
	portNotReady  = bpf.DatapathReasonREASON_PORT_NOT_READY
	spoofed       = bpf.DatapathReasonREASON_SPOOFED_ADDRESS
	spoofedMAC    = bpf.DatapathReasonREASON_SPOOFED_MAC
	loopbackAddr  = bpf.DatapathReasonREASON_LOOPBACK_ADDRESS
	isolated      = bpf.DatapathReasonREASON_ISOLATED
	iccDisabled   = bpf.DatapathReasonREASON_ICC_DISABLED
	internalNet   = bpf.DatapathReasonREASON_INTERNAL
	directAccess  = bpf.DatapathReasonREASON_DIRECT_ACCESS
	unknown       = bpf.DatapathReasonREASON_UNKNOWN_ENDPOINT
	malformed     = bpf.DatapathReasonREASON_MALFORMED
	noFragment    = bpf.DatapathReasonREASON_FRAGMENT_NOT_FOUND
	snatExhausted = bpf.DatapathReasonREASON_SNAT_EXHAUSTED
	tableFull     = bpf.DatapathReasonREASON_FLOW_TABLE_FULL
	collision     = bpf.DatapathReasonREASON_FLOW_COLLISION
	noFlow        = bpf.DatapathReasonREASON_NO_FLOW
	staleFlow     = bpf.DatapathReasonREASON_STALE_FLOW
	transit       = bpf.DatapathReasonREASON_TRANSIT
	martian       = bpf.DatapathReasonREASON_MARTIAN
	tooBig        = bpf.DatapathReasonREASON_TOO_BIG
	unsupported   = bpf.DatapathReasonREASON_UNSUPPORTED
	noRoute       = bpf.DatapathReasonREASON_NO_ROUTE
)

// Who may send what where, from a container.
func TestFromContainer(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, b, c := f.addr(alice), f.addr(bob), f.addr(carol)
		tcp := packet.TCP
		peer := tcp(at(a, 40000), at(b, 80), toNeighbour(alice, bob))
		cases := []packetCase{
			h.fromCase("same network", alice, peer, actRedirect, toContainer, nil),
			h.fromCase("same network UDP", alice, packet.UDP(at(a, 40000), at(b, 80), toNeighbour(alice, bob)), actRedirect, toContainer, nil),
			h.fromCase("same network echo", alice, packet.ICMPEcho(a, b, 7, 1, toNeighbour(alice, bob)), actRedirect, toContainer, nil),
			h.fromCase("same network by the gateway is a hop", alice, tcp(at(a, 40000), at(b, 80), toGateway(alice)),
				actRedirect, toContainer, tcp(at(a, 40000), at(b, 80), routedTo(bob), packet.TTL(63))),
			h.fromCase("a neighbour nobody knows is the bridge's", alice,
				tcp(at(a, 40000), at(f.in(netOne, 99), 80), packet.MAC(macOf(alice), outsideMAC)), actPass, toBridge, nil),
			h.fromCase("a neighbour as router", alice, tcp(at(a, 40000), at(f.foreign, 80), toNeighbour(alice, bob)), actPass, toBridge, nil),
			h.fromCase("peer not ready", alice, tcp(at(a, 40000), at(f.addr(late), 80), toNeighbour(alice, late)),
				actShot, dropped(notReady, "container"), nil),
			h.fromCase("peer not ready, by the gateway", alice, tcp(at(a, 40000), at(f.addr(late), 80), toGateway(alice)),
				actShot, dropped(notReady, "container"), nil),
			h.fromCase("sender not ready", late, tcp(at(f.addr(late), 40000), at(b, 80), toNeighbour(late, bob)),
				actShot, dropped(notReady, "container"), nil),
			h.fromCase("icc off", quinn, tcp(at(f.addr(quinn), 40000), at(f.addr(rita), 80), toNeighbour(quinn, rita)),
				actShot, dropped(iccDisabled, "container"), nil),
			h.fromCase("icc off, by the gateway", quinn, tcp(at(f.addr(quinn), 40000), at(f.addr(rita), 80), toGateway(quinn)),
				actShot, dropped(iccDisabled, "container"), nil),
			h.fromCase("icc off, unknown neighbour", quinn, tcp(at(f.addr(quinn), 40000), at(f.in(netQuiet, 99), 80), packet.MAC(macOf(quinn), outsideMAC)),
				actShot, dropped(iccDisabled, "container"), nil),
			h.fromCase("other network", alice, tcp(at(a, 40000), at(c, 80), toGateway(alice)), actShot, dropped(isolated, "container"), nil),
			h.fromCase("other network UDP", carol, packet.UDP(at(c, 40000), at(a, 80), toGateway(carol)), actShot, dropped(isolated, "container"), nil),
			h.fromCase("other network echo", carol, packet.ICMPEcho(c, a, 1, 1, toGateway(carol)), actShot, dropped(isolated, "container"), nil),
			h.fromCase("allowed pair", alice, tcp(at(a, 40000), at(f.addr(peggy), 80), toGateway(alice)), actRedirect, toContainer,
				tcp(at(a, 40000), at(f.addr(peggy), 80), routedTo(peggy), packet.TTL(63))),
			h.fromCase("allowed pair, the other way", peggy, packet.ICMPEcho(f.addr(peggy), b, 1, 1, toGateway(peggy)), actRedirect, toContainer,
				packet.ICMPEcho(f.addr(peggy), b, 1, 1, routedTo(bob), packet.TTL(63))),
			h.fromCase("internal to other network", ian, tcp(at(f.addr(ian), 40000), at(a, 80), toGateway(ian)), actShot, dropped(internalNet, "container"), nil),
			h.fromCase("other network to internal", alice, tcp(at(a, 40000), at(f.addr(ian), 80), toGateway(alice)), actShot, dropped(internalNet, "container"), nil),
			h.fromCase("internal to outside", ian, tcp(at(f.addr(ian), 40000), at(f.foreign, 80), toGateway(ian)), actShot, dropped(internalNet, "container"), nil),
			h.fromCase("internal to its host", ian, tcp(at(f.addr(ian), 40000), at(f.gateway(netInternal), 80), toGateway(ian)), actPass, toStack, nil),
			h.fromCase("internal to a published port", ian, tcp(at(f.addr(ian), 40000), at(f.host, pubAlice), toGateway(ian)),
				actShot, dropped(internalNet, "container"), nil),
			h.fromCase("nobody has the address", alice, tcp(at(a, 40000), at(f.in(netOne, 99), 80), toGateway(alice)), actShot, dropped(unknown, "container"), nil),
			h.fromCase("nobody in the other network has it", alice, tcp(at(a, 40000), at(f.in(netTwo, 99), 80), toGateway(alice)), actShot, dropped(isolated, "container"), nil),

			h.fromCase("spoofed address", alice, tcp(at(b, 40000), at(f.foreign, 80), toGateway(alice)), actShot, dropped(spoofed, "container"), nil),
			h.fromCase("spoofed foreign address", alice, packet.UDP(at(f.foreign, 53), at(b, 80), toNeighbour(alice, bob)), actShot, dropped(spoofed, "container"), nil),
			h.fromCase("gateway's address", alice, tcp(at(f.gateway(netOne), 40000), at(b, 80), toNeighbour(alice, bob)), actShot, dropped(spoofed, "container"), nil),
			h.fromCase("other interface's address, same sandbox", alice, tcp(at(f.addr(alice2), 40000), at(b, 80), toNeighbour(alice, bob)), actRedirect, toContainer, nil),
			h.fromCase("spoofed MAC", alice, tcp(at(a, 40000), at(b, 80), toNeighbour(bob, bob)), actShot, dropped(spoofedMAC, "container"), nil),
			h.fromCase("unknown interface", alice, peer, actShot, dropped(notReady, "container"), nil),
			h.fromCase("to loopback", alice, tcp(at(a, 40000), at(f.loopback, 80), toGateway(alice)), actShot, dropped(loopbackAddr, "container"), nil),
			h.fromCase("from loopback", alice, tcp(at(f.loopback, 40000), at(b, 80), toNeighbour(alice, bob)), actShot, dropped(loopbackAddr, "container"), nil),
			h.fromCase("from the unspecified address", alice, tcp(at(f.unspecified, 40000), at(b, 80), toNeighbour(alice, bob)), actShot, dropped(loopbackAddr, "container"), nil),
			h.fromCase("to the unspecified address", alice, tcp(at(a, 40000), at(f.unspecified, 80), toGateway(alice)), actShot, dropped(loopbackAddr, "container"), nil),

			h.fromCase("host", alice, tcp(at(a, 40000), at(f.host, 22), toGateway(alice)), actPass, toStack, nil),
			h.fromCase("gateway echo", alice, packet.ICMPEcho(a, f.gateway(netOne), 1, 1, toGateway(alice)), actPass, toStack, nil),
			h.fromCase("other network's gateway", alice, tcp(at(a, 40000), at(f.gateway(netTwo), 22), toGateway(alice)), actPass, toStack, nil),
			h.fromCase("engine's reservation", alice, tcp(at(a, 40000), at(f.host, reserved), toGateway(alice)), actShot, dropped(portNotReady, "container"), nil),
			h.fromCase("engine's reservation UDP", alice, packet.UDP(at(a, 40000), at(f.host, reserved), toGateway(alice)), actShot, dropped(portNotReady, "container"), nil),
			h.fromCase("engine's reservation, not a SYN", alice, tcp(at(a, 40000), at(f.host, reserved), toGateway(alice), packet.Flags("A")), actPass, toStack, nil),

			h.fromCase("published, other network", carol, tcp(at(c, 40000), at(f.host, pubAlice), toGateway(carol)), actRedirect, toContainer,
				tcp(at(c, 40000), at(a, 80), routedTo(alice), packet.TTL(63))),
			h.fromCase("published, other network, UDP", carol, packet.UDP(at(c, 40000), at(f.host1, pubAlice), toGateway(carol)), actRedirect, toContainer,
				packet.UDP(at(c, 40000), at(a, 80), routedTo(alice), packet.TTL(63))),
			h.fromCase("published, same network", bob, tcp(at(b, 40000), at(f.gateway(netOne), pubAlice), toGateway(bob)), actRedirect, toContainer,
				tcp(at(b, 40000), at(a, 80), routedTo(alice), packet.TTL(63))),
			h.fromCase("published on an address", carol, tcp(at(c, 40000), at(f.host, pubBob), toGateway(carol)), actRedirect, toContainer,
				tcp(at(c, 40000), at(b, 8081), routedTo(bob), packet.TTL(63))),
			h.fromCase("published on another address", carol, tcp(at(c, 40000), at(f.host1, pubBob), toGateway(carol)), actPass, toStack, nil),
			h.fromCase("published, icc off", quinn, tcp(at(f.addr(quinn), 40000), at(f.host, pubQuiet), toGateway(quinn)), actRedirect, toContainer,
				tcp(at(f.addr(quinn), 40000), at(f.addr(rita), 80), routedTo(rita), packet.TTL(63))),
			h.fromCase("published by another protocol", carol, packet.UDP(at(c, 40000), at(f.host, pubBob), toGateway(carol)), actPass, toStack, nil),
			h.fromCase("published, not ready", carol, tcp(at(c, 40000), at(f.host, pubLate), toGateway(carol)), actShot, dropped(portNotReady, "container"), nil),
			h.fromCase("published, RST", carol, tcp(at(c, 40000), at(f.host, pubAlice), toGateway(carol), packet.Flags("R")), actShot, dropped(noFlow, "container"), nil),
			h.fromCase("published, TTL over: the host must not answer as itself", carol,
				tcp(at(c, 40000), at(f.host, pubAlice), toGateway(carol), packet.TTL(1)), actPass, toStack,
				tcp(at(c, 40000), at(a, 80), toGateway(carol), packet.TTL(1))),

			h.fromCase("outside, unmasqueraded", peggy, tcp(at(f.addr(peggy), 40000), at(f.foreign, 80), toGateway(peggy)), actRedirect, toUplink,
				tcp(at(f.addr(peggy), 40000), at(f.foreign, 80), toGateway(peggy), packet.TTL(63))),
			h.fromCase("outside, TTL over", alice, tcp(at(a, 40000), at(f.foreign, 80), toGateway(alice), packet.TTL(1)), actPass, toStack, nil),
			h.fromCase("outside, TTL 0", alice, packet.UDP(at(a, 40000), at(f.foreign, 80), toGateway(alice), packet.TTL(0)), actPass, toStack, nil),
			h.fromCase("outside, RST of no flow", alice, tcp(at(a, 40000), at(f.foreign, 80), toGateway(alice), packet.Flags("R")), actShot, dropped(noFlow, "container"), nil),
			h.fromCase("other network, TTL over", alice, tcp(at(a, 40000), at(f.addr(peggy), 80), toGateway(alice), packet.TTL(1)), actPass, toStack, nil),
			h.fromCase("neighbour, TTL 1 is no hop", alice, tcp(at(a, 40000), at(b, 80), toNeighbour(alice, bob), packet.TTL(1)), actRedirect, toContainer, nil),
			h.fromCase("error of no flow", alice, packet.ICMPError(a, f.foreign, f.unreach, 3, packet.UDP(at(f.foreign, 9), at(a, 9)), toGateway(alice)),
				actShot, dropped(noFlow, "container"), nil),
			h.fromCase("error to the host", alice, packet.ICMPError(a, f.gateway(netOne), f.unreach, 3, packet.UDP(at(f.gateway(netOne), 9), at(a, 9)), toGateway(alice)),
				actPass, toStack, nil),
			h.fromCase("error to a neighbour", alice, packet.ICMPError(a, b, f.unreach, 3, packet.UDP(at(b, 9), at(a, 9)), toNeighbour(alice, bob)), actPass, toBridge, nil),
			h.fromCase("broadcast frame", alice, packet.UDP(at(a, 68), at(b, 67), packet.MAC(macOf(alice), broadcast)), actPass, toBridge, nil),
			h.fromCase("SCTP to a neighbour", alice, packet.SCTP(at(a, 40000), at(b, 80), toNeighbour(alice, bob)), actRedirect, toContainer, nil),
			h.fromCase("SCTP published", carol, packet.SCTP(at(c, 40000), at(f.host, pubSCTP), toGateway(carol)), actRedirect, toContainer,
				packet.SCTP(at(c, 40000), at(a, pubSCTP), routedTo(alice), packet.TTL(63))),
			h.fromCase("SCTP published on another port", carol, packet.SCTP(at(c, 40000), at(f.host, pubSCTPOther), toGateway(carol)), actShot, dropped(unsupported, "container"), nil),

			h.fromCase("truncated TCP", alice, packet.TCP(at(a, 40000), at(b, 80), toNeighbour(alice, bob), packet.Truncate(1)), actShot, dropped(malformed, "container"), nil),
			h.fromCase("truncated UDP", alice, packet.UDP(at(a, 40000), at(b, 80), toNeighbour(alice, bob), packet.Truncate(4)), actShot, dropped(malformed, "container"), nil),
		}
		for i := range cases {
			if cases[i].name == "unknown interface" {
				cases[i].ctx.Ifindex = uint32(h.up1)
			}
		}
		h.check(t, cases)
	})
}

// Masqueraded flows there and back, and what may not follow them.
func TestMasquerade(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, server := f.addr(alice), f.client2
		for _, c := range []struct {
			name string
			make func(src, dst netip.AddrPort, o ...packet.Option) []byte
			more []packet.Option
		}{
			{"TCP", packet.TCP, nil},
			{"UDP", packet.UDP, nil},
			{"UDP payload of odd length", packet.UDP, []packet.Option{packet.Payload([]byte("odd"))}},
			{"wrong checksum", packet.TCP, []packet.Option{packet.SkewL4(0x1234)}},
			{"wrong IP checksum", packet.UDP, []packet.Option{packet.SkewIP(7)}},
			{"IP options", packet.TCP, []packet.Option{packet.IPOptions(1, 1, 1, 0), packet.HopByHop()}},
		} {
			t.Run(c.name, func(t *testing.T) {
				h.t = t
				h.reset()
				opt := func(o ...packet.Option) []packet.Option { return append(o, c.more...) }
				r := h.expect("out", actRedirect, toUplink, func() result {
					return h.from(alice, c.make(at(a, 40000), at(server, 443), opt(toGateway(alice))...))
				})
				require.Equal(t, uint32(markJudged), r.mark, "to_uplink must know it")
				port := h.outer(f, alice, 40000, server, 443)
				require.True(t, port >= snatFirst && port < snatFirst+snatCount || port >= snatFirst2 && port < snatFirst2+snatCount2, "port %d", port)
				require.NotEqual(t, snatHole, port)
				same(t, "out", c.make(at(f.host, port), at(server, 443), opt(toGateway(alice), packet.TTL(63))...), r.out)
				require.Equal(t, 2, h.entries(f))

				back := h.expect("back", actRedirect, published, func() result {
					return h.uplink(c.make(at(server, 443), at(f.host, port), opt(fromOutside, packet.Flags("SA"))...))
				})
				same(t, "back", c.make(at(server, 443), at(a, 40000), opt(routedTo(alice), packet.TTL(63), packet.Flags("SA"))...), back.out)

				r = h.expect("on", actRedirect, toUplink, func() result {
					return h.from(alice, c.make(at(a, 40000), at(server, 443), opt(toGateway(alice), packet.Flags("A"))...))
				})
				same(t, "on", c.make(at(f.host, port), at(server, 443), opt(toGateway(alice), packet.TTL(63), packet.Flags("A"))...), r.out)

				second := h.from(alice, c.make(at(a, 40000), at(f.foreign, 443), opt(toGateway(alice))...))
				require.EqualValues(t, actRedirect, second.action)
				require.Equal(t, port, h.outer(f, alice, 40000, f.foreign, 443), "one socket keeps one outer port (RFC 4787 REQ-1)")

				h.expect("somebody else's answer", actPass, "", func() result {
					return h.uplink(c.make(at(f.client, 443), at(f.host, port), opt(fromOutside)...))
				})
				h.drops("the tuple copied from outside", directAccess, "uplink", func() result {
					return h.uplink(c.make(at(server, 443), at(a, 40000), opt(fromOutside)...))
				})
				h.expect("the tuple copied from outside, the other way", actPass, "", func() result {
					return h.uplink(c.make(at(a, 40000), at(server, 443), opt(fromOutside)...))
				})
				h.drops("the tuple copied by a neighbour", spoofed, "container", func() result {
					return h.from(bob, c.make(at(a, 40000), at(server, 443), opt(toGateway(bob))...))
				})
				h.drops("the tuple and MAC copied by a neighbour", spoofedMAC, "container", func() result {
					return h.from(bob, c.make(at(a, 40000), at(server, 443), opt(toGateway(alice))...))
				})
				h.drops("the answer forged by a neighbour", spoofed, "container", func() result {
					return h.from(bob, c.make(at(server, 443), at(f.host, port), opt(toGateway(bob))...))
				})
			})
		}
		t.Run("echo", func(t *testing.T) {
			h.t = t
			h.reset()
			data := packet.Payload([]byte("abcdefg"))
			r := h.expect("out", actRedirect, toUplink, func() result {
				return h.from(alice, packet.ICMPEcho(a, server, 0x4321, 1, toGateway(alice), data))
			})
			id := echoID(r.out)
			same(t, "out", packet.ICMPEcho(f.host, server, id, 1, toGateway(alice), packet.TTL(63), data), r.out)
			r = h.expect("back", actRedirect, published, func() result {
				return h.uplink(packet.ICMPEchoReply(server, f.host, id, 1, fromOutside, data))
			})
			same(t, "back", packet.ICMPEchoReply(server, a, 0x4321, 1, routedTo(alice), packet.TTL(63), data), r.out)
			r = h.from(bob, packet.ICMPEcho(f.addr(bob), server, 0x4321, 1, toGateway(bob)))
			require.NotEqual(t, id, echoID(r.out), "two senders with one identifier")
			h.expect("a request to the host with that identifier", actPass, "", func() result {
				return h.uplink(packet.ICMPEcho(server, f.host, id, 1, fromOutside))
			})
		})
		t.Run("no source address", func(t *testing.T) {
			h.t = t
			h.reset()
			r := h.from(alice, packet.SCTP(at(a, 40000), at(server, 80), toGateway(alice)))
			same(t, "by address alone", packet.SCTP(at(f.host, 40000), at(server, 80), toGateway(alice), packet.TTL(63)), r.out)
			h.drops("a second one with the same ports", snatExhausted, "container", func() result {
				return h.from(bob, packet.SCTP(at(f.addr(bob), 40000), at(server, 80), toGateway(bob)))
			})
		})
	})
	t.Run("UDP without a checksum", func(t *testing.T) {
		h.t = t
		h.reset()
		f := families[0]
		r := h.from(alice, packet.UDP(at(f.addr(alice), 1), at(f.foreign, 2), toGateway(alice), packet.NoUDPChecksum()))
		port, _ := ports(r.out)
		same(t, "stays without", packet.UDP(at(f.host, port), at(f.foreign, 2), toGateway(alice), packet.TTL(63), packet.NoUDPChecksum()), r.out)
	})
}

// outer is the outer port that a masqueraded TCP or UDP flow has.
func (h *host) outer(f family, slot int, sport uint16, dst netip.Addr, dport uint16) uint16 {
	h.t.Helper()
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		if f.v6 {
			var v bpf.DatapathFlow6
			k := bpf.DatapathFlow6Key{
				Saddr: mapAddr(f.addr(slot)), Daddr: mapAddr(dst), Sport: swap16(sport), Dport: swap16(dport),
				Proto: proto, Hook: uint8(bpf.DatapathHookHOOK_CONTAINER),
			}
			if h.coll.Maps["flows6"].Lookup(k, &v) == nil {
				return swap16(v.F.Sport)
			}
			continue
		}
		var v bpf.DatapathFlow4
		k := bpf.DatapathFlow4Key{
			Saddr: addr32(f.addr(slot)), Daddr: addr32(dst), Sport: swap16(sport), Dport: swap16(dport),
			Proto: proto, Hook: bpf.DatapathHookHOOK_CONTAINER,
		}
		if h.coll.Maps["flows4"].Lookup(k, &v) == nil {
			return swap16(v.F.Sport)
		}
	}
	h.t.Fatalf("no flow from %v:%d to %v:%d", f.addr(slot), sport, dst, dport)
	return 0
}
