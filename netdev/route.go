// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Route is where the host sends a range of addresses.
type Route struct {
	Dst    netip.Prefix
	Device string // the first one's, if the route spreads over several
}

// Routes lists the destinations of the main table that lead somewhere in particular: those that a new
// subnet must not overlap. Left out are default routes, also those that VPNs write as two halves;
// multicast, link-local and loopback ranges; routes that only refuse, for a subnet's own route is the
// longer prefix; and the known ones, which the caller need not be told.
func (d *Devices) Routes(known map[netip.Prefix]bool) ([]Route, error) {
	name := make(map[int]string)
	var out []Route
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := listRoutes(d.handle, family)
		if err != nil {
			return nil, err
		}
		for i := range list {
			dst := prefixOf(list[i].Dst)
			if list[i].Type != unix.RTN_UNICAST || !particular(dst) || known[dst] {
				continue
			}
			index := oif(&list[i])
			if _, ok := name[index]; !ok {
				l, err := d.linkByIndex(index)
				if err != nil {
					return nil, err
				}
				if l == nil {
					continue // gone, and its routes with it
				}
				name[index] = l.name
			}
			out = append(out, Route{Dst: dst, Device: name[index]})
		}
	}
	return out, nil
}

// particular reports whether a route to p is about certain networks, not about the rest of the world
// or this link.
func particular(p netip.Prefix) bool {
	// Halves of everything, and all global IPv6 addresses (2000::/3): OpenVPN's and others' way to
	// outdo a default route without touching it.
	if !p.IsValid() || p.Bits() <= 1 || p.Addr().Is6() && p.Bits() <= 3 {
		return false
	}
	a := p.Addr()
	return !a.IsMulticast() && !a.IsLinkLocalUnicast() && !a.IsLoopback()
}

// Hop is where the host sends something.
type Hop struct {
	Ifindex int  // of the device that leads there; 0: there is no route, or one that refuses
	Local   bool // it is the host's own
	Encap   bool // in a tunnel that only the stack can make
}

// RouteOf asks where the host sends what comes from src by the device of index in; without in, where what it sends itself
// goes, and src is not looked at.
func (d *Devices) RouteOf(src, dst netip.Addr, in int) (Hop, error) {
	options := &netlink.RouteGetOptions{}
	if in != 0 {
		options.IifIndex, options.SrcAddr = in, src.AsSlice()
	}
	list, err := d.handle.RouteGetWithOptions(dst.AsSlice(), options)
	for _, refused := range []unix.Errno{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.ENETDOWN, unix.ESRCH} {
		if errors.Is(err, refused) {
			return Hop{}, nil
		}
	}
	if err != nil {
		return Hop{}, fmt.Errorf("route to %s: %w", dst, err)
	}
	for i := range list {
		switch list[i].Type {
		case unix.RTN_UNICAST:
			return Hop{Ifindex: oif(&list[i]), Encap: list[i].Encap != nil}, nil
		case unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST:
			return Hop{Local: true}, nil
		}
	}
	return Hop{}, nil
}

func listRoutes(h *netlink.Handle, family int) ([]netlink.Route, error) {
	return retry("list routes", func() ([]netlink.Route, error) {
		list, err := h.RouteList(nil, family)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) { // no IPv6
			return nil, nil
		}
		return list, err
	})
}

func oif(r *netlink.Route) int {
	if r.LinkIndex == 0 && len(r.MultiPath) > 0 {
		return r.MultiPath[0].LinkIndex
	}
	return r.LinkIndex
}

func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

// SetDefaultRoutes makes gw4 and gw6 the ways out of the namespace, in the place of any that it has; an
// invalid address leaves it without a default route of that family. The gateways must be on the link
// of a device that is up. When it fails for one family, the other may have been set.
func (d *Devices) SetDefaultRoutes(ns *os.File, gw4, gw6 netip.Addr) error {
	return inNetNSWithHandle(ns, func(h *netlink.Handle) error {
		if err := setDefaultRoute(h, unix.AF_INET, gw4); err != nil {
			return err
		}
		return setDefaultRoute(h, unix.AF_INET6, gw6)
	})
}

// setDefaultRoute adds the new route before it removes others, so that there is always one.
func setDefaultRoute(h *netlink.Handle, family int, gw netip.Addr) error {
	if gw.IsValid() {
		err := h.RouteReplace(&netlink.Route{Gw: gw.AsSlice(), Protocol: unix.RTPROT_STATIC})
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
			err = errors.New("no device of the sandbox reaches it")
		}
		if err != nil {
			return fmt.Errorf("default route via %s: %w", gw, err)
		}
	}
	list, err := listRoutes(h, family)
	if err != nil {
		return err
	}
	for i := range list {
		r := &list[i]
		if p := prefixOf(r.Dst); p.IsValid() && p.Bits() > 0 || r.Type != unix.RTN_UNICAST {
			continue
		}
		if have, ok := netip.AddrFromSlice(r.Gw); ok && have.Unmap() == gw {
			continue
		}
		// ESRCH: it went with its device meanwhile.
		if err := h.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove default route: %w", err)
		}
	}
	return nil
}

// LoopbackUp sets lo of the namespace up, with which it gets its addresses.
func (d *Devices) LoopbackUp(ns *os.File) error {
	return inNetNSWithHandle(ns, func(h *netlink.Handle) error {
		lo, err := mustLink(h, "lo")
		if err == nil {
			err = h.LinkSetUp(handleOf(lo))
		}
		if err != nil {
			return fmt.Errorf("set up loopback: %w", err)
		}
		return nil
	})
}
