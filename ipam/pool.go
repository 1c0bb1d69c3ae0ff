// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
)

// Pool hands out subnets of Base, each of prefix length Bits.
type Pool struct {
	Base netip.Prefix
	Bits int
}

// ErrPoolsExhausted says that no pool has a subnet left.
var ErrPoolsExhausted = errors.New("the address pools are used up; choose a subnet with --subnet, or remove a network")

// DefaultPools returns those of the Docker Engine: 172.17.0.0/16 to 172.31.0.0/16, then
// 192.168.0.0/16 in sixteenths.
func DefaultPools() []Pool {
	return []Pool{
		{netip.MustParsePrefix("172.17.0.0/16"), 16},
		{netip.MustParsePrefix("172.18.0.0/15"), 16},
		{netip.MustParsePrefix("172.20.0.0/14"), 16},
		{netip.MustParsePrefix("172.24.0.0/13"), 16},
		{netip.MustParsePrefix("192.168.0.0/16"), 20},
	}
}

// NextSubnet returns the lowest subnet of the first pool that has one that overlaps nothing of
// taken, default routes apart. Without one the error is ErrPoolsExhausted.
func NextSubnet(pools []Pool, taken []netip.Prefix) (netip.Prefix, error) {
	for _, pool := range pools {
		if !pool.Base.IsValid() || pool.Base != pool.Base.Masked() ||
			pool.Bits < pool.Base.Bits() || pool.Bits > pool.Base.Addr().BitLen() {
			return netip.Prefix{}, fmt.Errorf("address pool %s: cannot be cut into prefixes of length %d", pool.Base, pool.Bits)
		}
		if p, ok := pool.next(taken); ok {
			return p, nil
		}
	}
	return netip.Prefix{}, ErrPoolsExhausted
}

// next goes through what is taken of the pool, in the order of addresses, and looks at the gaps.
func (p Pool) next(taken []netip.Prefix) (netip.Prefix, bool) {
	length := p.Base.Addr().BitLen()
	size := length - p.Bits // in bits
	var in []netip.Prefix
	for _, t := range taken {
		if !isDefault(t) && t.Overlaps(p.Base) {
			in = append(in, t.Masked())
		}
	}
	slices.SortFunc(in, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })

	at, end := first(p.Base), last(p.Base)
	for _, t := range in {
		switch from, to := first(t), last(t); {
		case to.less(at): // lies in one that was passed
		case at.add(ones(size)).less(from):
			return netip.PrefixFrom(at.addr(length), p.Bits), true
		case !to.shr(size).less(end.shr(size)): // reaches into the last
			return netip.Prefix{}, false
		default:
			at = to.shr(size).add(u128{lo: 1}).shl(size)
		}
	}
	return netip.PrefixFrom(at.addr(length), p.Bits), true
}

// ulaTries is how often ULA draws: a second time is needed if a host has many of a trillion.
const ulaTries = 16

// ULA generates a /64 of unique local addresses: fd00::/8, 40 random bits, subnet 0 (RFC 4193
// 3.1 and 3.2). It overlaps nothing of taken, default routes apart.
func ULA(random io.Reader, taken []netip.Prefix) (netip.Prefix, error) {
	for range ulaTries {
		b := [16]byte{0xfd}
		if _, err := io.ReadFull(random, b[1:6]); err != nil {
			return netip.Prefix{}, fmt.Errorf("generate an IPv6 subnet: %w", err)
		}
		p := netip.PrefixFrom(netip.AddrFrom16(b), 64)
		if !slices.ContainsFunc(taken, func(t netip.Prefix) bool { return !isDefault(t) && t.Overlaps(p) }) {
			return p, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("generate an IPv6 subnet of fd00::/8: %w", ErrPoolsExhausted)
}
