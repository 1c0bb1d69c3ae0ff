// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The interfaces of the topology. The clients have one each, the host has two.
const (
	ClientIf = "eth0" // of Client and of Client2
	HostIf   = "up0"  // of Host, towards Client
	HostIf2  = "up1"  // of Host, towards Client2
)

// The addresses of the topology: documentation ranges only (RFC 5737, RFC 3849).
var (
	Client4   = netip.MustParseAddr("192.0.2.2")
	Client6   = netip.MustParseAddr("2001:db8:1::2")
	Host4     = netip.MustParseAddr("192.0.2.1") // as Client sees the host
	Host6     = netip.MustParseAddr("2001:db8:1::1")
	HostB4    = netip.MustParseAddr("198.51.100.1") // as Client2 sees the host
	HostB6    = netip.MustParseAddr("2001:db8:2::1")
	Client24  = netip.MustParseAddr("198.51.100.2")
	Client26  = netip.MustParseAddr("2001:db8:2::2")
	Internet4 = netip.MustParseAddr("203.0.113.1") // on the loopback interface of Client2
	Internet6 = netip.MustParseAddr("2001:db8:3::1")
)

// Opts are the ways in which labs differ. The zero value is a host before Docker
// starts: it does not forward, and bridged packets do not pass netfilter.
type Opts struct {
	// Forwarding switches forwarding on in the host, both families. The engine does it
	// as well: IPv4 when it starts, IPv6 when it makes a network with IPv6.
	Forwarding bool
	// BridgeNetfilter lets bridged packets pass the host's iptables rules, as on
	// machines that have br_netfilter loaded. The FORWARD policy then drops them.
	BridgeNetfilter bool
	// Plain is a host without any netfilter rule of the lab's own: no FORWARD policy, no connection
	// tracking, no counters. For measurements, in which each of those would cost something.
	Plain bool
	// Sysctls of the host's namespace, set last.
	Sysctls map[string]string
}

// Lab is one topology. It lives as long as the test that made it.
type Lab struct {
	Client, Host, Client2 *NS

	// Dir is an empty directory with a short path (sockets fit), removed with the lab.
	Dir string
	// Cgroup is the cgroup2 directory that stands for the host's root cgroup: the
	// engine, its proxies and containers, the daemon under test and all other commands
	// in the host's namespace run below it.
	Cgroup string
	// BPFFS is an empty directory in a BPF file system.
	BPFFS string
	// Tool is the test tool, a static binary: see internal/lab/tool.
	Tool string

	name    string
	serial  atomic.Int64 // numbers the log files
	tools   *os.File     // cgroup of the commands in the host's namespace
	outside *os.File     // cgroup of the commands in the others
}

// labs numbers the labs of this process.
var labs atomic.Int64

// New builds a lab, and removes it when the test ends. The test is skipped without
// root, unless BPFNET_REQUIRE_ROOT is set; it fails when the machine lacks what the lab
// needs, or when the test's package does not call [Main] from its TestMain.
func New(t testing.TB, opts Opts) *Lab {
	t.Helper()
	if !mainRuns {
		t.Fatal("no leak check: call lab.Main from TestMain")
	}
	NeedRoot(t)
	l := &Lab{name: fmt.Sprintf("%s-%d", processTag, labs.Add(1)), Tool: buildTool(t)}
	l.makeDirs(t)
	l.makeCgroup(t)
	l.makeTopology(t)
	if !opts.Plain {
		l.makeNetfilter(t)
	}

	bridged := "0"
	if opts.BridgeNetfilter {
		bridged = "1"
	}
	if l.hasSysctl("net.bridge.bridge-nf-call-iptables") {
		for _, family := range []string{"iptables", "ip6tables", "arptables"} {
			l.Host.Sysctl(t, "net.bridge.bridge-nf-call-"+family, bridged)
		}
	} else if opts.BridgeNetfilter {
		t.Fatal("this kernel has no br_netfilter")
	}
	if opts.Forwarding {
		l.Host.Sysctl(t, "net.ipv4.ip_forward", "1")
		l.Host.Sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	} else {
		l.Host.Sysctl(t, "net.ipv4.ip_forward", "0")
	}
	for key, value := range opts.Sysctls {
		l.Host.Sysctl(t, key, value)
	}
	return l
}

// NeedRoot skips a test that does not run as root, or fails it when
// BPFNET_REQUIRE_ROOT is set, as it is where every test must have run.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("BPFNET_REQUIRE_ROOT") != "" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

// BPFFS makes an empty directory in a BPF file system, which is mounted if there is
// none, and removes it, with what was pinned below it, when the test ends.
func BPFFS(t testing.TB) string {
	t.Helper()
	NeedRoot(t)
	return makeBPFFS(t, fmt.Sprintf("%s-%d", processTag, labs.Add(1)))
}

func makeBPFFS(t testing.TB, name string) string {
	t.Helper()
	if err := mountBPFFS(t); err != nil {
		t.Fatalf("mount bpffs: %v", err)
	}
	dir := filepath.Join(bpffsRoot, name)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove pins: %v", err)
		}
	})
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

const bpffsRoot = "/sys/fs/bpf"

// mountBPFFS mounts the BPF file system where every tool expects it. It stays mounted:
// other test processes may have begun to use it.
func mountBPFFS(t testing.TB) error {
	var st unix.Statfs_t
	return withMachineLock(func() error {
		if err := unix.Statfs(bpffsRoot, &st); err != nil {
			return err
		}
		if st.Type == unix.BPF_FS_MAGIC {
			return nil
		}
		t.Logf("%s was not mounted; it is now, and stays so", bpffsRoot)
		return unix.Mount("bpffs", bpffsRoot, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	})
}

func (l *Lab) makeDirs(t testing.TB) {
	t.Helper()
	l.Dir = filepath.Join(os.TempDir(), l.name)
	t.Cleanup(func() {
		if err := removeTree(l.Dir); err != nil {
			t.Errorf("remove lab directory: %v", err)
		}
	})
	if err := os.Mkdir(l.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	l.BPFFS = makeBPFFS(t, l.name)
}

// makeCgroup makes the cgroups. Processes stand in leaves only, as cgroup2 asks for
// when controllers are enabled:
//
//	bl-…/host/          Lab.Cgroup
//	        ├─ tools       commands in the host's namespace, the engine, the daemon
//	        └─ containers  the engine's --cgroup-parent
//	bl-…/outside        commands in the clients' namespaces
func (l *Lab) makeCgroup(t testing.TB) {
	t.Helper()
	root, err := cgroup2Root()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, l.name)
	l.Cgroup = filepath.Join(dir, "host")
	t.Cleanup(func() {
		if err := killCgroup(dir); err != nil {
			t.Error(err)
		}
		if err := removeCgroups(l.name); err != nil {
			t.Errorf("remove cgroups: %v", err)
		}
	})
	for _, d := range []string{dir, l.Cgroup, l.cgroup("tools"), l.cgroup("containers"), filepath.Join(dir, "outside")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	l.tools = openDir(t, l.cgroup("tools"))
}

func (l *Lab) cgroup(leaf string) string { return filepath.Join(l.Cgroup, leaf) }

func openDir(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func (l *Lab) makeTopology(t testing.TB) {
	t.Helper()
	l.outside = openDir(t, filepath.Join(filepath.Dir(l.Cgroup), "outside"))
	l.Client = l.NewNS(t, "client")
	l.Host = l.newNS(t, l.name+"-host", l.tools)
	l.Client2 = l.NewNS(t, "client2")

	Join(t,
		End{l.Client, ClientIf, []netip.Prefix{addr(Client4, 24), addr(Client6, 64)}},
		End{l.Host, HostIf, []netip.Prefix{addr(Host4, 24), addr(Host6, 64)}})
	Join(t,
		End{l.Client2, ClientIf, []netip.Prefix{addr(Client24, 24), addr(Client26, 64)}},
		End{l.Host, HostIf2, []netip.Prefix{addr(HostB4, 24), addr(HostB6, 64)}})
	l.Client2.setUp(t, "lo", addr(Internet4, 32), addr(Internet6, 128))
	l.Client.routeByDefault(t, Host4, Host6)
	l.Host.routeByDefault(t, Client24, Client26)
	l.Client2.routeByDefault(t, HostB4, HostB6)
}

// NewNS makes another namespace that stands for a machine outside the host: lo is up,
// [Join] connects it. Its full name is the lab's followed by this one.
func (l *Lab) NewNS(t testing.TB, name string) *NS {
	t.Helper()
	return l.newNS(t, l.name+"-"+name, l.outside)
}

// addr is an address with its prefix length in bits.
func addr(a netip.Addr, bits int) netip.Prefix { return netip.PrefixFrom(a, bits) }

// End is one end of a link between two namespaces.
type End struct {
	NS    *NS
	If    string // interface name, at most 15 bytes
	Addrs []netip.Prefix
}

// Join makes a veth pair between two namespaces, which may be of different labs, and
// gives its ends their addresses. Both are up and answer when it returns. Neither is
// ever seen in a third namespace.
func Join(t testing.TB, a, b End) {
	t.Helper()
	peer, err := os.Open(b.NS.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	a.NS.link(t, func(h *netlink.Handle) error {
		return h.LinkAdd(&netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: a.If},
			PeerName:      b.If,
			PeerNamespace: netlink.NsFd(peer.Fd()),
		})
	})
	a.NS.setUp(t, a.If, a.Addrs...)
	b.NS.setUp(t, b.If, b.Addrs...)
	a.NS.noticeCarrier(t, a.If)
	b.NS.noticeCarrier(t, b.If)
}

// setUp gives an interface its addresses and sets it up.
func (n *NS) setUp(t testing.TB, ifname string, addrs ...netip.Prefix) {
	t.Helper()
	n.link(t, func(h *netlink.Handle) error {
		link, err := h.LinkByName(ifname)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if err := h.AddrAdd(link, netlinkAddr(a)); err != nil {
				return fmt.Errorf("add %v to %s: %w", a, ifname, err)
			}
		}
		return h.LinkSetUp(link)
	})
}

// noticeCarrier lets the kernel see at once that an interface has a carrier. It looks
// once a second otherwise, and IPv6 does not answer on the interface before. Asking for
// the link state makes it look.
func (n *NS) noticeCarrier(t testing.TB, ifname string) {
	t.Helper()
	n.MustRun(t, "ethtool", ifname)
}

func netlinkAddr(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// AddAddr adds an address to an interface, usable at once.
func (n *NS) AddAddr(t testing.TB, ifname string, p netip.Prefix) {
	t.Helper()
	n.setUp(t, ifname, p)
}

// AddRoute routes a prefix through a gateway on a connected network.
func (n *NS) AddRoute(t testing.TB, to netip.Prefix, via netip.Addr) {
	t.Helper()
	n.link(t, func(h *netlink.Handle) error {
		return h.RouteAdd(&netlink.Route{
			Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())},
			Gw:  via.AsSlice(),
		})
	})
}

func (n *NS) routeByDefault(t testing.TB, via4, via6 netip.Addr) {
	t.Helper()
	n.AddRoute(t, netip.PrefixFrom(netip.IPv4Unspecified(), 0), via4)
	n.AddRoute(t, netip.PrefixFrom(netip.IPv6Unspecified(), 0), via6)
}

// HostCommand prepares a program to be run as a process of the host: in its namespace
// and in its cgroup.
func (l *Lab) HostCommand(ctx context.Context, name string, args ...string) *exec.Cmd {
	return l.Host.Command(ctx, name, args...)
}

func (l *Lab) hasSysctl(key string) bool {
	return l.Host.Do(func() error { _, err := os.Stat(sysctlPath(key)); return err }) == nil
}

// removeTree unmounts what is mounted below dir and removes it.
func removeTree(dir string) error {
	for _, m := range mountsBelow(dir) {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil && err != syscall.EINVAL {
			return fmt.Errorf("unmount %q: %w", m, err)
		}
	}
	return os.RemoveAll(dir)
}

// mountsBelow lists mount points at or below dir, innermost first.
func mountsBelow(dir string) []string {
	all, _ := mounts()
	var below []string
	for i := len(all) - 1; i >= 0; i-- {
		if rel, err := filepath.Rel(dir, all[i].dir); err == nil && filepath.IsLocal(rel) {
			below = append(below, all[i].dir)
		}
	}
	return below
}
