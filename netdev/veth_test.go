// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/policy"
)

// noDAD is less than the detection of duplicate addresses takes (RFC 4862 5.4: a second, and up to one
// more at random), and than a first packet's repetition.
const noDAD = 900 * time.Millisecond

func itoa(i int) string { return strconv.Itoa(i) }

// newSandbox makes a network namespace that lives until the test ends.
func newSandbox(t testing.TB) *os.File {
	t.Helper()
	f, err := makeNetNS()
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func makeNetNS() (f *os.File, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			f, err = OpenNetNS(threadNetNS)
		}
	}()
	<-done
	return f, err
}

// vethSpec is the i-th pair, with eth0 in the sandbox.
func vethSpec(i int, addrs ...string) VethSpec {
	return VethSpec{
		Host: "bpv-" + itoa(i), Name: "eth0",
		MAC:   policy.MAC{0x02, 0x42, 10, 9, byte(i >> 8), byte(i)},
		Addrs: prefixes(addrs...),
	}
}

func plug(t testing.TB, d *Devices, ns *os.File, v VethSpec, bridge string) {
	t.Helper()
	_, err := d.CreateVeth(ns, v)
	require.NoError(t, err)
	require.NoError(t, d.PlugIn(ns, v, bridge))
}

// within runs f with a netlink handle in the namespace.
func within(t testing.TB, ns *os.File, f func(h *netlink.Handle)) {
	t.Helper()
	require.NoError(t, inNetNSWithHandle(ns, func(h *netlink.Handle) error { f(h); return nil }))
}

func attrsIn(t testing.TB, ns *os.File, name string) (a netlink.LinkAttrs) {
	t.Helper()
	within(t, ns, func(h *netlink.Handle) {
		if l, err := h.LinkByName(name); assert.NoError(t, err) {
			a = *l.Attrs()
		}
	})
	return a
}

func linkNamesIn(t testing.TB, ns *os.File) (list []string) {
	t.Helper()
	within(t, ns, func(h *netlink.Handle) {
		links, err := retry("list", h.LinkList)
		assert.NoError(t, err)
		for _, l := range links {
			list = append(list, l.Attrs().Name)
		}
	})
	// Whatever modules are loaded add devices of their own to each namespace.
	return slices.DeleteFunc(list, func(s string) bool { return slices.Contains(kernelDevices(), s) })
}

// kernelDevices are what any new namespace holds on this machine, but for lo.
var kernelDevices = sync.OnceValue(func() (list []string) {
	f, err := makeNetNS()
	if err != nil {
		return nil
	}
	defer f.Close()
	_ = inNetNSWithHandle(f, func(h *netlink.Handle) error {
		links, _ := retry("list", h.LinkList)
		for _, l := range links {
			if n := l.Attrs().Name; n != "lo" {
				list = append(list, n)
			}
		}
		return nil
	})
	return list
})

func sysctlIn(t testing.TB, ns *os.File, path string) (value string) {
	t.Helper()
	require.NoError(t, inNetNS(ns, func() (err error) { value, err = ReadSysctl(path); return err }))
	return value
}

// exchange has the namespace from talk by TCP with addr, which to has, and returns how long it took.
func exchange(t testing.TB, from, to *os.File, addr netip.Addr) time.Duration {
	t.Helper()
	var ln net.Listener
	require.NoError(t, inNetNS(to, func() (err error) {
		ln, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	}))
	defer ln.Close()
	echoed := make(chan struct{})
	go func() {
		defer close(echoed)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, c)
	}()

	start := time.Now()
	var c net.Conn
	err := inNetNS(from, func() (err error) {
		c, err = net.DialTimeout("tcp", ln.Addr().String(), 10*time.Second)
		return err
	})
	if err != nil {
		ln.Close()
		<-echoed
		require.NoError(t, err)
	}
	defer c.Close()
	msg := bytes.Repeat([]byte("sandbox "), 4096) // many segments
	go func() { _, _ = c.Write(msg) }()
	got := make([]byte, len(msg))
	_, err = io.ReadFull(c, got)
	took := time.Since(start)
	c.Close()
	<-echoed
	require.NoError(t, err)
	require.Equal(t, msg, got)
	return took
}

// churn makes and deletes devices in another namespace until the test ends, so that the kernel's
// workers have to wait for the lock of the interfaces.
func churn(t *testing.T) {
	t.Helper()
	ns, stop, ended := newSandbox(t), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		assert.NoError(t, inNetNSWithHandle(ns, func(h *netlink.Handle) error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "c0"
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				pair := &netlink.Veth{LinkAttrs: attrs, PeerName: "c1"}
				if err := errors.Join(h.LinkAdd(pair), h.LinkSetUp(pair), h.LinkDel(pair)); err != nil {
					return err
				}
			}
		}))
	}()
	t.Cleanup(func() { close(stop); <-ended })
}

// Needs root: sandboxes and host talk over a bridge by both families the moment that PlugIn returns,
// on a busy machine too: no first packet is lost, which would cost a second.
func TestTraffic(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	for range 3 {
		churn(t)
	}
	require.NoError(t, d.LoopbackUp(d.ns))
	ensure(t, d, dual)
	host := addVeth(t, "up0", "upp0") // a way out, as far as the sandboxes can tell
	addAddr(t, host, "198.51.100.1/24")
	addAddr(t, host, "2001:db8::1/64")
	require.NoError(t, netlink.LinkSetUp(host))
	require.NoError(t, netlink.LinkSetUp(linkNamed(t, "upp0")))
	out := []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8::1")}

	rounds := 5
	if os.Getenv("BPFNET_FULL") == "1" {
		rounds = 50
	}
	for round := range rounds {
		var ns [2]*os.File
		var specs [2]VethSpec
		for i := range ns {
			ns[i] = newSandbox(t)
			specs[i] = vethSpec(i, "10.9.0."+itoa(2+i)+"/24", "fd09::"+itoa(2+i)+"/64")
			require.NoError(t, d.LoopbackUp(ns[i]))
			plug(t, d, ns[i], specs[i], "br0")
			require.NoError(t, d.SetDefaultRoutes(ns[i], dual.Addrs[0].Addr(), dual.Addrs[1].Addr()))
			for f, p := range dual.Addrs {
				assert.Less(t, exchange(t, ns[i], d.ns, p.Addr()), noDAD, "round %d: sandbox %d to gateway %s", round, i, p)
				assert.Less(t, exchange(t, d.ns, ns[i], specs[i].Addrs[f].Addr()), noDAD, "round %d: host to sandbox %d: %s", round, i, specs[i].Addrs[f])
			}
		}
		for f := range dual.Addrs {
			assert.Less(t, exchange(t, ns[0], ns[1], specs[1].Addrs[f].Addr()), noDAD)
			assert.Less(t, exchange(t, ns[1], ns[0], specs[0].Addrs[f].Addr()), noDAD)
			exchange(t, ns[0], ns[0], specs[0].Addrs[f].Addr())
			if f == 0 || round == 0 { // detection for 2001:db8::1 takes a second or two
				exchangeWhenReady(t, ns[0], d.ns, out[f])
			}
		}
		for i := range ns {
			require.NoError(t, d.DeleteLink(specs[i].Host))
			require.Equal(t, []string{"lo"}, linkNamesIn(t, ns[i]))
		}
	}
}

// exchangeWhenReady waits until the host's address has passed its detection of duplicates.
func exchangeWhenReady(t *testing.T, from, to *os.File, addr netip.Addr) {
	t.Helper()
	lab.Eventually(t, 10*time.Second, addr.String()+" can be listened on", func() bool {
		return inNetNS(to, func() error {
			ln, err := net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
			if err != nil {
				return err
			}
			return ln.Close()
		}) == nil
	})
	exchange(t, from, to, addr)
}

// Needs root: both ends are as asked, in each mix of families, also where the namespace has IPv6 off.
func TestCreateVeth(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	ensure(t, d, dual)
	for name, c := range map[string]struct {
		addrs []string
		off6  string
	}{
		"dual stack": {[]string{"10.9.0.2/24", "fd09::2/64"}, "0"},
		"IPv4":       {[]string{"10.9.0.2/24"}, "1"},
		"IPv6":       {[]string{"fd09::2/64"}, "0"},
		"none":       {nil, "1"},
	} {
		for _, inherited := range []string{"0", "1"} {
			ns := newSandbox(t)
			require.NoError(t, inNetNS(ns, func() error { return WriteSysctl("net/ipv6/conf/default/disable_ipv6", inherited) }))
			v := vethSpec(7, c.addrs...)
			v.Name, v.MTU = "eth3", 1280
			index, err := d.CreateVeth(ns, v)
			require.NoError(t, err, name)

			host, peer := linkNamed(t, v.Host).Attrs(), attrsIn(t, ns, "eth3")
			require.Equal(t, index, host.Index)
			require.Equal(t, Alias, host.Alias)
			require.Equal(t, byte(0xfe), host.HardwareAddr[0])
			require.Equal(t, v.MAC[:], []byte(peer.HardwareAddr))
			require.Equal(t, []int{1280, 1280}, []int{host.MTU, peer.MTU})
			require.Zero(t, host.MasterIndex)
			require.Zero(t, (host.RawFlags|peer.RawFlags)&unix.IFF_UP, "both down")
			require.Equal(t, []string{"lo", "eth3"}, linkNamesIn(t, ns))
			require.Equal(t, "1", sysctl(t, "net/ipv6/conf/bpv-7/disable_ipv6"))
			require.Equal(t, c.off6, sysctlIn(t, ns, "net/ipv6/conf/eth3/disable_ipv6"), name)
			require.Equal(t, "0", sysctlIn(t, ns, "net/ipv6/conf/eth3/accept_ra"))

			require.NoError(t, d.PlugIn(ns, v, "br0"))
			addrs := func() (got []string) {
				within(t, ns, func(h *netlink.Handle) { got = addrsOn(t, h, "eth3") })
				return got
			}
			want := slices.Clone(c.addrs)
			require.Subset(t, append(addrs(), ""), append(want, ""), name)
			if c.off6 == "0" {
				want = append(want, linkLocal(v.MAC).String()+"/64")
			}
			lab.Eventually(t, noDAD, "the link-local address is no longer tentative", func() bool { return len(addrs()) == len(want) })
			require.ElementsMatch(t, want, addrs(), name)
			require.Empty(t, addrsOn(t, d.handle, v.Host), "the port has none")
			link, ok, err := d.Link(index)
			require.NoError(t, err)
			require.True(t, ok)
			require.Equal(t, policy.Link{Ifindex: index, Name: v.Host, Bridge: "br0", PeerMAC: v.MAC, PeerNS: link.PeerNS}, link)
			require.Empty(t, snapshot(t, d).Uplinks)
			for _, a := range v.Addrs {
				exchange(t, d.ns, ns, a.Addr())
			}
			require.NoError(t, d.DeleteLink(v.Host))
		}
	}
}

// linkLocal is the address that the kernel makes of a MAC (RFC 4291 appendix A).
func linkLocal(m policy.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// Needs root: a stray of ours makes room, all else is refused, and a failure leaves nothing at all.
func TestCreateVethRefuses(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	ns, other := newSandbox(t), newSandbox(t)
	old, err := d.CreateVeth(other, vethSpec(1, "10.9.0.2/24"))
	require.NoError(t, err)
	got, err := d.CreateVeth(ns, vethSpec(1, "10.9.0.3/24"))
	require.NoError(t, err, "a stray")
	require.NotEqual(t, old, got)
	require.Equal(t, []string{"lo"}, linkNamesIn(t, other))
	require.NoError(t, d.DeleteLink("bpv-1"))

	addVeth(t, "bpv-2", "bpv-2p")
	ensure(t, d, BridgeSpec{Name: "bpv-3"})
	require.NoError(t, inNetNS(ns, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth9"
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	}))
	before, inside := snapshotLinks(t, d), linkNamesIn(t, ns)
	file, err := os.Open("/dev/null")
	require.NoError(t, err)
	defer file.Close()
	closed, err := makeNetNS()
	require.NoError(t, err)
	closed.Close()

	for _, c := range []struct {
		ns   *os.File
		edit func(v *VethSpec)
		text string
	}{
		{ns, func(v *VethSpec) { v.Host = "bpv-2" }, "interface bpv-2: create: a device of that name exists already and is not bpfnet's"},
		{ns, func(v *VethSpec) { v.Host = "bpv-3" }, "interface bpv-3: create: a device of that name exists already and is not"},
		{ns, func(v *VethSpec) { v.Name = "eth9" }, "interface bpv-0: create: the sandbox has a device eth9 already"},
		{ns, func(v *VethSpec) { v.Name = "lo" }, "the sandbox has a device lo already"},
		{ns, func(v *VethSpec) { v.Name = "" }, `interface bpv-0: "" in the sandbox: a device's name has`},
		{ns, func(v *VethSpec) { v.Host = "" }, "a device's name has"},
		{ns, func(v *VethSpec) { v.MAC = policy.MAC{} }, "MAC 00:00:00:00:00:00 is not one of a single device"},
		{ns, func(v *VethSpec) { v.MAC[0] |= 1 }, "is not one of a single device"},
		{ns, func(v *VethSpec) { v.MTU = 1000 }, "MTU 1000 is too small for IPv6"},
		{ns, func(v *VethSpec) { v.MTU, v.Addrs = 20, nil }, "create: "},
		{ns, func(v *VethSpec) { v.Addrs = prefixes("10.9.0.2/24", "ff02::1/64") }, "add address ff02::1/64: "},
		{ns, func(v *VethSpec) { v.Addrs = prefixes("::1/128") }, "add address ::1/128: "},
		{file, func(*VethSpec) {}, "create: "},
		{closed, func(*VethSpec) {}, "create: "},
	} {
		v := vethSpec(0, "10.9.0.2/24", "fd09::2/64")
		c.edit(&v)
		_, err := d.CreateVeth(c.ns, v)
		require.ErrorContains(t, err, c.text)
		require.Equal(t, before, snapshotLinks(t, d), c.text)
		require.Equal(t, inside, linkNamesIn(t, ns), c.text)
	}
}

func snapshotLinks(t testing.TB, d *Devices) (list []string) {
	t.Helper()
	links, err := d.links()
	require.NoError(t, err)
	for _, l := range links {
		list = append(list, l.name+" "+itoa(l.index))
	}
	return list
}

// Needs root: once or twice is the same, a port moves from bridge to bridge, and what is missing is named.
func TestPlugIn(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	ensure(t, d, dual)
	ensure(t, d, BridgeSpec{Name: "br1", Addrs: prefixes("10.10.0.1/24")})
	ns, v := newSandbox(t), vethSpec(0, "10.9.0.2/24")
	require.EqualError(t, d.PlugIn(ns, v, "br0"), "plug bpv-0 into br0: bpv-0: no such device")
	_, err := d.CreateVeth(ns, v)
	require.NoError(t, err)
	require.EqualError(t, d.PlugIn(ns, v, "br9"), "plug bpv-0 into br9: br9: no such device")
	require.EqualError(t, d.PlugIn(ns, v, "lo"), "plug bpv-0 into lo: lo is no bridge but a device")
	require.ErrorContains(t, d.PlugIn(newSandbox(t), v, "br0"), "plug bpv-0 into br0: eth0: no such device")
	require.NoError(t, d.PlugIn(ns, v, "br0"))
	require.Equal(t, linkNamed(t, "br0").Attrs().Index, linkNamed(t, "bpv-0").Attrs().MasterIndex)
	// The kernel tells of the carrier a moment later.
	lab.Eventually(t, 5*time.Second, "br0 and its port are up", func() bool {
		return linkNamed(t, "bpv-0").Attrs().OperState == netlink.OperUp && linkNamed(t, "br0").Attrs().OperState == netlink.OperUp
	})
	require.Zero(t, countEvents(t, d, func() { require.NoError(t, d.PlugIn(ns, v, "br0")) }, LinkChanged, PortChanged))

	require.NoError(t, d.PlugIn(ns, v, "br1"))
	require.Equal(t, linkNamed(t, "br1").Attrs().Index, linkNamed(t, "bpv-0").Attrs().MasterIndex)
	require.NoError(t, netlink.LinkSetDown(linkNamed(t, "br0")))
	require.EqualError(t, d.PlugIn(ns, v, "br0"), "plug bpv-0 into br0: br0 is down; set it up")
	require.Equal(t, linkNamed(t, "br1").Attrs().Index, linkNamed(t, "bpv-0").Attrs().MasterIndex)
}

// Needs root: no thread stays in a sandbox, whatever is done there at once and how it ends.
func TestNoThreadStays(t *testing.T) {
	enterNS(t)
	d := open(t, Options{})
	ensure(t, d, dual)
	var wg sync.WaitGroup
	sandboxes := make([]*os.File, 8)
	for i := range sandboxes {
		sandboxes[i] = newSandbox(t)
		wg.Go(func() {
			v := vethSpec(i, "10.9.0."+itoa(2+i)+"/24", "fd09::"+itoa(2+i)+"/64")
			_, err := d.CreateVeth(sandboxes[i], v)
			assert.NoError(t, err)
			assert.NoError(t, d.PlugIn(sandboxes[i], v, "br0"))
			assert.NoError(t, d.SetDefaultRoutes(sandboxes[i], dual.Addrs[0].Addr(), dual.Addrs[1].Addr()))
			assert.ErrorIs(t, inNetNS(sandboxes[i], func() error { return unix.EPERM }), unix.EPERM)
		})
	}
	wg.Wait()
	inside := make(map[string]bool)
	for _, f := range sandboxes {
		link, err := os.Readlink("/proc/self/fd/" + itoa(int(f.Fd())))
		require.NoError(t, err)
		inside[link] = true
	}
	require.Len(t, inside, len(sandboxes))
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	require.NoError(t, err)
	require.NotEmpty(t, threads)
	for _, path := range threads {
		link, err := os.Readlink(path)
		if errors.Is(err, os.ErrNotExist) { // ended meanwhile
			continue
		}
		require.NoError(t, err)
		require.False(t, inside[link], path)
	}
}

// Needs root.
func TestOpenNetNS(t *testing.T) {
	own, _ := enterNS(t)
	f, err := OpenNetNS("/proc/self/fd/" + itoa(int(own)))
	require.NoError(t, err)
	defer f.Close()
	var a, b uint64
	a, err = NetnsCookie()
	require.NoError(t, err)
	require.NoError(t, inNetNS(f, func() (err error) { b, err = NetnsCookie(); return err }))
	require.Equal(t, a, b)

	_, err = OpenNetNS("/proc/self/ns/uts")
	require.EqualError(t, err, "open namespace /proc/self/ns/uts: is not a network namespace")
	_, err = OpenNetNS("/dev/null")
	require.EqualError(t, err, "open namespace /dev/null: is not a network namespace")
	_, err = OpenNetNS("/proc/0/ns/net")
	require.EqualError(t, err, "open namespace /proc/0/ns/net: no such file or directory")
	require.ErrorIs(t, err, os.ErrNotExist)
}

// durations are times of one thing.
type durations []time.Duration

func (d *durations) since(start time.Time) { *d = append(*d, time.Since(start)) }

func (d durations) report(b *testing.B, unit string) {
	slices.Sort(d)
	for _, p := range []int{50, 95} {
		b.ReportMetric(float64(d[len(d)*p/100])/float64(time.Millisecond), fmt.Sprintf("p%d-%s", p, unit))
	}
}

// What a sandbox's start and end cost in this package.
func BenchmarkSandbox(b *testing.B) {
	enterNS(b)
	d := open(b, Options{})
	ensure(b, d, dual)
	var making, create, plugging, routes, del durations
	for b.Loop() {
		start := time.Now()
		ns, err := makeNetNS()
		require.NoError(b, err)
		making.since(start)
		v := vethSpec(0, "10.9.0.2/24", "fd09::2/64")
		start = time.Now()
		_, err = d.CreateVeth(ns, v)
		require.NoError(b, err)
		create.since(start)
		start = time.Now()
		require.NoError(b, d.PlugIn(ns, v, "br0"))
		plugging.since(start)
		start = time.Now()
		require.NoError(b, d.SetDefaultRoutes(ns, dual.Addrs[0].Addr(), dual.Addrs[1].Addr()))
		routes.since(start)
		start = time.Now()
		require.NoError(b, d.DeleteLink(v.Host))
		del.since(start)
		ns.Close()
	}
	making.report(b, "namespace-ms")
	create.report(b, "create-ms")
	plugging.report(b, "plugin-ms")
	routes.report(b, "routes-ms")
	del.report(b, "delete-ms")
}
