// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// Two networks (the second internal), a container on each, a port of the first published, two addresses
// of the host.
func adopting() Tables {
	return Tables{
		Networks:  map[uint16]NetworkRow{1: {Ifindex: 10, Masquerade: true}, 2: {Ifindex: 20, Internal: true, Masquerade: true}, 3: {Ifindex: 30}},
		Endpoints: map[uint16]EndpointRow{1: {Ifindex: 11, Network: 1}, 2: {Ifindex: 21, Network: 2}, 3: {Ifindex: 31, Network: 3}},
		Addrs: map[netip.Addr]uint16{
			netip.MustParseAddr("172.18.0.2"): 1, netip.MustParseAddr("172.19.0.2"): 2, netip.MustParseAddr("172.20.0.2"): 3,
			netip.MustParseAddr("172.18.0.9"): 9, // not READY
		},
		Subnets: map[netip.Prefix]uint16{
			netip.MustParsePrefix("172.18.0.0/16"): 1, netip.MustParsePrefix("172.19.0.0/16"): 2, netip.MustParsePrefix("172.20.0.0/16"): 3,
		},
		HostAddrs: map[netip.Addr]int{netip.MustParseAddr("192.0.2.1"): 2, netip.MustParseAddr("172.18.0.1"): 10},
		Ports: map[PortKey]PortRow{
			{TCP, ap("0.0.0.0:8080")}: {Target: ap("172.18.0.2:80"), Endpoint: 1, Slot: 7},
		},
	}
}

func TestAdopt(t *testing.T) {
	for _, c := range []struct {
		what                       string
		proto                      uint8
		src, dst, answer, answered string // the tuples: src→dst, and answer→answered
		want                       *Adopted
	}{
		{"masqueraded", 6, "172.18.0.2:4000", "198.51.100.9:443", "198.51.100.9:443", "192.0.2.1:61000", &Adopted{Opener: 1, SNAT: true}},
		{"masqueraded with its own port", 17, "172.18.0.2:4000", "198.51.100.9:53", "198.51.100.9:53", "192.0.2.1:4000", &Adopted{Opener: 1, SNAT: true}},
		{"an echo request", 1, "172.18.0.2:77", "198.51.100.9:0", "198.51.100.9:0", "192.0.2.1:78", &Adopted{Opener: 1, SNAT: true}},
		{"published", 6, "198.51.100.9:5000", "192.0.2.1:8080", "172.18.0.2:80", "198.51.100.9:5000", &Adopted{Target: 1, Port: 7}},
		{"published, from a container", 6, "172.20.0.2:5000", "192.0.2.1:8080", "172.18.0.2:80", "172.18.0.1:5000", &Adopted{Opener: 3, Target: 1, Port: 7, SNAT: true}},
		{"without masquerade where none is wanted", 6, "172.20.0.2:4000", "198.51.100.9:443", "198.51.100.9:443", "172.20.0.2:4000", &Adopted{Opener: 3}},

		{"without masquerade where it is wanted", 6, "172.18.0.2:4000", "198.51.100.9:443", "198.51.100.9:443", "172.18.0.2:4000", nil},
		{"by an address that is not the host's any more", 6, "172.18.0.2:4000", "198.51.100.9:443", "198.51.100.9:443", "192.0.2.77:61000", nil},
		{"to the host itself", 6, "172.18.0.2:4000", "192.0.2.1:22", "192.0.2.1:22", "172.18.0.2:4000", nil},
		{"from an internal network", 6, "172.19.0.2:4000", "198.51.100.9:443", "198.51.100.9:443", "192.0.2.1:61000", nil},
		{"to a container of another network", 6, "172.20.0.2:4000", "172.18.0.2:80", "172.18.0.2:80", "172.20.0.2:4000", nil},
		{"to a container's address from outside", 6, "198.51.100.9:5000", "172.18.0.2:80", "172.18.0.2:80", "198.51.100.9:5000", nil},
		{"to a port that is not published any more", 6, "198.51.100.9:5000", "192.0.2.1:8081", "172.18.0.2:80", "198.51.100.9:5000", nil},
		{"to a port that leads elsewhere now", 6, "198.51.100.9:5000", "192.0.2.1:8080", "172.20.0.2:80", "198.51.100.9:5000", nil},
		{"of the host's own", 6, "192.0.2.1:4000", "198.51.100.9:443", "198.51.100.9:443", "192.0.2.1:4000", nil},
		{"from the host to a published port", 6, "192.0.2.1:4000", "192.0.2.1:8080", "172.18.0.2:80", "172.18.0.1:4000", nil},
		{"of a container that is not READY", 6, "172.18.0.9:4000", "198.51.100.9:443", "198.51.100.9:443", "192.0.2.1:61000", nil},
		{"of a protocol without ports", 47, "172.18.0.2:0", "198.51.100.9:0", "198.51.100.9:0", "192.0.2.1:0", nil},
		{"an echo reply", 1, "172.18.0.2:0", "198.51.100.9:77", "198.51.100.9:77", "192.0.2.1:0", nil},
	} {
		k := Tracked{Proto: c.proto, Orig: Tuple{ap(c.src), ap(c.dst)}, Reply: Tuple{ap(c.answer), ap(c.answered)}, Answered: true}
		got, ok := adopting().Adopt(k)
		if !assert.Equal(t, c.want != nil, ok, c.what) || !ok {
			continue
		}
		c.want.Tracked = k
		assert.Equal(t, *c.want, got, c.what)
	}
}
