// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"net/netip"
	"slices"
)

// The rules of Docker's network model for published ports and the way out, which hold for
// every source of state.

// gwbridge is the network that gives swarm's containers their way out.
const gwbridge = "docker_gwbridge"

// Candidate is an endpoint that could be a sandbox's way out.
type Candidate struct {
	Endpoint string // ID
	Network  string // name
	Bridge   bool   // of the bridge driver: only those publish
	Internal bool   // leads nowhere
	Priority int    // the highest is asked first
	V4, V6   bool   // has a gateway of that family
}

// GatewayEndpoints returns the endpoints that carry a sandbox's published ports of each
// family; empty if there is none. They are the first with a gateway of that family in the
// Engine's order: by priority, docker_gwbridge last, internal networks never, more families
// first, then by the network's name. Engines before 28 have one gateway for both families,
// which by this order is the same endpoint.
func GatewayEndpoints(list []Candidate) (v4, v6 string) {
	families := func(c Candidate) int { // as Engine 20.10 scores
		n := 0
		if c.V4 {
			n++
		}
		if c.V6 {
			n += 2
		}
		return n
	}
	last := func(c Candidate) int {
		if c.Network == gwbridge {
			return 1
		}
		return 0
	}
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, func(a, b Candidate) int {
		return cmp.Or(
			cmp.Compare(b.Priority, a.Priority),
			cmp.Compare(last(a), last(b)),
			cmp.Compare(families(b), families(a)),
			cmp.Compare(a.Network, b.Network),
		)
	})
	var done4, done6 bool
	for _, c := range sorted {
		if c.Internal {
			continue
		}
		if c.V4 && !done4 {
			done4 = true
			if c.Bridge {
				v4 = c.Endpoint
			}
		}
		if c.V6 && !done6 {
			done6 = true
			if c.Bridge {
				v6 = c.Endpoint
			}
		}
	}
	return v4, v6
}

// ExpandHost returns the host addresses and ports of a published port that was asked for, as the
// Engine allocates them. Without an address (host is invalid) it stands for the network's default
// one, binding, or else for all IPv4 addresses and, if the sandbox has an IPv6 address, all IPv6
// ones. An address that was given stands for itself, 0.0.0.0 for IPv4 only.
func ExpandHost(host netip.Addr, port uint16, binding netip.Addr, has6 bool) []netip.AddrPort {
	switch {
	case host.IsValid():
		return []netip.AddrPort{netip.AddrPortFrom(host.Unmap(), port)}
	case binding.IsValid():
		return []netip.AddrPort{netip.AddrPortFrom(binding, port)}
	}
	out := []netip.AddrPort{netip.AddrPortFrom(netip.IPv4Unspecified(), port)}
	if has6 {
		out = append(out, netip.AddrPortFrom(netip.IPv6Unspecified(), port))
	}
	return out
}

// Taken returns the first port of the list that excludes another on the same host address: one
// of its protocol and number on that address, or on any address of the family.
func Taken(ports []Port, proto Proto, host netip.AddrPort) (Port, bool) {
	for _, p := range ports {
		a, b := p.Host.Addr(), host.Addr()
		if p.Proto == proto && p.Host.Port() == host.Port() && a.Is4() == b.Is4() &&
			(a == b || a.IsUnspecified() || b.IsUnspecified()) {
			return p, true
		}
	}
	return Port{}, false
}
