// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherVLAN = 0x8100
	etherQinQ = 0x88a8

	protoHopByHop = 0
	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoICMPv6   = 58
	protoDestOpts = 60
)

// headers says where the checksums of a packet stand, as offsets into the slice that
// was parsed, -1 for none.
type headers struct {
	proto    uint8
	ipSum    int
	l4Sum    int
	l4       int // where the transport header begins
	end      int // of the packet: what follows is Ethernet padding
	pseudo   uint32
	whole    bool // not a fragment, and nothing cut off
	fragment bool
	quoted   int // where the packet quoted by an ICMP error begins, -1 for none
}

var errShort = errors.New("frame is cut off inside a header")

// etherType returns where the network header begins and which it is.
func etherType(frame []byte) (start int, typ uint16, err error) {
	if len(frame) < 14 {
		return 0, 0, errShort
	}
	start, typ = 14, get16(frame[12:])
	for typ == etherVLAN || typ == etherQinQ {
		if len(frame) < start+4 {
			return 0, 0, errShort
		}
		typ = get16(frame[start+2:])
		start += 4
	}
	return start, typ, nil
}

func parse(frame []byte) (headers, error) {
	start, typ, err := etherType(frame)
	if err != nil {
		return headers{}, err
	}
	switch typ {
	case etherIPv4, etherIPv6:
		return parseIP(frame, start)
	}
	return headers{ipSum: -1, l4Sum: -1, quoted: -1}, nil
}

// parseIP parses the IPv4 or IPv6 packet that begins at start.
func parseIP(b []byte, start int) (headers, error) {
	h := headers{ipSum: -1, l4Sum: -1, quoted: -1, whole: true}
	if len(b) < start+20 {
		return h, errShort
	}
	ip := b[start:]
	switch ip[0] >> 4 {
	case 4:
		length := int(ip[0]&0xf) * 4
		if length < 20 || len(ip) < length {
			return h, errShort
		}
		h.ipSum = start + 10
		h.proto = ip[9]
		h.l4 = start + length
		h.end = start + int(get16(ip[2:]))
		h.fragment = get16(ip[6:])&0x3fff != 0
		h.pseudo = sum(ip[12:20], 0)
	case 6:
		if len(ip) < 40 {
			return h, errShort
		}
		h.proto = ip[6]
		h.l4 = start + 40
		h.end = h.l4 + int(get16(ip[4:]))
		h.pseudo = sum(ip[8:40], 0)
		if err := h.skipExtensions(b); err != nil {
			return h, err
		}
	default:
		return h, fmt.Errorf("IP version %d", ip[0]>>4)
	}
	if h.end < h.l4 {
		return h, errors.New("IP length is less than that of the headers")
	}
	h.whole = !h.fragment && h.end <= len(b)
	h.end = min(h.end, len(b))
	h.findL4(b)
	return h, nil
}

func (h *headers) skipExtensions(b []byte) error {
	const most = 8 // headers; more than any sane packet has
	for range most {
		switch h.proto {
		case protoHopByHop, protoRouting, protoDestOpts:
			if len(b) < h.l4+8 {
				return errShort
			}
			h.proto, h.l4 = b[h.l4], h.l4+8+int(b[h.l4+1])*8
		case protoFragment:
			if len(b) < h.l4+8 {
				return errShort
			}
			h.fragment = h.fragment || get16(b[h.l4+2:])&^0x6 != 0
			h.proto, h.l4 = b[h.l4], h.l4+8
		default:
			return nil
		}
	}
	return errors.New("too many extension headers")
}

// findL4 finds the transport checksum. Quoted packets may end before it.
func (h *headers) findL4(b []byte) {
	offset := 0
	switch h.proto {
	case protoTCP:
		offset = 16
	case protoUDP:
		offset = 6
	case protoICMP, protoICMPv6:
		offset = 2
	default:
		return
	}
	if h.l4+offset+2 > h.end {
		return
	}
	h.l4Sum = h.l4 + offset
	if h.proto == protoICMP {
		h.pseudo = 0
	} else {
		length := h.end - h.l4
		h.pseudo += uint32(h.proto) + uint32(length)
	}
	if h.isError(b) && h.l4+8 < h.end && !h.fragment {
		h.quoted = h.l4 + 8
	}
}

// isError reports whether the packet is an ICMP message that quotes another packet.
func (h *headers) isError(b []byte) bool {
	typ := b[h.l4]
	switch h.proto {
	case protoICMP:
		return typ == 3 || typ == 4 || typ == 5 || typ == 11 || typ == 12
	case protoICMPv6:
		return typ < 128
	}
	return false
}

// Skew returns by how much the checksums of a frame's packet are wrong: the field's
// value minus the right one, in ones' complement arithmetic, where 0 is right. It is
// what [SkewIP] and [SkewL4] have added. The transport's is 0 too where there is none to
// verify: fragments, cut off packets, other protocols, UDP without a checksum.
func Skew(frame []byte) (ip, l4 uint16, err error) {
	h, err := parse(frame)
	if err != nil {
		return 0, 0, err
	}
	ip, l4 = h.skew(frame)
	return ip, l4, nil
}

func (h *headers) skew(b []byte) (ip, l4 uint16) {
	if h.ipSum >= 0 {
		start := h.ipSum - 10
		header := b[start : start+int(b[start]&0xf)*4]
		ip = difference(get16(b[h.ipSum:]), ^fold(sum(header, 0)-uint32(get16(b[h.ipSum:]))))
	}
	if h.l4Sum < 0 || !h.whole {
		return ip, 0
	}
	field := get16(b[h.l4Sum:])
	if h.proto == protoUDP && field == 0 {
		return ip, 0
	}
	right := ^fold(sum(b[h.l4:h.end], h.pseudo) - uint32(field))
	return ip, difference(field, right)
}

// VerifyChecksums checks every checksum of an Ethernet frame that can be checked: the
// IPv4 header's, that of TCP, UDP, ICMP or ICMPv6, and those of the packet that an ICMP
// error quotes, as far as it quotes enough. IPv6 UDP without a checksum is an error (RFC
// 8200, 8.1), IPv4 UDP without one is not.
func VerifyChecksums(frame []byte) error {
	h, err := parse(frame)
	if err != nil {
		return err
	}
	if err := h.verify(frame); err != nil {
		return err
	}
	if h.quoted < 0 {
		return nil
	}
	inner, err := parseIP(frame[:h.end], h.quoted)
	if errors.Is(err, errShort) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("quoted packet: %w", err)
	}
	if err := inner.verify(frame); err != nil {
		return fmt.Errorf("quoted packet: %w", err)
	}
	return nil
}

func (h *headers) verify(b []byte) error {
	ip, l4 := h.skew(b)
	if ip != 0 {
		return fmt.Errorf("IPv4 header checksum %#04x is wrong by %#04x", get16(b[h.ipSum:]), ip)
	}
	if l4 != 0 {
		return fmt.Errorf("checksum %#04x of protocol %d is wrong by %#04x", get16(b[h.l4Sum:]), h.proto, l4)
	}
	if h.proto == protoUDP && h.l4Sum >= 0 && get16(b[h.l4Sum:]) == 0 && h.ipSum < 0 {
		return errors.New("IPv6 UDP without a checksum")
	}
	return nil
}

func get16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }

func put16(b []byte, v uint16) { binary.BigEndian.PutUint16(b, v) }

// sum adds the 16-bit words of b to acc. A packet has less than 2^16 of them, so that 32
// bits do not overflow.
func sum(b []byte, acc uint32) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		acc += uint32(get16(b))
	}
	if len(b) == 1 {
		acc += uint32(b[0]) << 8
	}
	return acc
}

// fold brings a sum into 16 bits, the carries added.
func fold(acc uint32) uint16 {
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}

// difference returns a-b in ones' complement arithmetic, with one zero only.
func difference(a, b uint16) uint16 {
	d := fold(uint32(a) + uint32(^b))
	if d == 0xffff {
		return 0
	}
	return d
}

// addSkew adds d to the checksum field at b. A UDP checksum must not become 0, which
// would mean none; 0xffff is the same number.
func addSkew(b []byte, d uint16) {
	if d == 0 {
		return
	}
	v := fold(uint32(get16(b)) + uint32(d))
	if v == 0 {
		v = 0xffff
	}
	put16(b, v)
}

// fixIPSum makes an IPv4 header's checksum right.
func fixIPSum(ip []byte) {
	put16(ip[10:], 0)
	put16(ip[10:], ^fold(sum(ip[:int(ip[0]&0xf)*4], 0)))
}
