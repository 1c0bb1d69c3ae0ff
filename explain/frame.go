// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// Link is the link layer of a packet.
type Link struct{ Src, Dst policy.MAC }

const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	hopLimit  = 64

	tcpSYN = 0x02
	tcpRST = 0x04
	tcpACK = 0x10
)

// Frame is the packet as a whole frame: a TCP segment without options or data, an empty UDP datagram, an echo without data,
// or SCTP's common header. Its protocol is one of these.
func Frame(p policy.Packet, l Link) []byte {
	var l4 []byte
	src, dst := p.Tuple.Src, p.Tuple.Dst
	check := -1
	switch p.Proto {
	case policy.TCP:
		l4 = make([]byte, 20)
		l4[12] = 5 << 4 // words of the header
		switch {
		case p.Reset:
			l4[13] = tcpRST
		case p.Answer:
			l4[13] = tcpSYN | tcpACK
		default:
			l4[13] = tcpSYN
		}
		binary.BigEndian.PutUint16(l4[14:], 65535) // window
		check = 16
	case policy.UDP:
		l4 = make([]byte, 8)
		binary.BigEndian.PutUint16(l4[4:], 8)
		check = 6
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		l4 = make([]byte, 8)
		check = 2
		reply := dst.Port() != 0
		switch {
		case p.Proto == unix.IPPROTO_ICMP && !reply:
			l4[0] = 8
		case p.Proto == unix.IPPROTO_ICMPV6 && !reply:
			l4[0] = 128
		case p.Proto == unix.IPPROTO_ICMPV6:
			l4[0] = 129
		}
		binary.BigEndian.PutUint16(l4[4:], max(src.Port(), dst.Port()))
		binary.BigEndian.PutUint16(l4[6:], 1)
	default:
		l4 = make([]byte, 12) // SCTP's common header; its checksum is nobody's business on the way
	}
	if p.Proto == policy.TCP || p.Proto == policy.UDP || p.Proto == policy.SCTP {
		binary.BigEndian.PutUint16(l4, src.Port())
		binary.BigEndian.PutUint16(l4[2:], dst.Port())
	}

	frame := append(append([]byte{}, l.Dst[:]...), l.Src[:]...)
	addrs := append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
	if src.Addr().Is4() {
		frame = binary.BigEndian.AppendUint16(frame, etherIPv4)
		ip := make([]byte, 12, 20)
		ip[0] = 4<<4 | 5
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(l4)))
		ip[8], ip[9] = hopLimit, byte(p.Proto)
		ip = append(ip, addrs...)
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
		frame = append(frame, ip...)
	} else {
		frame = binary.BigEndian.AppendUint16(frame, etherIPv6)
		ip := make([]byte, 8, 40)
		ip[0] = 6 << 4
		binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)))
		ip[6], ip[7] = byte(p.Proto), hopLimit
		frame = append(frame, append(ip, addrs...)...)
	}
	if check >= 0 {
		pseudo := binary.BigEndian.AppendUint16(append(addrs, 0, byte(p.Proto)), uint16(len(l4)))
		if p.Proto == unix.IPPROTO_ICMP {
			pseudo = nil
		}
		sum := checksum(append(pseudo, l4...))
		if sum == 0 && p.Proto == policy.UDP { // 0 says that there is none (RFC 768)
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(l4[check:], sum)
	}
	return append(frame, l4...)
}

// checksum is that of RFC 1071 over an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
