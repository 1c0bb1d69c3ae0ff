// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

var families = []struct {
	name     string
	src, dst netip.AddrPort
}{
	{"4", netip.MustParseAddrPort("192.0.2.2:40000"), netip.MustParseAddrPort("198.51.100.2:80")},
	{"6", netip.MustParseAddrPort("[2001:db8:1::2]:40000"), netip.MustParseAddrPort("[2001:db8:2::2]:80")},
}

// builders is one of each kind of packet.
func builders(src, dst netip.AddrPort, opts ...Option) map[string][]byte {
	typ, code := uint8(3), uint8(4)
	if src.Addr().Is6() {
		typ, code = 2, 0
	}
	inner := UDP(dst, src, Payload([]byte("inner")))
	return map[string][]byte{
		"tcp":   TCP(src, dst, opts...),
		"udp":   UDP(src, dst, opts...),
		"echo":  ICMPEcho(src.Addr(), dst.Addr(), 7, 1, opts...),
		"reply": ICMPEchoReply(src.Addr(), dst.Addr(), 7, 1, opts...),
		"error": ICMPError(src.Addr(), dst.Addr(), typ, code, inner, append(opts, MTU(1400))...),
	}
}

func TestChecksumsAreRight(t *testing.T) {
	for _, f := range families {
		for size := range 70 {
			data := bytes.Repeat([]byte{0xa5, 0x17, 0xff}, size)[:size]
			for name, frame := range builders(f.src, f.dst, Payload(data)) {
				if err := VerifyChecksums(frame); err != nil {
					t.Errorf("%s%s, %d bytes: %v", name, f.name, size, err)
				}
				p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
				if failure := p.ErrorLayer(); failure != nil {
					t.Errorf("%s%s, %d bytes: %v", name, f.name, size, failure.Error())
				}
			}
		}
	}
}

// A skew comes back as it was put in, and an option beside it changes nothing of that.
func TestSkewIsMeasured(t *testing.T) {
	extras := map[string][]Option{
		"plain": nil, "vlan": {VLAN(7)}, "ip options": {IPOptions(1, 1, 1, 0)}, "hop by hop": {HopByHop()},
		"odd payload": {Payload([]byte("abc"))},
	}
	for _, f := range families {
		for extra, opts := range extras {
			for _, d := range []uint16{0, 1, 0x1234, 0x8000, 0xfffe} {
				for name, frame := range builders(f.src, f.dst, append(opts, SkewL4(d))...) {
					ip, l4, err := Skew(frame)
					if err != nil || ip != 0 || l4 != d {
						t.Errorf("%s%s, %s: skew %#x, %#x, %v; want 0, %#x", name, f.name, extra, ip, l4, err, d)
					}
					if err := VerifyChecksums(frame); (err == nil) != (d == 0) {
						t.Errorf("%s%s, %s, skew %#x: %v", name, f.name, extra, d, err)
					}
				}
			}
		}
	}
	ip, l4, err := Skew(TCP(families[0].src, families[0].dst, SkewIP(0x101)))
	if ip != 0x101 || l4 != 0 || err != nil {
		t.Errorf("skew %#x, %#x, %v; want 0x101, 0", ip, l4, err)
	}
}

func TestWrongQuotedPacketIsFound(t *testing.T) {
	for _, f := range families {
		inner := TCP(f.dst, f.src, SkewL4(9))
		frame := ICMPError(f.src.Addr(), f.dst.Addr(), 3, 1, inner)
		if VerifyChecksums(frame) == nil {
			t.Errorf("%s: a wrong checksum in the quoted packet was not found", f.name)
		}
		short := ICMPError(f.src.Addr(), f.dst.Addr(), 3, 1, Quote(inner, 8))
		if err := VerifyChecksums(short); err != nil {
			t.Errorf("%s: eight quoted bytes: %v", f.name, err)
		}
	}
}

func TestUDPWithoutChecksum(t *testing.T) {
	for i, f := range families {
		err := VerifyChecksums(UDP(f.src, f.dst, NoUDPChecksum()))
		if (err == nil) != (i == 0) {
			t.Errorf("%s: %v", f.name, err)
		}
	}
}

// Fragments put together again are the packet.
func TestFragment(t *testing.T) {
	payload := bytes.Repeat([]byte("0123456789"), 30)
	for _, f := range families {
		whole := UDP(f.src, f.dst, Payload(payload))
		fragments := Fragment(whole, 64, 0xbeef)
		var got []byte
		for i, frame := range fragments {
			if err := VerifyChecksums(frame); err != nil {
				t.Errorf("%s: fragment %d: %v", f.name, i, err)
			}
			p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
			var offset, id int
			var more bool
			if v4, ok := p.NetworkLayer().(*layers.IPv4); ok {
				offset, id, more = int(v4.FragOffset)*8, int(v4.Id), v4.Flags&layers.IPv4MoreFragments != 0
				got = append(got, v4.Payload...)
			} else {
				v6, ok := p.Layer(layers.LayerTypeIPv6Fragment).(*layers.IPv6Fragment)
				if !ok {
					t.Fatalf("no fragment header in %v", p)
				}
				offset, id, more = int(v6.FragmentOffset)*8, int(v6.Identification), v6.MoreFragments
				got = append(got, v6.Payload...)
			}
			if offset != i*64 || id != 0xbeef || more != (i < len(fragments)-1) {
				t.Errorf("%s: fragment %d: offset %d, id %#x, more %v", f.name, i, offset, id, more)
			}
		}
		header := map[string]int{"4": 34, "6": 54}[f.name]
		if !bytes.Equal(got, whole[header:]) {
			t.Errorf("%s: the fragments do not add up to the packet", f.name)
		}
	}
}

func TestARPAndND(t *testing.T) {
	arp := gopacket.NewPacket(ARP(families[0].src.Addr(), families[0].dst.Addr(), false), layers.LayerTypeEthernet, gopacket.Default)
	if arp.Layer(layers.LayerTypeARP) == nil {
		t.Errorf("no ARP in %v", arp)
	}
	if err := VerifyChecksums(NeighborSolicit(families[1].src.Addr(), families[1].dst.Addr())); err != nil {
		t.Error(err)
	}
	if err := VerifyChecksums(SCTP(families[0].src, families[0].dst)); err != nil {
		t.Error(err)
	}
}

// No frame, however broken, may crash the verifier.
func FuzzVerifyChecksums(f *testing.F) {
	for _, family := range families {
		for _, frame := range builders(family.src, family.dst) {
			f.Add(frame)
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		ip, l4, err := Skew(frame)
		whole := VerifyChecksums(frame)
		if err == nil && (ip != 0 || l4 != 0) && whole == nil {
			t.Error(fmt.Errorf("skew %#x, %#x, but verified", ip, l4))
		}
	})
}
