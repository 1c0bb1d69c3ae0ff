// SPDX-License-Identifier: Apache-2.0

// Needs root: see datapath_host_test.go.
//
// The options of Docker's bridge driver, packet by packet: who may open a flow to a container's own
// address, and as whom a container goes out.
package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

const notPublished = bpf.DatapathReasonREASON_NOT_PUBLISHED

// setMode sets a network's gateway mode for both families; the test's end sets it back.
func (h *host) setMode(t *testing.T, network int, mode bpf.DatapathGatewayMode) {
	t.Helper()
	set := func(m bpf.DatapathGatewayMode) {
		h.setNetwork(network, func(n *bpf.DatapathNetwork) { n.Mode4, n.Mode6 = m, m })
	}
	set(mode)
	t.Cleanup(func() { h.t = t; set(bpf.DatapathGatewayModeGATEWAY_NAT) })
}

// open opens a container's own port; from is whom to, invalid: all.
func (h *host) open(t *testing.T, f family, from netip.Addr, slot int, proto uint8, port uint16) {
	t.Helper()
	k := bpf.DatapathOpenKey{Daddr: mapAddr(f.addr(slot)), Port: swap16(port), Proto: proto}
	if from.IsValid() {
		k.Saddr = mapAddr(from)
	}
	h.put("open_ports", k, uint32(0))
	t.Cleanup(func() { _ = h.coll.Maps["open_ports"].Delete(k) })
}

// unprotected ports, and what is published on a routed network, by mode.
const openPort, shutPort = 80, 81

// What the world and other networks may dial by a container's own address.
func TestGatewayModes(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, c := f.addr(alice), f.addr(carol)
		client := at(f.client, 50000)
		drop := func(r bpf.DatapathReason) (int32, string) { return actShot, dropped(r, "uplink") }
		type verdict struct{ open, shut, echo bool }
		for name, m := range map[string]struct {
			mode bpf.DatapathGatewayMode
			verdict
		}{
			"nat":             {bpf.DatapathGatewayModeGATEWAY_NAT, verdict{}},
			"nat-unprotected": {bpf.DatapathGatewayModeGATEWAY_NAT_UNPROTECTED, verdict{true, true, true}},
			"routed":          {bpf.DatapathGatewayModeGATEWAY_ROUTED, verdict{open: true, echo: true}},
			"isolated":        {bpf.DatapathGatewayModeGATEWAY_ISOLATED, verdict{}},
		} {
			t.Run(name, func(t *testing.T) {
				h.t = t
				h.setMode(t, netOne, m.mode)
				h.open(t, f, netip.Addr{}, alice, unix.IPPROTO_TCP, openPort)
				h.open(t, f, netip.Addr{}, alice, unix.IPPROTO_SCTP, openPort)
				var cases []packetCase
				add := func(what string, ok bool, frame, out []byte) {
					action, count := drop(directAccess)
					if ok {
						action, count = actRedirect, published
					} else {
						out = nil
					}
					cases = append(cases, h.uplinkCase("from outside, "+what, frame, action, count, out))
				}
				made := func(make func(src, dst netip.AddrPort, o ...packet.Option) []byte, port uint16) (in, out []byte) {
					return make(client, at(a, port), fromOutside), make(client, at(a, port), routedTo(alice), packet.TTL(63))
				}
				in, out := made(packet.TCP, openPort)
				add("published", m.open, in, out)
				in, out = made(packet.SCTP, openPort)
				add("published SCTP", m.open, in, out)
				in, out = made(packet.TCP, shutPort)
				add("unpublished", m.shut, in, out)
				in, out = made(packet.UDP, openPort)
				add("published by another protocol", m.shut, in, out)
				add("echo", m.echo, packet.ICMPEcho(f.client, a, 9, 1, fromOutside), packet.ICMPEcho(f.client, a, 9, 1, routedTo(alice), packet.TTL(63)))
				add("of a neighbour", m.shut, packet.TCP(client, at(f.addr(bob), openPort), fromOutside), packet.TCP(client, at(f.addr(bob), openPort), routedTo(bob), packet.TTL(63)))

				between := func(what string, ok bool, in, out []byte) {
					if !ok {
						cases = append(cases, h.fromCase("other network, "+what, carol, in, actShot, dropped(isolated, "container"), nil))
						return
					}
					cases = append(cases, h.fromCase("other network, "+what, carol, in, actRedirect, toContainer, out))
				}
				between("published", m.open, packet.TCP(at(c, 40000), at(a, openPort), toGateway(carol)), packet.TCP(at(c, 40000), at(a, openPort), routedTo(alice), packet.TTL(63)))
				between("unpublished", m.shut, packet.TCP(at(c, 40000), at(a, shutPort), toGateway(carol)), packet.TCP(at(c, 40000), at(a, shutPort), routedTo(alice), packet.TTL(63)))
				between("echo", m.echo, packet.ICMPEcho(c, a, 9, 1, toGateway(carol)), packet.ICMPEcho(c, a, 9, 1, routedTo(alice), packet.TTL(63)))
				// The mode of the one who asks opens nothing.
				cases = append(cases, h.fromCase("to the other network", alice, packet.TCP(at(a, 40000), at(c, openPort), toGateway(alice)),
					actShot, dropped(map[bool]bpf.DatapathReason{false: isolated, true: internalNet}[name == "isolated"], "container"), nil))
				h.check(t, cases)
			})
		}
		t.Run("routed", func(t *testing.T) {
			h.t = t
			h.setMode(t, netOne, bpf.DatapathGatewayModeGATEWAY_ROUTED)
			h.open(t, f, netip.Addr{}, alice, unix.IPPROTO_TCP, openPort)
			h.check(t, []packetCase{
				h.fromCase("goes out as itself", alice, packet.TCP(at(a, 40000), at(f.foreign, 80), toGateway(alice)), actRedirect, toUplink,
					packet.TCP(at(a, 40000), at(f.foreign, 80), toGateway(alice), packet.TTL(63))),
				h.uplinkCase("from a container's address", packet.TCP(at(c, 50000), at(a, openPort), fromOutside), actShot, dropped(martian, "uplink"), nil),
				h.uplinkCase("from the host's own", packet.TCP(at(f.host1, 50000), at(a, openPort), fromOutside), actShot, dropped(martian, "uplink"), nil),
				h.uplinkCase("from loopback", packet.TCP(at(f.loopback, 50000), at(a, openPort), fromOutside), actShot, dropped(loopbackAddr, "uplink"), nil),
				h.uplinkCase("a reset of no flow", packet.TCP(client, at(a, openPort), fromOutside, packet.Flags("R")), actShot, dropped(noFlow, "uplink"), nil),
				h.uplinkCase("an error of no flow", packet.ICMPError(f.client, a, f.unreach, 3, packet.UDP(at(a, 9), client), fromOutside),
					actShot, dropped(noFlow, "uplink"), nil),
				h.uplinkCase("TTL over", packet.TCP(client, at(a, openPort), fromOutside, packet.TTL(1)), actPass, "fate stack uplink", nil),
				h.uplinkCase("nobody has the address", packet.TCP(client, at(f.in(netOne, 99), openPort), fromOutside), actShot, dropped(directAccess, "uplink"), nil),
				h.fromCase("from an internal network", ian, packet.TCP(at(f.addr(ian), 40000), at(a, openPort), toGateway(ian)), actShot, dropped(internalNet, "container"), nil),
			})
			if f.v6 {
				h.check(t, []packetCase{
					h.uplinkCase("from an address of the link", packet.TCP(at(ip("fe80::99"), 50000), at(a, openPort), fromOutside), actShot, dropped(martian, "uplink"), nil),
					h.uplinkCase("echo from an address of the link", packet.ICMPEcho(ip("fe80::99"), a, 1, 1, fromOutside), actShot, dropped(martian, "uplink"), nil),
				})
			}
			h.open(t, f, netip.Addr{}, late, unix.IPPROTO_TCP, openPort)
			h.check(t, []packetCase{
				h.uplinkCase("not ready", packet.TCP(client, at(f.addr(late), openPort), fromOutside), actShot, dropped(notReady, "uplink"), nil),
			})
		})
		t.Run("a host port that leads nowhere", func(t *testing.T) {
			h.t = t
			const port = 8099
			k := bpf.DatapathPortKey{Addr: mapAddr(f.unspecified), Port: swap16(port), Proto: unix.IPPROTO_TCP}
			h.put("ports", k, bpf.DatapathPort{Addr: mapAddr(families[0].addr(alice)), Port: swap16(80), Slot: 99})
			h.setClass(port, byte(bpf.DatapathPortBitsPORT_TCP), 0)
			defer func() {
				require.NoError(t, h.coll.Maps["ports"].Delete(k))
				h.setClass(port, 0, byte(bpf.DatapathPortBitsPORT_TCP))
			}()
			h.check(t, []packetCase{
				h.uplinkCase("from outside", packet.TCP(client, at(f.host, port), fromOutside), actShot, dropped(notPublished, "uplink"), nil),
				h.fromCase("from a container", carol, packet.TCP(at(c, 40000), at(f.host, port), toGateway(carol)), actShot, dropped(notPublished, "container"), nil),
			})
		})
	})
}

// A flow opened from outside goes both ways, untranslated, and is judged again by who opened it.
func TestDirectFlow(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, c := f.addr(alice), f.addr(carol)
		client := at(f.client, 50000)
		h.t = t
		routed := func(mode bpf.DatapathGatewayMode) {
			h.setNetwork(netOne, func(n *bpf.DatapathNetwork) { n.Mode4, n.Mode6 = mode, mode })
			h.bump()
		}
		t.Cleanup(func() { routed(bpf.DatapathGatewayModeGATEWAY_NAT) })
		h.open(t, f, netip.Addr{}, alice, unix.IPPROTO_TCP, openPort)
		answer := func(o ...packet.Option) []byte {
			return packet.TCP(at(a, openPort), client, append(o, packet.Flags("A"))...)
		}
		for _, gone := range []string{"no longer routed", "no longer published"} {
			t.Run(gone, func(t *testing.T) {
				h.t = t
				h.reset()
				routed(bpf.DatapathGatewayModeGATEWAY_ROUTED)
				h.expect("in", actRedirect, published, func() result { return h.uplink(packet.TCP(client, at(a, openPort), fromOutside)) })
				r := h.expect("out", actRedirect, toUplink, func() result { return h.from(alice, answer(toGateway(alice))) })
				same(t, "the answer keeps its address", answer(toGateway(alice), packet.TTL(63)), r.out)
				h.bump()
				h.expect("after another policy", actRedirect, toUplink, func() result { return h.from(alice, answer(toGateway(alice))) })
				if gone == "no longer routed" {
					routed(bpf.DatapathGatewayModeGATEWAY_NAT)
				} else {
					k := bpf.DatapathOpenKey{Daddr: mapAddr(a), Port: swap16(openPort), Proto: unix.IPPROTO_TCP}
					require.NoError(t, h.coll.Maps["open_ports"].Delete(k))
					defer h.put("open_ports", k, uint32(0))
					h.bump()
				}
				h.drops("the answer", directAccess, "container", func() result { return h.from(alice, answer(toGateway(alice))) })
				h.drops("the next one in", directAccess, "uplink", func() result {
					return h.uplink(packet.TCP(client, at(a, openPort), fromOutside, packet.Flags("A")))
				})
			})
		}
		t.Run("from another network", func(t *testing.T) {
			h.t = t
			h.reset()
			routed(bpf.DatapathGatewayModeGATEWAY_ROUTED)
			back := packet.TCP(at(a, openPort), at(c, 40000), toGateway(alice), packet.Flags("A"))
			h.expect("there", actRedirect, toContainer, func() result {
				return h.from(carol, packet.TCP(at(c, 40000), at(a, openPort), toGateway(carol)))
			})
			h.expect("back", actRedirect, toContainer, func() result { return h.from(alice, back) })
			h.bump()
			// Judged as carol's: alice herself could not have opened it.
			h.expect("back, after another policy", actRedirect, toContainer, func() result { return h.from(alice, back) })
			h.expect("there, after another policy", actRedirect, toContainer, func() result {
				return h.from(carol, packet.TCP(at(c, 40000), at(a, openPort), toGateway(carol), packet.Flags("A")))
			})
			routed(bpf.DatapathGatewayModeGATEWAY_NAT)
			h.drops("back, no longer", isolated, "container", func() result { return h.from(alice, back) })
			h.drops("there, no longer", isolated, "container", func() result {
				return h.from(carol, packet.TCP(at(c, 40000), at(a, openPort), toGateway(carol), packet.Flags("A")))
			})
		})
	})
}

// Between an isolated network and its host nothing goes; its containers have each other.
func TestIsolated(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.setMode(t, netOne, bpf.DatapathGatewayModeGATEWAY_ISOLATED)
		a, b, gw := f.addr(alice), f.addr(bob), f.gateway(netOne)
		const hook = "to_container"
		cases := []packetCase{
			h.fromCase("neighbour", alice, packet.TCP(at(a, 40000), at(b, 80), toNeighbour(alice, bob)), actRedirect, toContainer, nil),
			h.fromCase("gateway", alice, packet.TCP(at(a, 40000), at(gw, 22), toGateway(alice)), actShot, dropped(internalNet, "container"), nil),
			h.fromCase("gateway echo", alice, packet.ICMPEcho(a, gw, 1, 1, toGateway(alice)), actShot, dropped(internalNet, "container"), nil),
			h.fromCase("host", alice, packet.UDP(at(a, 40000), at(f.host, 22), toGateway(alice)), actShot, dropped(internalNet, "container"), nil),
			h.fromCase("published", alice, packet.TCP(at(a, 40000), at(f.host, pubAlice), toGateway(alice)), actShot, dropped(internalNet, "container"), nil),
			h.fromCase("outside", alice, packet.TCP(at(a, 40000), at(f.foreign, 80), toGateway(alice)), actShot, dropped(internalNet, "container"), nil),
			h.fromCase("broadcast is the neighbours' only", alice, packet.UDP(at(a, 68), at(b, 67), packet.MAC(macOf(alice), broadcast)), actPass, toBridge, nil),
			{
				name: "from the host", program: "to_container", ctx: skb{Ifindex: uint32(h.links[alice])},
				in: packet.TCP(at(gw, 40000), at(a, 80), routedTo(alice)), action: actShot, count: dropped(internalNet, hook),
			},
			{
				name: "from a neighbour by the bridge", program: "to_container", ctx: skb{Ifindex: uint32(h.links[alice]), IngressIfindex: uint32(h.links[bob])},
				in: packet.UDP(at(b, 40000), at(a, 80), toNeighbour(bob, alice)), action: actPass, count: "fate bridge " + hook,
			},
		}
		h.check(t, cases)
		h.t = t
		r := h.from(alice, packet.UDP(at(a, 68), at(b, 67), packet.MAC(macOf(alice), broadcast)))
		require.Zero(t, r.mark, "from_bridge must not let it up to the host")
		if f.v6 {
			local := ip("fe80::42:acff:fe00:101") // alice's own
			h.drops("the host's link-local address", internalNet, "container", func() result {
				return h.from(alice, packet.TCP(at(local, 40000), at(ip("fe80::1"), 22), toGateway(alice)))
			})
		}
	})
}

// Devices, the daemon's switch and marks: what each opens.
func TestDirectRouting(t *testing.T) {
	h := newHost(t, 1024)
	const mark, mask = 0x1200, 0xff00
	forFamilies(t, func(t *testing.T, f family) {
		a, c := f.addr(alice), f.addr(carol)
		client := at(f.client, 50000)
		h.t = t
		h.open(t, f, netip.Addr{}, alice, unix.IPPROTO_TCP, openPort)
		in := func(port uint16) []byte { return packet.TCP(client, at(a, port), fromOutside) }
		out := func(port uint16) []byte { return packet.TCP(client, at(a, port), routedTo(alice), packet.TTL(63)) }
		in1 := packet.TCP(client, at(a, openPort), packet.MAC(outsideMAC, up1MAC))
		by1 := func(c packetCase) packetCase {
			c.ctx.Ifindex = uint32(h.up1)
			return c
		}
		t.Run("trusted device", func(t *testing.T) {
			h.t = t
			for _, ifindex := range []int{0, h.up} {
				k := bpf.DatapathTrustedKey{Ifindex: uint32(ifindex), Net: netOne}
				h.put("trusted", k, uint8(1))
				defer func() { require.NoError(t, h.coll.Maps["trusted"].Delete(k)) }()
			}
			h.check(t, []packetCase{
				h.uplinkCase("published", in(openPort), actRedirect, published, out(openPort)),
				h.uplinkCase("unpublished", in(shutPort), actShot, dropped(directAccess, "uplink"), nil),
				h.uplinkCase("echo", packet.ICMPEcho(f.client, a, 1, 1, fromOutside), actShot, dropped(directAccess, "uplink"), nil),
				by1(h.uplinkCase("by another device", in1, actShot, dropped(directAccess, "uplink"), nil)),
				h.fromCase("from another network", carol, packet.TCP(at(c, 40000), at(a, openPort), toGateway(carol)), actShot, dropped(isolated, "container"), nil),
				h.uplinkCase("another network's", packet.TCP(client, at(c, openPort), fromOutside), actShot, dropped(directAccess, "uplink"), nil),
			})
			h.t = t
			h.reset()
			h.expect("in", actRedirect, published, func() result { return h.uplink(in(openPort)) })
			h.bump()
			h.expect("an error about it, after another policy", actRedirect, toUplink, func() result {
				return h.from(alice, packet.ICMPError(a, f.client, f.unreach, 3, packet.TCP(client, at(a, openPort)), toGateway(alice)))
			})
			h.bump()
			h.expect("its answer, after another policy", actRedirect, toUplink, func() result {
				return h.from(alice, packet.TCP(at(a, openPort), client, toGateway(alice), packet.Flags("SA")))
			})
		})
		t.Run("direct routing", func(t *testing.T) {
			h.t = t
			h.setConfig(func(c *bpf.DatapathConfig) { c.Flags |= bpf.DatapathConfigFlagsCONFIG_DIRECT_ROUTING })
			defer func() {
				h.t = t
				h.setConfig(func(c *bpf.DatapathConfig) { c.Flags &^= bpf.DatapathConfigFlagsCONFIG_DIRECT_ROUTING })
			}()
			h.check(t, []packetCase{
				h.uplinkCase("published", in(openPort), actRedirect, published, out(openPort)),
				h.uplinkCase("unpublished", in(shutPort), actShot, dropped(directAccess, "uplink"), nil),
				h.uplinkCase("echo", packet.ICMPEcho(f.client, a, 1, 1, fromOutside), actShot, dropped(directAccess, "uplink"), nil),
				by1(h.uplinkCase("by another device", in1, actRedirect, published, out(openPort))),
				h.fromCase("from another network", carol, packet.TCP(at(c, 40000), at(a, openPort), toGateway(carol)), actRedirect, toContainer,
					packet.TCP(at(c, 40000), at(a, openPort), routedTo(alice), packet.TTL(63))),
				h.fromCase("from another network, unpublished", carol, packet.TCP(at(c, 40000), at(a, shutPort), toGateway(carol)), actShot, dropped(isolated, "container"), nil),
			})
		})
		t.Run("mark", func(t *testing.T) {
			h.t = t
			h.setConfig(func(c *bpf.DatapathConfig) { c.AcceptMark, c.AcceptMask = mark, mask })
			defer func() {
				h.t = t
				h.setConfig(func(c *bpf.DatapathConfig) { c.AcceptMark, c.AcceptMask = 0, 0 })
			}()
			marked := func(c packetCase, m uint32) packetCase {
				c.name, c.ctx.Mark = c.name+", marked", m
				return c
			}
			behind := func(name string, port uint16, m uint32, action int32, count string) packetCase {
				return packetCase{
					name: name, program: "to_container", ctx: skb{Ifindex: uint32(h.links[alice]), IngressIfindex: uint32(h.up), Mark: m},
					in: packet.TCP(client, at(a, port), routedTo(alice), packet.TTL(63)), action: action, count: count,
				}
			}
			h.check(t, []packetCase{
				marked(h.uplinkCase("unpublished", in(shutPort), actRedirect, published, out(shutPort)), mark|0x34),
				marked(h.uplinkCase("echo", packet.ICMPEcho(f.client, a, 1, 1, fromOutside), actRedirect, published,
					packet.ICMPEcho(f.client, a, 1, 1, routedTo(alice), packet.TTL(63))), mark),
				h.uplinkCase("not marked yet: to_container has the last word", in(shutPort), actPass, "fate stack uplink", nil),
				marked(h.uplinkCase("otherwise", in(shutPort), actPass, "fate stack uplink", nil), 0x1100),
				marked(h.uplinkCase("internal network", packet.TCP(client, at(f.addr(ian), 80), fromOutside), actPass, "fate stack uplink", nil), mark),
				behind("by the stack, marked", shutPort, mark, actPass, "fate stack to_container"),
				behind("by the stack, marked otherwise", shutPort, 0x1100, actShot, dropped(directAccess, "to_container")),
				behind("by the stack, not marked", openPort, 0, actShot, dropped(directAccess, "to_container")),
			})
			h.t = t
			h.reset()
			c := behind("", shutPort, mark, 0, "")
			h.expect("by the stack", actPass, "fate stack to_container", func() result { return h.run(c.program, c.in, c.ctx) })
			require.Equal(t, 2, h.entries(f))
			answer := packet.TCP(at(a, shutPort), client, toGateway(alice), packet.Flags("SA"))
			r := h.expect("its answer", actRedirect, toUplink, func() result { return h.from(alice, answer) })
			same(t, "as itself", packet.TCP(at(a, shutPort), client, toGateway(alice), packet.Flags("SA"), packet.TTL(63)), r.out)
			r = h.expect("what follows needs no mark", actRedirect, published, func() result {
				return h.uplink(packet.TCP(client, at(a, shutPort), fromOutside, packet.Flags("A")))
			})
			same(t, "what follows", packet.TCP(client, at(a, shutPort), routedTo(alice), packet.TTL(63), packet.Flags("A")), r.out)
			h.bump()
			h.expect("its answer, after another policy", actRedirect, toUplink, func() result { return h.from(alice, answer) })
			h.bump()
			h.expect("what follows, after another policy", actRedirect, published, func() result {
				return h.uplink(packet.TCP(client, at(a, shutPort), fromOutside, packet.Flags("A")))
			})
			require.Equal(t, 2, h.entries(f), "the same flow")
		})
		t.Run("none of them", func(t *testing.T) {
			h.t = t
			h.check(t, []packetCase{h.uplinkCase("published", in(openPort), actShot, dropped(directAccess, "uplink"), nil)})
		})
	})
}

// Links open what is named, one way and its answers, and what comes from there, as Docker's rules do.
func TestLinks(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		q, r := f.addr(quinn), f.addr(rita)
		h.t = t
		h.open(t, f, q, rita, unix.IPPROTO_TCP, openPort)
		to, back := toNeighbour(quinn, rita), toNeighbour(rita, quinn)
		h.check(t, []packetCase{
			h.fromCase("the linked port", quinn, packet.TCP(at(q, 40000), at(r, openPort), to), actRedirect, toContainer, nil),
			h.fromCase("the linked port by the gateway", quinn, packet.TCP(at(q, 40000), at(r, openPort), toGateway(quinn)), actRedirect, toContainer,
				packet.TCP(at(q, 40000), at(r, openPort), routedTo(rita), packet.TTL(63))),
			h.fromCase("from the linked port", rita, packet.TCP(at(r, openPort), at(q, 40000), back), actRedirect, toContainer, nil),
			h.fromCase("another port", quinn, packet.TCP(at(q, 40000), at(r, shutPort), to), actShot, dropped(iccDisabled, "container"), nil),
			h.fromCase("another protocol", quinn, packet.UDP(at(q, 40000), at(r, openPort), to), actShot, dropped(iccDisabled, "container"), nil),
			h.fromCase("echo", quinn, packet.ICMPEcho(q, r, 1, 1, to), actShot, dropped(iccDisabled, "container"), nil),
			h.fromCase("the other way", rita, packet.TCP(at(r, 40000), at(q, openPort), back), actShot, dropped(iccDisabled, "container"), nil),
			h.uplinkCase("from outside", packet.TCP(at(f.client, 50000), at(r, openPort), fromOutside), actShot, dropped(directAccess, "uplink"), nil),
			h.fromCase("from another network", carol, packet.TCP(at(f.addr(carol), 40000), at(r, openPort), toGateway(carol)), actShot, dropped(isolated, "container"), nil),
		})
		t.Run("the link goes", func(t *testing.T) {
			h.t = t
			h.reset()
			h.expect("there", actRedirect, toContainer, func() result { return h.from(quinn, packet.TCP(at(q, 40000), at(r, openPort), to)) })
			h.bump()
			h.expect("back, after another policy", actRedirect, toContainer, func() result {
				return h.from(rita, packet.TCP(at(r, openPort), at(q, 40000), back, packet.Flags("SA")))
			})
			require.NoError(t, h.coll.Maps["open_ports"].Delete(bpf.DatapathOpenKey{
				Saddr: mapAddr(q), Daddr: mapAddr(r), Port: swap16(openPort), Proto: unix.IPPROTO_TCP,
			}))
			h.bump()
			h.drops("there, no longer", iccDisabled, "container", func() result {
				return h.from(quinn, packet.TCP(at(q, 40000), at(r, openPort), to, packet.Flags("A")))
			})
		})
	})
}

// A network's own address to masquerade with, of the host or routed to it.
func TestMasqueradeSource(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, server := f.addr(alice), at(f.client2, 443)
		foreign := ip("203.0.113.50")
		if f.v6 {
			foreign = ip("2001:db8:50::1")
		}
		for name, source := range map[string]netip.Addr{"the host's": f.host1, "routed to the host": foreign} {
			t.Run(name, func(t *testing.T) {
				h.t = t
				h.reset()
				h.setNetwork(netOne, func(n *bpf.DatapathNetwork) {
					if f.v6 {
						n.Source6 = mapAddr(source)
					} else {
						n.Source4 = addr32(source)
					}
				})
				defer func() {
					h.t = t
					h.setNetwork(netOne, func(n *bpf.DatapathNetwork) { n.Source4, n.Source6 = 0, bpf.DatapathAddr{} })
				}()
				frame := packet.TCP(at(a, 40000), server, toGateway(alice))
				r := h.expect("out", actRedirect, toUplink, func() result { return h.from(alice, frame) })
				port := h.outer(f, alice, 40000, f.client2, 443)
				same(t, "out", packet.TCP(at(source, port), server, toGateway(alice), packet.TTL(63)), r.out)
				r = h.expect("back", actRedirect, published, func() result {
					return h.uplink(packet.TCP(server, at(source, port), fromOutside, packet.Flags("SA")))
				})
				same(t, "back", packet.TCP(server, at(a, 40000), routedTo(alice), packet.TTL(63), packet.Flags("SA")), r.out)
				h.bump()
				h.expect("on, after another policy", actRedirect, toUplink, func() result {
					return h.from(alice, packet.TCP(at(a, 40000), server, toGateway(alice), packet.Flags("A")))
				})
				require.Equal(t, port, h.outer(f, alice, 40000, f.client2, 443))
				var sent uint64
				for _, seen := range h.flowSeen(f) {
					sent = max(sent, seen[0])
				}
				require.EqualValues(t, 2, sent, "the flow goes on, it is not opened anew")
				r = h.expect("echo", actRedirect, toUplink, func() result { return h.from(alice, packet.ICMPEcho(a, f.client2, 7, 1, toGateway(alice))) })
				same(t, "echo", packet.ICMPEcho(source, f.client2, echoID(r.out), 1, toGateway(alice), packet.TTL(63)), r.out)
				r = h.expect("SCTP keeps its port", actRedirect, toUplink, func() result {
					return h.from(alice, packet.SCTP(at(a, 40000), server, toGateway(alice)))
				})
				same(t, "SCTP", packet.SCTP(at(source, 40000), server, toGateway(alice), packet.TTL(63)), r.out)
				r = h.expect("SCTP's answer", actRedirect, published, func() result {
					return h.uplink(packet.SCTP(server, at(source, 40000), fromOutside))
				})
				same(t, "SCTP's answer", packet.SCTP(server, at(a, 40000), routedTo(alice), packet.TTL(63)), r.out)
			})
		}
	})
}
