// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"strings"
)

// packetHead is what the first bytes of a packet tell.
type packetHead struct {
	Proto string // "tcp", "udp", "sctp", "icmp", "icmp6", "arp", a number of IP's; empty: not known
	From  netip.Addr
	To    netip.Addr
	// Ports of TCP, UDP and SCTP in the first fragment; type and code of ICMP.
	FromPort, ToPort uint16
	HasPorts         bool
	Detail           string // flags of TCP, type and code of ICMP
}

// Numbers of Ethernet (IEEE 802) and IP (IANA, Protocol Numbers).
const (
	etherIPv4, etherIPv6, etherARP, etherVLAN, etherQinQ                 = 0x0800, 0x86dd, 0x0806, 0x8100, 0x88a8
	protoICMP, protoTCP, protoUDP, protoICMPv6, protoSCTP                = 1, 6, 17, 58, 132
	protoHopByHop, protoRouting, protoFragment, protoAuth, protoDestOpts = 0, 43, 44, 51, 60
)

// decodeHead reads a packet from its link layer on, or from its network layer. What was cut off or makes no sense stays unknown.
func decodeHead(raw []byte, ethernet bool) packetHead {
	var p packetHead
	kind := 0
	switch {
	case ethernet:
		if len(raw) < 14 {
			return p
		}
		kind, raw = int(binary.BigEndian.Uint16(raw[12:])), raw[14:]
		for (kind == etherVLAN || kind == etherQinQ) && len(raw) >= 4 {
			kind, raw = int(binary.BigEndian.Uint16(raw[2:])), raw[4:]
		}
	case len(raw) > 0 && raw[0]>>4 == 4:
		kind = etherIPv4
	case len(raw) > 0 && raw[0]>>4 == 6:
		kind = etherIPv6
	}
	switch kind {
	case etherIPv4:
		p.ipv4(raw)
	case etherIPv6:
		p.ipv6(raw)
	case etherARP:
		p.Proto = "arp"
		if len(raw) >= 28 { // RFC 826: the sender's and the target's protocol addresses
			p.From, p.To = netip.AddrFrom4([4]byte(raw[14:18])), netip.AddrFrom4([4]byte(raw[24:28]))
		}
	}
	return p
}

func (p *packetHead) ipv4(raw []byte) {
	if len(raw) < 20 {
		return
	}
	p.From, p.To = netip.AddrFrom4([4]byte(raw[12:16])), netip.AddrFrom4([4]byte(raw[16:20]))
	first := binary.BigEndian.Uint16(raw[6:])&0x1fff == 0
	p.transport(raw[9], raw[min(4*int(raw[0]&15), len(raw)):], first)
}

// ipv6 steps over the extension headers of RFC 8200, section 4.
func (p *packetHead) ipv6(raw []byte) {
	if len(raw) < 40 {
		return
	}
	p.From, p.To = netip.AddrFrom16([16]byte(raw[8:24])), netip.AddrFrom16([16]byte(raw[24:40]))
	next, first := raw[6], true
	raw = raw[40:]
	for len(raw) >= 8 {
		length := 8 * (int(raw[1]) + 1)
		switch next {
		case protoHopByHop, protoRouting, protoDestOpts:
		case protoAuth:
			length = 4 * (int(raw[1]) + 2) // RFC 4302
		case protoFragment:
			length, first = 8, first && binary.BigEndian.Uint16(raw[2:])>>3 == 0
		default:
			p.transport(next, raw, first)
			return
		}
		next, raw = raw[0], raw[min(length, len(raw)):]
	}
	p.transport(next, raw, first)
}

// tcpFlags are written as tcpdump does.
var tcpFlags = []struct {
	bit  byte
	name string
}{{2, "S"}, {1, "F"}, {4, "R"}, {8, "P"}, {16, "."}}

// protoNames are the protocols that are told by name.
var protoNames = map[byte]string{protoICMP: "icmp", protoTCP: "tcp", protoUDP: "udp", protoICMPv6: "icmp6", protoSCTP: "sctp"}

// protoName is a protocol's name, or its number.
func protoName(proto byte) string {
	if name, ok := protoNames[proto]; ok {
		return name
	}
	return strconv.Itoa(int(proto))
}

func (p *packetHead) transport(proto byte, raw []byte, first bool) {
	p.Proto = protoName(proto)
	if _, known := protoNames[proto]; !known {
		return
	}
	switch {
	case !first:
		p.Detail = "fragment"
	case len(raw) < 4:
	case proto == protoICMP || proto == protoICMPv6:
		p.Detail = "type " + strconv.Itoa(int(raw[0])) + " code " + strconv.Itoa(int(raw[1]))
	default:
		p.FromPort, p.ToPort, p.HasPorts = binary.BigEndian.Uint16(raw), binary.BigEndian.Uint16(raw[2:]), true
		if proto == protoTCP && len(raw) >= 14 {
			var b strings.Builder
			for _, f := range tcpFlags {
				if raw[13]&f.bit != 0 {
					b.WriteString(f.name)
				}
			}
			p.Detail = b.String()
		}
	}
}
