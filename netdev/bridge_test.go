// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/policy"
)

// A network of both families, as most tests want it.
var dual = BridgeSpec{Name: "br0", Addrs: prefixes("10.9.0.1/24", "fd09::1/64")}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func linkNamed(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	require.NoError(t, err)
	return l
}

// addrsOn lists all addresses of a device, link-local ones included, that are not tentative.
func addrsOn(t testing.TB, h *netlink.Handle, name string) []string {
	t.Helper()
	l, err := h.LinkByName(name)
	require.NoError(t, err)
	list, err := retry("list", func() ([]netlink.Addr, error) { return h.AddrList(l, netlink.FAMILY_ALL) })
	require.NoError(t, err)
	var out []string
	for _, a := range list {
		if a.Flags&unix.IFA_F_TENTATIVE == 0 {
			out = append(out, a.IPNet.String())
		}
	}
	return out
}

// globalsOn is addrsOn without the link-local ones.
func globalsOn(t testing.TB, d *Devices, name string) []netip.Prefix {
	t.Helper()
	got, err := d.globalAddrs(linkNamed(t, name).Attrs().Index)
	require.NoError(t, err)
	return got
}

func sysctl(t testing.TB, path string) string {
	t.Helper()
	v, err := ReadSysctl(path)
	require.NoError(t, err)
	return v
}

func ensure(t testing.TB, d *Devices, b BridgeSpec) bool {
	t.Helper()
	created, err := d.EnsureBridge(b)
	require.NoError(t, err)
	return created
}

// countEvents returns how many events of the kinds f causes. Other kinds can come late from what was
// done before.
func countEvents(t *testing.T, d *Devices, f func(), kinds ...Kind) (n int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events, err := d.Watch(ctx)
	require.NoError(t, err)
	f()
	addVeth(t, "mark", "markp") // what comes after f
	for e := range events {
		if e.Name == "mark" || e.Name == "markp" {
			break
		}
		if slices.Contains(kinds, e.Kind) {
			n++
		}
	}
	require.NoError(t, netlink.LinkDel(linkNamed(t, "mark")))
	return n
}

// Needs root: a new bridge is as it should be, and is so at once, with no port on it.
func TestEnsureBridgeNew(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	require.NoError(t, WriteSysctl("net/ipv6/conf/default/disable_ipv6", "1"), "a host that has IPv6 off on new devices")
	require.True(t, ensure(t, d, dual))

	l := linkNamed(t, "br0")
	a := l.Attrs()
	require.Equal(t, "bridge", l.Type())
	require.Equal(t, Alias, a.Alias)
	require.Equal(t, 1500, a.MTU)
	require.NotZero(t, a.RawFlags&unix.IFF_UP)
	require.Equal(t, []byte{0x02, 0x42}, []byte(a.HardwareAddr[:2]))
	for file, want := range map[string]string{"stp_state": "0", "multicast_snooping": "1"} {
		require.Equal(t, want, bridgeFile(t, "br0", file), file)
	}
	for name, want := range map[string]string{"disable_ipv6": "0", "accept_ra": "0"} {
		require.Equal(t, want, sysctl(t, "net/ipv6/conf/br0/"+name), name)
	}
	require.Equal(t, dual.Addrs, globalsOn(t, d, "br0"))

	require.NoError(t, d.LoopbackUp(d.ns))
	for _, p := range dual.Addrs {
		exchange(t, d.ns, d.ns, p.Addr())
	}

	own, err := d.OwnLinks()
	require.NoError(t, err)
	require.Equal(t, []OwnLink{{Name: "br0", Kind: "bridge", Ifindex: a.Index}}, own)
	snap, err := d.Snapshot(nil, nil)
	require.NoError(t, err)
	require.Empty(t, snap.Uplinks, "ours, though nobody has said that it is served")
	require.Len(t, snap.Bridges, 1)
}

// Needs root: called again, also by another run, it changes nothing; what others changed it mends.
func TestEnsureBridgeAgain(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	require.True(t, ensure(t, d, dual))
	mac := linkNamed(t, "br0").Attrs().HardwareAddr
	later := open(t, Options{})
	require.Zero(t, countEvents(t, d, func() { require.False(t, ensure(t, later, dual)) }, AddrChanged, RouteChanged))

	br := linkNamed(t, "br0")
	for name, harm := range map[string]func(){
		"stray addresses": func() {
			addAddr(t, br, "192.0.2.7/24")
			addAddr(t, br, "2001:db8::7/64")
			addAddr(t, br, "10.9.0.7/24")
		},
		"lost address": func() {
			require.NoError(t, netlink.AddrDel(br, &netlink.Addr{IPNet: ipNet(dual.Addrs[0])}))
		},
		"another prefix length": func() {
			require.NoError(t, netlink.AddrDel(br, &netlink.Addr{IPNet: ipNet(dual.Addrs[0])}))
			addAddr(t, br, "10.9.0.1/16")
		},
		// The new first address of a subnet: the second one falls with it.
		"wrong primary": func() {
			require.NoError(t, netlink.AddrDel(br, &netlink.Addr{IPNet: ipNet(dual.Addrs[0])}))
			addAddr(t, br, "10.9.0.7/24")
			addAddr(t, br, "10.9.0.1/24")
		},
		// With which the kernel takes the IPv6 addresses off.
		"down":     func() { require.NoError(t, netlink.LinkSetDown(br)) },
		"IPv6 off": func() { require.NoError(t, WriteSysctl("net/ipv6/conf/br0/disable_ipv6", "1")) },
	} {
		harm()
		require.False(t, ensure(t, d, dual), name)
		require.ElementsMatch(t, dual.Addrs, globalsOn(t, d, "br0"), name)
		require.ElementsMatch(t, []string{"10.9.0.1/24", "fd09::1/64"}, addrsOn(t, d.handle, "br0"), name)
		require.NotZero(t, linkNamed(t, "br0").Attrs().RawFlags&unix.IFF_UP, name)
	}
	// A link-local address is the kernel's, or the administrator's.
	addAddr(t, br, "169.254.1.1/16")
	require.NoError(t, addAddress(d.handle, br.Attrs().Index, netip.MustParsePrefix("fe80::99/64")))
	require.False(t, ensure(t, d, dual))
	got := addrsOn(t, d.handle, "br0")
	require.Contains(t, got, "169.254.1.1/16")
	require.Contains(t, got, "fe80::99/64")
	require.NoError(t, netlink.AddrDel(br, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("169.254.1.1/16"))}))

	only6 := BridgeSpec{Name: "br0", Addrs: dual.Addrs[1:]}
	require.False(t, ensure(t, d, only6))
	require.Equal(t, only6.Addrs, globalsOn(t, d, "br0"))
	require.False(t, ensure(t, d, BridgeSpec{Name: "br0"}))
	require.Empty(t, globalsOn(t, d, "br0"))

	require.NoError(t, d.DeleteLink("br0"))
	require.True(t, ensure(t, d, dual))
	again := linkNamed(t, "br0").Attrs().HardwareAddr
	require.Equal(t, machineID(), slices.Equal(mac, again), "the MAC comes back with the name")
}

// Needs root: a stated MTU stays, whatever ports come and go.
func TestEnsureBridgeMTU(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	for _, mtu := range []int{1400, 9000} {
		b := BridgeSpec{Name: "br0", Addrs: dual.Addrs, MTU: mtu}
		ensure(t, d, b)
		require.Equal(t, mtu, linkNamed(t, "br0").Attrs().MTU)
		ns := newSandbox(t)
		v := vethSpec(0, "10.9.0.2/24")
		v.MTU = mtu
		plug(t, d, ns, v, "br0")
		require.Equal(t, mtu, linkNamed(t, v.Host).Attrs().MTU)
		require.Equal(t, mtu, attrsIn(t, ns, "eth0").MTU)
		require.NoError(t, d.DeleteLink(v.Host))
		require.Equal(t, mtu, linkNamed(t, "br0").Attrs().MTU, "after the last port")
	}
}

// Needs root: nothing of somebody else's is taken, changed or deleted; a failure leaves nothing.
func TestEnsureBridgeRefuses(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	foreign := addBridge(t, "cni0", "10.88.0.1/16")
	addVeth(t, "v0", "p0")
	before := snapshot(t, d)

	_, err := d.EnsureBridge(BridgeSpec{Name: "cni0", Addrs: dual.Addrs, MTU: 1400})
	require.EqualError(t, err, "bridge cni0: exists already and is not bpfnet's; choose another name")
	require.ErrorIs(t, err, ErrForeign)
	_, err = d.EnsureBridge(BridgeSpec{Name: "v0", Addrs: dual.Addrs})
	require.EqualError(t, err, "bridge v0: a device of that name exists and is no bridge but a veth; choose another name")
	_, err = d.EnsureBridge(BridgeSpec{Name: "v0", Adopt: true})
	require.ErrorContains(t, err, "no bridge")
	for text, b := range map[string]BridgeSpec{
		"a device's name has 1 to 15 characters":         {Name: "sixteen-letters-"},
		"bridge : a device's name":                       {},
		"no name for a device":                           {Name: "a b"},
		"bridge a/b: that is no name":                    {Name: "a/b"},
		"bridge br%d: that is no name":                   {Name: "br%d"},
		"bridge all: that is no name":                    {Name: "all"},
		"bridge grün: that is no name":                   {Name: "grün"},
		"MTU 1200 is too small for IPv6, which needs 12": {Name: "br0", MTU: 1200, Addrs: dual.Addrs},
		"MTU 70000 is not between":                       {Name: "br0", MTU: 70000},
		"set MTU 20: ":                                   {Name: "br0", MTU: 20},
		"add address ff02::1/64: ":                       {Name: "br0", Addrs: prefixes("10.9.0.1/24", "ff02::1/64")},
		"invalid Prefix is no address":                   {Name: "br0", Addrs: []netip.Prefix{{}}},
		"::ffff:10.0.0.1/120 is no address":              {Name: "br0", Addrs: prefixes("::ffff:10.0.0.1/120")},
	} {
		_, err := d.EnsureBridge(b)
		require.ErrorContains(t, err, text)
	}
	require.ErrorIs(t, d.DeleteLink("cni0"), ErrForeign)
	require.EqualError(t, d.DeleteLink("v0"), "delete link v0: is not bpfnet's; left as it is")
	require.NoError(t, d.DeleteLink("gone"))
	require.Error(t, d.DeleteLink(""))
	require.Equal(t, before, snapshot(t, d))

	// By the caller's records it is ours, unless somebody uses it.
	_, err = d.EnsureBridge(BridgeSpec{Name: "cni0", Addrs: dual.Addrs, Adopt: true})
	require.ErrorIs(t, err, ErrForeign)
	require.Equal(t, before, snapshot(t, d))
	for _, p := range globalsOn(t, d, "cni0") {
		require.NoError(t, netlink.AddrDel(foreign, &netlink.Addr{IPNet: ipNet(p)}))
	}
	require.False(t, ensure(t, d, BridgeSpec{Name: "cni0", Addrs: dual.Addrs, Adopt: true}))
	require.Equal(t, foreign.Attrs().Index, linkNamed(t, "cni0").Attrs().Index)
	require.Equal(t, dual.Addrs, globalsOn(t, d, "cni0"))
	require.False(t, ensure(t, d, BridgeSpec{Name: "cni0", Addrs: dual.Addrs}))
	require.NoError(t, d.DeleteLink("cni0"))
	require.True(t, ensure(t, d, BridgeSpec{Name: "cni0", Adopt: true}), "a recorded one that is gone")
}

// Needs root: the methods work on the namespace that was opened, wherever the caller's thread is.
func TestOtherThreads(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	ns := newSandbox(t)
	done := make(chan error)
	go func() { // on a thread of the machine's namespace
		_, err := d.EnsureBridge(dual)
		if err == nil {
			_, err = d.CreateVeth(ns, vethSpec(0, "10.9.0.2/24"))
		}
		if err == nil {
			err = d.PlugIn(ns, vethSpec(0), "br0")
		}
		done <- err
	}()
	require.NoError(t, <-done)
	require.Equal(t, "0", sysctl(t, "net/ipv6/conf/br0/accept_ra"))
	require.Equal(t, "1", sysctl(t, "net/ipv6/conf/bpv-0/disable_ipv6"))
}

func TestBridgeMAC(t *testing.T) {
	seen := make(map[policy.MAC]bool)
	for _, name := range []string{"bpfnet0", "bpn-0123456789a", "br0"} {
		mac := policy.MAC(bridgeMAC(name))
		assert.Equal(t, policy.MAC(bridgeMAC(name)) == mac, machineID(), "fixed on a machine that has an identity")
		assert.Equal(t, []byte{0x02, 0x42}, mac[:2])
		seen[mac] = true
	}
	assert.Len(t, seen, 3)
}

func machineID() bool {
	b, err := os.ReadFile("/etc/machine-id")
	return err == nil && len(b) > 0
}

func snapshot(t testing.TB, d *Devices) policy.Devices {
	t.Helper()
	snap, err := d.Snapshot(nil, nil)
	require.NoError(t, err)
	return snap
}

// bridgeFile reads a bridge's option from a sysfs of the calling thread's namespace.
func bridgeFile(t testing.TB, bridge, file string) string {
	t.Helper()
	dir := t.TempDir()
	// A mount of its own in a mount namespace would be cleaner, but a thread cannot leave one.
	require.NoError(t, unix.Mount("sysfs", dir, "sysfs", unix.MS_RDONLY, ""))
	defer func() { assert.NoError(t, unix.Unmount(dir, 0)) }()
	b, err := os.ReadFile(dir + "/class/net/" + bridge + "/bridge/" + file)
	require.NoError(t, err)
	return string(b[:len(b)-1])
}

// Needs root: the bridge's link-local address, which comes with the first port, needs no second.
func TestBridgeLinkLocal(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	ensure(t, d, dual)
	plug(t, d, newSandbox(t), vethSpec(0, "10.9.0.2/24", "fd09::2/64"), "br0")
	lab.Eventually(t, noDAD, "the bridge has a link-local address that is not tentative", func() bool {
		return slices.ContainsFunc(addrsOn(t, d.handle, "br0"), func(s string) bool {
			return netip.MustParsePrefix(s).Addr().IsLinkLocalUnicast()
		})
	})
}

// What a bridge costs, new or there already, and a look at the routes, with five hundred others present.
func BenchmarkEnsureBridge(b *testing.B) {
	enterNS(b)
	d := open(b, Options{})
	spec := func(i int) BridgeSpec {
		return BridgeSpec{Name: "br" + itoa(i), Addrs: []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), 24),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 9, byte(i >> 8), byte(i), 15: 1}), 64),
		}}
	}
	for i := range 500 {
		ensure(b, d, spec(i))
	}
	b.Run("new", func(b *testing.B) {
		var cost, del durations
		for b.Loop() {
			start := time.Now()
			ensure(b, d, spec(500))
			cost.since(start)
			start = time.Now()
			require.NoError(b, d.DeleteLink("br500"))
			del.since(start)
		}
		cost.report(b, "ensure-ms")
		del.report(b, "delete-ms")
	})
	b.Run("present", func(b *testing.B) {
		var cost durations
		for b.Loop() {
			start := time.Now()
			ensure(b, d, spec(250))
			cost.since(start)
		}
		cost.report(b, "ms")
	})
	b.Run("routes", func(b *testing.B) {
		var cost durations
		for b.Loop() {
			start := time.Now()
			list, err := d.Routes(nil)
			require.NoError(b, err)
			require.GreaterOrEqual(b, len(list), 1000)
			cost.since(start)
		}
		cost.report(b, "ms")
	})
}
