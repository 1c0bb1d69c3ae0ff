// SPDX-License-Identifier: Apache-2.0

package ipam_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/ipam"
)

var (
	prefix = netip.MustParsePrefix
	addr   = netip.MustParseAddr
)

// subnet reads prefix, gateway and range; the empty string is the zero value.
func subnet(t testing.TB, p, gateway, ipRange string) ipam.Subnet {
	t.Helper()
	var s ipam.Subnet
	var err error
	if p != "" {
		s.Prefix, err = netip.ParsePrefix(p)
		require.NoError(t, err)
	}
	if gateway != "" {
		s.Gateway, err = netip.ParseAddr(gateway)
		require.NoError(t, err)
	}
	if ipRange != "" {
		s.Range, err = netip.ParsePrefix(ipRange)
		require.NoError(t, err)
	}
	return s
}

func TestNormalize(t *testing.T) {
	for _, c := range []struct {
		prefix, gateway, ipRange string
		want                     string // gateway, or the error
	}{
		{"172.19.0.0/16", "", "", "172.19.0.1"},
		{"172.19.0.0/16", "172.19.255.254", "", "172.19.255.254"},
		{"172.19.0.0/16", "::ffff:172.19.0.9", "", "172.19.0.9"},
		{"172.19.0.0/16", "", "172.19.5.0/24", "172.19.0.1"},
		{"172.19.0.0/16", "", "172.19.0.0/16", "172.19.0.1"},
		{"172.19.0.0/16", "172.19.5.1", "172.19.5.0/31", "172.19.5.1"},
		{"10.0.0.0/8", "", "", "10.0.0.1"},
		{"10.0.0.0/30", "", "", "10.0.0.1"},
		{"10.0.0.0/30", "", "10.0.0.2/32", "10.0.0.1"},
		{"10.0.0.0/31", "", "", "10.0.0.0"},
		{"10.0.0.0/31", "10.0.0.1", "", "10.0.0.1"},
		{"10.0.0.0/31", "", "10.0.0.1/32", "10.0.0.0"},
		{"169.254.170.0/24", "", "", "169.254.170.1"}, // Amazon's ECS makes that one
		{"fd00:1::/64", "", "", "fd00:1::1"},
		{"fd00:1::/64", "fd00:1::ffff:ffff:ffff:ffff", "", "fd00:1::ffff:ffff:ffff:ffff"},
		{"fd00:1::/48", "", "fd00:1:0:5::/64", "fd00:1::1"},
		{"fd00:1::4/126", "", "", "fd00:1::5"},
		{"fd00:1::4/127", "", "", "fd00:1::4"},

		{"", "", "", "subnet: none is given; write it as 172.19.0.0/16"},
		{"172.19.0.1/16", "", "", "subnet 172.19.0.1/16: has host bits set; write 172.19.0.0/16"},
		{"fd00::1/64", "", "", "subnet fd00::1/64: has host bits set; write fd00::/64"},
		{"::ffff:10.0.0.0/104", "", "", "subnet ::ffff:10.0.0.0/104: is one of IPv4; write 10.0.0.0/8"},
		{"::ffff:10.0.0.0/90", "", "", "subnet ::ffff:10.0.0.0/90: covers all of IPv4; choose a smaller one"},
		{"10.0.0.0/32", "", "", "subnet 10.0.0.0/32: has no room for a gateway and an endpoint; choose a /31 or larger"},
		{"fd00::7/128", "", "", "subnet fd00::7/128: has no room for a gateway and an endpoint; choose a /127 or larger"},
		{"0.0.0.0/0", "", "", "subnet 0.0.0.0/0: has addresses of 0.0.0.0/8 (this network, RFC 1122 3.2.1.3); choose another"},
		{"127.4.0.0/16", "", "", "subnet 127.4.0.0/16: has addresses of 127.0.0.0/8 (loopback); choose another"},
		{"224.1.0.0/16", "", "", "subnet 224.1.0.0/16: has addresses of 224.0.0.0/4 (multicast); choose another"},
		{"::/64", "", "", "subnet ::/64: has addresses of ::/127 (loopback); choose another"},
		{"fe80::/64", "", "", "subnet fe80::/64: has addresses of fe80::/10 (link-local, which the kernel gives out itself); choose another"},
		{"ff02::/64", "", "", "subnet ff02::/64: has addresses of ff00::/8 (multicast); choose another"},

		{"172.19.0.0/16", "10.0.0.1", "", "gateway 10.0.0.1: outside of subnet 172.19.0.0/16; choose an address in it"},
		{"172.19.0.0/16", "fd00::1", "", "gateway fd00::1: outside of subnet 172.19.0.0/16; choose an address in it"},
		{"fd00::/64", "fd00::1%eth0", "", "gateway fd00::1%eth0: outside of subnet fd00::/64; choose an address in it"},
		{"172.19.0.0/16", "172.19.0.0", "", "gateway 172.19.0.0: is the network address of subnet 172.19.0.0/16; choose another in it"},
		{"172.19.0.0/16", "172.19.255.255", "", "gateway 172.19.255.255: is the broadcast address of subnet 172.19.0.0/16; choose another in it"},
		{"fd00::/64", "fd00::", "", "gateway fd00::: is the anycast address of the routers of subnet fd00::/64; choose another in it"},

		{"172.19.0.0/16", "", "172.19.5.1/24", "ip-range 172.19.5.1/24: has host bits set; write 172.19.5.0/24"},
		{"172.19.0.0/16", "", "172.20.5.0/24", "ip-range 172.20.5.0/24: outside of subnet 172.19.0.0/16; choose a part of it"},
		{"172.19.0.0/16", "", "172.16.0.0/12", "ip-range 172.16.0.0/12: outside of subnet 172.19.0.0/16; choose a part of it"},
		{"172.19.0.0/16", "", "fd00::/64", "ip-range fd00::/64: outside of subnet 172.19.0.0/16; choose a part of it"},
		{"172.19.0.0/16", "", "172.19.0.1/32", "ip-range 172.19.0.1/32: has no address for an endpoint; choose a larger part of subnet 172.19.0.0/16"},
		{"172.19.0.0/16", "", "172.19.0.0/31", "ip-range 172.19.0.0/31: has no address for an endpoint; choose a larger part of subnet 172.19.0.0/16"},
		{"10.0.0.0/31", "", "10.0.0.0/32", "ip-range 10.0.0.0/32: has no address for an endpoint; choose a larger part of subnet 10.0.0.0/31"},
	} {
		s := subnet(t, c.prefix, c.gateway, c.ipRange)
		got, err := s.Normalize()
		if err != nil {
			assert.Equal(t, c.want, err.Error())
			assert.Zero(t, got)
			continue
		}
		s.Gateway = addr(c.want)
		assert.Equal(t, s, got, "%s %s %s", c.prefix, c.gateway, c.ipRange)
	}
	_, err := ipam.Subnet{Prefix: prefix("10.0.0.0/8"), Range: netip.PrefixFrom(addr("10.0.0.0"), 99)}.Normalize()
	require.EqualError(t, err, "ip-range invalid Prefix: is no prefix; choose a part of subnet 10.0.0.0/8")
}

// What Normalize passes has a first address for an endpoint, in the range and outside of nothing.
func FuzzNormalize(f *testing.F) {
	f.Add("172.19.0.0/16", "", "")
	f.Add("10.0.0.0/31", "10.0.0.1", "10.0.0.0/32")
	f.Add("fd00::/64", "fd00::ffff", "fd00::/127")
	f.Add("::ffff:10.0.0.0/90", "::ffff:10.0.0.1", "::/0")
	f.Fuzz(func(t *testing.T, p, gateway, ipRange string) {
		var s ipam.Subnet
		s.Prefix, _ = netip.ParsePrefix(p)
		s.Gateway, _ = netip.ParseAddr(gateway)
		s.Range, _ = netip.ParsePrefix(ipRange)
		n, err := s.Normalize()
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			// Leases of what was refused are of no use, but no danger either.
			l := ipam.NewLeases(s, time.Minute)
			_ = l.Take(s.Gateway)
			if a, err := l.Allocate(time.Unix(0, 0)); err == nil {
				l.Release(a, time.Unix(0, 0))
			}
			return
		}
		again, err := n.Normalize()
		require.NoError(t, err)
		require.Equal(t, n, again)
		require.True(t, n.Prefix.Contains(n.Gateway))

		l := ipam.NewLeases(n, time.Minute)
		a, err := l.Allocate(time.Unix(0, 0))
		require.NoError(t, err)
		require.True(t, n.Prefix.Contains(a))
		require.True(t, !n.Range.IsValid() || n.Range.Contains(a))
		require.NotEqual(t, n.Gateway, a)
		require.ErrorIs(t, l.Take(a), ipam.ErrTaken)
		require.ErrorIs(t, l.Take(n.Gateway), ipam.ErrReserved)
	})
}

func TestOverlap(t *testing.T) {
	taken := []ipam.Taken{
		{prefix("0.0.0.0/0"), "the host's route by eth0"},
		{prefix("128.0.0.0/1"), "the host's route by tun0"},
		{prefix("::/0"), "the host's route by eth0"},
		{prefix("fc00::/7"), "the host's route by tun0"},
		{netip.Prefix{}, "nothing"},
		{prefix("172.19.4.0/24"), `network "x"`},
		{prefix("10.0.0.0/8"), "the host's route by eth1"},
		{prefix("fd00:5::/64"), `network "y"`},
	}
	for s, want := range map[string]string{
		"172.18.0.0/16":   "",
		"172.19.0.0/16":   `subnet 172.19.0.0/16: overlaps 172.19.4.0/24 of network "x"; choose another with --subnet`,
		"172.19.4.128/25": `subnet 172.19.4.128/25: overlaps 172.19.4.0/24 of network "x"; choose another with --subnet`,
		"10.1.0.0/16":     "subnet 10.1.0.0/16: overlaps 10.0.0.0/8 of the host's route by eth1; choose another with --subnet",
		"fd00:4::/64":     "",
		"fd00:5::/48":     `subnet fd00:5::/48: overlaps fd00:5::/64 of network "y"; choose another with --subnet`,
	} {
		err := ipam.Overlap(prefix(s), taken)
		if want == "" {
			assert.NoError(t, err)
		} else {
			assert.EqualError(t, err, want)
		}
	}
}
