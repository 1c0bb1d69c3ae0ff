// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// u128 is an address, or the distance between two, as a number. IPv4 uses the low 32 bits.
type u128 struct{ hi, lo uint64 }

func number(a netip.Addr) u128 {
	if a.Is4() {
		b := a.As4()
		return u128{lo: uint64(binary.BigEndian.Uint32(b[:]))}
	}
	b := a.As16()
	return u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

// addr is the inverse of number, for an address of length bits.
func (x u128) addr(length int) netip.Addr {
	if length == 32 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(x.lo))
		return netip.AddrFrom4(b)
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], x.hi)
	binary.BigEndian.PutUint64(b[8:], x.lo)
	return netip.AddrFrom16(b)
}

func (x u128) add(y u128) u128 {
	lo, carry := bits.Add64(x.lo, y.lo, 0)
	hi, _ := bits.Add64(x.hi, y.hi, carry)
	return u128{hi, lo}
}

func (x u128) sub(y u128) u128 {
	lo, borrow := bits.Sub64(x.lo, y.lo, 0)
	hi, _ := bits.Sub64(x.hi, y.hi, borrow)
	return u128{hi, lo}
}

func (x u128) less(y u128) bool {
	return x.hi < y.hi || x.hi == y.hi && x.lo < y.lo
}

func (x u128) shl(n int) u128 {
	if n >= 64 {
		return u128{hi: x.lo << (n - 64)}
	}
	return u128{x.hi<<n | x.lo>>(64-n), x.lo << n}
}

func (x u128) shr(n int) u128 {
	if n >= 64 {
		return u128{lo: x.hi >> (n - 64)}
	}
	return u128{x.hi >> n, x.lo>>n | x.hi<<(64-n)}
}

// ones is the number whose lowest n bits are set, and no others.
func ones(n int) u128 {
	return u128{^uint64(0), ^uint64(0)}.shr(128 - n)
}

// first and last are the ends of a prefix.
func first(p netip.Prefix) u128 { return number(p.Masked().Addr()) }

func last(p netip.Prefix) u128 { return first(p).add(ones(hostBits(p))) }

// hostBits is the number of bits that tell the addresses of a prefix apart.
func hostBits(p netip.Prefix) int { return p.Addr().BitLen() - p.Bits() }
