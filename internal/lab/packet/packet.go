// SPDX-License-Identifier: Apache-2.0

// Package packet builds Ethernet frames for tests, right in every checksum or wrong in
// exactly the way that is asked for, and verifies those that come back. It needs no
// privileges.
//
// The builders take netip addresses; the family of the packet is that of its addresses,
// so that one table of tests serves both. Options apply in any order.
package packet

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// The hardware addresses of frames that do not ask for others: locally administered.
var (
	SrcMAC = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x01}
	DstMAC = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x02}
)

type params struct {
	src, dst  net.HardwareAddr
	ttl       uint8
	tos       uint8
	id        uint16
	df        bool
	options   []byte // IPv4
	hopByHop  bool   // IPv6
	payload   []byte
	flags     string
	seq, ack  uint32
	window    uint16
	tcpOpts   []layers.TCPOption
	rest      uint32 // ICMP error: MTU, pointer or unused
	skewIP    uint16
	skewL4    uint16
	noUDPSum  bool
	truncated int
	vlan      uint16
}

// Option changes one thing about a packet.
type Option func(*params)

// MAC sets the hardware addresses.
func MAC(src, dst net.HardwareAddr) Option {
	return func(p *params) { p.src, p.dst = src, dst }
}

// TTL sets the time to live or hop limit; 64 without it.
func TTL(n uint8) Option { return func(p *params) { p.ttl = n } }

// TOS sets the type of service or traffic class octet: DSCP and ECN.
func TOS(n uint8) Option { return func(p *params) { p.tos = n } }

// ID sets the IPv4 identification.
func ID(n uint16) Option { return func(p *params) { p.id = n } }

// DontFragment sets the IPv4 DF flag.
func DontFragment() Option { return func(p *params) { p.df = true } }

// IPOptions adds IPv4 options; the length must be a multiple of 4, at most 40 bytes.
func IPOptions(options ...byte) Option { return func(p *params) { p.options = options } }

// HopByHop puts an IPv6 hop-by-hop header, padding only, before the transport header.
func HopByHop() Option { return func(p *params) { p.hopByHop = true } }

// VLAN puts an 802.1Q tag on the frame; id is 1 to 4094.
func VLAN(id uint16) Option { return func(p *params) { p.vlan = id } }

// Payload sets the data behind the transport header.
func Payload(b []byte) Option { return func(p *params) { p.payload = b } }

// Flags sets the TCP flags by their letters: S, A, F, R, P, U, E, C. SYN without it.
func Flags(letters string) Option { return func(p *params) { p.flags = letters } }

// Seq sets the TCP sequence and acknowledgement numbers.
func Seq(seq, ack uint32) Option { return func(p *params) { p.seq, p.ack = seq, ack } }

// Window sets the TCP window, unscaled, in bytes; 65535 without it.
func Window(n uint16) Option { return func(p *params) { p.window = n } }

// MSS adds the TCP maximum segment size option, in bytes.
func MSS(n uint16) Option {
	return func(p *params) {
		p.tcpOpts = append(p.tcpOpts, layers.TCPOption{
			OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{byte(n >> 8), byte(n)},
		})
	}
}

// MTU sets the next hop's MTU, in bytes, in an ICMP error that carries one.
func MTU(n uint32) Option { return func(p *params) { p.rest = n } }

// SkewIP makes the IPv4 header checksum wrong: the field is d greater than right, in
// ones' complement arithmetic. 0 and 0xffff change nothing.
func SkewIP(d uint16) Option { return func(p *params) { p.skewIP = d } }

// SkewL4 makes the transport or ICMP checksum wrong by d, as SkewIP does.
func SkewL4(d uint16) Option { return func(p *params) { p.skewL4 = d } }

// NoUDPChecksum sends UDP with checksum 0: none computed (RFC 768).
func NoUDPChecksum() Option { return func(p *params) { p.noUDPSum = true } }

// Truncate cuts n bytes off the end of the finished frame; lengths in headers stay.
func Truncate(n int) Option { return func(p *params) { p.truncated = n } }

func newParams(opts []Option) *params {
	p := &params{src: SrcMAC, dst: DstMAC, ttl: 64, flags: "S", window: 65535}
	for _, o := range opts {
		o(p)
	}
	return p
}

// network is a layer that transport checksums cover a part of.
type network interface {
	gopacket.NetworkLayer
	gopacket.SerializableLayer
}

func (p *params) ip(src, dst netip.Addr, proto layers.IPProtocol) network {
	if src.Is4() != dst.Is4() {
		panic(fmt.Sprintf("packet: %v and %v are of different families", src, dst))
	}
	if src.Is4() {
		ip := &layers.IPv4{
			Version: 4, TOS: p.tos, Id: p.id, TTL: p.ttl, Protocol: proto,
			SrcIP: src.AsSlice(), DstIP: dst.AsSlice(),
		}
		if p.df {
			ip.Flags |= layers.IPv4DontFragment
		}
		return ip
	}
	return &layers.IPv6{
		Version: 6, TrafficClass: p.tos, NextHeader: proto, HopLimit: p.ttl,
		SrcIP: src.AsSlice(), DstIP: dst.AsSlice(),
	}
}

// TCP builds a segment; a SYN without [Flags].
func TCP(src, dst netip.AddrPort, opts ...Option) []byte {
	p := newParams(opts)
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(src.Port()), DstPort: layers.TCPPort(dst.Port()),
		Seq: p.seq, Ack: p.ack, Window: p.window, Options: p.tcpOpts,
	}
	for _, letter := range p.flags {
		switch letter {
		case 'S':
			tcp.SYN = true
		case 'A':
			tcp.ACK = true
		case 'F':
			tcp.FIN = true
		case 'R':
			tcp.RST = true
		case 'P':
			tcp.PSH = true
		case 'U':
			tcp.URG = true
		case 'E':
			tcp.ECE = true
		case 'C':
			tcp.CWR = true
		default:
			panic(fmt.Sprintf("packet: no TCP flag %q", letter))
		}
	}
	ip := p.ip(src.Addr(), dst.Addr(), layers.IPProtocolTCP)
	check(tcp.SetNetworkLayerForChecksum(ip))
	return p.frame(ip, tcp, gopacket.Payload(p.payload))
}

// UDP builds a datagram.
func UDP(src, dst netip.AddrPort, opts ...Option) []byte {
	p := newParams(opts)
	udp := &layers.UDP{SrcPort: layers.UDPPort(src.Port()), DstPort: layers.UDPPort(dst.Port())}
	ip := p.ip(src.Addr(), dst.Addr(), layers.IPProtocolUDP)
	check(udp.SetNetworkLayerForChecksum(ip))
	return p.frame(ip, udp, gopacket.Payload(p.payload))
}

// SCTP builds a packet with one INIT chunk, enough for what looks at its ports.
func SCTP(src, dst netip.AddrPort, opts ...Option) []byte {
	p := newParams(opts)
	sctp := &layers.SCTP{SrcPort: layers.SCTPPort(src.Port()), DstPort: layers.SCTPPort(dst.Port())}
	init := &layers.SCTPInit{
		SCTPChunk:   layers.SCTPChunk{Type: layers.SCTPChunkTypeInit},
		InitiateTag: 1, AdvertisedReceiverWindowCredit: 65535, OutboundStreams: 1, InboundStreams: 1, InitialTSN: 1,
	}
	return p.frame(p.ip(src.Addr(), dst.Addr(), layers.IPProtocolSCTP), sctp, init)
}

// IP builds a packet of any protocol: its payload alone, behind the network header.
func IP(src, dst netip.Addr, proto uint8, opts ...Option) []byte {
	p := newParams(opts)
	return p.frame(p.ip(src, dst, layers.IPProtocol(proto)), gopacket.Payload(p.payload))
}

// ICMPEcho builds an echo request, of ICMP or ICMPv6.
func ICMPEcho(src, dst netip.Addr, id, seq uint16, opts ...Option) []byte {
	return echo(src, dst, id, seq, layers.ICMPv4TypeEchoRequest, layers.ICMPv6TypeEchoRequest, opts)
}

// ICMPEchoReply builds the answer to an echo request.
func ICMPEchoReply(src, dst netip.Addr, id, seq uint16, opts ...Option) []byte {
	return echo(src, dst, id, seq, layers.ICMPv4TypeEchoReply, layers.ICMPv6TypeEchoReply, opts)
}

func echo(src, dst netip.Addr, id, seq uint16, type4, type6 uint8, opts []Option) []byte {
	p := newParams(opts)
	if src.Is4() {
		icmp := &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(type4, 0), Id: id, Seq: seq}
		return p.frame(p.ip(src, dst, layers.IPProtocolICMPv4), icmp, gopacket.Payload(p.payload))
	}
	ip := p.ip(src, dst, layers.IPProtocolICMPv6)
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(type6, 0)}
	check(icmp.SetNetworkLayerForChecksum(ip))
	return p.frame(ip, icmp, &layers.ICMPv6Echo{Identifier: id, SeqNumber: seq}, gopacket.Payload(p.payload))
}

// ICMPError builds an error message of ICMP or ICMPv6 about inner, a frame as the
// builders make them: its network header and what follows is quoted, without its
// Ethernet header. [Quote] cuts it to the length that routers quote.
func ICMPError(src, dst netip.Addr, typ, code uint8, inner []byte, opts ...Option) []byte {
	p := newParams(opts)
	start, _, err := etherType(inner)
	check(err)
	quoted := append([]byte{byte(p.rest >> 24), byte(p.rest >> 16), byte(p.rest >> 8), byte(p.rest)}, inner[start:]...)
	if src.Is4() {
		// The four bytes behind the checksum are Id and Seq in gopacket's view.
		icmp := &layers.ICMPv4{
			TypeCode: layers.CreateICMPv4TypeCode(typ, code), Id: uint16(p.rest >> 16), Seq: uint16(p.rest),
		}
		return p.frame(p.ip(src, dst, layers.IPProtocolICMPv4), icmp, gopacket.Payload(quoted[4:]))
	}
	ip := p.ip(src, dst, layers.IPProtocolICMPv6)
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, code)}
	check(icmp.SetNetworkLayerForChecksum(ip))
	return p.frame(ip, icmp, gopacket.Payload(quoted))
}

// Quote cuts a frame behind the first n bytes of its IPv4 or IPv6 payload: RFC 792 asks
// routers to quote 8, RFC 4443 for as much as fits 1280 bytes.
func Quote(frame []byte, n int) []byte {
	start, _, err := etherType(frame)
	check(err)
	header := 40
	if frame[start]>>4 == 4 {
		header = int(frame[start]&0xf) * 4
	}
	return frame[:min(len(frame), start+header+n)]
}

// NeighborSolicit builds a neighbour solicitation for target (IPv6).
func NeighborSolicit(src, target netip.Addr, opts ...Option) []byte {
	p := newParams(append([]Option{TTL(255)}, opts...))
	t := target.As16()
	group := netip.AddrFrom16([16]byte{0xff, 0x02, 11: 0x01, 12: 0xff, 13: t[13], 14: t[14], 15: t[15]})
	ip := p.ip(src, group, layers.IPProtocolICMPv6)
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborSolicitation, 0)}
	check(icmp.SetNetworkLayerForChecksum(ip))
	return p.frame(ip, icmp, &layers.ICMPv6NeighborSolicitation{
		TargetAddress: target.AsSlice(),
		Options:       layers.ICMPv6Options{{Type: layers.ICMPv6OptSourceAddress, Data: p.src}},
	})
}

// ARP builds a request (who has dst, tell src) or, with reply, the answer to one.
func ARP(src, dst netip.Addr, reply bool, opts ...Option) []byte {
	p := newParams(opts)
	arp := &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4,
		HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
		SourceHwAddress: p.src, SourceProtAddress: src.AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: dst.AsSlice(),
	}
	if reply {
		arp.Operation, arp.DstHwAddress = layers.ARPReply, p.dst
	}
	return serialize(p.ethernet(layers.EthernetTypeARP), arp)
}

// ethernet is the frame's header, and its tag if it has one.
func (p *params) ethernet(t layers.EthernetType) gopacket.SerializableLayer {
	eth := &layers.Ethernet{SrcMAC: p.src, DstMAC: p.dst, EthernetType: t}
	if p.vlan == 0 {
		return eth
	}
	eth.EthernetType = layers.EthernetTypeDot1Q
	return stack{eth, &layers.Dot1Q{VLANIdentifier: p.vlan, Type: t}}
}

// frame puts the layers together and then does what gopacket would not: options, and
// wrong checksums.
func (p *params) frame(ip network, rest ...gopacket.SerializableLayer) []byte {
	t := layers.EthernetTypeIPv6
	if ip.LayerType() == layers.LayerTypeIPv4 {
		t = layers.EthernetTypeIPv4
	}
	b := serialize(append([]gopacket.SerializableLayer{p.ethernet(t), ip}, rest...)...)
	if len(p.options) > 0 && t == layers.EthernetTypeIPv4 {
		b = insertIPOptions(b, p.options)
	}
	if p.hopByHop && t == layers.EthernetTypeIPv6 {
		b = insertHopByHop(b)
	}
	h, err := parse(b)
	check(err)
	if h.ipSum >= 0 {
		addSkew(b[h.ipSum:], p.skewIP)
	}
	if h.l4Sum >= 0 {
		if p.noUDPSum && h.proto == protoUDP {
			put16(b[h.l4Sum:], 0)
		} else {
			addSkew(b[h.l4Sum:], p.skewL4)
		}
	}
	return b[:len(b)-p.truncated]
}

// stack is several layers that are serialized as one.
type stack []gopacket.SerializableLayer

func (s stack) SerializeTo(b gopacket.SerializeBuffer, opts gopacket.SerializeOptions) error {
	for i := len(s) - 1; i >= 0; i-- {
		if err := s[i].SerializeTo(b, opts); err != nil {
			return err
		}
	}
	return nil
}

func (s stack) LayerType() gopacket.LayerType { return s[0].LayerType() }

func serialize(l ...gopacket.SerializableLayer) []byte {
	buf := gopacket.NewSerializeBuffer()
	check(gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, l...))
	return buf.Bytes()
}

// insertIPOptions lengthens the IPv4 header, whose checksum becomes right again.
func insertIPOptions(frame, options []byte) []byte {
	if len(options)%4 != 0 || len(options) > 40 {
		panic("packet: IPv4 options must be a multiple of 4 bytes, at most 40")
	}
	start, _, err := etherType(frame)
	check(err)
	end := start + 20
	b := append(append(append([]byte(nil), frame[:end]...), options...), frame[end:]...)
	ip := b[start:]
	ip[0] += byte(len(options) / 4)
	put16(ip[2:], get16(ip[2:])+uint16(len(options)))
	fixIPSum(ip)
	return b
}

// insertHopByHop puts eight bytes of padding options behind the IPv6 header.
func insertHopByHop(frame []byte) []byte {
	start, _, err := etherType(frame)
	check(err)
	end := start + 40
	header := []byte{frame[start+6], 0, 1, 4, 0, 0, 0, 0} // PadN over six bytes
	b := append(append(append([]byte(nil), frame[:end]...), header...), frame[end:]...)
	b[start+6] = 0
	put16(b[start+4:], get16(b[start+4:])+uint16(len(header)))
	return b
}

// Fragment splits a frame's packet into fragments that carry size bytes of its payload
// each, a multiple of 8. All carry the same identification, id.
func Fragment(frame []byte, size int, id uint32) [][]byte {
	if size <= 0 || size%8 != 0 {
		panic("packet: fragment size must be a positive multiple of 8")
	}
	start, version, err := etherType(frame)
	check(err)
	header := 40
	if version == etherIPv4 {
		header = int(frame[start]&0xf) * 4
	}
	head, payload := frame[:start+header], frame[start+header:]
	var out [][]byte
	for offset := 0; offset < len(payload); offset += size {
		part := payload[offset:min(offset+size, len(payload))]
		more := offset+size < len(payload)
		b := append([]byte(nil), head...)
		ip := b[start:]
		if version == etherIPv4 {
			put16(ip[2:], uint16(header+len(part)))
			put16(ip[4:], uint16(id))
			field := uint16(offset / 8)
			if more {
				field |= 0x2000
			}
			put16(ip[6:], field)
			fixIPSum(ip)
		} else {
			field := uint16(offset)
			if more {
				field |= 1
			}
			next := ip[6]
			ip[6] = protoFragment
			put16(ip[4:], uint16(8+len(part)))
			b = append(b, next, 0, byte(field>>8), byte(field),
				byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
		}
		out = append(out, append(b, part...))
	}
	return out
}

// check panics: a test that builds an impossible packet is wrong in itself.
func check(err error) {
	if err != nil {
		panic("packet: " + err.Error())
	}
}
