// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// What XDP programs return (linux/bpf.h).
const (
	xdpDrop = 1
	xdpPass = 2
)

// xdpMD is struct xdp_md.
type xdpMD struct{ Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32 }

// shielded is a host whose uplink up0 has the shield.
type shielded struct {
	*host
	shield *ebpf.Collection
}

func newShielded(t testing.TB) *shielded {
	t.Helper()
	s := &shielded{host: newHost(t, 1024)}
	spec, err := bpf.LoadShield()
	require.NoError(t, err)
	shared := make(map[string]*ebpf.Map)
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		if have := s.coll.Maps[name]; have != nil {
			shared[name], m.MaxEntries = have, have.MaxEntries()
		}
	}
	s.shield, err = ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	require.NoError(t, err)
	t.Cleanup(s.shield.Close)
	s.set("shield_devices", uint32(s.up), bpf.ShieldShieldDevice{Mac: [6]byte(upMAC)})
	return s
}

func (s *shielded) set(name string, key, value any) {
	s.t.Helper()
	require.NoError(s.t, s.shield.Maps[name].Put(key, value), name)
}

// deny puts a prefix on the list, with an index for its hits.
func (s *shielded) deny(prefix string, index uint32) {
	s.t.Helper()
	p := netip.MustParsePrefix(prefix)
	if p.Addr().Is4() {
		s.set("shield_deny4", bpf.ShieldDeny4Key{Prefixlen: uint32(p.Bits()), Addr: addr32(p.Addr())}, index)
	} else {
		s.set("shield_deny6", bpf.ShieldDeny6Key{Prefixlen: uint32(p.Bits()), Addr: bpf.ShieldAddr(mapAddr(p.Addr()))}, index)
	}
}

func (s *shielded) hits(index uint32) (sum uint64) {
	s.t.Helper()
	var values []uint64
	require.NoError(s.t, s.shield.Maps["shield_hits"].Lookup(index, &values))
	for _, v := range values {
		sum += v
	}
	return sum
}

// judge runs the shield on a frame that came by up0.
func (s *shielded) judge(frame []byte) result {
	s.t.Helper()
	var ret uint32
	var err error
	s.do(func() {
		ret, err = s.shield.Programs["shield"].Run(&ebpf.RunOptions{
			Data: frame, Context: xdpMD{DataEnd: uint32(len(frame)), IngressIfindex: uint32(s.up)},
		})
	})
	require.NoError(s.t, err)
	return result{action: int32(ret)}
}

// directDrops are those of from_uplink for direct access.
func (s *shielded) directDrops() (n uint64) {
	s.t.Helper()
	key := uint32(bpf.DatapathReasonREASON_DIRECT_ACCESS)*uint32(bpf.DatapathHookHOOK_COUNT) + uint32(bpf.DatapathHookHOOK_UPLINK)
	var values []bpf.DatapathCount
	require.NoError(s.t, s.coll.Maps["drops"].Lookup(key, &values))
	for _, v := range values {
		n += v.Packets
	}
	return n
}

// passes and drops check what the shield does with a frame, and its counters.
func (s *shielded) passes(name string, frame []byte) {
	s.t.Helper()
	s.expect(name, xdpPass, "", func() result { return s.judge(frame) })
}

func (s *shielded) drops(name string, reason bpf.DatapathReason, frame []byte) {
	s.t.Helper()
	s.expect(name, xdpDrop, dropped(reason, "shield"), func() result { return s.judge(frame) })
}

// mixed are frames of all kinds from the client, by name.
func (f family) mixed() map[string][]byte {
	client, a := at(f.client, 50000), f.addr(alice)
	long := packet.Fragment(packet.UDP(client, at(f.host, pubAlice), fromOutside, packet.Payload(make([]byte, 2000))), 1000, 77)
	return map[string][]byte{
		"SYN":                          packet.TCP(client, at(f.host, pubAlice), fromOutside),
		"SYN, options and extensions":  packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.IPOptions(1, 1, 1, 0), packet.HopByHop()),
		"ACK":                          packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.Flags("A")),
		"RST":                          packet.TCP(client, at(f.host, 22), fromOutside, packet.Flags("R")),
		"UDP":                          packet.UDP(client, at(f.host, pubAlice), fromOutside),
		"UDP to the host":              packet.UDP(client, at(f.host, 53), fromOutside),
		"masquerade port":              packet.UDP(client, at(f.host, snatFirst), fromOutside),
		"SCTP":                         packet.SCTP(client, at(f.host, pubSCTP), fromOutside),
		"echo":                         packet.ICMPEcho(f.client, f.host, 1, 1, fromOutside),
		"echo reply":                   packet.ICMPEchoReply(f.client, f.host, 1, 1, fromOutside),
		"GRE":                          packet.IP(f.client, f.host, unix.IPPROTO_GRE, fromOutside),
		"first fragment":               long[0],
		"transit":                      packet.TCP(client, at(f.foreign, pubAlice), fromOutside),
		"container":                    packet.TCP(client, at(a, 80), fromOutside),
		"container, published port":    packet.TCP(client, at(a, pubAlice), fromOutside),
		"container, UDP":               packet.UDP(client, at(a, 80), fromOutside),
		"container, echo":              packet.ICMPEcho(f.client, a, 1, 1, fromOutside),
		"container, ACK":               packet.TCP(client, at(a, 80), fromOutside, packet.Flags("A")),
		"nobody in a container subnet": packet.UDP(client, at(f.in(netOne, 77), 80), fromOutside),
		"routed container":             packet.UDP(client, at(f.addr(peggy), 80), fromOutside),
		"gateway":                      packet.TCP(client, at(f.gateway(netOne), 22), fromOutside),
	}
}

// unjudged are frames of the client that the shield leaves to others, whoever is denied.
func (f family) unjudged() map[string][]byte {
	client, a := at(f.client, 50000), f.addr(alice)
	long := packet.Fragment(packet.UDP(client, at(a, 80), fromOutside, packet.Payload(make([]byte, 2000))), 1000, 77)
	return map[string][]byte{
		"later fragment":   long[1],
		"error":            packet.ICMPError(f.client, f.host, f.unreach, 1, packet.TCP(at(f.host, 22), client), fromOutside),
		"error, container": packet.ICMPError(f.client, a, f.unreach, 1, packet.TCP(at(a, 22), client), fromOutside),
		"for another MAC":  packet.TCP(client, at(f.host, pubAlice), packet.MAC(outsideMAC, up1MAC)),
		"broadcast":        packet.UDP(client, at(a, pubAlice), packet.MAC(outsideMAC, broadcast)),
		"VLAN":             packet.TCP(client, at(f.host, pubAlice), fromOutside, packet.VLAN(7)),
		"ARP":              packet.ARP(ip("192.0.2.100"), ip("192.0.2.1"), false, fromOutside),
		"discovery":        packet.NeighborSolicit(ip("2001:db8::100"), ip("2001:db8::1"), packet.MAC(outsideMAC, upMAC)),
	}
}

// Needs root. All that a denied source sends is dropped, each packet for its reason and its prefix; what the
// shield cannot tell from something established is not.
func TestShieldDeny(t *testing.T) {
	s := newShielded(t)
	forFamilies(t, func(t *testing.T, f family) {
		s.t = t
		s.reset()
		wide, own := "192.0.2.0/24", "192.0.2.100/32"
		other := "2001:db8::/32"
		if f.v6 {
			wide, own, other = "2001:db8::/64", "2001:db8::100/128", "192.0.2.0/24"
		}
		s.deny(other, 9)
		defer func() { require.NoError(t, clearDeny(s)) }()
		for name, frame := range f.mixed() {
			if name != "container" && name != "container, published port" {
				continue
			}
			s.drops("not denied: "+name, directAccess, frame)
		}
		s.passes("the other family is denied", f.mixed()["SYN"])
		s.deny(wide, 3)
		n := s.hits(3)
		for name, frame := range f.mixed() {
			s.drops(name, bpf.DatapathReasonREASON_DENIED, frame)
			n++
			require.Equal(t, n, s.hits(3), name)
		}
		s.deny(own, 4)
		s.drops("the longest prefix", bpf.DatapathReasonREASON_DENIED, f.mixed()["UDP"])
		require.Equal(t, n, s.hits(3))
		for name, frame := range f.unjudged() {
			s.passes(name, frame)
		}
		absurd := packet.TCP(at(f.client, 50000), at(f.host, pubAlice), fromOutside)
		absurd[len(absurd)-8] = 0 // the header's length
		s.drops("absurd", bpf.DatapathReasonREASON_DENIED, absurd)
		s.passes("cut short, which the stack drops",
			packet.TCP(at(f.client, 50000), at(f.host, pubAlice), fromOutside, packet.Payload(make([]byte, 20)), packet.Truncate(3)))
		s.passes("somebody else", packet.TCP(at(f.client2, 50000), at(f.host, pubAlice), fromOutside))
		require.Zero(t, s.hits(9))
	})
}

func clearDeny(s *shielded) error {
	for _, name := range []string{"shield_deny4", "shield_deny6"} {
		m := s.shield.Maps[name]
		key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
		for m.NextKey(nil, &key) == nil {
			if err := m.Delete(key); err != nil {
				return fmt.Errorf("%s: %w: %v", name, err, value)
			}
		}
	}
	return nil
}

// Needs root. What stands when its source is denied goes on: flows of containers in both directions, sockets
// of the host, and what the host asks.
func TestShieldEstablished(t *testing.T) {
	s := newShielded(t)
	defer func() { require.NoError(t, clearDeny(s)) }()
	s.deny("0.0.0.0/0", 0)
	s.deny("::/0", 1)
	forFamilies(t, func(t *testing.T, f family) {
		s.t = t
		s.reset()
		client, host := at(f.client, 50000), at(f.host, pubAlice)
		uplink := skb{Ifindex: uint32(s.up)}
		ack := packet.TCP(client, host, fromOutside, packet.Flags("A"), packet.Seq(2, 7001))
		datagram := packet.UDP(client, host, fromOutside)
		s.drops("TCP, no flow", bpf.DatapathReasonREASON_DENIED, ack)
		s.drops("UDP, no flow", bpf.DatapathReasonREASON_DENIED, datagram)
		s.run("from_uplink", packet.TCP(client, host, fromOutside, packet.Seq(1, 0)), uplink)
		s.run("from_container", packet.TCP(at(f.addr(alice), 80), client, toGateway(alice), packet.Flags("SA"), packet.Seq(7000, 2)),
			skb{Ifindex: uint32(s.links[alice])})
		s.drops("TCP, answered but not confirmed", bpf.DatapathReasonREASON_DENIED, ack)
		for _, frame := range [][]byte{ack, datagram} {
			require.EqualValues(t, actRedirect, s.run("from_uplink", frame, uplink).action)
			s.passes("flow", frame)
		}
		s.drops("SYN on a flow's ports", bpf.DatapathReasonREASON_DENIED, packet.TCP(client, host, fromOutside))
		s.passes("its end", packet.TCP(client, host, fromOutside, packet.Flags("RA")))
		s.drops("the port's neighbour", bpf.DatapathReasonREASON_DENIED, packet.TCP(at(f.client, 50001), host, fromOutside, packet.Flags("A")))

		// A container asks.
		s.run("from_container", packet.UDP(at(f.addr(alice), 40000), at(f.client, 53), toGateway(alice)), skb{Ifindex: uint32(s.links[alice])})
		sport := s.outer(f, alice, 40000, f.client, 53)
		s.passes("answer to a container", packet.UDP(at(f.client, 53), at(f.host, sport), fromOutside))
		s.drops("not an answer", bpf.DatapathReasonREASON_DENIED, packet.UDP(at(f.client, 54), at(f.host, sport), fromOutside))

		// The host's own sockets.
		var l net.Listener
		var tcpConn, udpConn net.Conn
		var free net.PacketConn
		s.do(func() {
			var err error
			l, err = net.Listen("tcp", netip.AddrPortFrom(f.host, 7000).String())
			require.NoError(t, err)
			tcpConn, err = net.DialTCP("tcp", net.TCPAddrFromAddrPort(at(f.host, 7001)), net.TCPAddrFromAddrPort(at(f.host, 7000)))
			require.NoError(t, err)
			udpConn, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(at(f.host, 7002)), net.UDPAddrFromAddrPort(client))
			require.NoError(t, err)
			free, err = net.ListenPacket("udp", netip.AddrPortFrom(f.host, 7003).String())
			require.NoError(t, err)
		})
		defer l.Close()
		defer tcpConn.Close()
		defer udpConn.Close()
		defer free.Close()
		s.passes("a connection of the host", packet.TCP(at(f.host, 7000), at(f.host, 7001), fromOutside, packet.Flags("A")))
		s.drops("a listener of the host", bpf.DatapathReasonREASON_DENIED, packet.TCP(client, at(f.host, 7000), fromOutside, packet.Flags("A")))
		s.passes("a connected UDP socket", packet.UDP(client, at(f.host, 7002), fromOutside))
		s.drops("not from its peer", bpf.DatapathReasonREASON_DENIED, packet.UDP(at(f.client, 50001), at(f.host, 7002), fromOutside))
		s.drops("an unconnected one", bpf.DatapathReasonREASON_DENIED, packet.UDP(client, at(f.host, 7003), fromOutside))
		s.run("to_uplink", packet.ICMPEcho(f.host, f.client, 42, 1), uplink)
		s.passes("answer to the host's ping", packet.ICMPEchoReply(f.client, f.host, 42, 1, fromOutside))
		s.drops("no answer to the host's ping", bpf.DatapathReasonREASON_DENIED, packet.ICMPEchoReply(f.client, f.host, 43, 1, fromOutside))
	})
}

// Needs root. Without a deny list and a rate, the shield drops what from_uplink would drop as direct access,
// all of it, and nothing else.
func TestShieldDirectAccess(t *testing.T) {
	s := newShielded(t)
	unprotected := func(n *bpf.DatapathNetwork) {
		n.Mode4, n.Mode6 = bpf.DatapathGatewayModeGATEWAY_NAT_UNPROTECTED, bpf.DatapathGatewayModeGATEWAY_NAT_UNPROTECTED
	}
	routed := func(n *bpf.DatapathNetwork) {
		n.Mode4, n.Mode6 = bpf.DatapathGatewayModeGATEWAY_ROUTED, bpf.DatapathGatewayModeGATEWAY_ROUTED
	}
	open := func(f family) {
		s.put("open_ports", bpf.DatapathOpenKey{Daddr: mapAddr(f.addr(alice)), Port: swap16(pubAlice), Proto: unix.IPPROTO_TCP}, uint32(1))
	}
	for name, setup := range map[string]func(f family){
		"closed":      func(family) {},
		"nat":         open,
		"unprotected": func(family) { s.setNetwork(netOne, unprotected) },
		"routed":      func(f family) { open(f); s.setNetwork(netOne, routed) },
		"trusted": func(f family) {
			open(f)
			s.put("trusted", bpf.DatapathTrustedKey{Ifindex: uint32(s.up), Net: netOne}, uint8(1))
		},
		"direct routing": func(f family) {
			open(f)
			s.setConfig(func(c *bpf.DatapathConfig) { c.Flags |= bpf.DatapathConfigFlagsCONFIG_DIRECT_ROUTING })
		},
		"mark": func(family) { s.setConfig(func(c *bpf.DatapathConfig) { c.AcceptMark, c.AcceptMask = 1, 1 }) },
		"flow": func(f family) {
			// One that was opened while its network let it in.
			s.setNetwork(netOne, unprotected)
			s.run("from_uplink", f.mixed()["container"], skb{Ifindex: uint32(s.up)})
			s.setNetwork(netOne, func(n *bpf.DatapathNetwork) { n.Mode4, n.Mode6 = 0, 0 })
		},
	} {
		t.Run(name, func(t *testing.T) {
			forFamilies(t, func(t *testing.T, f family) {
				s.t = t
				var network bpf.DatapathNetwork
				require.NoError(t, s.coll.Maps["network_slots"].Lookup(uint32(netOne), &network))
				config := s.config()
				defer func() {
					s.put("network_slots", uint32(netOne), network)
					s.put("config", uint32(0), config)
					clearMap[bpf.DatapathOpenKey, uint32](s.host, "open_ports")
					clearMap[bpf.DatapathTrustedKey, uint8](s.host, "trusted")
				}()
				drops := 0
				for _, frames := range []map[string][]byte{f.mixed(), f.unjudged()} {
					for kind, frame := range frames {
						s.reset()
						setup(f)
						verdict := s.judge(frame).action
						before := s.directDrops()
						s.run("from_uplink", frame, skb{Ifindex: uint32(s.up)})
						direct := s.directDrops() > before
						switch {
						case verdict == xdpDrop:
							require.True(t, direct, "%s: from_uplink does not drop it", kind)
							drops++
						case direct:
							// What may belong to something, or is not for the shield to read.
							require.Contains(t, f.unjudged(), kind)
						}
					}
				}
				require.NotEqual(t, name == "mark", drops > 0, "dropped: %d", drops)
			})
		})
	}
}

// Needs root. A source opens as many connections to published ports as it may, and its established ones go on;
// others, other ports and other protocols do not count.
func TestShieldSynRate(t *testing.T) {
	s := newShielded(t)
	const rate = 4
	forFamilies(t, func(t *testing.T, f family) {
		s.t = t
		s.reset()
		syn := func(from netip.Addr, n int) []byte {
			return packet.TCP(at(from, uint16(40000+n)), at(f.host, pubAlice), fromOutside)
		}
		for i := range 20 {
			require.EqualValues(t, xdpPass, s.judge(syn(f.client, i)).action, "no rate")
		}
		// Nothing falls due while the test runs.
		s.set("shield_config", uint32(0), bpf.ShieldShieldConfig{SynInterval: uint64(time.Hour), SynBurst: rate * uint64(time.Hour)})
		defer s.set("shield_config", uint32(0), bpf.ShieldShieldConfig{})
		for i := range rate + 1 {
			s.passes("not published", packet.TCP(at(f.client, uint16(40000+i)), at(f.host, 22), fromOutside))
			s.passes("not published here", packet.TCP(at(f.client, uint16(40000+i)), at(f.host1, pubBob), fromOutside))
			s.passes("not the host", packet.TCP(at(f.client, uint16(40000+i)), at(f.foreign, pubAlice), fromOutside))
			s.passes("UDP", packet.UDP(at(f.client, uint16(40000+i)), at(f.host, pubAlice), fromOutside))
			s.passes("established", packet.TCP(at(f.client, 40000), at(f.host, pubAlice), fromOutside, packet.Flags("A")))
		}
		for i := range rate {
			s.passes("in time", syn(f.client, i))
		}
		s.drops("too fast", bpf.DatapathReasonREASON_SYN_RATE, syn(f.client, 99))
		s.passes("established all the same", packet.TCP(at(f.client, 40000), at(f.host, pubAlice), fromOutside, packet.Flags("A")))
		s.passes("another source", syn(f.client2, 0))
		neighbour := f.client.Next()
		if f.v6 {
			s.drops("another address of its /64", bpf.DatapathReasonREASON_SYN_RATE, syn(neighbour, 0))
		} else {
			s.passes("its neighbour", syn(neighbour, 0))
		}
		// An hour later the next one is due.
		key := mapAddr(f.client)
		if f.v6 {
			key.W[2], key.W[3] = 0, 0
		}
		var due uint64
		require.NoError(t, s.shield.Maps["shield_sources"].Lookup(key, &due))
		s.set("shield_sources", key, due-uint64(time.Hour))
		s.passes("one is due", syn(f.client, 100))
		s.drops("and one only", bpf.DatapathReasonREASON_SYN_RATE, syn(f.client, 101))
	})
}

// What the shield costs, for each packet.
func BenchmarkShield(b *testing.B) {
	s := newShielded(b)
	f := families[0]
	client := at(f.client, 50000)
	frames := map[string][]byte{
		"pass":       packet.TCP(client, at(f.host, 22), fromOutside, packet.Flags("A")),
		"denied SYN": packet.TCP(at(f.client2, 50000), at(f.host, pubAlice), fromOutside),
		"denied UDP": packet.UDP(at(f.client2, 50000), at(f.host, 53), fromOutside),
		"denied ACK": packet.TCP(at(f.client2, 50000), at(f.host, pubAlice), fromOutside, packet.Flags("A")),
		"direct":     packet.TCP(client, at(f.addr(alice), 80), fromOutside),
	}
	s.deny(f.client2.String()+"/32", 1)
	for name, frame := range frames {
		b.Run(name, func(b *testing.B) {
			var took time.Duration
			var err error
			s.do(func() {
				_, took, err = benchmarkProgram(s.shield.Programs["shield"], frame, uint32(s.up), b.N)
			})
			require.NoError(b, err)
			b.ReportMetric(float64(took.Nanoseconds()), "ns/packet")
		})
	}
}

func benchmarkProgram(p *ebpf.Program, frame []byte, ifindex uint32, n int) (uint32, time.Duration, error) {
	start := time.Now()
	ret, err := p.Run(&ebpf.RunOptions{
		Data: frame, Repeat: uint32(n), Context: xdpMD{DataEnd: uint32(len(frame)), IngressIfindex: ifindex},
	})
	return ret, time.Since(start) / time.Duration(n), err
}
