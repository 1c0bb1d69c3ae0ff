// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// mischief is what root sends in a container, and the reason that counts its drop; without one it is let go and
// must be harmless by itself.
type mischief struct {
	name   string
	frames [][]byte
	want   string
}

// Needs root. Whoever is root in a container sends what it likes. All the while streams run between others, whose every
// byte is checked; nobody gets a frame that is not for it; what neighbours, bridge and host believe of each other stays;
// and sockets of others learn of no error.
func TestHostile(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	for _, name := range []string{"peer", "evil"} {
		w.sandbox(t, name, "blue")
	}
	w.sandbox(t, "far", "red")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	echoUDP(t, w.Client2, echoPort, unix.IP_PMTUDISC_DONT)
	in := map[string]*lab.NS{}
	for _, name := range []string{"web", "peer", "evil", "far"} {
		in[name] = w.b.NS(t, name)
	}
	others := []*lab.NS{in["web"], in["peer"], in["far"], w.Host, w.Client, w.Client2}
	tr := begin(t, w)

	var captures []*lab.Capture
	for ns, ifname := range map[*lab.NS]string{in["web"]: "eth0", in["peer"]: "eth0", in["far"]: "eth0", w.Client: lab.ClientIf, w.Client2: lab.ClientIf} {
		own := ns.MAC(t, ifname)
		// A bridge floods what is for a MAC that it does not know: that is for nobody.
		captures = append(captures, ns.Capture(t, ifname, func(p gopacket.Packet) bool {
			dst := p.Data()[:6]
			return bytes.Contains(p.Data(), malice) && (dst[0]&1 != 0 || bytes.Equal(dst, own))
		}))
	}
	arrived := func() (all []string) {
		for _, c := range captures {
			for _, f := range c.Frames() {
				if !f.Outgoing {
					all = append(all, f.Packet.String())
				}
			}
		}
		return all
	}
	m := w.maps(t)
	var sent, sorts int
	for _, v6 := range []bool{false, true} {
		h := newHostility(t, w, in, v6)
		before := beliefs(t, w.Host, others)
		for _, c := range h.all(t) {
			t.Run(h.family+"/"+c.name, func(t *testing.T) {
				drops := readCounters(t, m)
				in["evil"].SendFrames(t, "eth0", c.frames)
				want := counters{}
				if c.want != "" {
					want[c.want] = uint64(len(c.frames))
				}
				lab.Eventually(t, 2*time.Second, "each frame is counted", func() bool {
					return since(t, m, drops).drops()[c.want] >= want[c.want]
				})
				require.Equal(t, want, since(t, m, drops).drops())
				require.Empty(t, arrived())
			})
			sent, sorts = sent+len(c.frames), sorts+1
		}
		h.unharmed(t)
		after := beliefs(t, w.Host, others)
		for who, what := range before {
			if now, known := after[who]; known {
				require.Equal(t, what, now, "what is believed of %s", who)
			}
		}
	}
	tr.end(t, false)
	promise.Kept(t, promise.Hostile, "Root in a container forges addresses, neighbours, routers, errors, resets, fragments and headers, and harms neither another container nor the host.",
		"%d kinds, %d frames; every byte of %d streams right", sorts, sent, len(tr.streams))
}

// hostility is what evil knows of those that it attacks, over one family.
type hostility struct {
	family                                           string
	v6                                               bool
	web, peer, evil, far, gateway, host, outer, away netip.Addr
	bridge, red, webMAC, peerMAC, evilMAC            net.HardwareAddr
	flows                                            []*conversation
	sockets                                          []*socket // connected to away: peer's and the host's
	mtus                                             []int
}

func newHostility(t *testing.T, w *site, in map[string]*lab.NS, v6 bool) *hostility {
	pick := func(v4, six netip.Addr) netip.Addr {
		if v6 {
			return six
		}
		return v4
	}
	of := func(name, network string) netip.Addr { return pick(w.b.Addrs(t, name, network)) }
	h := &hostility{
		family: map[bool]string{false: "v4", true: "v6"}[v6], v6: v6,
		web: of("web", "blue"), peer: of("peer", "blue"), evil: of("evil", "blue"), far: of("far", "red"), gateway: pick(w.ownGateways(t, "blue")),
		host: pick(lab.Host4, lab.Host6), outer: pick(lab.HostB4, lab.HostB6), away: pick(lab.Client24, lab.Client26),
		bridge: w.Host.MAC(t, "blue0"), red: w.Host.MAC(t, "red0"),
		webMAC: in["web"].MAC(t, "eth0"), peerMAC: in["peer"].MAC(t, "eth0"), evilMAC: in["evil"].MAC(t, "eth0"),
	}
	h.flows = []*conversation{
		converse(t, in["peer"], at(h.web, 80)), converse(t, in["peer"], at(h.away, 7000)), converse(t, w.Host, at(h.away, 7000)),
		converse(t, w.Client, at(h.host, 8080)),
	}
	for _, n := range []*lab.NS{in["peer"], w.Host} {
		h.sockets = append(h.sockets, openUDP(t, n, netip.AddrPortFrom(h.away, echoPort)))
	}
	for _, s := range h.sockets {
		require.NoError(t, s.exchange([]byte("begins")))
		h.mtus = append(h.mtus, s.pathMTU(t))
	}
	// Everybody knows everybody.
	for _, a := range []netip.Addr{h.web, h.peer, h.gateway} {
		for _, n := range []*lab.NS{in["web"], in["peer"], in["evil"], w.Host} {
			require.NotEmpty(t, ttls(n, a, 1), "%s pings %v", n.Name, a)
		}
	}
	return h
}

// unharmed wants all of the victims' connections to go on, and their sockets to have heard of no error.
func (h *hostility) unharmed(t *testing.T) {
	t.Helper()
	for _, f := range h.flows {
		f.say(t, "goes on")
	}
	for i, s := range h.sockets {
		fault, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		require.NoError(t, err)
		require.Zero(t, fault, "an error reached socket %d: %v", i, unix.Errno(fault))
		require.NoError(t, s.exchange([]byte("goes on")))
		require.Equal(t, h.mtus[i], s.pathMTU(t), "path MTU of socket %d", i)
	}
}

// ownGateways are the host's addresses on a network of bpfnet's own.
func (w *site) ownGateways(t *testing.T, network string) (v4, v6 netip.Addr) {
	t.Helper()
	for _, c := range w.b.InspectNetwork(t, network).IPAM.Config {
		a, err := netip.ParseAddr(c.Gateway)
		require.NoError(t, err)
		if a.Is4() {
			v4 = a
		} else {
			v6 = a
		}
	}
	return v4, v6
}

// local is the address that a socket has.
func (s *socket) local(t *testing.T) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(s.fd)
	require.NoError(t, err)
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	t.Fatalf("socket at %v", sa)
	return netip.AddrPort{}
}

// beliefs are the link-layer addresses that namespaces have for addresses, their default routes for IPv6, and the ports
// at which the host's bridges have seen MACs.
func beliefs(t *testing.T, host *lab.NS, all []*lab.NS) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, n := range all {
		for line := range strings.Lines(n.MustRun(t, "ip", "neigh", "show")) {
			words := strings.Fields(line)
			if i := slices.Index(words, "lladdr"); i > 0 && !strings.Contains(line, "FAILED") {
				out[n.Name+" of "+words[0]] = words[i+1]
			}
		}
		out[n.Name+"'s default routes"] = n.MustRun(t, "ip", "-6", "route", "show", "default")
	}
	for line := range strings.Lines(host.MustRun(t, "bridge", "fdb", "show")) {
		if words := strings.Fields(line); strings.Contains(line, "master") && len(words) > 2 && !strings.Contains(line, "permanent") {
			out["bridge's of "+words[0]] = words[2]
		}
	}
	return out
}

func (h *hostility) all(t *testing.T) []mischief {
	var all []mischief
	do := func(name, want string, frames ...[]byte) {
		if want != "" {
			want += "/container"
		}
		all = append(all, mischief{name, frames, want})
	}
	ap := netip.AddrPortFrom
	everybody := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	mac := func(src, dst net.HardwareAddr) packet.Option { return packet.MAC(src, dst) }
	toGateway, toPeer := mac(h.evilMAC, h.bridge), mac(h.evilMAC, h.peerMAC)
	evil := packet.Payload(malice)
	pick := func(v4, six string) netip.Addr {
		if h.v6 {
			return netip.MustParseAddr(six)
		}
		return netip.MustParseAddr(v4)
	}

	// Who is who on the link.
	if !h.v6 {
		for _, as := range []netip.Addr{h.peer, h.gateway} {
			for _, dst := range []net.HardwareAddr{h.webMAC, everybody} {
				do("ARP as "+as.String(), "spoofed_address",
					pad(packet.ARP(as, h.web, false, mac(h.evilMAC, dst))), pad(packet.ARP(as, h.web, true, mac(h.evilMAC, dst))),
					pad(packet.ARP(as, as, false, mac(h.evilMAC, dst))), pad(packet.ARP(as, as, true, mac(h.evilMAC, dst))))
			}
		}
		do("ARP with a neighbour's MAC", "spoofed_mac", pad(packet.ARP(h.evil, h.web, true, mac(h.peerMAC, everybody))),
			pad(packet.ARP(h.evil, h.web, true, mac(h.bridge, everybody))))
	} else {
		own := linkLocalOf(h.evilMAC)
		group, routers := netip.MustParseAddr("ff02::1"), netip.MustParseAddr("ff02::2")
		link := func(kind byte, mac net.HardwareAddr) []byte { return append([]byte{kind, 1}, mac...) }
		for _, as := range []netip.Addr{h.peer, h.gateway, linkLocalOf(h.peerMAC)} {
			do("advertisement of "+as.String(), "spoofed_address", advertisement(h.evil, h.web, as, h.evilMAC, h.webMAC),
				discovery(136, own, group, everybody, h.evilMAC, as, link(2, h.evilMAC)))
			do("solicitation as "+as.String(), "spoofed_address", packet.NeighborSolicit(as, h.web, mac(h.evilMAC, h.webMAC)))
			do("duplicate address detection of "+as.String(), "spoofed_address",
				discovery(135, netip.IPv6Unspecified(), group, everybody, h.evilMAC, as, nil))
		}
		do("advertisement with a neighbour's MAC", "spoofed_mac", discovery(136, h.evil, h.web, h.webMAC, h.evilMAC, h.evil, link(2, h.peerMAC)))
		do("solicitation with the gateway's MAC", "spoofed_mac", discovery(135, h.evil, h.web, h.webMAC, h.evilMAC, h.web, link(1, h.bridge)))
		advertise := append(binary.BigEndian.AppendUint64(nil, 0x40000708_00000000), link(1, h.evilMAC)...)
		do("router advertisement", "spoofed_router", routing(134, own, group, everybody, h.evilMAC, advertise),
			routing(134, own, h.web, h.webMAC, h.evilMAC, advertise), routing(134, own, routers, h.bridge, h.evilMAC, advertise))
		redirect := slices.Concat(make([]byte, 4), own.AsSlice(), h.away.AsSlice())
		do("redirect", "spoofed_router", routing(137, own, h.web, h.webMAC, h.evilMAC, redirect))
	}
	do("a neighbour's address", "spoofed_address", packet.UDP(ap(h.peer, 999), ap(h.web, 80), mac(h.evilMAC, h.webMAC), evil))
	do("a neighbour's MAC", "spoofed_mac", packet.UDP(ap(h.evil, 999), ap(h.web, 80), mac(h.peerMAC, h.webMAC), evil),
		packet.UDP(ap(h.peer, 999), ap(h.web, 80), mac(h.peerMAC, h.webMAC), evil), packet.UDP(ap(h.evil, 999), ap(h.web, 80), mac(h.bridge, h.webMAC), evil))

	// Resets and errors for others' connections.
	var inside, egress = parseAddrPort(t, h.flows[0].LocalAddr().String()), parseAddrPort(t, h.flows[1].LocalAddr().String())
	outer, published := parseAddrPort(t, h.flows[1].view.Remote), parseAddrPort(t, h.flows[3].view.Remote)
	away, web := ap(h.away, 7000), ap(h.web, 80)
	reset := func(src, dst netip.AddrPort, m packet.Option) []byte {
		return packet.TCP(src, dst, m, packet.Flags("R"), packet.Seq(1, 1), evil)
	}
	do("resets of others' connections", "spoofed_address", reset(inside, web, mac(h.evilMAC, h.webMAC)), reset(web, inside, toPeer),
		reset(egress, away, toGateway), reset(away, egress, toPeer), reset(away, outer, toGateway), reset(web, published, toGateway))
	do("resets with their MACs", "spoofed_mac", reset(inside, web, mac(h.peerMAC, h.webMAC)), reset(egress, away, mac(h.peerMAC, h.bridge)))
	unreach, tooBig, code := uint8(3), uint8(3), uint8(4)
	if h.v6 {
		unreach, tooBig, code = 1, 2, 0
	}
	for i, name := range []string{"a neighbour's socket", "the host's socket"} {
		from := h.sockets[i].local(t)
		way := [][]packet.Option{{toPeer}, {toGateway}}[i]
		// In a broadcast frame, the kernel takes it as well.
		for _, m := range append(way, mac(h.evilMAC, everybody)) {
			quoted := packet.UDP(from, ap(h.away, echoPort), evil)
			do("errors for "+name, "no_flow", packet.ICMPError(h.evil, from.Addr(), unreach, 3, quoted, m),
				packet.ICMPError(h.evil, from.Addr(), tooBig, code, quoted, m, packet.MTU(1280)))
		}
	}
	do("errors for a neighbour's connection", "no_flow", packet.ICMPError(h.evil, inside.Addr(), unreach, 3, packet.TCP(inside, web, evil), toPeer))
	do("errors for a masqueraded connection", "no_flow", packet.ICMPError(h.evil, outer.Addr(), unreach, 3, packet.TCP(outer, away, evil), toGateway))

	// Where it may not go, by whatever frame.
	far := ap(h.far, 80)
	metadata := pick("169.254.169.254", "fd00:ec2::254")
	loopback := ap(pick("127.0.0.1", "::1"), 8080)
	do("another network", "isolated", packet.UDP(ap(h.evil, 999), far, toGateway, evil))
	do("another network by other MACs", "", packet.UDP(ap(h.evil, 999), far, mac(h.evilMAC, h.red), evil),
		packet.UDP(ap(h.evil, 999), far, mac(h.evilMAC, net.HardwareAddr{2, 0, 0, 0, 0, 99}), evil))
	do("loopback", "loopback_address", packet.UDP(ap(h.evil, 999), loopback, toGateway, evil), packet.UDP(ap(h.evil, 999), loopback, mac(h.evilMAC, everybody), evil),
		packet.UDP(ap(loopback.Addr(), 999), ap(h.gateway, 80), toGateway, evil))
	do("metadata service's address", "spoofed_address", packet.UDP(ap(metadata, 80), ap(h.web, 999), mac(h.evilMAC, h.webMAC), evil))
	// Two tags too: the kernel takes off the inner one as well.
	do("tag of VLAN 0", "malformed", tagged(packet.UDP(ap(h.peer, 999), ap(h.gateway, 80), toGateway, evil), 0),
		tagged(packet.UDP(ap(h.peer, 999), web, mac(h.evilMAC, h.webMAC), evil), 0x2000), tagged(packet.UDP(ap(h.peer, 999), far, toGateway, evil), 0),
		tagged(packet.UDP(ap(h.peer, 999), away, toGateway, evil), 0), tagged(tagged(packet.UDP(ap(h.peer, 999), away, toGateway, evil), 0), 0))
	do("tag of VLAN 5", "", tagged(packet.UDP(ap(h.peer, 999), ap(h.far, 80), toGateway, evil), 5))

	// Headers and fragments. What goes to web carries no mark: web may get it, and does not mind.
	data := packet.Payload(bytes.Repeat([]byte("x"), 1400))
	toWeb := mac(h.evilMAC, h.webMAC)
	parts := packet.Fragment(packet.UDP(ap(h.evil, 1000), web, toWeb, data), 512, 77)
	over := slices.Clone(packet.Fragment(packet.TCP(ap(h.evil, 1001), web, toWeb, packet.Flags("S"), packet.Payload(make([]byte, 200))), 64, 78))
	again := packet.Fragment(packet.TCP(ap(h.evil, 1001), ap(h.web, 22), toWeb, packet.Flags("R"), packet.Payload(make([]byte, 200))), 32, 78)
	do("overlapping fragments", "", append(append(over[:2:2], again[0], again[1]), over[2:]...)...)
	do("fragments twice and backwards", "", parts[0], parts[2], parts[1], parts[0], parts[2])
	do("fragments beyond the largest datagram", "malformed", oversized(parts[1], h.v6))
	do("first fragment without a whole header", "malformed", packet.Fragment(packet.TCP(ap(h.evil, 1002), far, toGateway, evil), 8, 79)[0])
	var lost [][]byte
	for id := range uint32(count(10000)) {
		lost = append(lost, packet.Fragment(packet.UDP(ap(h.evil, 1003), ap(h.far, 80), mac(h.evilMAC, h.bridge), data), 1024, 1000+id)[1])
	}
	do("fragments without a first", "isolated", lost...)
	if h.v6 {
		chain := packet.UDP(ap(h.evil, 1004), far, toGateway, evil)
		do("extension headers without end", "malformed", extensions(chain, slices.Repeat([]byte{60}, 7)...), extensions(chain, slices.Repeat([]byte{0}, 12)...))
		do("extension headers do not hide where it goes", "isolated", extensions(chain, 0, 60, 43, 60, 60, 60))
		do("extension headers do not hide who it is from", "spoofed_address", extensions(packet.UDP(ap(h.peer, 1004), web, toWeb, evil), 60, 43, 60))
	} else {
		route := append([]byte{0x83, 7, 4}, h.far.AsSlice()...) // loose source route, RFC 791
		do("source route", "", packet.UDP(ap(h.evil, 1004), ap(h.gateway, 80), toGateway, packet.IPOptions(append(route, 0)...), evil))
		do("source route from a neighbour's address", "spoofed_address", packet.UDP(ap(h.peer, 1004), ap(h.gateway, 80), toGateway, packet.IPOptions(append(route, 0)...), evil))
	}
	return all
}

// linkLocalOf is the address that the kernel makes of a MAC, RFC 4291 appendix A.
func linkLocalOf(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

// discovery is a neighbour solicitation (135) or advertisement (136) about a target.
func discovery(typ uint8, src, dst netip.Addr, dmac, smac net.HardwareAddr, target netip.Addr, options []byte) []byte {
	return routing(typ, src, dst, dmac, smac, slices.Concat([]byte{0x60, 0, 0, 0}, target.AsSlice(), options))
}

// routing is any message of neighbour discovery; body is what follows its checksum.
func routing(typ uint8, src, dst netip.Addr, dmac, smac net.HardwareAddr, body []byte) []byte {
	ip := &layers.IPv6{Version: 6, NextHeader: layers.IPProtocolICMPv6, HopLimit: 255, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, 0)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		panic(err)
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: smac, DstMAC: dmac, EthernetType: layers.EthernetTypeIPv6}, ip, icmp, gopacket.Payload(body))
	if err != nil {
		panic(err)
	}
	return buf.Bytes()
}

// tagged puts an 802.1Q tag into a frame: three bits of priority, and the VLAN.
func tagged(frame []byte, tag uint16) []byte {
	return slices.Concat(frame[:12], []byte{0x81, 0x00, byte(tag >> 8), byte(tag)}, frame[12:])
}

// oversized moves a fragment to the end of the largest offset.
func oversized(fragment []byte, v6 bool) []byte {
	out := bytes.Clone(fragment)
	if v6 {
		out[56], out[57] = 0xff, 0xf8
		return out
	}
	out[20], out[21] = 0x1f, 0xff
	sum := uint32(0)
	out[24], out[25] = 0, 0
	for i := 14; i < 34; i += 2 {
		sum += uint32(out[i])<<8 | uint32(out[i+1])
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(out[24:], ^uint16(sum>>16+sum))
	return out
}

// extensions puts empty IPv6 extension headers of those kinds before the upper layer; a routing header has none left.
func extensions(frame []byte, kinds ...byte) []byte {
	var headers []byte
	for i := range kinds {
		next := frame[20]
		if i+1 < len(kinds) {
			next = kinds[i+1]
		}
		header := []byte{next, 0, 1, 4, 0, 0, 0, 0} // PadN
		if kinds[i] == 43 {
			header[2], header[3] = 0, 0
		}
		headers = append(headers, header...)
	}
	out := slices.Concat(frame[:54], headers, frame[54:])
	out[20] = kinds[0]
	binary.BigEndian.PutUint16(out[18:], binary.BigEndian.Uint16(out[18:])+uint16(len(headers)))
	return out
}
