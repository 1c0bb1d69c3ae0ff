// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var nowhere netip.Addr

// defaultsIn lists the default routes of the namespace's main table: "10.9.0.1 eth0".
func defaultsIn(t testing.TB, ns *os.File) (list []string) {
	t.Helper()
	within(t, ns, func(h *netlink.Handle) {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			routes, err := listRoutes(h, family)
			assert.NoError(t, err)
			for _, r := range routes {
				if p := prefixOf(r.Dst); !p.IsValid() || p.Bits() == 0 {
					l, err := h.LinkByIndex(oif(&r))
					assert.NoError(t, err)
					list = append(list, r.Gw.String()+" "+l.Attrs().Name)
				}
			}
		}
	})
	return list
}

// Needs root: whatever was there, afterwards there is the one that was asked for.
func TestSetDefaultRoutes(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	ensure(t, d, dual)
	ensure(t, d, BridgeSpec{Name: "br1", Addrs: prefixes("10.10.0.1/24", "fd10::1/64")})
	ns := newSandbox(t)
	plug(t, d, ns, vethSpec(0, "10.9.0.2/24", "fd09::2/64"), "br0")
	second := vethSpec(1, "10.10.0.2/24", "fd10::2/64")
	second.Name = "eth1"
	plug(t, d, ns, second, "br1")
	gw := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	set := func(gw4, gw6 netip.Addr) []string {
		t.Helper()
		require.NoError(t, d.SetDefaultRoutes(ns, gw4, gw6))
		return defaultsIn(t, ns)
	}
	require.Empty(t, set(nowhere, nowhere))
	for range 2 {
		require.Equal(t, []string{"10.9.0.1 eth0", "fd09::1 eth0"}, set(gw("10.9.0.1"), gw("fd09::1")))
	}
	require.Equal(t, []string{"10.10.0.1 eth1", "fd09::1 eth0"}, set(gw("10.10.0.1"), gw("fd09::1")))
	require.Equal(t, []string{"10.10.0.1 eth1", "fd10::1 eth1"}, set(gw("10.10.0.1"), gw("fd10::1")))
	require.Equal(t, []string{"fd10::1 eth1"}, set(nowhere, gw("fd10::1")))
	require.Equal(t, []string{"10.9.0.1 eth0"}, set(gw("10.9.0.1"), nowhere))

	// Routes of other metrics are what else would be a way out.
	within(t, ns, func(h *netlink.Handle) {
		for _, via := range []string{"10.10.0.1", "fd10::1"} {
			assert.NoError(t, h.RouteAdd(&netlink.Route{Gw: net.ParseIP(via), Priority: 5000}))
		}
	})
	require.Len(t, defaultsIn(t, ns), 3)
	require.Equal(t, []string{"10.9.0.1 eth0", "fd09::1 eth0"}, set(gw("10.9.0.1"), gw("fd09::1")))

	// No route is better than one that nothing can reach, and the old one is better than none.
	err := d.SetDefaultRoutes(ns, gw("10.99.0.1"), gw("fd09::1"))
	require.EqualError(t, err, "default route via 10.99.0.1: no device of the sandbox reaches it")
	require.Error(t, d.SetDefaultRoutes(ns, gw("10.9.0.1"), gw("fd99::1")))
	require.Equal(t, []string{"10.9.0.1 eth0", "fd09::1 eth0"}, defaultsIn(t, ns))

	require.NoError(t, d.DeleteLink("bpv-0"))
	require.Empty(t, defaultsIn(t, ns), "gone with its device")
	require.Equal(t, []string{"10.10.0.1 eth1", "fd10::1 eth1"}, set(gw("10.10.0.1"), gw("fd10::1")))
	exchange(t, ns, d.ns, dual.Addrs[0].Addr())
}

// Needs root: lo of a new namespace is down, and has its addresses when it is up.
func TestLoopbackUp(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	ns := newSandbox(t)
	require.Zero(t, attrsIn(t, ns, "lo").RawFlags&unix.IFF_UP)
	require.NoError(t, d.LoopbackUp(ns))
	require.NoError(t, d.LoopbackUp(ns))
	exchange(t, ns, ns, netip.MustParseAddr("127.0.0.1"))
	exchange(t, ns, ns, netip.MustParseAddr("::1"))
}

// Needs root: what leads somewhere in particular is listed, and nothing else.
func TestRoutes(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	require.NoError(t, d.LoopbackUp(d.ns))
	got, err := d.Routes(nil)
	require.NoError(t, err)
	require.Empty(t, got)

	ensure(t, d, dual) // without a port: its routes are there all the same
	up, peer := addVeth(t, "up0", "p0"), linkNamed(t, "p0")
	addAddr(t, up, "192.0.2.1/24")
	addAddr(t, up, "2001:db8::1/64")
	require.NoError(t, netlink.LinkSetUp(up))
	require.NoError(t, netlink.LinkSetUp(peer))
	via := func(dst, gw string) *netlink.Route {
		return &netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst)), Gw: net.ParseIP(gw)}
	}
	for _, r := range []*netlink.Route{
		via("0.0.0.0/0", "192.0.2.9"), via("::/0", "2001:db8::9"),
		via("0.0.0.0/1", "192.0.2.9"), via("128.0.0.0/1", "192.0.2.9"), via("2000::/3", "2001:db8::9"),
		via("10.200.0.0/16", "192.0.2.9"), via("172.20.0.7/32", "192.0.2.9"), via("fd77::/48", "2001:db8::9"),
		{Dst: ipNet(netip.MustParsePrefix("169.254.0.0/16")), LinkIndex: up.Attrs().Index},
		{Dst: ipNet(netip.MustParsePrefix("224.0.0.0/4")), LinkIndex: up.Attrs().Index},
		{Dst: ipNet(netip.MustParsePrefix("10.0.0.0/8")), Type: unix.RTN_UNREACHABLE},
		{Dst: ipNet(netip.MustParsePrefix("10.3.0.0/16")), LinkIndex: up.Attrs().Index, Table: 100},
		{Dst: ipNet(netip.MustParsePrefix("10.4.0.0/16")), MultiPath: []*netlink.NexthopInfo{
			{LinkIndex: up.Attrs().Index, Gw: net.IPv4(192, 0, 2, 8)}, {LinkIndex: up.Attrs().Index, Gw: net.IPv4(192, 0, 2, 9)},
		}},
	} {
		require.NoError(t, netlink.RouteAdd(r), r.String())
	}
	got, err = d.Routes(nil)
	require.NoError(t, err)
	var want []Route
	for dst, dev := range map[string]string{
		"10.9.0.0/24": "br0", "fd09::/64": "br0", "192.0.2.0/24": "up0", "2001:db8::/64": "up0",
		"10.200.0.0/16": "up0", "172.20.0.7/32": "up0", "fd77::/48": "up0", "10.4.0.0/16": "up0",
	} {
		want = append(want, Route{netip.MustParsePrefix(dst), dev})
	}
	require.ElementsMatch(t, want, got)
}
