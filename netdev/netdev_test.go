// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/policy"
)

func TestMain(m *testing.M) { lab.Main(m) }

// enterNS moves the test's thread into a network namespace of its own until the test ends, and
// returns a second one. Both have no name and vanish with the test.
func enterNS(t testing.TB) (own, other netns.NsHandle) {
	t.Helper()
	lab.NeedRoot(t)
	runtime.LockOSThread()
	old, err := netns.Get()
	require.NoError(t, err)
	t.Cleanup(func() {
		// A thread that cannot go back stays locked, and ends with the test.
		if err := netns.Set(old); err != nil {
			t.Errorf("leave namespace: %v", err)
		} else {
			runtime.UnlockOSThread()
		}
		old.Close()
	})
	other, err = netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { other.Close() })
	own, err = netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { own.Close() })
	return own, other
}

func open(t testing.TB, opts Options) *Devices {
	t.Helper()
	d, err := Open(opts)
	require.NoError(t, err)
	t.Cleanup(d.Close)
	return d
}

func addBridge(t testing.TB, name, addr string) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	br := &netlink.Bridge{LinkAttrs: attrs}
	require.NoError(t, netlink.LinkAdd(br))
	addAddr(t, br, addr)
	require.NoError(t, netlink.LinkSetUp(br))
	return br
}

func addVeth(t testing.TB, name, peer string) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer}))
	l, err := netlink.LinkByName(name)
	require.NoError(t, err)
	return l
}

func addAddr(t testing.TB, l netlink.Link, addr string) {
	t.Helper()
	a, err := netlink.ParseAddr(addr)
	require.NoError(t, err)
	require.NoError(t, netlink.AddrAdd(l, a))
}

// Needs root: a bridge port whose far end is made here, moved away and renumbered there.
func TestPeerMAC(t *testing.T) {
	_, other := enterNS(t)
	br := addBridge(t, "br0", "172.30.0.1/24")
	veth := addVeth(t, "v0", "p0")
	require.NoError(t, netlink.LinkSetMaster(veth, br))
	peer, err := netlink.LinkByName("p0")
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetHardwareAddr(peer, net.HardwareAddr{2, 0x42, 0, 0, 0, 1}))

	d := open(t, Options{})
	mac := func() policy.MAC {
		t.Helper()
		snap, err := d.Snapshot(map[string]bool{"br0": true}, nil)
		require.NoError(t, err)
		require.Len(t, snap.Links, 1)
		l := snap.Links[0]
		require.Equal(t, policy.Link{Ifindex: veth.Attrs().Index, Name: "v0", Bridge: "br0", PeerMAC: l.PeerMAC, PeerNS: l.PeerNS}, l)
		one, ok, err := d.Link(l.Ifindex)
		require.NoError(t, err)
		require.True(t, ok)
		require.Equal(t, l, one)
		return l.PeerMAC
	}
	require.Equal(t, policy.MAC{2, 0x42, 0, 0, 0, 1}, mac(), "both ends here")

	require.NoError(t, netlink.LinkSetNsFd(peer, int(other)))
	require.Equal(t, policy.MAC{2, 0x42, 0, 0, 0, 1}, mac(), "far end moved")

	h, err := netlink.NewHandleAt(other)
	require.NoError(t, err)
	defer h.Close()
	require.NoError(t, h.LinkSetHardwareAddr(peer, net.HardwareAddr{2, 0x42, 0, 0, 0, 9}))
	require.Equal(t, policy.MAC{2, 0x42, 0, 0, 0, 9}, mac(), "address changed in the other namespace")

	snap, err := d.Snapshot(nil, nil)
	require.NoError(t, err)
	require.Empty(t, snap.Links, "not served")

	_, ok, err := d.Link(br.Attrs().Index)
	require.NoError(t, err)
	require.False(t, ok, "a bridge is no port")
	_, ok, err = d.Link(99999)
	require.NoError(t, err)
	require.False(t, ok, "no such device")
}

// Needs root: the kernel's own devices are sorted into roles as the table test has it.
func TestSnapshotRoles(t *testing.T) {
	_, other := enterNS(t)
	addBridge(t, "served0", "172.30.0.1/24")
	foreign := addBridge(t, "cni0", "10.88.0.1/16")
	port := addVeth(t, "port0", "portp")
	require.NoError(t, netlink.LinkSetMaster(port, foreign))
	up := addVeth(t, "up0", "upp")
	far, err := netlink.LinkByName("upp")
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetNsFd(far, int(other)))
	addAddr(t, up, "192.0.2.1/24")
	addAddr(t, up, "2001:db8::1/64")

	snap, err := open(t, Options{}).Snapshot(map[string]bool{"served0": true}, nil)
	require.NoError(t, err)
	bridges, links, uplinks := names(snap)
	require.Equal(t, []string{"served0", "cni0"}, bridges)
	require.Empty(t, links)
	require.Equal(t, []string{"cni0", "up0"}, uplinks)
	require.True(t, snap.Uplinks[1].Ethernet)
	require.ElementsMatch(t, []netip.Prefix{
		netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64"),
	}, snap.Uplinks[1].Addrs)
	require.Contains(t, snap.HostAddrs, policy.HostAddr{Addr: netip.MustParseAddr("2001:db8::1"), Ifindex: up.Attrs().Index}, "tentative addresses too")

	snap, err = open(t, Options{Uplinks: []string{"portp"}}).Snapshot(nil, nil)
	require.NoError(t, err)
	_, _, uplinks = names(snap)
	require.Equal(t, []string{"portp"}, uplinks)

	_, err = Open(Options{Uplinks: []string{"up1"}})
	require.ErrorContains(t, err, `uplink "up1": no such device; nearest: up0`)
	_, err = Open(Options{Uplinks: []string{"port0"}})
	require.EqualError(t, err, `uplink "port0": it is a port of cni0; name that instead`)
}

// Needs root: each change is reported without delay and with names.
func TestWatch(t *testing.T) {
	enterNS(t)
	br := addBridge(t, "br0", "172.30.0.1/24")
	d := open(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events, err := d.Watch(ctx)
	require.NoError(t, err)
	wait := func(what string, match func(Event) bool) Event {
		t.Helper()
		deadline := time.After(5 * time.Second)
		for {
			select {
			case ev, ok := <-events:
				require.True(t, ok, "channel closed before: %s", what)
				require.NotEqual(t, Resync, ev.Kind)
				if match(ev) {
					return ev
				}
			case <-deadline:
				require.FailNow(t, "no event", what)
			}
		}
	}

	veth := addVeth(t, "v0", "p0")
	idx := veth.Attrs().Index
	wait("new link", func(e Event) bool { return e.Kind == LinkChanged && e.Name == "v0" && !e.Gone && e.Master == 0 })
	require.NoError(t, netlink.LinkSetMaster(veth, br))
	wait("new port", func(e Event) bool {
		return e == Event{Kind: LinkChanged, Ifindex: idx, Name: "v0", Master: br.Attrs().Index, MasterName: "br0"}
	})
	_, ok, err := d.Link(idx)
	require.NoError(t, err)
	require.True(t, ok)

	require.NoError(t, netlink.LinkSetUp(veth))
	addAddr(t, veth, "192.0.2.9/24")
	wait("address", func(e Event) bool { return e == Event{Kind: AddrChanged, Ifindex: idx, Name: "v0"} })
	wait("route", func(e Event) bool { return e.Kind == RouteChanged && e.Ifindex == idx })
	require.NoError(t, netlink.NeighSet(&netlink.Neigh{
		LinkIndex: idx, State: netlink.NUD_PERMANENT, IP: net.IPv4(192, 0, 2, 10), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1},
	}))
	wait("neighbour", func(e Event) bool { return e == Event{Kind: NeighChanged, Ifindex: idx, Name: "v0"} })

	require.NoError(t, netlink.LinkSetNoMaster(veth))
	wait("port left", func(e Event) bool {
		return e.Kind == PortChanged && e.Gone && e.Ifindex == idx && e.MasterName == "br0"
	})
	require.NoError(t, netlink.LinkDel(veth))
	wait("link gone", func(e Event) bool { return e.Kind == LinkChanged && e.Gone && e.Name == "v0" })

	cancel()
	for range events { // until closed
	}
}

// Needs root: what a bridge repeats of a port is no news; that the port has changed or come back is.
func TestWatchRepeatedPort(t *testing.T) {
	enterNS(t)
	br := addBridge(t, "br0", "172.30.0.1/24")
	d := open(t, Options{})
	veth := addVeth(t, "v0", "p0")
	require.NoError(t, netlink.LinkSetMaster(veth, br))
	repeat := func() { // each tells of the whole port
		for i := range 4 {
			require.NoError(t, netlink.LinkSetHairpin(veth, i%2 == 0))
		}
	}
	require.Equal(t, 1, countEvents(t, d, repeat, PortChanged))
	require.GreaterOrEqual(t, countEvents(t, d, func() {
		repeat()
		require.NoError(t, netlink.LinkSetNoMaster(veth))
		require.NoError(t, netlink.LinkSetMaster(veth, br))
	}, PortChanged), 3)
	require.GreaterOrEqual(t, countEvents(t, d, func() {
		repeat()
		require.NoError(t, netlink.LinkSetUp(veth))
	}, PortChanged), 2)
}

// Needs root: a reader that does not read gets a Resync, and then goes on.
func TestWatchOverflow(t *testing.T) {
	enterNS(t)
	br := addBridge(t, "br0", "172.30.0.1/24")
	d := open(t, Options{})
	events, err := d.Watch(t.Context())
	require.NoError(t, err)

	seen := func(match func(Event) bool) bool {
		deadline := time.After(20 * time.Second)
		for {
			select {
			case ev, ok := <-events:
				require.True(t, ok)
				if match(ev) {
					return true
				}
			case <-deadline:
				return false
			}
		}
	}
	// Each change of the MTU is one message of over a kilobyte.
	for i := range 12000 {
		require.NoError(t, netlink.LinkSetMTU(br, 1300+i%2))
	}
	require.True(t, seen(func(e Event) bool { return e.Kind == Resync }))
	addVeth(t, "v0", "p0")
	require.True(t, seen(func(e Event) bool { return e.Name == "v0" }))
}

// Needs root: two namespaces have two cookies, and each keeps its own.
func TestNetnsCookie(t *testing.T) {
	own, other := enterNS(t)
	a, err := NetnsCookie()
	require.NoError(t, err)
	require.NotZero(t, a)
	require.NoError(t, netns.Set(other))
	b, err := NetnsCookie()
	require.NoError(t, err)
	require.NoError(t, netns.Set(own))
	again, err := NetnsCookie()
	require.NoError(t, err)
	require.Equal(t, a, again)
	require.NotEqual(t, a, b)
}

// sysctls reads all of this thread's namespace that forwarding could touch.
func sysctls(t *testing.T) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for _, glob := range []string{"net/ipv4/ip_*", "net/ipv4/conf/*/*", "net/ipv6/conf/*/*", "net/bridge/*"} {
		paths, err := filepath.Glob(filepath.Join(sysctlRoot, glob))
		require.NoError(t, err)
		for _, p := range paths {
			if b, err := os.ReadFile(p); err == nil {
				all[p] = string(b)
			}
		}
	}
	require.NotEmpty(t, all)
	return all
}

// requireSame fails with the differences only: there are some hundred values.
func requireSame(t *testing.T, before map[string]string) {
	t.Helper()
	now := sysctls(t)
	for path, value := range before {
		require.Equal(t, value, now[path], path)
	}
	require.Len(t, now, len(before))
}

// Needs root: switching forwarding on and back leaves every sysctl as it was, those that the
// kernel flips on its own included.
func TestForwardingRestoredExactly(t *testing.T) {
	enterNS(t)
	addVeth(t, "up0", "p0")
	addVeth(t, "up1", "p1")
	for path, value := range map[string]string{
		"net/ipv4/ip_forward":                 "0",
		"net/ipv6/conf/all/forwarding":        "0",
		"net/ipv6/conf/up1/forwarding":        "1", // on its own
		"net/ipv4/conf/p1/forwarding":         "1",
		"net/ipv4/conf/all/accept_redirects":  "1",
		"net/ipv6/conf/up0/accept_ra":         "1",
		"net/ipv6/conf/up1/accept_ra":         "0",
		"net/ipv6/conf/p0/accept_ra":          "1", // no uplink
		"net/bridge/bridge-nf-call-iptables":  "1",
		"net/bridge/bridge-nf-call-ip6tables": "0",
	} {
		if err := WriteSysctl(path, value); err != nil {
			require.ErrorIs(t, err, os.ErrNotExist)
		}
	}
	before := sysctls(t)
	uplinks := []string{"up0", "up1", "gone"}
	plan, err := PlanForwarding(ReadSysctl, uplinks, nil)
	require.NoError(t, err)
	requireSame(t, before)
	changes, err := Apply(plan)
	require.NoError(t, err)

	for path, want := range map[string]string{
		"net/ipv4/ip_forward":                 "1",
		"net/ipv6/conf/all/forwarding":        "1",
		"net/ipv6/conf/up0/forwarding":        "1",
		"net/ipv6/conf/up0/accept_ra":         "2",
		"net/ipv6/conf/up1/accept_ra":         "0",
		"net/ipv6/conf/p0/accept_ra":          "1",
		"net/ipv4/conf/lo/route_localnet":     "1",
		"net/ipv4/conf/lo/accept_local":       "1",
		"net/bridge/bridge-nf-call-iptables":  "0",
		"net/bridge/bridge-nf-call-ip6tables": "0",
	} {
		got, err := ReadSysctl(path)
		if err != nil {
			require.ErrorIs(t, err, os.ErrNotExist)
			continue
		}
		require.Equal(t, want, got, path)
	}

	again, err := PlanForwarding(ReadSysctl, uplinks, changes)
	require.NoError(t, err)
	require.Empty(t, again)
	require.NoError(t, Restore(changes))
	requireSame(t, before)
	require.NoError(t, Restore(changes), "twice is no error")
	requireSame(t, before)
}

// Needs root: what someone else set after us stays, also where the kernel flips it back.
func TestRestoreLeavesLaterChanges(t *testing.T) {
	enterNS(t)
	addVeth(t, "up0", "p0")
	require.NoError(t, WriteSysctl("net/ipv4/ip_forward", "0"))
	require.NoError(t, WriteSysctl("net/ipv6/conf/all/forwarding", "0"))
	require.NoError(t, WriteSysctl("net/ipv6/conf/up0/accept_ra", "1"))
	plan, err := PlanForwarding(ReadSysctl, []string{"up0"}, nil)
	require.NoError(t, err)
	changes, err := Apply(plan)
	require.NoError(t, err)

	require.NoError(t, WriteSysctl("net/ipv6/conf/up0/accept_ra", "0"))
	require.NoError(t, WriteSysctl("net/ipv4/conf/p0/forwarding", "0"))
	require.NoError(t, WriteSysctl("net/ipv4/conf/all/accept_redirects", "1"))
	require.NoError(t, Restore(changes))
	for path, want := range map[string]string{
		"net/ipv4/ip_forward":                "0",
		"net/ipv6/conf/up0/accept_ra":        "0",
		"net/ipv4/conf/p0/forwarding":        "0",
		"net/ipv4/conf/all/accept_redirects": "1",
	} {
		got, err := ReadSysctl(path)
		require.NoError(t, err)
		require.Equal(t, want, got, path)
	}
}

// Needs root: the list is replaced as a whole, and comes back exactly, empty included.
func TestReservedPorts(t *testing.T) {
	enterNS(t)
	for _, old := range [][]PortRange{nil, {{80, 80}, {8000, 8010}}} {
		_, err := SetReservedPorts(old)
		require.NoError(t, err)
		change, err := SetReservedPorts([]PortRange{{20000, 20999}, {21000, 21001}, {443, 443}})
		require.NoError(t, err)
		got, err := ReservedPorts()
		require.NoError(t, err)
		require.Equal(t, []PortRange{{443, 443}, {20000, 21001}}, got)
		none, err := SetReservedPorts(got)
		require.NoError(t, err)
		require.Zero(t, none)
		require.NoError(t, Restore([]Change{change}))
		got, err = ReservedPorts()
		require.NoError(t, err)
		require.Equal(t, old, got)
	}
	r, err := LocalPortRange()
	require.NoError(t, err)
	require.Greater(t, r.Len(), 1000)
}
