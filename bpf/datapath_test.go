// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes a network namespace and loads BPF programs (see datapath_host_test.go).
//
// The TC programs one by one, by test runs over packets: each is given what its hook would see, and
// its action, the counter it moved and the packet it left are compared with what they ought to be.
// Round trips hand one program's packet to the next.
package bpf_test

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
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
		name: name, program: "from_container", ctx: h.sentBy(slot),
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
	spoofedRouter = bpf.DatapathReasonREASON_SPOOFED_ROUTER
)

// Who may send what where, from a container.
func TestFromContainer(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, b, c := f.addr(alice), f.addr(bob), f.addr(carol)
		tcp, data := packet.TCP, packet.Payload([]byte("twenty bytes of data"))
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
			h.fromCase("error about the host's own flow", alice, packet.ICMPError(a, f.host, f.unreach, 3, packet.UDP(at(f.host, 5353), at(f.client2, 53)), toGateway(alice)),
				actShot, dropped(noFlow, "container"), nil),
			h.fromCase("error about a neighbour's flow", alice, packet.ICMPError(a, b, f.unreach, 3, packet.UDP(at(b, 5353), at(f.client2, 53)), toNeighbour(alice, bob)),
				actShot, dropped(noFlow, "container"), nil),
			h.fromCase("error about a neighbour's flow, too big", alice, packet.ICMPError(a, b, f.tooBig, f.tooBigCode, packet.TCP(at(b, 5353), at(f.addr(carol), 53)), toNeighbour(alice, bob)),
				actShot, dropped(noFlow, "container"), nil),
			h.fromCase("error about a neighbour's flow, in a broadcast frame", alice, packet.ICMPError(a, b, f.unreach, 3, packet.UDP(at(b, 5353), at(f.client2, 53)), packet.MAC(macOf(alice), broadcast)),
				actShot, dropped(noFlow, "container"), nil),
			h.fromCase("error that quotes another's packet", alice, packet.ICMPError(a, b, f.unreach, 3, packet.UDP(at(f.addr(carol), 5353), at(a, 53)), toNeighbour(alice, bob)),
				actShot, dropped(noFlow, "container"), nil),
			h.fromCase("broadcast frame", alice, packet.UDP(at(a, 68), at(b, 67), packet.MAC(macOf(alice), broadcast)), actPass, toBridge, nil),
			h.fromCase("broadcast frame to the host", alice, packet.UDP(at(a, 40000), at(f.host, 53), packet.MAC(macOf(alice), broadcast)), actPass, toStack, nil),
			h.fromCase("multicast frame to the engine's reservation", alice,
				packet.UDP(at(a, 40000), at(f.host, reserved), packet.MAC(macOf(alice), net.HardwareAddr{1, 0, 0x5e, 0, 0, 1})), actShot, dropped(portNotReady, "container"), nil),
			h.fromCase("broadcast frame to the engine's reservation", alice, packet.UDP(at(a, 40000), at(f.host, reserved), packet.MAC(macOf(alice), broadcast)),
				actShot, dropped(portNotReady, "container"), nil),
			h.fromCase("broadcast frame to a published port", carol, packet.UDP(at(c, 40000), at(f.host1, pubAlice), packet.MAC(macOf(carol), broadcast)), actRedirect, toContainer,
				packet.UDP(at(c, 40000), at(a, 80), routedTo(alice), packet.TTL(63))),
			h.fromCase("broadcast frame to a published port, internal", ian, packet.UDP(at(f.addr(ian), 40000), at(f.host, pubAlice), packet.MAC(macOf(ian), broadcast)),
				actShot, dropped(internalNet, "container"), nil),
			h.fromCase("SCTP to a neighbour", alice, packet.SCTP(at(a, 40000), at(b, 80), toNeighbour(alice, bob)), actRedirect, toContainer, nil),
			h.fromCase("SCTP published", carol, packet.SCTP(at(c, 40000), at(f.host, pubSCTP), toGateway(carol)), actRedirect, toContainer,
				packet.SCTP(at(c, 40000), at(a, pubSCTP), routedTo(alice), packet.TTL(63))),
			h.fromCase("SCTP published on another port", carol, packet.SCTP(at(c, 40000), at(f.host, pubSCTPOther), toGateway(carol)), actShot, dropped(unsupported, "container"), nil),

			h.fromCase("truncated TCP", alice, packet.TCP(at(a, 40000), at(b, 80), toNeighbour(alice, bob), data, packet.Truncate(1)), actShot, dropped(malformed, "container"), nil),
			h.fromCase("truncated UDP", alice, packet.UDP(at(a, 40000), at(b, 80), toNeighbour(alice, bob), data, packet.Truncate(4)), actShot, dropped(malformed, "container"), nil),
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
			h.drops("a reply that nobody asked for, to catch the host's requests", noFlow, "container", func() result {
				return h.from(alice, packet.ICMPEchoReply(a, server, 9, 1, toGateway(alice)))
			})
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

// What comes by an uplink.
func TestFromUplink(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, b := f.addr(alice), f.addr(bob)
		client := at(f.client, 50000)
		data := packet.Payload([]byte("twenty bytes of data"))
		cases := []packetCase{
			h.uplinkCase("published", packet.TCP(client, at(f.host, pubAlice), fromOutside), actRedirect, published,
				packet.TCP(client, at(a, 80), routedTo(alice), packet.TTL(63))),
			h.uplinkCase("published UDP", packet.UDP(client, at(f.host, pubAlice), fromOutside), actRedirect, published,
				packet.UDP(client, at(a, 80), routedTo(alice), packet.TTL(63))),
			h.uplinkCase("published, another address of the host", packet.TCP(client, at(f.gateway(netTwo), pubAlice), fromOutside), actRedirect, published,
				packet.TCP(client, at(a, 80), routedTo(alice), packet.TTL(63))),
			h.uplinkCase("published on that address", packet.TCP(client, at(f.host, pubBob), fromOutside), actRedirect, published,
				packet.TCP(client, at(b, 8081), routedTo(bob), packet.TTL(63))),
			h.uplinkCase("published on that address only", packet.TCP(client, at(f.host1, pubBob), fromOutside), actPass, "", nil),
			h.uplinkCase("published, wrong checksum", packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.SkewL4(99)), actRedirect, published,
				packet.TCP(client, at(a, 80), routedTo(alice), packet.TTL(63), packet.SkewL4(99))),
			h.uplinkCase("published, IP options", packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.IPOptions(1, 1, 1, 0), packet.HopByHop()), actRedirect, published,
				packet.TCP(client, at(a, 80), routedTo(alice), packet.TTL(63), packet.IPOptions(1, 1, 1, 0), packet.HopByHop())),
			h.uplinkCase("published, TTL over", packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.TTL(1)), actPass, "fate stack uplink",
				packet.TCP(client, at(a, 80), fromOutside, packet.TTL(1))),
			h.uplinkCase("published, not ready", packet.TCP(client, at(f.host, pubLate), fromOutside), actShot, dropped(portNotReady, "uplink"), nil),
			h.uplinkCase("published, RST", packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.Flags("R")), actShot, dropped(noFlow, "uplink"), nil),
			h.uplinkCase("published, from a container's address", packet.TCP(at(b, 50000), at(f.host, pubAlice), fromOutside), actShot, dropped(martian, "uplink"), nil),
			h.uplinkCase("published, from the host's own address", packet.TCP(at(f.host1, 50000), at(f.host, pubAlice), fromOutside), actShot, dropped(martian, "uplink"), nil),
			h.uplinkCase("published, from loopback", packet.TCP(at(f.loopback, 50000), at(f.host, pubAlice), fromOutside), actShot, dropped(loopbackAddr, "uplink"), nil),
			h.uplinkCase("published, from nowhere", packet.UDP(at(f.unspecified, 50000), at(f.host, pubAlice), fromOutside), actShot, dropped(loopbackAddr, "uplink"), nil),
			h.uplinkCase("published, at loopback", packet.TCP(client, at(f.loopback, pubAlice), fromOutside), actShot, dropped(loopbackAddr, "uplink"), nil),
			h.uplinkCase("SCTP published", packet.SCTP(client, at(f.host, pubSCTP), fromOutside), actRedirect, published,
				packet.SCTP(client, at(a, pubSCTP), routedTo(alice), packet.TTL(63))),
			h.uplinkCase("SCTP published on another port", packet.SCTP(client, at(f.host, pubSCTPOther), fromOutside), actShot, dropped(unsupported, "uplink"), nil),
			h.uplinkCase("engine's reservation", packet.TCP(client, at(f.host, reserved), fromOutside), actShot, dropped(portNotReady, "uplink"), nil),
			h.uplinkCase("engine's reservation UDP", packet.UDP(client, at(f.host, reserved), fromOutside), actShot, dropped(portNotReady, "uplink"), nil),
			h.uplinkCase("engine's reservation, not a SYN", packet.TCP(client, at(f.host, reserved), fromOutside, packet.Flags("A")), actPass, "", nil),
			h.uplinkCase("engine's reservation, other family", packet.TCP(client, at(f.host, reserved+2), fromOutside), actPass, "", nil),
			h.uplinkCase("engine's reservation, old", packet.TCP(client, at(f.host, reserved+1), fromOutside), actPass, "", nil),
			h.uplinkCase("host's own", packet.TCP(client, at(f.host, 22), fromOutside), actPass, "", nil),
			h.uplinkCase("host's own, a masquerade port", packet.TCP(client, at(f.host, snatFirst), fromOutside), actPass, "", nil),
			h.uplinkCase("host's own echo", packet.ICMPEcho(f.client, f.host, 1, 1, fromOutside), actPass, "", nil),
			h.uplinkCase("transit", packet.TCP(client, at(f.foreign, pubAlice), fromOutside), actPass, "", nil),
			h.uplinkCase("container's address", packet.TCP(client, at(a, 80), fromOutside), actShot, dropped(directAccess, "uplink"), nil),
			h.uplinkCase("container's address, UDP", packet.UDP(client, at(a, 80), fromOutside), actShot, dropped(directAccess, "uplink"), nil),
			h.uplinkCase("container's address, echo", packet.ICMPEcho(f.client, a, 1, 1, fromOutside), actShot, dropped(directAccess, "uplink"), nil),
			h.uplinkCase("container's address, published port", packet.TCP(client, at(a, pubAlice), fromOutside), actShot, dropped(directAccess, "uplink"), nil),
			h.uplinkCase("nobody's address in a container subnet", packet.TCP(client, at(f.in(netOne, 77), 80), fromOutside), actShot, dropped(directAccess, "uplink"), nil),
			h.uplinkCase("error about nothing of ours", packet.ICMPError(f.client, f.host, f.unreach, 1, packet.TCP(at(f.host, snatFirst), at(f.client, 9)), fromOutside), actPass, "", nil),
			h.uplinkCase("for another host", packet.TCP(client, at(f.host, pubAlice), packet.MAC(outsideMAC, up1MAC)), actPass, "", nil),
			h.uplinkCase("broadcast frame", packet.UDP(client, at(f.host, pubAlice), packet.MAC(outsideMAC, broadcast)), actPass, "", nil),
			h.uplinkCase("VLAN", packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.VLAN(7)), actPass, "", nil),
			h.uplinkCase("truncated", packet.TCP(client, at(f.host, pubAlice), fromOutside, data, packet.Truncate(3)), actPass, "", nil),
			h.uplinkCase("no way back", packet.TCP(client, at(f.host, pubAlice), fromOutside), actShot, dropped(noRoute, "uplink"), nil),
		}
		for i := range cases {
			switch cases[i].name {
			case "engine's reservation, other family":
				cases[i].setup = func() {
					var bound [2]uint64
					bound[map[bool]int{true: 0, false: 1}[f.v6]] = uint64(h.now()) << 30
					h.put("reservations", bpf.DatapathReservationKey{Port: swap16(reserved + 2), Proto: unix.IPPROTO_TCP},
						bpf.DatapathReservation{Bound: bound, Sockets: 1})
					h.setClass(65536+reserved+2, byte(bpf.DatapathPortBitsPORT_TCP), 0)
				}
			case "engine's reservation, old":
				cases[i].setup = func() {
					h.put("reservations", bpf.DatapathReservationKey{Port: swap16(reserved + 1), Proto: unix.IPPROTO_TCP},
						bpf.DatapathReservation{Bound: [2]uint64{uint64(h.now()-timeout-2) << 30, uint64(h.now()-timeout-2) << 30}, Sockets: 1})
					h.setClass(65536+reserved+1, byte(bpf.DatapathPortBitsPORT_TCP), 0)
				}
			case "no way back":
				cases[i].in = packet.TCP(at(f.noRoute(), 50000), at(f.host, pubAlice), fromOutside)
			}
		}
		h.check(t, cases)
	})
}

// A published flow, there and back, in every direction it can be dialled from.
func TestPublishedRoundTrip(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a := f.addr(alice)
		client := at(f.client, 50000)
		t.Run("remote", func(t *testing.T) {
			h.t = t
			h.reset()
			in := h.uplink(packet.TCP(client, at(f.host, pubAlice), fromOutside))
			require.EqualValues(t, actRedirect, in.action)
			reply := h.expect("reply", actRedirect, toUplink, func() result {
				return h.from(alice, packet.TCP(at(a, 80), client, toGateway(alice), packet.Flags("SA")))
			})
			same(t, "reply", packet.TCP(at(f.host, pubAlice), client, toGateway(alice), packet.Flags("SA"), packet.TTL(63)), reply.out)
			require.EqualValues(t, markJudged, reply.mark)
			h.expect("reply, TTL over", actPass, toStack, func() result {
				return h.from(alice, packet.TCP(at(a, 80), client, toGateway(alice), packet.Flags("A"), packet.TTL(1)))
			})
			h.drops("the reply forged by a neighbour", spoofed, "container", func() result {
				return h.from(bob, packet.TCP(at(a, 80), client, toGateway(bob), packet.Flags("SA")))
			})
			h.drops("the container's tuple from outside", directAccess, "uplink", func() result {
				return h.uplink(packet.TCP(client, at(a, 80), fromOutside))
			})
			h.connect(f, client, at(f.host, pubAlice), alice, 80)
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Flags = 0 })
			h.drops("endpoint not ready any more", staleFlow, "uplink", func() result {
				return h.uplink(packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.Flags("A")))
			})
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) {
				e.Flags, e.Ifindex = bpf.DatapathEndpointFlagsENDPOINT_READY, uint32(h.up1)
			})
			h.drops("endpoint on another interface", staleFlow, "uplink", func() result {
				return h.uplink(packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.Flags("A")))
			})
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = uint32(h.links[alice]) })
		})
		t.Run("host by lo", func(t *testing.T) {
			h.t = t
			h.reset()
			lo := packet.MAC(zeroMAC, zeroMAC)
			r := h.expect("loopback", actRedirect, "fate container host", func() result {
				return h.onLo(packet.TCP(at(f.loopback, 50000), at(f.loopback, pubAlice), lo))
			})
			port, _ := ports(r.out)
			same(t, "seen as from the gateway", packet.TCP(at(f.gateway(netOne), port), at(a, 80), routedTo(alice)), r.out)
			require.EqualValues(t, markJudged, r.mark, "to_container must know that it was judged")
			passed := h.expect("on to the container", actPass, "", func() result {
				return h.run("to_container", r.out, skb{Ifindex: uint32(h.links[alice]), IngressIfindex: 1, Mark: r.mark})
			})
			require.Zero(t, passed.mark)
			r = h.expect("reply", actRedirect, "fate lo container", func() result {
				return h.from(alice, packet.TCP(at(a, 80), at(f.gateway(netOne), port), toGateway(alice), packet.Flags("SA")))
			})
			same(t, "reply", packet.TCP(at(f.loopback, pubAlice), at(f.loopback, 50000), lo, packet.Flags("SA")), r.out)
			passed = h.expect("back on lo", actPass, "", func() result {
				return h.run("from_host", r.out, skb{Ifindex: 1, Mark: r.mark})
			})
			require.Zero(t, passed.mark)
			r = h.expect("host address", actRedirect, "fate container host", func() result {
				return h.onLo(packet.UDP(at(f.host, 50000), at(f.host, pubAlice), lo))
			})
			same(t, "keeps the address", packet.UDP(at(f.host, 50000), at(a, 80), routedTo(alice)), r.out)
			h.expect("not published", actPass, "", func() result { return h.onLo(packet.TCP(at(f.loopback, 50000), at(f.loopback, 22), lo)) })
			h.drops("reserved", portNotReady, "host", func() result { return h.onLo(packet.TCP(at(f.loopback, 50000), at(f.loopback, reserved), lo)) })
			h.expect("the host to a container", actPass, "", func() result { return h.onLo(packet.TCP(at(f.host, 50000), at(a, 80), lo)) })
		})
		t.Run("container to itself", func(t *testing.T) {
			h.t = t
			h.reset()
			r := h.expect("out", actRedirect, toContainer, func() result {
				return h.from(alice, packet.TCP(at(a, 40000), at(f.host, pubAlice), toGateway(alice)))
			})
			port, _ := ports(r.out)
			same(t, "seen as from the gateway", packet.TCP(at(f.gateway(netOne), port), at(a, 80), routedTo(alice), packet.TTL(63)), r.out)
			r = h.expect("reply", actRedirect, toContainer, func() result {
				return h.from(alice, packet.TCP(at(a, 80), at(f.gateway(netOne), port), toGateway(alice), packet.Flags("SA")))
			})
			same(t, "reply", packet.TCP(at(f.host, pubAlice), at(a, 40000), routedTo(alice), packet.TTL(63), packet.Flags("SA")), r.out)
		})
		t.Run("same network", func(t *testing.T) {
			h.t = t
			h.reset()
			b := f.addr(bob)
			h.from(bob, packet.TCP(at(b, 40000), at(f.host, pubAlice), toGateway(bob)))
			r := h.expect("reply at layer 2", actRedirect, toContainer, func() result {
				return h.from(alice, packet.TCP(at(a, 80), at(b, 40000), toNeighbour(alice, bob), packet.Flags("SA")))
			})
			same(t, "reply", packet.TCP(at(f.host, pubAlice), at(b, 40000), routedTo(bob), packet.TTL(63), packet.Flags("SA")), r.out)
		})
		t.Run("two ways to one container port", func(t *testing.T) {
			h.t = t
			h.reset()
			h.connect(f, client, at(f.host, pubAlice), alice, 80)
			r := h.expect("second way", actRedirect, published, func() result {
				return h.uplink(packet.TCP(client, at(f.host, pubAlice2nd), fromOutside))
			})
			port, _ := ports(r.out)
			require.NotEqual(t, uint16(50000), port)
			right(t, "second way", r.out)
			r = h.from(alice, packet.TCP(at(a, 80), at(f.client, port), toGateway(alice), packet.Flags("SA")))
			same(t, "its reply", packet.TCP(at(f.host, pubAlice2nd), client, toGateway(alice), packet.Flags("SA"), packet.TTL(63)), r.out)
			r = h.from(alice, packet.TCP(at(a, 80), client, toGateway(alice), packet.Flags("SA")))
			same(t, "the first one's", packet.TCP(at(f.host, pubAlice), client, toGateway(alice), packet.Flags("SA"), packet.TTL(63)), r.out)
			h.uplink(packet.SCTP(client, at(f.host, pubSCTP), fromOutside))
			h.drops("without ports to change", collision, "uplink", func() result {
				return h.uplink(packet.SCTP(client, at(f.host1, pubSCTP), fromOutside))
			})
		})
	})
}

// What stack and bridge send a container, and what comes up from a bridge.
func TestToContainer(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, b := f.addr(alice), f.addr(bob)
		to := func(name string, slot, in int, mark uint32, frame []byte, action int32, count string) packetCase {
			return packetCase{
				name: name, program: "to_container",
				ctx: skb{Ifindex: uint32(h.links[slot]), IngressIfindex: uint32(in), Mark: mark}, in: frame, action: action, count: count,
			}
		}
		const stack, bridge, hook = "fate stack to_container", "fate bridge to_container", "to_container"
		fromBob := packet.UDP(at(b, 1), at(a, 2), toNeighbour(bob, alice))
		fromQuinn := packet.UDP(at(f.addr(quinn), 1), at(f.addr(rita), 2), packet.MAC(macOf(quinn), broadcast))
		h.check(t, []packetCase{
			to("host", alice, 0, 0, packet.TCP(at(f.gateway(netOne), 1), at(a, 2), routedTo(alice)), actPass, stack),
			to("neighbour", alice, h.links[bob], 0, fromBob, actPass, bridge),
			to("neighbour, marked by from_container", alice, h.links[bob], markJudged, fromBob, actPass, bridge),
			to("neighbour, icc off", rita, h.links[quinn], 0, fromQuinn, actShot, dropped(iccDisabled, hook)),
			to("neighbour's broadcast, icc off", rita, h.links[quinn], markJudged, fromQuinn, actShot, dropped(iccDisabled, hook)),
			to("neighbour not ready", alice, h.links[late], 0, fromBob, actShot, dropped(notReady, hook)),
			to("receiver not ready", late, 0, 0, packet.TCP(at(f.gateway(netOne), 1), at(f.addr(late), 2), routedTo(late)), actShot, dropped(notReady, hook)),
			to("receiver not ready, neighbour's broadcast", late, h.links[bob], markJudged, packet.UDP(at(b, 1), at(f.addr(late), 2), packet.MAC(macOf(bob), broadcast)), actShot, dropped(notReady, hook)),
			to("routed by the host from outside", alice, h.up, 0, packet.TCP(at(f.client, 1), at(a, 2), routedTo(alice)), actShot, dropped(directAccess, hook)),
			to("routed by the host from another network", alice, h.bridges[netTwo], 0, packet.TCP(at(f.addr(carol), 1), at(a, 2), routedTo(alice)), actShot, dropped(directAccess, hook)),
			to("from another network's interface", alice, h.links[carol], 0, packet.TCP(at(f.addr(carol), 1), at(a, 2), routedTo(alice)), actShot, dropped(isolated, hook)),
			to("from loopback", alice, 0, 0, packet.TCP(at(f.loopback, 1), at(a, 2), routedTo(alice)), actShot, dropped(loopbackAddr, hook)),
			to("to loopback", alice, 0, 0, packet.TCP(at(f.gateway(netOne), 1), at(f.loopback, 2), routedTo(alice)), actShot, dropped(loopbackAddr, hook)),
			to("malformed", alice, 0, 0, packet.TCP(at(f.gateway(netOne), 1), at(a, 2), routedTo(alice), packet.Payload(make([]byte, 40)), packet.Truncate(1)), actShot, dropped(malformed, hook)),
			{
				name: "bridge, marked", program: "from_bridge", ctx: skb{Ifindex: uint32(h.bridges[netOne]), Mark: markJudged},
				in: packet.TCP(at(a, 1), at(f.host, 2), toGateway(alice)), action: actPass,
			},
			{
				name: "bridge, unmarked", program: "from_bridge", ctx: skb{Ifindex: uint32(h.bridges[netOne])},
				in: packet.TCP(at(a, 1), at(f.host, 2), toGateway(alice)), action: actShot, count: dropped(notReady, "bridge"),
			},
		})
		t.Run("host-side interface's MAC", func(t *testing.T) {
			// The bridge hands a frame to one of its ports' own addresses to the host, which routes it.
			h.t = t
			mac := append(hostEndMAC[:5:5], byte(ian))
			r := h.from(ian, packet.UDP(at(f.addr(ian), 1), at(f.foreign, 2), packet.MAC(macOf(ian), mac)))
			require.EqualValues(t, actPass, r.action)
			h.drops("past from_bridge", notReady, "bridge", func() result {
				return h.run("from_bridge", r.out, skb{Ifindex: uint32(h.bridges[netInternal]), Mark: r.mark})
			})
		})
	})
}

// What belongs to the link: ARP, ND, MLD, DHCP, other protocols.
func TestLink(t *testing.T) {
	h := newHost(t, 1024)
	f4, f6 := families[0], families[1]
	a, b, q := f6.addr(alice), f6.addr(bob), f4.addr(quinn)
	linkLocal := ip("fe80::42:acff:fe00:101") // alice's, EUI-64
	const echoRequest = 128                   // echo request
	nd := func(typ uint8, src, dst, target netip.Addr, ttl uint8, mac packet.Option, options ...byte) []byte {
		// ICMPv6 error messages have the same shape: four bytes of rest, here flags, then the body.
		frame := packet.ICMPEcho(src, dst, 0, 0, mac, packet.TTL(ttl), packet.Payload(append(target.AsSlice(), options...)))
		// The type is the high byte of a summed word: down there, up here by as much.
		frame[54] = typ
		d := (int(echoRequest) - int(typ)) << 8
		if d < 0 {
			d += 0xffff
		}
		return addToSum(frame, 56, uint16(d))
	}
	lldp := append(append(append([]byte{}, broadcast...), macOf(alice)...), 0x88, 0xcc, 1, 2, 3, 4)
	tagged := func(tci byte) []byte {
		return slices.Insert(packet.UDP(at(f4.addr(bob), 40000), at(f4.addr(carol), 80), toGateway(alice)), 12, 0x81, 0x00, 0, tci)
	}
	lldpQuiet := append(append(append([]byte{}, broadcast...), macOf(quinn)...), 0x88, 0xcc, 1, 2, 3, 4)
	group := ip("ff02::1")
	link := func(kind byte, slot int) []byte { return append([]byte{kind, 1}, macOf(slot)...) }
	harmless := []byte{14, 1, 0, 0, 0, 0, 0, 0} // a nonce, RFC 3971
	toGroup := packet.MAC(macOf(alice), []byte{0x33, 0x33, 0, 0, 0, 1})
	h.check(t, []packetCase{
		h.fromCase("ARP request", alice, packet.ARP(f4.addr(alice), f4.addr(bob), false, packet.MAC(macOf(alice), broadcast)), actPass, toBridge, nil),
		h.fromCase("ARP probe", alice, packet.ARP(f4.unspecified, f4.addr(alice), false, packet.MAC(macOf(alice), broadcast)), actPass, toBridge, nil),
		h.fromCase("ARP reply", alice, packet.ARP(f4.addr(alice), f4.addr(bob), true, toNeighbour(alice, bob)), actPass, toBridge, nil),
		h.fromCase("ARP with icc off", quinn, packet.ARP(q, f4.addr(rita), false, packet.MAC(macOf(quinn), broadcast)), actPass, toBridge, nil),
		h.fromCase("ARP for another's address", alice, packet.ARP(f4.addr(bob), f4.addr(alice), true, toNeighbour(alice, bob)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("ARP for the gateway", alice, packet.ARP(f4.gateway(netOne), f4.addr(bob), true, toNeighbour(alice, bob)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("ARP from another MAC", alice, packet.ARP(f4.addr(alice), f4.addr(bob), true, toNeighbour(bob, bob)), actShot, dropped(spoofedMAC, "container"), nil),
		h.fromCase("ARP cut short", alice, packet.ARP(f4.addr(alice), f4.addr(bob), false, packet.MAC(macOf(alice), broadcast))[:30], actShot, dropped(malformed, "container"), nil),
		h.fromCase("ARP before it is ready", late, packet.ARP(f4.addr(late), f4.addr(bob), false, packet.MAC(macOf(late), broadcast)), actPass, toBridge, nil),
		h.fromCase("in a VLAN", alice, tagged(5), actPass, toBridge, nil),
		h.fromCase("with a tag of no VLAN", alice, tagged(0), actShot, dropped(malformed, "container"), nil),
		h.fromCase("neighbour solicitation", alice, packet.NeighborSolicit(a, b, toGroup), actPass, toBridge, nil),
		h.fromCase("neighbour solicitation before it is ready", late, packet.NeighborSolicit(f6.addr(late), b, packet.MAC(macOf(late), broadcast)), actPass, toBridge, nil),
		h.fromCase("neighbour solicitation, link-local", alice, packet.NeighborSolicit(linkLocal, b, toGroup), actPass, toBridge, nil),
		h.fromCase("duplicate address detection", alice, packet.NeighborSolicit(f6.unspecified, a, toGroup), actPass, toBridge, nil),
		h.fromCase("neighbour solicitation, forged", alice, packet.NeighborSolicit(b, a, toGroup), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("advertisement of its own", alice, nd(136, a, b, a, 255, toNeighbour(alice, bob)), actPass, toBridge, nil),
		h.fromCase("advertisement to the gateway", alice, nd(136, a, f6.gateway(netOne), a, 255, toGateway(alice)), actPass, toBridge, nil),
		h.fromCase("advertisement for another", alice, nd(136, a, b, b, 255, toNeighbour(alice, bob)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("advertisement for the gateway", alice, nd(136, linkLocal, b, f6.gateway(netOne), 255, toNeighbour(alice, bob)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("ND into another network", alice, nd(135, a, f6.addr(carol), f6.addr(carol), 255, toGateway(alice)), actShot, dropped(isolated, "container"), nil),
		h.fromCase("ND out of an internal network", ian, nd(135, f6.addr(ian), f6.foreign, f6.foreign, 255, toGateway(ian)), actShot, dropped(internalNet, "container"), nil),
		h.fromCase("ND that was routed is none", alice, nd(135, a, b, b, 254, toNeighbour(alice, bob)), actRedirect, toContainer, nil),
		h.fromCase("ND to the host-side interface", ian, nd(135, f6.addr(ian), f6.foreign, f6.foreign, 255, packet.MAC(macOf(ian), hostEndMAC)), actPass, toBridge, nil),
		h.fromCase("ND to a neighbour before it is ready", late, nd(135, f6.addr(late), f6.addr(carol), f6.addr(carol), 255, toGateway(late)), actShot, dropped(notReady, "container"), nil),
		h.fromCase("IPv4 in IPv6's clothes, source", alice, packet.UDP(at(asMapped(f4.addr(alice)), 1), at(b, 2), toNeighbour(alice, bob)), actShot, dropped(malformed, "container"), nil),
		h.fromCase("IPv4 in IPv6's clothes, destination", alice, packet.UDP(at(a, 1), at(asMapped(f4.addr(bob)), 2), toNeighbour(alice, bob)), actShot, dropped(malformed, "container"), nil),
		h.fromCase("detection of another's address", alice, packet.NeighborSolicit(f6.unspecified, b, toGroup), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("detection of the gateway's address", alice, packet.NeighborSolicit(f6.unspecified, f6.gateway(netOne), toGroup), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("advertisement with its MAC", alice, nd(136, a, b, a, 255, toNeighbour(alice, bob), link(2, alice)...), actPass, toBridge, nil),
		h.fromCase("advertisement with another's MAC", alice, nd(136, a, b, a, 255, toNeighbour(alice, bob), link(2, bob)...), actShot, dropped(spoofedMAC, "container"), nil),
		h.fromCase("solicitation with another's MAC", alice, nd(135, a, b, b, 255, toNeighbour(alice, bob), link(1, bob)...), actShot, dropped(spoofedMAC, "container"), nil),
		h.fromCase("solicitation with another's MAC behind its own", alice, nd(135, a, b, b, 255, toNeighbour(alice, bob), append(link(1, alice), link(1, bob)...)...),
			actShot, dropped(spoofedMAC, "container"), nil),
		h.fromCase("solicitation with other options", alice, nd(135, a, b, b, 255, toNeighbour(alice, bob), append(slices.Clone(harmless), link(1, alice)...)...), actPass, toBridge, nil),
		h.fromCase("solicitation with an empty option", alice, nd(135, a, b, b, 255, toNeighbour(alice, bob), 1, 0, 0, 0, 0, 0, 0, 0), actShot, dropped(malformed, "container"), nil),
		h.fromCase("solicitation with very many options", alice, nd(135, a, b, b, 255, toNeighbour(alice, bob), append(bytes.Repeat(harmless, 8), link(1, bob)...)...),
			actShot, dropped(malformed, "container"), nil),
		h.fromCase("router solicitation", alice, nd(133, linkLocal, ip("ff02::2"), linkLocal, 255, toGroup), actPass, toBridge, nil),
		h.fromCase("router advertisement", alice, nd(134, linkLocal, group, group, 255, toGroup), actShot, dropped(spoofedRouter, "container"), nil),
		h.fromCase("router advertisement to a neighbour", alice, nd(134, linkLocal, b, b, 255, toNeighbour(alice, bob)), actShot, dropped(spoofedRouter, "container"), nil),
		h.fromCase("redirect", alice, nd(137, linkLocal, b, b, 255, toNeighbour(alice, bob)), actShot, dropped(spoofedRouter, "container"), nil),
		h.fromCase("router advertisement before it is ready", late, nd(134, ip("fe80::42:acff:fe00:103"), group, group, 255, packet.MAC(macOf(late), broadcast)),
			actShot, dropped(spoofedRouter, "container"), nil),
		h.fromCase("ARP for another's address before it is ready", late, packet.ARP(f4.addr(bob), f4.addr(alice), true, toNeighbour(late, alice)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("ARP for the gateway before it is ready", late, packet.ARP(f4.gateway(netOne), f4.addr(alice), true, toNeighbour(late, alice)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("ARP from another MAC before it is ready", late,
			append(append(append([]byte{}, macOf(alice)...), macOf(late)...), packet.ARP(f4.addr(late), f4.addr(alice), true, toNeighbour(bob, alice))[12:]...),
			actShot, dropped(spoofedMAC, "container"), nil),
		h.fromCase("advertisement of its own before it is ready", late, nd(136, f6.addr(late), group, f6.addr(late), 255, packet.MAC(macOf(late), broadcast)), actPass, toBridge, nil),
		h.fromCase("advertisement for another before it is ready", late, nd(136, f6.addr(late), group, b, 255, packet.MAC(macOf(late), broadcast)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("solicitation as another before it is ready", late, nd(135, b, group, a, 255, packet.MAC(macOf(late), broadcast)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("MLD report", alice, nd(131, linkLocal, group, group, 1, toGroup), actPass, toBridge, nil),
		h.uplinkCase("ND to a container", nd(135, f6.client, a, a, 255, fromOutside), actShot, dropped(directAccess, "uplink"), nil),
		h.uplinkCase("ND to the host", nd(135, f6.client, f6.host, f6.host, 255, fromOutside), actPass, "", nil),
		{
			name: "routed ND to a container", program: "to_container", ctx: skb{Ifindex: uint32(h.links[alice]), IngressIfindex: uint32(h.up)},
			in: nd(135, f6.client, a, a, 254, routedTo(alice)), action: actShot, count: dropped(directAccess, "to_container"),
		},
		{
			name: "ND of the host", program: "to_container", ctx: skb{Ifindex: uint32(h.links[late])},
			in: packet.NeighborSolicit(f6.gateway(netOne), f6.addr(late), packet.MAC(bridgeMAC(netOne), macOf(late))), action: actPass, count: "fate bridge to_container",
		},
		{
			name: "ARP of the host", program: "to_container", ctx: skb{Ifindex: uint32(h.links[late])},
			in: packet.ARP(f4.gateway(netOne), f4.addr(late), false, packet.MAC(bridgeMAC(netOne), broadcast)), action: actPass, count: "fate bridge to_container",
		},
		{
			name: "ARP comes up from a bridge", program: "from_bridge", ctx: skb{Ifindex: uint32(h.bridges[netOne])},
			in: packet.ARP(f4.addr(alice), f4.gateway(netOne), false, packet.MAC(macOf(alice), broadcast)), action: actPass, count: "fate bridge bridge",
		},
		h.fromCase("DHCP", alice, packet.UDP(at(f4.unspecified, 68), at(ip("255.255.255.255"), 67), packet.MAC(macOf(alice), broadcast)), actPass, toBridge, nil),
		h.fromCase("multicast", alice, packet.UDP(at(f4.addr(alice), 5353), at(ip("224.0.0.251"), 5353), packet.MAC(macOf(alice), []byte{1, 0, 0x5e, 0, 0, 0xfb})), actPass, toBridge, nil),
		h.fromCase("link-local neighbour", alice, packet.UDP(at(linkLocal, 1), at(ip("fe80::1"), 2), toNeighbour(alice, bob)), actPass, toBridge, nil),
		h.fromCase("link-local neighbour, icc off", quinn, packet.UDP(at(f6.addr(quinn), 1), at(ip("fe80::1"), 2), toNeighbour(quinn, rita)), actShot, dropped(iccDisabled, "container"), nil),
		h.fromCase("another's link-local address", alice, packet.UDP(at(ip("fe80::42:acff:fe00:102"), 1), at(ip("fe80::1"), 2), toNeighbour(alice, bob)), actShot, dropped(spoofed, "container"), nil),
		h.fromCase("link-local to outside is the stack's to refuse", alice, packet.UDP(at(linkLocal, 1), at(f6.foreign, 2), toGateway(alice)), actPass, toStack, nil),
		h.fromCase("link-local to a published port", alice, packet.TCP(at(linkLocal, 1), at(f6.host, pubAlice), toGateway(alice)), actPass, toStack, nil),
		h.uplinkCase("link-local client", packet.TCP(at(ip("fe80::99"), 1), at(f6.host, pubAlice), fromOutside), actPass, "", nil),
		h.fromCase("LLDP", alice, lldp, actPass, toBridge, nil),
		h.fromCase("LLDP with icc off", quinn, lldpQuiet, actShot, dropped(iccDisabled, "container"), nil),
		h.fromCase("LLDP from another MAC", bob, lldp, actShot, dropped(spoofedMAC, "container"), nil),
		h.fromCase("LLDP before it is ready", late, lldp, actShot, dropped(notReady, "container"), nil),
	})
	// Who may send from any address is a router.
	h.t = t
	h.put("allowed_sources", bpf.DatapathSourceKey{Prefixlen: 32, Endpoint: alice}, uint8(1))
	h.check(t, []packetCase{
		h.fromCase("router advertisement of a router", alice, nd(134, linkLocal, group, group, 255, toGroup), actPass, toBridge, nil),
		h.fromCase("router advertisement of another", bob, nd(134, ip("fe80::42:acff:fe00:102"), group, group, 255, packet.MAC(macOf(bob), broadcast)),
			actShot, dropped(spoofedRouter, "container"), nil),
	})
}

func asMapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

// addToSum adds to the checksum field at off what makes up for a changed byte.
func addToSum(frame []byte, off int, d uint16) []byte {
	v := uint32(frame[off])<<8 | uint32(frame[off+1])
	v += uint32(d)
	v = v>>16 + v&0xffff
	frame[off], frame[off+1] = byte(v>>8), byte(v)
	return frame
}

// ICMP errors about flows: what they say must be true for whom they reach.
func TestICMPErrors(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a := f.addr(alice)
		router := f.foreign
		server, client := at(f.client2, 443), at(f.client, 50000)
		data := packet.Payload([]byte("some data, so that the quoted transport header is whole"))
		for _, c := range []struct {
			name  string
			make  func(src, dst netip.AddrPort, o ...packet.Option) []byte
			more  []packet.Option
			quote int // bytes of the quoted packet's payload, 0: all
		}{
			{"TCP", packet.TCP, nil, 0},
			{"TCP, eight bytes quoted", packet.TCP, nil, 8},
			{"UDP", packet.UDP, nil, 0},
			{"wrong quoted checksum", packet.UDP, []packet.Option{packet.SkewL4(77)}, 0},
			{"no quoted checksum", packet.UDP, []packet.Option{packet.NoUDPChecksum()}, 0},
		} {
			t.Run(c.name, func(t *testing.T) {
				h.t = t
				h.reset()
				inner := func(src, dst netip.AddrPort, o ...packet.Option) []byte {
					frame := c.make(src, dst, append(append(o, data), c.more...)...)
					if c.quote > 0 {
						frame = packet.Quote(frame, c.quote)
					}
					return frame
				}
				h.from(alice, c.make(at(a, 40000), server, toGateway(alice)))
				port := h.outer(f, alice, 40000, f.client2, 443)
				outer := at(f.host, port)
				before := h.flowSeen(f)
				for what, src := range map[string]netip.Addr{"router": router, "server": f.client2} {
					r := h.expect("from "+what, actRedirect, published, func() result {
						return h.uplink(packet.ICMPError(src, f.host, f.timeExceeded, 0, inner(outer, server, packet.TTL(1)), fromOutside))
					})
					same(t, "from "+what, packet.ICMPError(src, a, f.timeExceeded, 0, inner(at(a, 40000), server, packet.TTL(1)), routedTo(alice), packet.TTL(63)), r.out)
				}
				require.Equal(t, before, h.flowSeen(f), "an error keeps no flow alive (RFC 5508 section 4.2)")
				r := h.expect("too big", actRedirect, published, func() result {
					return h.uplink(packet.ICMPError(router, f.host, f.tooBig, f.tooBigCode, inner(outer, server), fromOutside, packet.MTU(1300)))
				})
				same(t, "too big", packet.ICMPError(router, a, f.tooBig, f.tooBigCode, inner(at(a, 40000), server), routedTo(alice), packet.TTL(63), packet.MTU(1300)), r.out)
				h.expect("wrong outer checksum", actRedirect, published, func() result {
					r = h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, inner(outer, server), fromOutside, packet.SkewL4(5)))
					return r
				})
				same(t, "wrong outer checksum", packet.ICMPError(router, a, f.timeExceeded, 0, inner(at(a, 40000), server), routedTo(alice), packet.TTL(63), packet.SkewL4(5)), r.out)
				h.expect("to another address than the quoted sender's", actPass, "", func() result {
					return h.uplink(packet.ICMPError(router, f.host1, f.timeExceeded, 0, inner(outer, server), fromOutside))
				})
				h.expect("about another flow", actPass, "", func() result {
					return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, inner(at(f.host, port), at(f.client2, 444)), fromOutside))
				})
				r = h.expect("the container's own error about an answer", actRedirect, toUplink, func() result {
					return h.from(alice, packet.ICMPError(a, f.client2, f.unreach, 3, inner(server, at(a, 40000)), toGateway(alice)))
				})
				same(t, "the container's own", packet.ICMPError(f.host, f.client2, f.unreach, 3, inner(server, outer), toGateway(alice), packet.TTL(63)), r.out)
				h.bump()
				h.expect("the same after a change of policy", actRedirect, toUplink, func() result {
					return h.from(alice, packet.ICMPError(a, f.client2, f.unreach, 3, inner(server, at(a, 40000)), toGateway(alice)))
				})
				h.drops("a neighbour's error about it", noFlow, "container", func() result {
					return h.from(bob, packet.ICMPError(f.addr(bob), f.client2, f.unreach, 3, inner(server, at(a, 40000)), toGateway(bob)))
				})
				h.drops("an error about it to somebody else", noFlow, "container", func() result {
					return h.from(alice, packet.ICMPError(a, f.client, f.unreach, 3, inner(server, at(a, 40000)), toGateway(alice)))
				})

				{
					h.uplink(c.make(client, at(f.host, pubAlice), fromOutside))
					if strings.HasPrefix(c.name, "TCP") {
						h.connect(f, client, at(f.host, pubAlice), alice, 80)
					}
					r = h.expect("about a published port", actRedirect, toUplink, func() result {
						return h.from(alice, packet.ICMPError(a, f.client, f.unreach, 3, inner(client, at(a, 80)), toGateway(alice)))
					})
					same(t, "published port", packet.ICMPError(f.host, f.client, f.unreach, 3, inner(client, at(f.host, pubAlice)), toGateway(alice), packet.TTL(63)), r.out)
					r = h.expect("about a reply of it", actRedirect, published, func() result {
						return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, inner(at(f.host, pubAlice), client), fromOutside))
					})
					same(t, "about a reply", packet.ICMPError(router, a, f.timeExceeded, 0, inner(at(a, 80), client), routedTo(alice), packet.TTL(63)), r.out)
					own := packet.ICMPError(f.host, f.client, f.timeExceeded, 0, inner(client, at(a, 80), packet.TTL(1)), packet.MAC(upMAC, outsideMAC))
					r = h.expect("the stack's own", actPass, "", func() result { return h.run("to_uplink", own, skb{Ifindex: uint32(h.up)}) })
					same(t, "the stack's own", packet.ICMPError(f.host, f.client, f.timeExceeded, 0, inner(client, at(f.host, pubAlice), packet.TTL(1)), packet.MAC(upMAC, outsideMAC)), r.out)
				}
			})
		}
		t.Run("echo", func(t *testing.T) {
			h.t = t
			h.reset()
			id := echoID(h.from(alice, packet.ICMPEcho(a, f.client2, 0x4321, 1, toGateway(alice))).out)
			r := h.expect("about an echo request", actRedirect, published, func() result {
				return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, packet.ICMPEcho(f.host, f.client2, id, 1), fromOutside))
			})
			same(t, "echo", packet.ICMPError(router, a, f.timeExceeded, 0, packet.ICMPEcho(a, f.client2, 0x4321, 1), routedTo(alice), packet.TTL(63)), r.out)
			right(t, "echo", r.out)
		})
		t.Run("quoted header beyond the packet's end", func(t *testing.T) {
			h.t = t
			h.reset()
			h.from(alice, packet.UDP(at(a, 40000), server, toGateway(alice)))
			outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
			whole := packet.ICMPError(router, f.host, f.timeExceeded, 0, packet.UDP(outer, server), fromOutside)
			short := packet.ICMPError(router, f.host, f.timeExceeded, 0, packet.Quote(packet.UDP(outer, server), 2), fromOutside)
			padded := append(append([]byte{}, short[:min(len(short), len(whole))]...), make([]byte, 32)...)
			end := len(packet.Quote(packet.UDP(outer, server), 2)) - 14 + 8 + map[bool]int{false: 34, true: 54}[f.v6]
			copy(padded[end:], whole[end:])
			r := h.expect("padding is no data", actPass, "", func() result { return h.uplink(padded) })
			same(t, "untouched", padded, r.out)
		})
	})
}

// flowSeen is what a packet changes in the flow entries.
func (h *host) flowSeen(f family) map[any][2]uint64 {
	h.t.Helper()
	out := make(map[any][2]uint64)
	for k, v := range h.flows4() {
		out[k] = [2]uint64{v.F.Packets, uint64(v.F.LastSeen)}
	}
	for k, v := range h.flows6() {
		out[k] = [2]uint64{v.F.Packets, uint64(v.F.LastSeen)}
	}
	return out
}

// Fragments, in order and not, sizes and hops.
func TestFragments(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, b := f.addr(alice), f.addr(bob)
		payload := make([]byte, 300)
		for i := range payload {
			payload[i] = byte(i * 7)
		}
		whole := func(src, dst netip.AddrPort, o ...packet.Option) [][]byte {
			return packet.Fragment(packet.UDP(src, dst, append(o, packet.Payload(payload))...), 128, 0xabcd)
		}
		t.Run("masqueraded", func(t *testing.T) {
			h.t = t
			h.reset()
			in := whole(at(a, 40000), at(f.client2, 53), toGateway(alice))
			h.drops("a later one first", noFragment, "container", func() result { return h.from(alice, in[1]) })
			var got [][]byte
			for _, frame := range in {
				r := h.expect("fragment", actRedirect, toUplink, func() result { return h.from(alice, frame) })
				got = append(got, r.out)
			}
			port := h.outer(f, alice, 40000, f.client2, 53)
			for i, want := range whole(at(f.host, port), at(f.client2, 53), toGateway(alice), packet.TTL(63)) {
				same(t, "fragment", want, got[i])
			}
			back := whole(at(f.client2, 53), at(f.host, port), fromOutside)
			h.expect("a later one of the answer first", actPass, "", func() result { return h.uplink(back[2]) })
			h.expect("and another", actPass, "", func() result { return h.uplink(back[1]) })
			for i, want := range whole(at(f.client2, 53), at(a, 40000), routedTo(alice), packet.TTL(63)) {
				before := h.counters()
				r := h.uplink(back[i])
				moved := counters{published: 1}
				if i == 0 { // now it is known whose they were
					moved[dropped(noFragment, "uplink")] = 2
				}
				require.Equal(t, moved, h.counters().since(before))
				require.EqualValues(t, actRedirect, r.action)
				same(t, "back", want, r.out)
			}
			h.drops("a neighbour's fragment of that identification", noFragment, "container", func() result {
				return h.from(bob, whole(at(b, 40000), at(f.client2, 53), toGateway(bob))[1])
			})
		})
		t.Run("published", func(t *testing.T) {
			h.t = t
			h.reset()
			in := whole(at(f.client, 50000), at(f.host, pubAlice), fromOutside)
			for i, want := range whole(at(f.client, 50000), at(a, 80), routedTo(alice), packet.TTL(63)) {
				r := h.expect("in", actRedirect, published, func() result { return h.uplink(in[i]) })
				same(t, "in", want, r.out)
			}
			h.drops("a container's address, later fragment", directAccess, "uplink", func() result {
				return h.uplink(whole(at(f.client, 50000), at(b, 80), fromOutside)[1])
			})
		})
		t.Run("isolation", func(t *testing.T) {
			h.t = t
			h.reset()
			for _, frame := range whole(at(a, 1), at(f.addr(carol), 2), toGateway(alice)) {
				h.drops("other network", isolated, "container", func() result { return h.from(alice, frame) })
			}
			for i, frame := range whole(at(a, 1), at(b, 2), toNeighbour(alice, bob)) {
				r := h.expect("neighbour", actRedirect, toContainer, func() result { return h.from(alice, frame) })
				same(t, "neighbour", whole(at(a, 1), at(b, 2), toNeighbour(alice, bob))[i], r.out)
			}
		})
		t.Run("tiny", func(t *testing.T) {
			h.t = t
			h.reset()
			first := packet.Fragment(packet.TCP(at(a, 40000), at(f.client2, 80), toGateway(alice)), 8, 1)[0]
			h.drops("TCP header cut by fragmentation (RFC 1858)", malformed, "container", func() result { return h.from(alice, first) })
		})
		t.Run("size", func(t *testing.T) {
			h.t = t
			h.reset()
			big := packet.Payload(make([]byte, uplinkMTU))
			h.expect("too big, the stack says so", actPass, toStack, func() result {
				return h.from(alice, packet.UDP(at(a, 1), at(f.client2, 2), toGateway(alice), packet.DontFragment(), big))
			})
			if !f.v6 {
				r := h.expect("too big, and may be fragmented: the stack's answer has the sender do that", actPass, toStack, func() result {
					return h.from(alice, packet.UDP(at(a, 1), at(f.client2, 2), toGateway(alice), big))
				})
				same(t, "with the don't-fragment bit", packet.UDP(at(a, 1), at(f.client2, 2), toGateway(alice), packet.DontFragment(), big), r.out)
				h.run("from_uplink_l3", packet.UDP(at(f.client2, 2), at(f.host, 9), fromOutside), skb{Ifindex: uint32(h.up)})
				r = h.expect("the same after a packet without an Ethernet header", actPass, toStack, func() result {
					return h.from(alice, packet.UDP(at(a, 1), at(f.client2, 2), toGateway(alice), big))
				})
				same(t, "with the bit again", packet.UDP(at(a, 1), at(f.client2, 2), toGateway(alice), packet.DontFragment(), big), r.out)
				large := packet.Fragment(packet.UDP(at(a, 1), at(f.client2, 2), toGateway(alice), packet.Payload(make([]byte, 3*uplinkMTU))), 1480, 9)
				r = h.expect("a first fragment", actPass, toStack, func() result { return h.from(alice, large[0]) })
				require.Equal(t, []byte{0x40, 0}, r.out[20:22], "as if it were whole: else connection tracking waits for the others")
				right(t, "a first fragment", r.out[:34])
				h.drops("a later one, about which nobody may say anything (RFC 1122 3.2.2)", tooBig, "container", func() result {
					return h.from(alice, large[1])
				})
			}
			r := h.run("from_container", packet.TCP(at(a, 3), at(f.client2, 2), toGateway(alice), big), skb{
				Ifindex: uint32(h.links[alice]), GSOSize: uplinkMTU - 100, GSOSegs: 2,
			})
			require.EqualValues(t, actRedirect, r.action, "a GSO packet is measured by its segments")
			r = h.run("from_container", packet.TCP(at(a, 4), at(f.client2, 2), toGateway(alice), packet.DontFragment(), big), skb{
				Ifindex: uint32(h.links[alice]), GSOSize: uplinkMTU - 20, GSOSegs: 2,
			})
			require.EqualValues(t, actPass, r.action, "segments too big")
		})
	})
	t.Run("IPv6 extension headers", func(t *testing.T) {
		h.t = t
		h.reset()
		f := families[1]
		a, b := f.addr(alice), f.addr(bob)
		ext := func(n int) []byte { return withExtensions(packet.UDP(at(a, 1), at(b, 2), toNeighbour(alice, bob)), n) }
		for n := range 7 {
			h.expect("few", actRedirect, toContainer, func() result { return h.from(alice, ext(n)) })
		}
		require.Equal(t, 2, h.entries(f), "all were of one flow")
		h.drops("many", malformed, "container", func() result { return h.from(alice, ext(7)) })
		long := ext(1)
		long[14+41] = 200 // longer than the packet
		h.drops("beyond the end", malformed, "container", func() result { return h.from(alice, long) })
	})
}

// withExtensions puts n destination options headers before the upper layer.
func withExtensions(frame []byte, n int) []byte {
	next := frame[20]
	var headers []byte
	for i := range n {
		after := byte(unix.IPPROTO_DSTOPTS)
		if i == n-1 {
			after = next
		}
		headers = append(headers, after, 0, 1, 4, 0, 0, 0, 0)
	}
	out := append(append(append([]byte{}, frame[:54]...), headers...), frame[54:]...)
	if n > 0 {
		out[20] = unix.IPPROTO_DSTOPTS
	}
	length := int(out[18])<<8 + int(out[19]) + 8*n
	out[18], out[19] = byte(length>>8), byte(length)
	return out
}

// Absurd headers: dropped from a container, left to the stack from an uplink. (Test runs themselves
// refuse frames that end within the IP header.)
func TestMalformed(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a := f.addr(alice)
		good := func(src, dst netip.AddrPort, mac packet.Option) []byte {
			return packet.TCP(src, dst, mac, packet.Payload([]byte("twenty bytes of data")))
		}
		l4 := 34
		if f.v6 {
			l4 = 54
		}
		for what, spoil := range map[string]func(b []byte) []byte{
			"TCP header cut off":        func(b []byte) []byte { return b[:l4+10] },
			"wrong version":             func(b []byte) []byte { b[14] = 0x55; return b },
			"TCP offset too small":      func(b []byte) []byte { b[l4+12] = 0x40; return b },
			"TCP offset beyond the end": func(b []byte) []byte { b[l4+12] = 0xf0; return b },
			"length beyond the frame":   func(b []byte) []byte { b[14+2+2*f.index()] = 0x20; return b },
			"header length too small": func(b []byte) []byte {
				if f.v6 {
					b[20] = unix.IPPROTO_AH // and what follows is no such header
					b[55] = 255
					return b
				}
				b[14] = 0x44
				return b
			},
			"fragment beyond the largest datagram": func(b []byte) []byte {
				if f.v6 {
					b[20] = unix.IPPROTO_FRAGMENT
					b[54], b[55], b[56], b[57] = unix.IPPROTO_TCP, 0, 0xff, 0xf8
					return b
				}
				b[20], b[21] = 0x1f, 0xff
				return b
			},
			"header length beyond the packet": func(b []byte) []byte {
				if f.v6 {
					b[18], b[19] = 0, 4
					return b
				}
				b[14], b[16], b[17] = 0x4f, 0, 40
				return b
			},
		} {
			t.Run(what, func(t *testing.T) {
				h.t = t
				h.reset()
				h.drops("from container", malformed, "container", func() result {
					return h.from(alice, spoil(good(at(a, 1), at(f.foreign, 2), toGateway(alice))))
				})
				frame := spoil(good(at(f.client, 1), at(f.host, pubAlice), fromOutside))
				r := h.expect("from uplink", actPass, "", func() result { return h.uplink(frame) })
				same(t, "from uplink", frame, r.out)
				h.drops("to container", malformed, "to_container", func() result {
					return h.to(alice, 0, spoil(good(at(f.gateway(netOne), 1), at(a, 2), routedTo(alice))))
				})
			})
		}
	})
}

// The host forwards for others only if it did so before us.
func TestTransit(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		frame := packet.TCP(at(f.client, 1), at(f.foreign, 2), packet.MAC(upMAC, outsideMAC))
		out := func(in int, mark uint32) func() result {
			return func() result {
				return h.run("to_uplink", frame, skb{Ifindex: uint32(h.up), IngressIfindex: uint32(in), Mark: mark})
			}
		}
		h.t = t
		h.expect("forwarding was on", actPass, "", out(h.up1, 0))
		flag := []bpf.DatapathConfigFlags{bpf.DatapathConfigFlagsCONFIG_DROP_TRANSIT4, bpf.DatapathConfigFlagsCONFIG_DROP_TRANSIT6}[f.index()]
		h.setConfig(func(c *bpf.DatapathConfig) { c.Flags = flag })
		defer h.setConfig(func(c *bpf.DatapathConfig) { c.Flags = 0 })
		h.drops("foreign", transit, "to_uplink", out(h.up1, 0))
		h.expect("the host's own", actPass, "", out(0, 0))
		h.expect("by lo", actPass, "", out(1, 0))
		r := h.expect("ours", actPass, "", out(h.links[alice], markJudged))
		require.Zero(t, r.mark)
	})
}

// A flow's life: opened, closed, reset, reopened, taken over, timed out, judged again.
func TestFlowLife(t *testing.T) {
	h := newHost(t, 1024)
	expire := func() bpf.DatapathExpireArgs { return h.sweep("expire") }
	forFamilies(t, func(t *testing.T, f family) {
		a, b := f.addr(alice), f.addr(bob)
		server := at(f.client2, 443)
		send := func(slot int, src netip.Addr, flags string) result {
			return h.from(slot, packet.TCP(at(src, 40000), server, toGateway(slot), packet.Flags(flags)))
		}
		// port is the outer one of the only flow to the server.
		port := func() uint16 {
			for k := range h.flows4() {
				if k.Hook == bpf.DatapathHookHOOK_UPLINK {
					return swap16(k.Dport)
				}
			}
			for k := range h.flows6() {
				if k.Hook == uint8(bpf.DatapathHookHOOK_UPLINK) {
					return swap16(k.Dport)
				}
			}
			return 0
		}
		answer := func(flags string) result {
			return h.uplink(packet.TCP(server, at(f.host, port()), fromOutside, packet.Flags(flags)))
		}
		// one leaves a single masquerade port, so that the next flow to the server meets the first.
		one := func(t *testing.T) {
			h.t = t
			h.reset()
			h.setSNAT(snatFirst, 1)
			t.Cleanup(func() { h.setSNAT(snatFirst, snatCount) })
		}
		established := func() { send(alice, a, "S"); answer("SA"); send(alice, a, "A") }
		taken := func(t *testing.T, what string, want bool) {
			t.Helper()
			h.t = t
			if !want {
				h.drops(what, snatExhausted, "container", func() result { return send(bob, b, "S") })
				return
			}
			h.expect(what, actRedirect, toUplink, func() result { return send(bob, b, "S") })
			require.Equal(t, 2, h.entries(f), "%s: the old flow's entries are gone", what)
			require.EqualValues(t, 2, h.gauge()[f.index()])
			r := h.expect("its answer", actRedirect, published, func() result { return answer("SA") })
			same(t, "goes to the new owner", packet.TCP(server, at(b, 40000), routedTo(bob), packet.TTL(63), packet.Flags("SA")), r.out)
		}
		for _, c := range []struct {
			name  string
			do    func()
			taken bool
		}{
			{"unanswered", func() { send(alice, a, "S") }, false},
			{"established", established, false},
			{"unanswered, expired", func() { send(alice, a, "S"); h.age(timeout + 1) }, true},
			{"established, idle for long", func() { established(); h.age(timeout + 1) }, false},
			{"established, expired", func() { established(); h.age(timeoutUp + 1) }, true},
			{"reset by the server", func() { send(alice, a, "S"); answer("RA") }, true},
			{"reset by the container", func() { established(); send(alice, a, "R") }, true},
			{"reset from outside, just now", func() { established(); answer("R") }, false},
			{"reset from outside, and quiet since", func() { established(); answer("R"); h.age(2) }, true},
			{"reset from outside, and goes on", func() { established(); answer("R"); answer("A"); h.age(2) }, false},
			{"closed first by the container", func() {
				established()
				send(alice, a, "FA")
				answer("FA")
				send(alice, a, "A")
				h.age(2)
			}, true},
			{"closed first by the container, just now", func() { established(); send(alice, a, "FA"); answer("FA") }, false},
			{"closed first by the server", func() { established(); answer("FA"); send(alice, a, "FA"); answer("A") }, false},
			{"half closed", func() { established(); send(alice, a, "FA"); answer("A") }, false},
			{"closed and reopened", func() {
				established()
				send(alice, a, "FA")
				answer("FA")
				send(alice, a, "S")
				answer("SA")
				send(alice, a, "A")
			}, false},
			{"closed and reopened, after a change of policy", func() {
				established()
				send(alice, a, "FA")
				answer("FA")
				h.bump()
				send(alice, a, "S")
				answer("SA")
				send(alice, a, "A")
			}, false},
			{"retransmitted SYN", func() { send(alice, a, "S"); send(alice, a, "S") }, false},
		} {
			t.Run(c.name, func(t *testing.T) {
				one(t)
				c.do()
				taken(t, c.name, c.taken)
			})
		}
		t.Run("expiry", func(t *testing.T) {
			for _, c := range []struct {
				name string
				do   func()
				rest uint32 // ticks it may rest
			}{
				{"unanswered", func() { send(alice, a, "S") }, timeout},
				{"established", established, timeoutUp},
				{"half closed", func() { established(); send(alice, a, "FA"); answer("A") }, timeoutFin},
				{"closed", func() { established(); send(alice, a, "FA"); answer("FA") }, timeout},
				{"refused", func() { send(alice, a, "S"); answer("RA") }, timeout},
				{"reset by the container", func() { established(); send(alice, a, "R") }, timeout},
				{"reset from outside (RFC 7857 2.2: four minutes)", func() { established(); answer("R") }, timeoutFin},
				{"reset from outside, as nobody meant", func() { established(); answer("R"); answer("A") }, timeoutUp},
				{"UDP", func() { h.from(alice, packet.UDP(at(a, 1), server, toGateway(alice))) }, timeout},
				{"echo", func() { h.from(alice, packet.ICMPEcho(a, server.Addr(), 1, 1, toGateway(alice))) }, timeout},
				{"to the host", func() { h.from(alice, packet.UDP(at(a, 1), at(f.host, 53), toGateway(alice))) }, timeout},
				{"by address alone", func() { h.from(alice, packet.SCTP(at(a, 1), server, toGateway(alice))) }, timeout},
			} {
				t.Run(c.name, func(t *testing.T) {
					h.t = t
					h.reset()
					c.do()
					n := h.entries(f)
					h.age(c.rest - 1)
					args := expire()
					require.EqualValues(t, n, args.Live[f.index()])
					require.Zero(t, args.Deleted[f.index()])
					h.age(3)
					args = expire()
					require.Zero(t, args.Live[f.index()])
					require.NotZero(t, args.Deleted[f.index()])
					require.Zero(t, h.entries(f))
					require.Zero(t, h.gauge()[f.index()])
				})
			}
			t.Run("kept alive by one direction", func(t *testing.T) {
				h.t = t
				h.reset()
				established()
				h.age(timeoutUp + 1)
				port := h.outer(f, alice, 40000, server.Addr(), 443)
				h.uplink(packet.TCP(server, at(f.host, port), fromOutside, packet.Flags("A")))
				require.EqualValues(t, 2, expire().Live[f.index()], "neither direction goes without the other")
			})
		})
		t.Run("purge", func(t *testing.T) {
			purge := func() int {
				h.sweep("purge")
				require.EqualValues(h.t, h.entries(f), h.gauge()[f.index()])
				return h.entries(f)
			}
			clientPort := at(f.client, 50000)
			h.t = t
			h.reset()
			h.connect(f, clientPort, at(f.host, pubAlice), alice, 80)
			h.from(bob, packet.TCP(at(b, 1), server, toGateway(bob)))
			h.from(bob, packet.UDP(at(b, 1), at(a, 2), toNeighbour(bob, alice)))
			h.from(alice, packet.UDP(at(a, 1), at(f.host, 53), toGateway(alice)))
			require.Equal(t, 7, purge(), "all are alive")
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = 0 })
			require.Equal(t, 2, purge(), "alice is gone")
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = uint32(h.links[alice]) })
			h.connect(f, clientPort, at(f.host, pubAlice), alice, 80)
			slot := uint16(0)
			for _, v := range h.flows4() {
				slot = max(slot, v.F.Port)
			}
			for _, v := range h.flows6() {
				slot = max(slot, v.F.Port)
			}
			require.NotZero(t, slot)
			h.put("port_slots", uint32(slot), bpf.DatapathPortSlot{})
			require.Equal(t, 2, purge(), "the port is gone")
			h.put("port_slots", uint32(slot), bpf.DatapathPortSlot{Live: 1})
			h.from(bob, packet.UDP(at(b, 1), at(a, 2), toNeighbour(bob, alice)))
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = uint32(h.up1) })
			require.Equal(t, 2, purge(), "alice is on another interface")
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = uint32(h.links[alice]) })
		})
		t.Run("renewed at an uplink", func(t *testing.T) {
			h.t = t
			h.reset()
			client := at(f.client, 50000)
			in := func(flags string) result {
				return h.uplink(packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.Flags(flags)))
			}
			h.connect(f, client, at(f.host, pubAlice), alice, 80)
			require.EqualValues(t, 2, h.entries(f))
			h.bump()
			r := h.expect("still published", actRedirect, published, func() result { return in("A") })
			same(t, "still published", packet.TCP(client, at(a, 80), routedTo(alice), packet.TTL(63), packet.Flags("A")), r.out)
			require.EqualValues(t, 2, h.entries(f), "the same flow")
			h.bump()
			h.expect("a reset ends it as before", actRedirect, published, func() result { return in("R") })

			key := bpf.DatapathPortKey{Addr: mapAddr(f.unspecified), Port: swap16(pubAlice), Proto: unix.IPPROTO_TCP}
			var was bpf.DatapathPort
			require.NoError(t, h.coll.Maps["ports"].Lookup(key, &was))
			moved := was
			moved.Addr, moved.Endpoint, moved.Slot = mapAddr(f.addr(bob)), bob, was.Slot+1
			h.put("ports", key, moved)
			h.expect("of this generation", actRedirect, published, func() result { return in("A") })
			h.bump()
			h.drops("no reset for the successor", noFlow, "uplink", func() result { return in("R") })
			require.Zero(t, h.entries(f), "the old flow has gone")
			h.put("ports", key, was)
			h.connect(f, client, at(f.host, pubAlice), alice, 80)
			h.put("ports", key, moved)
			h.bump()
			r = h.expect("the successor's", actRedirect, published, func() result { return in("A") })
			same(t, "the successor's", packet.TCP(client, at(f.addr(bob), 80), routedTo(bob), packet.TTL(63), packet.Flags("A")), r.out)
			require.Zero(t, h.entries(f), "the old flow has gone; the new one waits")
			h.connect(f, client, at(f.host, pubAlice), bob, 80)
			require.EqualValues(t, 2, h.entries(f))
			require.NoError(t, h.coll.Maps["ports"].Delete(key))
			h.bump()
			h.expect("nobody's", actPass, "", func() result { return in("A") })
			require.Zero(t, h.entries(f))
			h.put("ports", key, was)

			h.connect(f, client, at(f.host, pubAlice), alice, 80)
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = 0 })
			h.bump()
			h.drops("its container has gone", portNotReady, "uplink", func() result { return in("A") })
			require.Zero(t, h.entries(f))
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = uint32(h.links[alice]) })

			send(alice, a, "S")
			answer := packet.TCP(server, at(f.host, h.outer(f, alice, 40000, server.Addr(), 443)), fromOutside, packet.Flags("SA"))
			h.bump()
			h.expect("answers go on", actRedirect, published, func() result { return h.uplink(answer) })
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = 0 })
			h.bump()
			h.drops("an answer to nobody", staleFlow, "uplink", func() result { return h.uplink(answer) })
			require.Zero(t, h.entries(f))
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Ifindex = uint32(h.links[alice]) })
		})
		t.Run("renewed", func(t *testing.T) {
			h.t = t
			h.reset()
			toPeggy := packet.TCP(at(a, 1), at(f.addr(peggy), 2), toGateway(alice))
			h.from(alice, toPeggy)
			h.bump()
			h.expect("still allowed", actRedirect, toContainer, func() result { return h.from(alice, toPeggy) })
			require.NoError(t, h.coll.Maps["pairs"].Delete(bpf.DatapathPair{A: netOne, B: netRouted}))
			h.expect("judged with its generation only", actRedirect, toContainer, func() result { return h.from(alice, toPeggy) })
			h.bump()
			h.drops("disallowed", isolated, "container", func() result { return h.from(alice, toPeggy) })
			require.Zero(t, h.entries(f))
			require.Zero(t, h.gauge()[f.index()])
			h.put("pairs", bpf.DatapathPair{A: netOne, B: netRouted}, uint8(1))
			h.from(alice, toPeggy)
			require.NoError(t, h.coll.Maps["pairs"].Delete(bpf.DatapathPair{A: netOne, B: netRouted}))
			h.bump()
			h.drops("errors about it are disallowed too", isolated, "container", func() result {
				return h.from(peggy, packet.ICMPError(f.addr(peggy), a, f.unreach, 3, toPeggy, toGateway(peggy)))
			})
			h.put("pairs", bpf.DatapathPair{A: netOne, B: netRouted}, uint8(1))
			h.reset()

			peer := packet.TCP(at(a, 1), at(b, 2), toNeighbour(alice, bob))
			h.from(alice, peer)
			h.setNetwork(netOne, func(n *bpf.DatapathNetwork) { n.Flags |= bpf.DatapathNetworkFlagsNETWORK_NO_ICC })
			h.bump()
			h.drops("icc turned off", iccDisabled, "container", func() result { return h.from(alice, peer) })
			h.reset()
			h.setNetwork(netOne, func(n *bpf.DatapathNetwork) { n.Flags = networkFlags[netOne] })
			send(alice, a, "S")
			h.setNetwork(netOne, func(n *bpf.DatapathNetwork) { n.Flags |= bpf.DatapathNetworkFlagsNETWORK_INTERNAL })
			h.bump()
			h.drops("made internal", internalNet, "container", func() result { return send(alice, a, "A") })
			h.setNetwork(netOne, func(n *bpf.DatapathNetwork) { n.Flags = networkFlags[netOne] })

			h.reset()
			send(alice, a, "S")
			port := h.outer(f, alice, 40000, server.Addr(), 443)
			require.NoError(t, h.coll.Maps["host_addrs"].Delete(mapAddr(f.host)))
			h.bump()
			r := h.expect("the masquerade address is gone: opened anew", actRedirect, toUplink, func() result { return send(alice, a, "A") })
			require.EqualValues(t, 2, h.entries(f))
			require.Equal(t, port, h.outer(f, alice, 40000, server.Addr(), 443))
			right(t, "opened anew", r.out)
			h.put("host_addrs", mapAddr(f.host), bpf.DatapathHostAddr{Ifindex: uint32(h.up)})

			h.reset()
			send(alice, a, "S")
			h.bump()
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Sandbox = 77 })
			h.setEndpoint(bob, func(e *bpf.DatapathEndpoint) {
				e.Addr4, e.Addr6 = addr32(families[0].addr(alice)), mapAddr(families[1].addr(alice))
			})
			r = h.expect("a reused address gets no previous owner's flow", actRedirect, toUplink, func() result {
				return h.from(bob, packet.TCP(at(a, 40000), server, toGateway(bob), packet.Flags("A")))
			})
			r = h.uplink(packet.TCP(server, at(f.host, h.outer(f, alice, 40000, server.Addr(), 443)), fromOutside, packet.Flags("A")))
			same(t, "the answer goes to the new owner", packet.TCP(server, at(a, 40000), routedTo(bob), packet.TTL(63), packet.Flags("A")), r.out)
			h.setEndpoint(alice, func(e *bpf.DatapathEndpoint) { e.Sandbox = places[alice].sandbox })
			h.setEndpoint(bob, func(e *bpf.DatapathEndpoint) {
				e.Addr4, e.Addr6 = addr32(families[0].addr(bob)), mapAddr(families[1].addr(bob))
			})
		})
	})
}

// sweep runs expire or purge.
func (h *host) sweep(program string) bpf.DatapathExpireArgs {
	h.t.Helper()
	var args bpf.DatapathExpireArgs
	_, err := h.program(program).Run(&ebpf.RunOptions{Context: args, ContextOut: &args})
	require.NoError(h.t, err)
	return args
}

// A full table loses new flows under their own reason, never a live one, and recovers.
func TestTableFull(t *testing.T) {
	const entries = 64
	h := newHost(t, entries)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		a := f.addr(alice)
		open := func(i int) []byte {
			return packet.UDP(at(a, uint16(1000+i)), at(f.addr(bob), 53), toNeighbour(alice, bob))
		}
		for i := range entries / 2 {
			h.expect("fits", actRedirect, toContainer, func() result { return h.from(alice, open(i)) })
		}
		require.Equal(t, entries, h.entries(f))
		h.drops("one too many", tableFull, "container", func() result { return h.from(alice, open(entries)) })
		for i := range entries / 2 {
			h.expect("still there", actRedirect, toContainer, func() result { return h.from(alice, open(i)) })
		}
		h.expect("the host is reached without an entry", actPass, toStack, func() result {
			return h.from(alice, packet.UDP(at(a, 9), at(f.host, 53), toGateway(alice)))
		})
		require.EqualValues(t, entries, h.gauge()[f.index()])
		h.age(timeout/16 + 1)
		args := h.sweep("expire")
		require.NotZero(t, args.Deleted[f.index()], "timeouts are short when the table is full")
		h.sweep("expire") // an entry may be passed over where its neighbour was deleted
		require.Zero(t, h.entries(f))
		require.Zero(t, h.gauge()[f.index()])
		h.expect("room again", actRedirect, toContainer, func() result { return h.from(alice, open(entries)) })
	})
}

// Both entries of an IPv4 flow cost at most 288 bytes of kernel memory in a table of a power of two,
// beside the few kilobytes that the map itself takes.
func TestFlowMemory(t *testing.T) {
	const entries = 1 << 15
	h := newHost(t, entries)
	file, err := os.Open(fmt.Sprintf("/proc/self/fdinfo/%d", h.coll.Maps["flows4"].FD()))
	require.NoError(t, err)
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		value, ok := strings.CutPrefix(lines.Text(), "memlock:")
		if !ok {
			continue
		}
		memlock, err := strconv.Atoi(strings.TrimSpace(value))
		require.NoError(t, err)
		require.LessOrEqual(t, 2*memlock/entries, 288)
		return
	}
	t.Fatal("no memlock in the map's fdinfo")
}

var update = flag.Bool("update", false, "write the golden files anew")

var objects = []struct {
	name string
	load func() (*ebpf.CollectionSpec, error)
}{{"datapath", bpf.LoadDatapath}, {"sock", bpf.LoadSock}, {"strict", bpf.LoadStrict}, {"shield", bpf.LoadShield}}

// The programs' sizes, so that a change that doubles one shows.
func TestInstructions(t *testing.T) {
	var out strings.Builder
	for _, object := range objects {
		spec, err := object.load()
		require.NoError(t, err)
		size := make(map[string]int)
		for _, program := range spec.Programs {
			// The functions that a program calls follow it.
			counted := make(map[string]int)
			name := ""
			for _, ins := range program.Instructions {
				if symbol := ins.Symbol(); symbol != "" {
					name = symbol
				}
				counted[name] += int(ins.Size() / asm.InstructionSize)
			}
			maps.Copy(size, counted)
		}
		for _, name := range slices.Sorted(maps.Keys(size)) {
			fmt.Fprintf(&out, "%s %s %d\n", object.name, name, size[name])
		}
	}
	golden := filepath.Join("testdata", "instructions.golden")
	if *update {
		require.NoError(t, os.WriteFile(golden, []byte(out.String()), 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), out.String(), "if that is meant: go test ./bpf -run TestInstructions -update")
}

// What must hold of masquerading whatever the containers send.
func TestMasqueradeProperties(t *testing.T) {
	flows := 10_000
	if os.Getenv("BPFNET_FULL") == "1" {
		flows = 100_000
	}
	table := uint32(1)
	for table < uint32(4*flows) {
		table *= 2
	}
	h := newHost(t, table)
	const first, count = 20000, 12000
	h.setSNAT(first, count)
	// Whatever the table could hold, no timeout is shortened and nothing is taken over.
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	// Sockets of the host on some of the ports: wildcard, bound to the address, of both families.
	taken := make(map[string]map[uint16]bool)
	for _, network := range []string{"udp", "tcp"} {
		taken[network] = make(map[uint16]bool)
		for range 300 {
			port := uint16(first + random.IntN(count))
			h.do(func() {
				switch network {
				case "udp":
					c, err := net.ListenPacket(network, fmt.Sprintf(":%d", port))
					if err == nil {
						taken[network][port] = true
						t.Cleanup(func() { c.Close() })
					}
				case "tcp":
					c, err := net.Listen(network, fmt.Sprintf(":%d", port))
					if err == nil {
						taken[network][port] = true
						t.Cleanup(func() { c.Close() })
					}
				}
			})
		}
		require.NotEmpty(t, taken[network])
	}

	type inner struct {
		family int
		udp    bool
		slot   int
		port   uint16
	}
	type outer struct {
		family int
		udp    bool
		dst    netip.AddrPort
		host   netip.Addr
		port   uint16
	}
	type flow struct {
		inner
		dst netip.AddrPort
	}
	reverse := make(map[outer]flow)
	seen := make(map[flow]uint16)
	mapping := make(map[inner]map[uint16]int)
	exhausted := 0
	for range flows {
		i := random.IntN(2)
		f := families[i]
		w := flow{inner: inner{family: i, udp: random.IntN(2) == 0, slot: []int{alice, bob, carol, quinn}[random.IntN(4)], port: uint16(1024 + random.IntN(3000))}}
		// Few destinations, so that flows meet there.
		w.dst = at([]netip.Addr{f.client, f.client2, f.foreign}[random.IntN(3)], uint16(80+random.IntN(3)))
		make, network := packet.TCP, "tcp"
		if w.udp {
			make, network = packet.UDP, "udp"
		}
		r := h.from(w.slot, make(at(f.addr(w.slot), w.port), w.dst, toGateway(w.slot)))
		if r.action == actShot {
			exhausted++
			continue
		}
		require.EqualValues(t, actRedirect, r.action)
		right(t, "masqueraded", r.out)
		port, dport := ports(r.out)
		require.Equal(t, w.dst.Port(), dport)
		require.True(t, port >= first && port < first+count, "port %d is not one for masquerading", port)
		require.False(t, taken[network][port], "%s port %d is a host socket's", network, port)
		k := outer{family: i, udp: w.udp, dst: w.dst, host: f.host, port: port}
		if old, ok := reverse[k]; ok {
			require.Equal(t, old, w, "two flows share an outer tuple")
		}
		reverse[k] = w
		if old, ok := seen[w]; ok {
			require.Equal(t, old, port, "a flow changed its outer port")
		} else {
			seen[w] = port
			if mapping[w.inner] == nil {
				mapping[w.inner] = map[uint16]int{}
			}
			mapping[w.inner][port]++
		}
	}
	same, more := 0, 0
	for _, ports := range mapping {
		n := 0
		for _, c := range ports {
			n += c
		}
		if n > 1 {
			more++
			if len(ports) == 1 {
				same++
			}
		}
	}
	t.Logf("%d flows, %d senders with several, %d of them with one outer port, %d found no port", len(seen), more, same, exhausted)
	require.Less(t, exhausted*1000, flows, "no port found, though half of them are free")
	require.EqualValues(t, 2*len(seen), h.gauge()[0]+h.gauge()[1])
	// Only where another flow or a socket holds the first candidate may it differ.
	require.Greater(t, same*10, more*5)
}

// The same socket to two destinations, nothing in the way: one outer port, always.
func TestEndpointIndependentMapping(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		for port := range uint16(100) {
			h.t = t
			h.reset()
			outer := make(map[uint16]bool)
			for _, dst := range []netip.AddrPort{at(f.client, 1), at(f.client2, 2), at(f.foreign, 3), at(f.client, 4)} {
				out, _ := ports(h.from(alice, packet.UDP(at(f.addr(alice), 1024+port), dst, toGateway(alice))).out)
				outer[out] = true
			}
			require.Len(t, outer, 1)
			require.NotContains(t, outer, uint16(snatHole))
		}
	})
}

// Echo requests and tunnels of the host's own have no socket that could be looked up: it claims their
// tuples by sending, also from a container.
func TestHostClaimsTuples(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		server := f.client2
		ping := func() uint16 {
			return echoID(h.expect("container pings", actRedirect, toUplink, func() result {
				return h.from(alice, packet.ICMPEcho(f.addr(alice), server, 0x4321, 1, toGateway(alice)))
			}).out)
		}
		hostSends := func(frame []byte) {
			h.expect("host sends", actPass, "", func() result {
				return h.run("to_uplink", frame, skb{Ifindex: uint32(h.up)})
			})
		}
		id := ping()
		answer := packet.ICMPEchoReply(server, f.host, id, 1, fromOutside)
		h.expect("the container's answer", actRedirect, published, func() result { return h.uplink(answer) })
		before := h.entries(f)
		hostSends(packet.ICMPEchoReply(f.host, server, 77, 1, packet.MAC(upMAC, outsideMAC)))
		require.Equal(t, before, h.entries(f), "a reply claims nothing: anybody could have asked for it")

		hostSends(packet.ICMPEcho(f.host, server, id, 1, packet.MAC(upMAC, outsideMAC)))
		h.expect("now the host's", actPass, "fate stack uplink", func() result { return h.uplink(answer) })
		require.NotEqual(t, id, ping(), "held by the host")
		h.expect("still the host's", actPass, "fate stack uplink", func() result { return h.uplink(answer) })

		h.age(timeout + 1)
		h.sweep("expire")
		require.Zero(t, h.entries(f))
		require.Zero(t, h.gauge()[f.index()])
	})
}

// The label bpfnet.allowed_addresses: one endpoint may send from a prefix, nobody else, and from
// nothing beside it.
func TestAllowedSources(t *testing.T) {
	h := newHost(t, 64)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		key := bpf.DatapathSourceKey{Prefixlen: 32 + 96 + 24, Endpoint: alice, Addr: mapAddr(f.foreign)}
		if f.v6 {
			key.Prefixlen = 32 + 64
		}
		send := func(slot int, src netip.Addr) func() result {
			return func() result {
				return h.from(slot, packet.UDP(at(src, 5000), at(f.client2, 53), toGateway(slot)))
			}
		}
		h.drops("before", spoofed, "container", send(alice, f.foreign))
		h.put("allowed_sources", key, uint8(1))
		defer func() { require.NoError(t, h.coll.Maps["allowed_sources"].Delete(key)) }()
		h.expect("allowed", actRedirect, toUplink, send(alice, f.foreign))
		h.drops("another endpoint", spoofed, "container", send(bob, f.foreign))
		h.drops("another prefix", spoofed, "container", send(alice, f.client))
	})
}
