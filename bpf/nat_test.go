// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes a network namespace and loads BPF programs (see datapath_host_test.go).
//
// What a translator owes its flows beside plain packets, byte by byte: docs/nat-behaviour.md says
// which requirement each test belongs to. The same with sockets of the kernel: internal/scenarios.
package bpf_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// extended puts IPv6 extension headers of eight bytes each between the network header and what
// follows it. A fragment header says that it is the first of several.
func extended(frame []byte, kinds ...byte) []byte {
	head, rest := append([]byte{}, frame[:54]...), frame[54:]
	next := &head[20]
	var headers []byte
	after := *next
	for i, kind := range kinds {
		following := after
		if i+1 < len(kinds) {
			following = kinds[i+1]
		}
		switch kind {
		case unix.IPPROTO_FRAGMENT:
			headers = append(headers, following, 0, 0, 1, 0xab, 0xcd, 0xef, 0x01)
		case unix.IPPROTO_ROUTING:
			headers = append(headers, following, 0, 253, 0, 0, 0, 0, 0) // experimental, no segments left
		default:
			headers = append(headers, following, 0, 1, 4, 0, 0, 0, 0) // PadN
		}
	}
	if len(kinds) > 0 {
		*next = kinds[0]
	}
	length := int(head[18])<<8 + int(head[19]) + len(headers)
	head[18], head[19] = byte(length>>8), byte(length)
	return append(append(head, headers...), rest...)
}

// An ICMPv6 error may quote a packet with extension headers, those of a first fragment among them.
func TestNATQuotedExtensionHeaders(t *testing.T) {
	h := newHost(t, 1024)
	f := families[1]
	a, router, server, client := f.addr(alice), f.foreign, at(f.client2, 443), at(f.client, 50000)
	data := packet.Payload([]byte("some data, so that the quoted transport header is whole"))
	const hop, routing, options, fragment = unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS, unix.IPPROTO_FRAGMENT
	for _, kinds := range [][]byte{
		{hop}, {options}, {routing}, {fragment}, {hop, routing, fragment, options}, {options, options, options, options, options, options},
	} {
		t.Run(fmt.Sprint(kinds), func(t *testing.T) {
			h.t = t
			h.reset()
			h.from(alice, packet.UDP(at(a, 40000), server, toGateway(alice)))
			outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
			r := h.expect("about what was masqueraded", actRedirect, published, func() result {
				return h.uplink(packet.ICMPError(router, f.host, f.tooBig, 0, extended(packet.UDP(outer, server, data), kinds...), fromOutside, packet.MTU(1300)))
			})
			same(t, "masqueraded", packet.ICMPError(router, a, f.tooBig, 0, extended(packet.UDP(at(a, 40000), server, data), kinds...),
				routedTo(alice), packet.TTL(63), packet.MTU(1300)), r.out)
			h.uplink(packet.UDP(client, at(f.host, pubAlice), fromOutside))
			r = h.expect("about what reached a published port", actRedirect, toUplink, func() result {
				return h.from(alice, packet.ICMPError(a, f.client, f.unreach, 4, extended(packet.UDP(client, at(a, 80), data), kinds...), toGateway(alice)))
			})
			same(t, "published", packet.ICMPError(f.host, f.client, f.unreach, 4, extended(packet.UDP(client, at(f.host, pubAlice), data), kinds...),
				toGateway(alice), packet.TTL(63)), r.out)
		})
	}
	t.Run("says too little", func(t *testing.T) {
		h.t = t
		h.reset()
		h.from(alice, packet.UDP(at(a, 40000), server, toGateway(alice)))
		outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
		whole := extended(packet.UDP(outer, server, data), hop, options)
		for _, n := range []int{0, 3, 8, 11, 16, 19} {
			h.expect("cut off", actPass, "", func() result {
				return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, whole[:54+n], fromOutside))
			})
		}
		later := extended(packet.UDP(outer, server, data), fragment)
		later[54+3] |= 8
		h.expect("a later fragment", actPass, "", func() result {
			return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, later, fromOutside))
		})
		endless := extended(packet.UDP(outer, server, data), options, options, options, options, options, options, options)
		h.expect("headers without end", actPass, "", func() result {
			return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, endless, fromOutside))
		})
	})
}

// Routers quote no more than eight bytes behind the network header (RFC 792): enough for ports and
// identifiers, whichever way the flow was opened.
func TestNATTruncatedErrors(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a, router, server, client := f.addr(alice), f.foreign, at(f.client2, 443), at(f.client, 50000)
		data := packet.Payload([]byte("none of this is quoted"))
		for name, make := range map[string]func(src, dst netip.AddrPort, o ...packet.Option) []byte{"TCP": packet.TCP, "UDP": packet.UDP} {
			quote := func(src, dst netip.AddrPort) []byte { return packet.Quote(make(src, dst, data), 8) }
			t.Run(name, func(t *testing.T) {
				h.t = t
				h.reset()
				h.from(alice, make(at(a, 40000), server, toGateway(alice)))
				outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
				r := h.expect("masqueraded", actRedirect, published, func() result {
					return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, quote(outer, server), fromOutside))
				})
				same(t, "masqueraded", packet.ICMPError(router, a, f.timeExceeded, 0, quote(at(a, 40000), server), routedTo(alice), packet.TTL(63)), r.out)
				r = h.expect("by the container", actRedirect, toUplink, func() result {
					return h.from(alice, packet.ICMPError(a, f.client2, f.unreach, 3, quote(server, at(a, 40000)), toGateway(alice)))
				})
				same(t, "by the container", packet.ICMPError(f.host, f.client2, f.unreach, 3, quote(server, outer), toGateway(alice), packet.TTL(63)), r.out)
				h.uplink(make(client, at(f.host, pubAlice), fromOutside))
				if name == "TCP" {
					h.connect(f, client, at(f.host, pubAlice), alice, 80)
				}
				r = h.expect("published", actRedirect, toUplink, func() result {
					return h.from(alice, packet.ICMPError(a, f.client, f.unreach, 3, quote(client, at(a, 80)), toGateway(alice)))
				})
				same(t, "published", packet.ICMPError(f.host, f.client, f.unreach, 3, quote(client, at(f.host, pubAlice)), toGateway(alice), packet.TTL(63)), r.out)
				r = h.expect("published, about a reply", actRedirect, published, func() result {
					return h.uplink(packet.ICMPError(router, f.host, f.tooBig, f.tooBigCode, quote(at(f.host, pubAlice), client), fromOutside, packet.MTU(1300)))
				})
				same(t, "published, about a reply", packet.ICMPError(router, a, f.tooBig, f.tooBigCode, quote(at(a, 80), client), routedTo(alice), packet.TTL(63), packet.MTU(1300)), r.out)
				h.expect("seven bytes", actRedirect, published, func() result {
					return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, packet.Quote(make(outer, server), 7), fromOutside))
				})
				h.expect("half a port", actPass, "", func() result {
					return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, packet.Quote(make(outer, server), 3), fromOutside))
				})
			})
		}
		t.Run("echo", func(t *testing.T) {
			h.t = t
			h.reset()
			id := echoID(h.from(alice, packet.ICMPEcho(a, f.client2, 0x4321, 1, toGateway(alice), data)).out)
			quote := func(src netip.Addr, id uint16) []byte {
				return packet.Quote(packet.ICMPEcho(src, f.client2, id, 1, data), 8)
			}
			r := h.expect("about a request", actRedirect, published, func() result {
				return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, quote(f.host, id), fromOutside))
			})
			same(t, "about a request", packet.ICMPError(router, a, f.timeExceeded, 0, quote(a, 0x4321), routedTo(alice), packet.TTL(63)), r.out)
			reply := func(dst netip.Addr, id uint16) []byte {
				return packet.Quote(packet.ICMPEchoReply(f.client2, dst, id, 1, data), 8)
			}
			r = h.expect("by the container, about a reply", actRedirect, toUplink, func() result {
				return h.from(alice, packet.ICMPError(a, f.client2, f.unreach, 1, reply(a, 0x4321), toGateway(alice)))
			})
			same(t, "about a reply", packet.ICMPError(f.host, f.client2, f.unreach, 1, reply(f.host, id), toGateway(alice), packet.TTL(63)), r.out)
		})
	})
}

// Both ends send a SYN before they see the other's (RFC 5382 REQ-2).
func TestNATSimultaneousOpen(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		a, server := f.addr(alice), at(f.client2, 443)
		out := func(flags string) {
			r := h.expect("out "+flags, actRedirect, toUplink, func() result {
				return h.from(alice, packet.TCP(at(a, 40000), server, toGateway(alice), packet.Flags(flags)))
			})
			same(t, "out "+flags, packet.TCP(at(f.host, h.outer(f, alice, 40000, f.client2, 443)), server, toGateway(alice), packet.TTL(63), packet.Flags(flags)), r.out)
		}
		in := func(flags string) {
			outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
			r := h.expect("in "+flags, actRedirect, published, func() result {
				return h.uplink(packet.TCP(server, outer, fromOutside, packet.Flags(flags)))
			})
			same(t, "in "+flags, packet.TCP(server, at(a, 40000), routedTo(alice), packet.TTL(63), packet.Flags(flags)), r.out)
		}
		out("S")
		in("S")
		out("SA")
		in("SA")
		out("PA")
		in("PA")
		require.Equal(t, 2, h.entries(f))
		h.age(timeoutUp - 1)
		require.EqualValues(t, 2, h.sweep("expire").Live[f.index()], "it is established")
	})
}

// Fragments in order, whatever the last one's size, of UDP and of echo requests, both ways.
func TestNATFragments(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		a := f.addr(alice)
		for last := 1; last <= 9; last++ {
			payload := make([]byte, 3*64-8+last) // behind the eight bytes of either header
			for i := range payload {
				payload[i] = byte(i * 7)
			}
			data := packet.Payload(payload)
			cut := func(frame []byte) [][]byte { return packet.Fragment(frame, 64, uint32(0xab00+last)) }
			all := func(what string, send func(frame []byte) result, count string, in, want [][]byte) {
				t.Helper()
				require.Len(t, in, 4)
				for i := range in {
					r := h.expect(what, actRedirect, count, func() result { return send(in[i]) })
					same(t, fmt.Sprintf("%s, fragment %d", what, i), want[i], r.out)
				}
			}
			t.Run(fmt.Sprintf("%d bytes", last), func(t *testing.T) {
				h.t = t
				h.reset()
				from := func(frame []byte) result { return h.from(alice, frame) }
				server := at(f.client2, 53)
				h.from(alice, packet.UDP(at(a, 40000), server, toGateway(alice)))
				outer := at(f.host, h.outer(f, alice, 40000, f.client2, 53))
				all("masqueraded", from, toUplink,
					cut(packet.UDP(at(a, 40000), server, toGateway(alice), data)),
					cut(packet.UDP(outer, server, toGateway(alice), packet.TTL(63), data)))
				all("its answer", h.uplink, published,
					cut(packet.UDP(server, outer, fromOutside, data)),
					cut(packet.UDP(server, at(a, 40000), routedTo(alice), packet.TTL(63), data)))

				id := echoID(h.from(alice, packet.ICMPEcho(a, f.client2, 7, 1, toGateway(alice))).out)
				all("echo", from, toUplink,
					cut(packet.ICMPEcho(a, f.client2, 7, 2, toGateway(alice), data)),
					cut(packet.ICMPEcho(f.host, f.client2, id, 2, toGateway(alice), packet.TTL(63), data)))
				all("its reply", h.uplink, published,
					cut(packet.ICMPEchoReply(f.client2, f.host, id, 2, fromOutside, data)),
					cut(packet.ICMPEchoReply(f.client2, a, 7, 2, routedTo(alice), packet.TTL(63), data)))

				client := at(f.client, 50000)
				all("published", h.uplink, published,
					cut(packet.UDP(client, at(f.host, pubAlice), fromOutside, data)),
					cut(packet.UDP(client, at(a, 80), routedTo(alice), packet.TTL(63), data)))
				all("its answer", from, toUplink,
					cut(packet.UDP(at(a, 80), client, toGateway(alice), data)),
					cut(packet.UDP(at(f.host, pubAlice), client, toGateway(alice), packet.TTL(63), data)))
			})
		}
	})
}

// Fragments that overtake their first are counted as lost once it is known whose they were: not
// those of the host.
func TestNATFragmentsOvertaken(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		data := packet.Payload(make([]byte, 200))
		cut := func(port uint16, id uint32) [][]byte {
			return packet.Fragment(packet.UDP(at(f.client, 50000), at(f.host, port), fromOutside, data), 64, id)
		}
		ours := cut(pubAlice, 1)
		for _, i := range []int{3, 1} {
			h.expect("early", actPass, "", func() result { return h.uplink(ours[i]) })
		}
		before := h.counters()
		require.EqualValues(t, actRedirect, h.uplink(ours[0]).action)
		require.Equal(t, counters{published: 1, dropped(noFragment, "uplink"): 2}, h.counters().since(before))
		h.expect("in its turn", actRedirect, published, func() result { return h.uplink(ours[2]) })

		host := cut(22, 2)
		for _, i := range []int{1, 0, 2, 3} {
			h.expect("the host's own", actPass, "", func() result { return h.uplink(host[i]) })
		}
	})
}

// IPv4 options and IPv6 extension headers change nothing about a flow.
func TestNATOptions(t *testing.T) {
	h := newHost(t, 1024)
	const hop, routing, options, fragment = unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS, unix.IPPROTO_FRAGMENT
	for _, c := range []struct {
		name   string
		family int
		change func(frame []byte) []byte
		more   packet.Option
	}{
		{"no operation", 0, nil, packet.IPOptions(1, 1, 1, 0)},
		{"router alert", 0, nil, packet.IPOptions(148, 4, 0, 0)},
		{"record route, forty bytes", 0, nil, packet.IPOptions(append([]byte{7, 39, 4}, make([]byte, 37)...)...)},
		{"hop by hop", 1, func(b []byte) []byte { return extended(b, hop) }, packet.HopByHop()},
		{"routing, none left", 1, func(b []byte) []byte { return extended(b, routing) }, nil},
		{"destination options", 1, func(b []byte) []byte { return extended(b, options) }, nil},
		{"all, a first fragment too", 1, func(b []byte) []byte { return extended(b, hop, options, routing, fragment, options) }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			h.t = t
			h.reset()
			f := families[c.family]
			a, server, client := f.addr(alice), at(f.client2, 443), at(f.client, 50000)
			udp := func(src, dst netip.AddrPort, o ...packet.Option) []byte {
				if c.family == 0 {
					o = append(o, c.more)
				}
				frame := packet.UDP(src, dst, o...)
				if c.change != nil {
					frame = c.change(frame)
				}
				return frame
			}
			r := h.expect("out", actRedirect, toUplink, func() result { return h.from(alice, udp(at(a, 40000), server, toGateway(alice))) })
			outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
			same(t, "out", udp(outer, server, toGateway(alice), packet.TTL(63)), r.out)
			r = h.expect("back", actRedirect, published, func() result { return h.uplink(udp(server, outer, fromOutside)) })
			same(t, "back", udp(server, at(a, 40000), routedTo(alice), packet.TTL(63)), r.out)
			r = h.expect("published", actRedirect, published, func() result { return h.uplink(udp(client, at(f.host, pubAlice), fromOutside)) })
			same(t, "published", udp(client, at(a, 80), routedTo(alice), packet.TTL(63)), r.out)
			r = h.expect("its answer", actRedirect, toUplink, func() result { return h.from(alice, udp(at(a, 80), client, toGateway(alice))) })
			same(t, "its answer", udp(at(f.host, pubAlice), client, toGateway(alice), packet.TTL(63)), r.out)
			require.Equal(t, 4, h.entries(f), "each was of one flow")
		})
	}
}

// Protocols without ports are masqueraded by address, one container at a time towards each address.
func TestNATByAddress(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		for name, proto := range map[string]uint8{"GRE": 47, "ESP": 50, "AH": 51, "IPIP": 4, "unassigned": 200} {
			if name == "AH" && f.v6 {
				continue // an extension header there
			}
			t.Run(name, func(t *testing.T) {
				h.t = t
				h.reset()
				a, data := f.addr(alice), packet.Payload([]byte("sixteen bytes or more of something"))
				r := h.expect("out", actRedirect, toUplink, func() result { return h.from(alice, packet.IP(a, f.client2, proto, toGateway(alice), data)) })
				same(t, "out", packet.IP(f.host, f.client2, proto, toGateway(alice), packet.TTL(63), data), r.out)
				r = h.expect("back", actRedirect, published, func() result { return h.uplink(packet.IP(f.client2, f.host, proto, fromOutside, data)) })
				same(t, "back", packet.IP(f.client2, a, proto, routedTo(alice), packet.TTL(63), data), r.out)
				r = h.expect("an error about it", actRedirect, published, func() result {
					return h.uplink(packet.ICMPError(f.foreign, f.host, f.timeExceeded, 0, packet.IP(f.host, f.client2, proto, data), fromOutside))
				})
				same(t, "an error about it", packet.ICMPError(f.foreign, a, f.timeExceeded, 0, packet.IP(a, f.client2, proto, data), routedTo(alice), packet.TTL(63)), r.out)
				h.drops("another container, to the same address", snatExhausted, "container", func() result {
					return h.from(bob, packet.IP(f.addr(bob), f.client2, proto, toGateway(bob), data))
				})
				r = h.expect("another container, elsewhere", actRedirect, toUplink, func() result {
					return h.from(bob, packet.IP(f.addr(bob), f.client, proto, toGateway(bob), data))
				})
				same(t, "elsewhere", packet.IP(f.host, f.client, proto, toGateway(bob), packet.TTL(63), data), r.out)
				h.expect("what nobody asked for", actPass, "", func() result { return h.uplink(packet.IP(f.foreign, f.host, proto, fromOutside, data)) })
			})
		}
	})
}

// Filtering depends on address and port: only who was asked may answer (RFC 4787 REQ-8, the stricter
// kind), and nobody from outside opens a mapping's way in.
func TestNATFiltering(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		for name, make := range map[string]func(src, dst netip.AddrPort, o ...packet.Option) []byte{"TCP": packet.TCP, "UDP": packet.UDP} {
			t.Run(name, func(t *testing.T) {
				h.t = t
				h.reset()
				server := at(f.client2, 443)
				h.from(alice, make(at(f.addr(alice), 40000), server, toGateway(alice)))
				outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
				h.expect("who was asked", actRedirect, published, func() result { return h.uplink(make(server, outer, fromOutside)) })
				h.expect("another port of it", actPass, "", func() result { return h.uplink(make(at(f.client2, 444), outer, fromOutside)) })
				h.expect("another address", actPass, "", func() result { return h.uplink(make(at(f.client, 443), outer, fromOutside)) })
				h.expect("a neighbour, to the outer address: the host answers", actPass, toStack, func() result {
					return h.from(bob, make(at(f.addr(bob), 443), outer, toGateway(bob)))
				})
			})
		}
	})
}

// A mapping lives by packets of either direction (RFC 4787 REQ-6), not by errors (RFC 5508 section 4).
func TestNATRefresh(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		server := at(f.client2, 443)
		for _, c := range []struct {
			name string
			send func(outer netip.AddrPort)
			live bool
		}{
			{"nothing", func(netip.AddrPort) {}, false},
			{"outbound", func(netip.AddrPort) { h.from(alice, packet.UDP(at(f.addr(alice), 40000), server, toGateway(alice))) }, true},
			{"inbound", func(outer netip.AddrPort) { h.uplink(packet.UDP(server, outer, fromOutside)) }, true},
			{"an error", func(outer netip.AddrPort) {
				h.uplink(packet.ICMPError(f.foreign, f.host, f.timeExceeded, 0, packet.UDP(outer, server), fromOutside))
			}, false},
			{"somebody else", func(outer netip.AddrPort) { h.uplink(packet.UDP(at(f.client, 443), outer, fromOutside)) }, false},
		} {
			t.Run(c.name, func(t *testing.T) {
				h.t = t
				h.reset()
				h.from(alice, packet.UDP(at(f.addr(alice), 40000), server, toGateway(alice)))
				h.age(timeout - 1)
				c.send(at(f.host, h.outer(f, alice, 40000, f.client2, 443)))
				h.age(2)
				h.sweep("expire")
				require.Equal(t, map[bool]int{true: 2}[c.live], h.entries(f))
			})
		}
	})
}

// What an ICMP error quotes may have IPv4 options, and structured extensions may follow it (RFC 4884):
// the ones are walked past, the others left as they are.
func TestNATQuotedOptions(t *testing.T) {
	h := newHost(t, 1024)
	f := families[0]
	a, router, server := f.addr(alice), f.foreign, at(f.client2, 443)
	t.Run("options", func(t *testing.T) {
		h.t = t
		h.reset()
		for _, options := range [][]byte{{1, 1, 1, 0}, append([]byte{7, 39, 4}, make([]byte, 37)...)} {
			more := packet.IPOptions(options...)
			h.from(alice, packet.UDP(at(a, 40000), server, toGateway(alice)))
			outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
			r := h.expect("options", actRedirect, published, func() result {
				return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, packet.UDP(outer, server, more), fromOutside))
			})
			same(t, "options", packet.ICMPError(router, a, f.timeExceeded, 0, packet.UDP(at(a, 40000), server, more), routedTo(alice), packet.TTL(63)), r.out)
		}
	})
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		a, router, server := f.addr(alice), f.foreign, at(f.client2, 443)
		h.from(alice, packet.UDP(at(a, 40000), server, toGateway(alice)))
		outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
		// An MPLS label stack object behind the quoted packet, which is padded to 128 bytes.
		extended := func(src netip.AddrPort) []byte {
			quoted := packet.UDP(src, server, packet.Payload([]byte("quoted")))
			quoted = append(quoted, make([]byte, 14+128-len(quoted))...)
			return append(quoted, 0x20, 0, 0xde, 0xad, 0, 8, 1, 1, 0, 1, 0x61, 1)
		}
		length := packet.MTU(uint32(128/4) << 16)
		if f.v6 {
			length = packet.MTU(uint32(128/8) << 24)
		}
		r := h.expect("extensions", actRedirect, published, func() result {
			return h.uplink(packet.ICMPError(router, f.host, f.timeExceeded, 0, extended(outer), fromOutside, length))
		})
		same(t, "extensions", packet.ICMPError(router, a, f.timeExceeded, 0, extended(at(a, 40000)), routedTo(alice), packet.TTL(63), length), r.out)
	})
}

// What the stack says about a packet to a published port of another container, which it saw
// translated, names the address that its sender has dialled.
func TestNATStackError(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		a, c, gateway := f.addr(alice), f.addr(carol), f.gateway(netTwo)
		h.from(carol, packet.UDP(at(c, 40000), at(f.host, pubAlice), toGateway(carol)))
		quoted := func(dst netip.AddrPort) []byte { return packet.UDP(at(c, 40000), dst, packet.TTL(1)) }
		own := func(about []byte) []byte {
			return packet.ICMPError(gateway, c, f.timeExceeded, 0, about, routedTo(carol))
		}
		r := h.expect("the stack's own", actPass, "fate stack to_container", func() result { return h.to(carol, 0, own(quoted(at(a, 80)))) })
		same(t, "the stack's own", own(quoted(at(f.host, pubAlice))), r.out)
		r = h.expect("about no flow", actPass, "fate stack to_container", func() result { return h.to(carol, 0, own(quoted(at(a, 81)))) })
		same(t, "about no flow", own(quoted(at(a, 81))), r.out)
	})
}

// A port that a socket of the host has, which is bound to a device, is not masqueraded with.
func TestDeviceSocketKeepsPort(t *testing.T) {
	h := newHost(t, 1024)
	h.setSNAT(snatFirst, 1)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		send := func() result {
			return h.from(alice, packet.UDP(at(f.addr(alice), 40000), at(f.client2, 53), toGateway(alice)))
		}
		h.put("device_sockets", uint32(snatFirst), uint32(1))
		h.drops("its port", snatExhausted, "container", send)
		h.put("device_sockets", uint32(snatFirst), uint32(0))
		require.EqualValues(t, actRedirect, send().action, "the socket is closed")
	})
}
