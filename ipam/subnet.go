// SPDX-License-Identifier: Apache-2.0

// Package ipam manages addresses: it chooses subnets for networks and addresses for endpoints.
// It is pure: it makes no system calls and knows no clock, no store and no source of randomness
// but those it is given.
package ipam

import (
	"errors"
	"fmt"
	"net/netip"
)

// Subnet is the addresses of a network, of one family.
type Subnet struct {
	Prefix netip.Prefix
	// Gateway is the bridge's own address. Invalid: Normalize chooses the first one.
	Gateway netip.Addr
	// Range is the part of Prefix that addresses are chosen from. Invalid: all of it.
	Range netip.Prefix
}

// unusable are the prefixes that no network can have addresses of.
var unusable = []struct {
	prefix netip.Prefix
	why    string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network, RFC 1122 3.2.1.3"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("::/127"), "loopback"},
	{netip.MustParsePrefix("fe80::/10"), "link-local, which the kernel gives out itself"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

// Normalize checks a subnet and fills its gateway. An error names what is wrong and the way out.
//
// Of an IPv4 subnet the network and the broadcast address are not for use, except of a /31
// (RFC 3021); of an IPv6 one the first is not, the anycast address of its routers (RFC 4291
// 2.6.1), except of a /127 (RFC 6164). A gateway and one endpoint must have room.
func (s Subnet) Normalize() (Subnet, error) {
	p := s.Prefix
	switch {
	case !p.IsValid():
		return Subnet{}, errors.New("subnet: none is given; write it as 172.19.0.0/16")
	case p.Addr().Is4In6():
		if plain := netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96); plain.IsValid() {
			return Subnet{}, fmt.Errorf("subnet %s: is one of IPv4; write %s", p, plain.Masked())
		}
		return Subnet{}, fmt.Errorf("subnet %s: covers all of IPv4; choose a smaller one", p)
	case p != p.Masked():
		return Subnet{}, fmt.Errorf("subnet %s: has host bits set; write %s", p, p.Masked())
	}
	for _, u := range unusable {
		if p.Overlaps(u.prefix) {
			return Subnet{}, fmt.Errorf("subnet %s: has addresses of %s (%s); choose another", p, u.prefix, u.why)
		}
	}
	if hostBits(p) == 0 {
		return Subnet{}, fmt.Errorf("subnet %s: has no room for a gateway and an endpoint; choose a /%d or larger", p, p.Bits()-1)
	}

	s.Gateway = s.Gateway.Unmap()
	if !s.Gateway.IsValid() {
		s.Gateway = p.Addr()
		if s.unusable(s.Gateway) != "" {
			s.Gateway = s.Gateway.Next()
		}
	}
	if !p.Contains(s.Gateway) {
		return Subnet{}, fmt.Errorf("gateway %s: outside of subnet %s; choose an address in it", s.Gateway, p)
	}
	if why := s.unusable(s.Gateway); why != "" {
		return Subnet{}, fmt.Errorf("gateway %s: is the %s of subnet %s; choose another in it", s.Gateway, why, p)
	}

	if r := s.Range; r != (netip.Prefix{}) {
		switch {
		case !r.IsValid():
			return Subnet{}, fmt.Errorf("ip-range %s: is no prefix; choose a part of subnet %s", r, p)
		case r != r.Masked():
			return Subnet{}, fmt.Errorf("ip-range %s: has host bits set; write %s", r, r.Masked())
		case !p.Contains(r.Addr()) || r.Bits() < p.Bits():
			return Subnet{}, fmt.Errorf("ip-range %s: outside of subnet %s; choose a part of it", r, p)
		case !s.hasRoom():
			return Subnet{}, fmt.Errorf("ip-range %s: has no address for an endpoint; choose a larger part of subnet %s", r, p)
		}
	}
	return s, nil
}

// unusable says what an address of the prefix is, if no interface can have it.
func (s Subnet) unusable(a netip.Addr) string {
	switch {
	case hostBits(s.Prefix) < 2:
		return ""
	case a == s.Prefix.Masked().Addr() && a.Is4():
		return "network address"
	case a == s.Prefix.Masked().Addr():
		return "anycast address of the routers"
	case a.Is4() && number(a) == last(s.Prefix):
		return "broadcast address"
	}
	return ""
}

// reserved says what an address of the prefix is, if no endpoint can have it.
func (s Subnet) reserved(a netip.Addr) string {
	if a == s.Gateway {
		return "gateway"
	}
	return s.unusable(a)
}

// hasRoom reports whether the range has an address for an endpoint. Three are not for one.
func (s Subnet) hasRoom() bool {
	if hostBits(s.Range) >= 2 {
		return true
	}
	a := s.Range.Addr()
	return s.reserved(a) == "" || s.Range.Contains(a.Next()) && s.reserved(a.Next()) == ""
}

// Taken is a prefix that something uses already.
type Taken struct {
	Prefix netip.Prefix
	By     string // as it stands in a sentence: network "web", the host's route by eth1
}

// Overlap returns an error that names the first of taken that shares addresses with the subnet,
// and nil if there is none. A default route shares none: it is for what has no other place.
func Overlap(s netip.Prefix, taken []Taken) error {
	for _, t := range taken {
		if !isDefault(t.Prefix) && s.Overlaps(t.Prefix) {
			return fmt.Errorf("subnet %s: overlaps %s of %s; choose another with --subnet", s, t.Prefix, t.By)
		}
	}
	return nil
}

// isDefault reports whether a prefix is a default route's, or a large part of one: VPNs go before
// the default route that is there with 0.0.0.0/1 and 128.0.0.0/1, and with ::/3, 2000::/4, 3000::/4
// and fc00::/7 (OpenVPN's redirect-gateway).
func isDefault(p netip.Prefix) bool {
	if p.Addr().Is4() {
		return p.Bits() <= 1
	}
	return p.Bits() <= 7
}
