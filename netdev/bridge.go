// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// Alias is the link alias (ip-link(8)) by which devices that this package made are known again.
const Alias = "bpfnet"

// ErrForeign is matched by errors about a device that somebody else made.
var ErrForeign = errors.New("is not bpfnet's")

// minMTU6 is the least MTU on which IPv6 works (RFC 8200 5); below it the kernel takes IPv6 off the device.
const minMTU6 = 1280

// BridgeSpec says what EnsureBridge sees to.
type BridgeSpec struct {
	Name string
	// Addrs are the host's addresses on it, with the prefix lengths of the subnets.
	Addrs []netip.Prefix
	// MTU in bytes. Optional: the kernel's 1500, or what the bridge has.
	MTU int
	// Adopt takes a bridge of that name for ours though it lacks our alias, if it has no other global
	// addresses than these: for one that the caller made earlier by its own records.
	Adopt bool
}

// OwnLink is a device with our alias.
type OwnLink struct {
	Name    string
	Kind    string // "bridge", "veth" or "netkit"
	Ifindex int
}

// EnsureBridge sees to it that the bridge exists, is up and has exactly the addresses given; only
// link-local ones are left to the kernel. It may be called again at any time. A new bridge has a
// fixed MAC, else it would change with its ports and leave the sandboxes' neighbour caches wrong.
//
// It fails with ErrForeign if a bridge of that name exists that is not ours, and with another
// error that names the kind if it is another device. When it fails, a bridge that it made is gone again.
func (d *Devices) EnsureBridge(b BridgeSpec) (created bool, err error) {
	if err := checkLink(b.Name, b.MTU, b.Addrs); err != nil {
		return false, fmt.Errorf("bridge %s: %w", b.Name, err)
	}
	br, err := linkByName(d.handle, b.Name)
	if err == nil && br == nil {
		br, err = d.createBridge(b.Name)
		created = err == nil
	}
	if err != nil {
		return false, fmt.Errorf("bridge %s: %w", b.Name, err)
	}
	switch {
	case br.kind != "bridge":
		return false, fmt.Errorf("bridge %s: a device of that name exists and is no bridge but a %s; choose another name", b.Name, br.kind)
	case !created && !br.own && !(b.Adopt && d.has(br.index, b.Addrs)):
		return false, fmt.Errorf("bridge %s: exists already and %w; choose another name", b.Name, ErrForeign)
	}
	if err := d.setUpBridge(br, b); err != nil {
		if created {
			err = errors.Join(err, delLink(d.handle, br.index))
		}
		return false, fmt.Errorf("bridge %s: %w", b.Name, err)
	}
	return created, nil
}

func (d *Devices) createBridge(name string) (*device, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	attrs.HardwareAddr = bridgeMAC(name)
	if err := d.handle.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	br, err := linkByName(d.handle, name)
	if err == nil && br == nil {
		err = unix.ENODEV
	}
	if err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	return br, nil
}

// setUpBridge makes the bridge what b says. Addresses come last: with our alias on it the bridge is
// no uplink to whoever looks in between.
func (d *Devices) setUpBridge(br *device, b BridgeSpec) error {
	link := handleOf(br)
	if !br.own {
		if err := d.handle.LinkSetAlias(link, Alias); err != nil {
			return fmt.Errorf("set alias: %w", err)
		}
	}
	// A bridge that was made with an MTU still follows its ports; one that was given it later does not.
	if b.MTU != 0 && b.MTU != br.mtu {
		if err := d.handle.LinkSetMTU(link, b.MTU); err != nil {
			return fmt.Errorf("set MTU %d: %w", b.MTU, err)
		}
	}
	want6 := slices.ContainsFunc(b.Addrs, is6)
	err := inNetNS(d.ns, func() error {
		return setSysctls6(br.name, want6, bridgeSysctls(want6))
	})
	if err != nil {
		return err
	}
	if !br.up {
		if err := d.handle.LinkSetUp(link); err != nil {
			return fmt.Errorf("set up: %w", err)
		}
	}
	if err := d.setAddrs(br.index, b.Addrs); err != nil {
		return err
	}
	for _, p := range b.Addrs {
		if is6(p) {
			if err := waitLocal(d.handle, p.Addr()); err != nil {
				return err
			}
		}
	}
	return nil
}

// bridgeSysctls are below net/ipv6/conf/NAME. The link-local address that the kernel makes when the
// first port comes must not wait a second for duplicate address detection (RFC 4862 5.4): there is
// nobody else on this link who could have it.
func bridgeSysctls(want6 bool) []Setting {
	list := []Setting{{"accept_ra", "0"}, {"accept_dad", "0"}}
	if want6 {
		list = append(list, Setting{"disable_ipv6", "0"})
	}
	return list
}

// has reports whether all global addresses of a device are among these.
func (d *Devices) has(ifindex int, addrs []netip.Prefix) bool {
	have, err := d.globalAddrs(ifindex)
	return err == nil && !slices.ContainsFunc(have, func(p netip.Prefix) bool { return !slices.Contains(addrs, p) })
}

// setAddrs gives the device the addresses of want and no others. Those that go, go first: with a
// primary IPv4 address the kernel removes the others of its subnet.
func (d *Devices) setAddrs(ifindex int, want []netip.Prefix) error {
	have, err := d.globalAddrs(ifindex)
	if err != nil {
		return err
	}
	stray := false
	for _, p := range have {
		if slices.Contains(want, p) {
			continue
		}
		stray = true
		err := d.handle.AddrDel(handleAt(ifindex), &netlink.Addr{IPNet: ipNet(p)})
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", p, err)
		}
	}
	if stray {
		if have, err = d.globalAddrs(ifindex); err != nil {
			return err
		}
	}
	for _, p := range want {
		if slices.Contains(have, p) {
			continue
		}
		if err := addAddress(d.handle, ifindex, p); err != nil {
			return err
		}
	}
	return nil
}

// addAddress is quick for IPv6 too: the address counts at once, without duplicate address detection.
func addAddress(h *netlink.Handle, ifindex int, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if is6(p) {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrReplace(handleAt(ifindex), a); err != nil {
		return fmt.Errorf("add address %s: %w", p, err)
	}
	return nil
}

// globalAddrs lists a device's addresses without the link-local ones. Other devices' are left out by
// the kernel: with five hundred bridges a dump of all takes longer than all else.
func (d *Devices) globalAddrs(ifindex int) ([]netip.Prefix, error) {
	msgs, err := retry("list addresses", func() ([][]byte, error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: d.queries}
		msg := nl.NewIfAddrmsg(unix.AF_UNSPEC)
		msg.Index = uint32(ifindex)
		req.AddData(msg)
		return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR)
	})
	if err != nil {
		return nil, err
	}
	var list []netip.Prefix
	for _, m := range msgs {
		p, index, err := parseAddr(m)
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		if index == ifindex && p.IsValid() && !p.Addr().IsLinkLocalUnicast() {
			list = append(list, p)
		}
	}
	return list, nil
}

// parseAddr reads an RTM_NEWADDR message (rtnetlink(7)).
func parseAddr(m []byte) (p netip.Prefix, ifindex int, err error) {
	if len(m) < unix.SizeofIfAddrmsg {
		return netip.Prefix{}, 0, errors.New("short message")
	}
	msg := nl.DeserializeIfAddrmsg(m)
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfAddrmsg:])
	if err != nil {
		return netip.Prefix{}, 0, err
	}
	// IFA_LOCAL is the device's own address where there is one; IFA_ADDRESS can be a peer's.
	var addr netip.Addr
	for _, a := range attrs {
		if t := a.Attr.Type; t == unix.IFA_LOCAL || t == unix.IFA_ADDRESS && !addr.IsValid() {
			addr, _ = netip.AddrFromSlice(a.Value)
		}
	}
	return netip.PrefixFrom(addr, int(msg.Prefixlen)), int(msg.Index), nil
}

// DeleteLink removes a device that this package made, with its far end if it has one. A missing one
// is no error; somebody else's stays and is ErrForeign.
func (d *Devices) DeleteLink(name string) error {
	if err := checkLink(name, 0, nil); err != nil {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	l, err := linkByName(d.handle, name)
	switch {
	case err != nil:
		return fmt.Errorf("delete link %s: %w", name, err)
	case l == nil:
		return nil
	case !l.own:
		return fmt.Errorf("delete link %s: %w; left as it is", name, ErrForeign)
	}
	if err := delLink(d.deleting, l.index); err != nil {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// OwnLinks lists the devices with our alias, sorted by index: those in use and strays alike.
func (d *Devices) OwnLinks() ([]OwnLink, error) {
	links, err := d.links()
	if err != nil {
		return nil, err
	}
	var own []OwnLink
	for _, l := range links {
		if l.own {
			own = append(own, OwnLink{Name: l.name, Kind: l.kind, Ifindex: l.index})
		}
	}
	slices.SortFunc(own, func(a, b OwnLink) int { return cmp.Compare(a.Ifindex, b.Ifindex) })
	return own, nil
}

// bridgeMAC is the same whenever a bridge of that name is made again on this machine, so that
// sandboxes which outlive it find the gateway where it was, and another one on every machine, as
// systemd.link(5) has it with MACAddressPolicy=persistent. 02:42 is locally administered.
func bridgeMAC(name string) []byte {
	machine, err := os.ReadFile("/etc/machine-id")
	if err != nil || len(machine) == 0 {
		mac := randomMAC(0x02)
		mac[1] = 0x42
		return mac[:]
	}
	sum := sha256.Sum256(slices.Concat([]byte("bpfnet bridge\x00"), machine, []byte(name)))
	mac := policy.MAC{0x02, 0x42}
	copy(mac[2:], sum[:])
	return mac[:]
}
