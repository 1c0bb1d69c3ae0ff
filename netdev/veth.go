// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// workerWait bounds the wait for the kernel's workers that finish what was asked for. It takes less than
// a millisecond on an idle machine, and as long as others hold the lock of the interfaces on a busy one.
const workerWait = 10 * time.Second

// The kinds of pairs that join sandboxes to bridges, and the choice between them.
const (
	LinkAuto   = "auto" // netkit where the kernel has it
	LinkVeth   = "veth"
	LinkNetkit = "netkit"
)

// VethSpec is the pair of devices that joins a sandbox to a bridge.
type VethSpec struct {
	Host string // the host's end
	Name string // the sandbox's end, as it is called there
	// MAC of the sandbox's end.
	MAC policy.MAC
	// MTU of both ends in bytes. Optional: the kernel's 1500.
	MTU int
	// Addrs of the sandbox's end, with the prefix lengths of the subnets. Without an IPv6 one IPv6 is
	// switched off on that device.
	Addrs []netip.Prefix
}

// CreateVeth makes the pair of the kind that the options say, one end in the host namespace, the other in
// ns, both down, and returns the index of the host's end. What a netkit's far end sends is dropped as long
// as no program sees it. An end with our alias that is left from an earlier run under the same
// name is replaced. When CreateVeth fails nothing is left; it fails with ErrForeign if the host has a
// device of that name that is not ours.
func (d *Devices) CreateVeth(ns *os.File, v VethSpec) (ifindex int, err error) {
	if err := v.check(); err != nil {
		return 0, fmt.Errorf("interface %s: %w", v.Host, err)
	}
	ifindex, err = d.addVeth(ns, v)
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w", v.Host, err)
	}
	if err := d.setUpVeth(ns, v, ifindex); err != nil {
		err = errors.Join(err, delLink(d.handle, ifindex))
		return 0, fmt.Errorf("interface %s: %w", v.Host, err)
	}
	return ifindex, nil
}

func (v VethSpec) check() error {
	if err := checkLink(v.Host, v.MTU, v.Addrs); err != nil {
		return err
	}
	if err := checkLink(v.Name, 0, nil); err != nil {
		return fmt.Errorf("%q in the sandbox: %w", v.Name, err)
	}
	if v.MAC == (policy.MAC{}) || v.MAC[0]&1 != 0 {
		return fmt.Errorf("MAC %s is not one of a single device", net.HardwareAddr(v.MAC[:]))
	}
	return nil
}

// addVeth makes the pair, in the place of a stray if there is one.
func (d *Devices) addVeth(ns *os.File, v VethSpec) (ifindex int, err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = v.Host, v.MTU
	// Not the lowest of the bridge's ports, should anyone's bridge take its MAC from them.
	mac := randomMAC(0xfe)
	attrs.HardwareAddr = mac[:]
	if (d.linkType == LinkAuto || d.linkType == LinkNetkit) && !d.noNetkit.Load() {
		ifindex, err = d.addPair(netkitOf(attrs, ns, v), v)
		if d.linkType == LinkNetkit || !errors.Is(err, unix.EOPNOTSUPP) {
			return ifindex, err
		}
		d.noNetkit.Store(true)
	}
	pair := netlink.NewVeth(attrs)
	pair.PeerName, pair.PeerHardwareAddr, pair.PeerNamespace = v.Name, v.MAC[:], netlink.NsFd(ns.Fd())
	return d.addPair(pair, v)
}

// netkitOf is a netkit that carries Ethernet frames, as a bridge wants them.
func netkitOf(attrs netlink.LinkAttrs, ns *os.File, v VethSpec) *netlink.Netkit {
	pair := &netlink.Netkit{
		LinkAttrs: attrs, Mode: netlink.NETKIT_MODE_L2,
		Policy: netlink.NETKIT_POLICY_FORWARD, PeerPolicy: netlink.NETKIT_POLICY_BLACKHOLE,
		// Marks and priorities do not cross.
		Scrub: netlink.NETKIT_SCRUB_DEFAULT, PeerScrub: netlink.NETKIT_SCRUB_DEFAULT,
	}
	pair.SetPeerAttrs(&netlink.LinkAttrs{
		Name: v.Name, MTU: v.MTU, HardwareAddr: v.MAC[:], Namespace: netlink.NsFd(ns.Fd()),
	})
	return pair
}

func (d *Devices) addPair(pair netlink.Link, v VethSpec) (ifindex int, err error) {
	err = d.handle.LinkAdd(pair)
	if errors.Is(err, unix.EEXIST) {
		if err = d.removeStray(v); err == nil {
			err = d.handle.LinkAdd(pair)
		}
	}
	if err != nil {
		return 0, fmt.Errorf("create: %w", err)
	}
	if index := pair.Attrs().Index; index != 0 {
		return index, nil
	}
	l, err := linkByName(d.handle, v.Host)
	if err == nil && l == nil {
		err = unix.ENODEV
	}
	if err != nil {
		return 0, fmt.Errorf("create: %w", err)
	}
	return l.index, nil
}

// ProbeNetkit makes a netkit pair as CreateVeth would, in a network namespace that ends with the call.
// The error says why the kernel has none.
func ProbeNetkit() error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread and its namespace end with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make a network namespace: %w", err)
			}
			ns, err := OpenNetNS(threadNetNS)
			if err != nil {
				return err
			}
			defer ns.Close()
			h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
			if err != nil {
				return err
			}
			defer h.Close()
			attrs, mac := netlink.NewLinkAttrs(), randomMAC(0xfe)
			attrs.Name, attrs.HardwareAddr = "near", mac[:]
			err = h.LinkAdd(netkitOf(attrs, ns, VethSpec{Name: "far", MAC: randomMAC(0x02)}))
			if errors.Is(err, unix.EOPNOTSUPP) {
				err = errors.New("the kernel makes no netkit pairs with addresses of our choice (since Linux 6.12, CONFIG_NETKIT)")
			}
			return err
		}()
	}()
	return <-done
}

// removeStray makes room after the kernel found a name taken, without saying which of the two.
func (d *Devices) removeStray(v VethSpec) error {
	l, err := linkByName(d.handle, v.Host)
	switch {
	case err != nil:
		return err
	case l == nil:
		return fmt.Errorf("the sandbox has a device %s already", v.Name)
	case !l.own || l.kind != LinkVeth && l.kind != LinkNetkit:
		return fmt.Errorf("a device of that name exists already and %w", ErrForeign)
	}
	return delLink(d.handle, l.index)
}

func (d *Devices) setUpVeth(ns *os.File, v VethSpec, ifindex int) error {
	if err := d.handle.LinkSetAlias(handleAt(ifindex), Alias); err != nil {
		return fmt.Errorf("set alias: %w", err)
	}
	// A port needs no IPv6 of its own. Off saves the link-local address, the route for multicast and
	// the reports to the sandbox that the kernel gives to every device; without an address alone
	// (addrgenmode none) the latter two would stay.
	err := inNetNS(d.ns, func() error {
		return setSysctls6(v.Host, false, []Setting{{"disable_ipv6", "1"}})
	})
	if err != nil {
		return err
	}
	return inNetNSWithHandle(ns, func(h *netlink.Handle) error {
		peer, err := mustLink(h, v.Name)
		if err != nil {
			return err
		}
		want6 := slices.ContainsFunc(v.Addrs, is6)
		off := "1"
		if want6 {
			off = "0" // the host's default may be off, and be inherited
		}
		err = setSysctls6(v.Name, want6, []Setting{{"accept_ra", "0"}, {"accept_dad", "0"}, {"disable_ipv6", off}})
		if err != nil {
			return err
		}
		for _, p := range v.Addrs {
			if err := addAddress(h, peer.index, p); err != nil {
				return err
			}
		}
		return nil
	})
}

// PlugIn makes the host's end of the pair a port of the bridge and sets both ends up. When it returns,
// packets pass. It may be called again. The sandbox's end comes last, so that what is sent from it finds
// the port. When it fails, what was done stays; DeleteLink undoes it.
func (d *Devices) PlugIn(ns *os.File, v VethSpec, bridge string) error {
	err := d.plugIn(ns, v, bridge)
	if err != nil {
		return fmt.Errorf("plug %s into %s: %w", v.Host, bridge, err)
	}
	return nil
}

func (d *Devices) plugIn(ns *os.File, v VethSpec, bridge string) error {
	br, err := mustLink(d.handle, bridge)
	if err != nil {
		return err
	}
	if br.kind != "bridge" {
		return fmt.Errorf("%s is no bridge but a %s", bridge, br.kind)
	}
	if !br.up {
		return fmt.Errorf("%s is down; set it up", bridge)
	}
	host, err := mustLink(d.handle, v.Host)
	if err != nil {
		return err
	}
	if host.master != br.index {
		if err := d.handle.LinkSetMasterByIndex(handleOf(host), br.index); err != nil {
			return err
		}
	}
	if !host.up {
		if err := d.handle.LinkSetUp(handleOf(host)); err != nil {
			return fmt.Errorf("set up: %w", err)
		}
	}
	err = inNetNSWithHandle(ns, func(h *netlink.Handle) error {
		peer, err := mustLink(h, v.Name)
		if err != nil {
			return err
		}
		if !peer.up {
			if err := h.LinkSetUp(handleOf(peer)); err != nil {
				return fmt.Errorf("set up %s in the sandbox: %w", v.Name, err)
			}
		}
		if err := waitCarrier(h, peer); err != nil {
			return err
		}
		return waitAddrs6(h, peer.index)
	})
	if err != nil {
		return err
	}
	if err := waitCarrier(d.handle, host); err != nil {
		return err
	}
	// With its first port the bridge gets its own carrier.
	return waitCarrier(d.handle, br)
}

// waitCarrier waits until the device sends. The second end that is set up gives both their carrier at
// once, but the first one's queue, and the bridge port on it, drop packets until a worker of the kernel
// has heard of it; a lost first SYN costs a second. From Linux 6.8 on, reading the link does that work,
// so the first look suffices.
func waitCarrier(h *netlink.Handle, dev *device) error {
	return await(dev.name+" has no carrier", func() (bool, error) {
		l, err := h.LinkByIndex(dev.index)
		if err != nil {
			return false, fmt.Errorf("read %s: %w", dev.name, err)
		}
		return l.Attrs().OperState == netlink.OperUp, nil
	})
}

// waitLocal waits until the kernel takes packets to the IPv6 address for its own. Though no detection of
// duplicates is asked for, a worker makes the route that says so, which no flag of the address shows.
func waitLocal(h *netlink.Handle, a netip.Addr) error {
	return await(a.String()+" is not reachable", func() (bool, error) {
		routes, err := h.RouteGet(a.AsSlice())
		if err != nil && !errors.Is(err, unix.ENETUNREACH) {
			return false, fmt.Errorf("route to %s: %w", a, err)
		}
		return len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, nil
	})
}

// waitAddrs6 is waitLocal for the addresses that the device really has: by the time of a second PlugIn
// the sandbox may have changed them.
func waitAddrs6(h *netlink.Handle, ifindex int) error {
	list, err := retry("list addresses", func() ([]netlink.Addr, error) {
		return h.AddrList(handleAt(ifindex), unix.AF_INET6)
	})
	if err != nil {
		return err
	}
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok || ip.IsLinkLocalUnicast() || a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 {
			continue
		}
		if err := waitLocal(h, ip); err != nil {
			return err
		}
	}
	return nil
}

// await looks until done, and fails with what if it takes too long.
func await(what string, done func() (bool, error)) error {
	deadline := time.Now().Add(workerWait)
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		ok, err := done()
		switch {
		case ok || err != nil:
			return err
		case time.Now().After(deadline):
			return fmt.Errorf("%s after %s", what, workerWait)
		}
		time.Sleep(pause)
	}
}

// setSysctls6 writes settings below net/ipv6/conf/NAME of the calling thread's namespace, where they
// differ. A kernel without IPv6 has none, which is an error only if it is needed.
func setSysctls6(name string, needed bool, list []Setting) error {
	for _, s := range list {
		path := "net/ipv6/conf/" + name + "/" + s.Path
		have, err := ReadSysctl(path)
		if errors.Is(err, os.ErrNotExist) && !needed {
			continue
		}
		if errors.Is(err, os.ErrNotExist) {
			return errors.New("the kernel has IPv6 switched off; leave the IPv6 address out")
		}
		if err == nil && have != s.Value {
			err = WriteSysctl(path, s.Value)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkLink refuses what the kernel would take for something else or refuse with a bare EINVAL.
func checkLink(name string, mtu int, addrs []netip.Prefix) error {
	switch {
	case name == "" || len(name) >= unix.IFNAMSIZ:
		return fmt.Errorf("a device's name has 1 to %d characters", unix.IFNAMSIZ-1)
	// "%d" asks for a number, a colon is for labels, and the whole names have a meaning in /proc/sys.
	case strings.ContainsAny(name, "/:%"), strings.ContainsFunc(name, notGraphic),
		slices.Contains([]string{".", "..", "all", "default"}, name):
		return errors.New("that is no name for a device")
	case mtu < 0 || mtu > 65535:
		return fmt.Errorf("MTU %d is not between 68 and 65535", mtu)
	case mtu != 0 && mtu < minMTU6 && slices.ContainsFunc(addrs, is6):
		return fmt.Errorf("MTU %d is too small for IPv6, which needs %d", mtu, minMTU6)
	}
	for _, p := range addrs {
		if !p.IsValid() || p.Addr().Is4In6() {
			return fmt.Errorf("%s is no address with a prefix length", p)
		}
	}
	return nil
}

func notGraphic(r rune) bool { return r <= ' ' || r > '~' }

func is6(p netip.Prefix) bool { return p.Addr().Is6() }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// randomMAC returns a MAC that begins with first.
func randomMAC(first byte) (mac policy.MAC) {
	_, _ = rand.Read(mac[:])
	mac[0] = first
	return mac
}

// linkByName returns nil if there is no such device. Other than the kernel it does not take a device
// by its alternative name.
func linkByName(h *netlink.Handle, name string) (*device, error) {
	l, err := h.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	dev := deviceOf(l)
	return &dev, nil
}

// deviceOf is parseLink for links that the netlink package has read.
func deviceOf(l netlink.Link) device {
	a := l.Attrs()
	d := device{
		index:    a.Index,
		name:     a.Name,
		kind:     l.Type(),
		mtu:      a.MTU,
		up:       a.RawFlags&unix.IFF_UP != 0,
		own:      a.Alias == Alias,
		loopback: a.RawFlags&unix.IFF_LOOPBACK != 0,
		ethernet: a.EncapType == "ether",
		master:   a.MasterIndex,
		peer:     a.ParentIndex,
		peerNS:   a.NetNsID,
	}
	if len(a.HardwareAddr) == len(d.mac) {
		copy(d.mac[:], a.HardwareAddr)
	}
	return d
}

// mustLink fails if there is no such device.
func mustLink(h *netlink.Handle, name string) (*device, error) {
	l, err := linkByName(h, name)
	if err == nil && l == nil {
		err = unix.ENODEV
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return l, nil
}

// handleAt and handleOf are what the netlink library wants to be told a device by.
func handleAt(ifindex int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
}

func handleOf(d *device) netlink.Link { return handleAt(d.index) }

// delLink removes the device. That it has gone already is no error.
func delLink(h *netlink.Handle, ifindex int) error {
	if err := h.LinkDel(handleAt(ifindex)); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}
