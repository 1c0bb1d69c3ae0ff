// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/netdev"
)

// space is a network namespace. It lives as long as the machine.
type space struct {
	ns netns.NsHandle
	h  *netlink.Handle
}

// within runs f on a thread of its own that enter has taken to a namespace.
func within(enter, f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		result <- func() error {
			if err := enter(); err != nil {
				return fmt.Errorf("enter namespace: %w", err)
			}
			return f()
		}()
	}()
	return <-result
}

// hostSpace is the namespace that the machine began with.
func hostSpace() (*space, error) {
	return openSpace(func() error { return nil })
}

func newSpace() (*space, error) {
	return openSpace(func() error { return unix.Unshare(unix.CLONE_NEWNET) })
}

func openSpace(enter func() error) (*space, error) {
	s := &space{}
	return s, within(enter, func() (err error) {
		if s.ns, err = netns.Get(); err != nil {
			return err
		}
		if s.h, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return err
		}
		for _, conf := range []string{"all", "default"} {
			// An address is there at once, and nobody but us makes any.
			for _, key := range []string{"accept_dad", "accept_ra"} {
				if err := netdev.WriteSysctl("net/ipv6/conf/"+conf+"/"+key, "0"); err != nil {
					return err
				}
			}
		}
		return s.up("lo")
	})
}

// do runs f in the namespace. Sockets that f opens stay there; goroutines that it starts do not.
func (s *space) do(f func() error) error {
	return within(func() error { return netns.Set(s.ns) }, f)
}

// up brings an interface up, with these addresses.
func (s *space) up(ifname string, addrs ...netip.Prefix) error {
	l, err := s.h.LinkByName(ifname)
	if err != nil {
		return fmt.Errorf("link %s: %w", ifname, err)
	}
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: &net.IPNet{
			IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen()),
		}}
		if err := s.h.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("add %s to %s: %w", a, ifname, err)
		}
	}
	return s.h.LinkSetUp(l)
}

// via adds routes by a gateway. Destinations and gateways are of the same family, in this order.
func (s *space) via(to netip.Prefix, gateway netip.Addr) error {
	return s.h.RouteAdd(&netlink.Route{
		Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())},
		Gw:  gateway.AsSlice(),
	})
}

// bridge makes a bridge with these addresses.
func (s *space) bridge(name string, addrs ...netip.Prefix) error {
	if err := s.h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	return s.up(name, addrs...)
}

// wire joins the namespace to another by a pair: name here, eth0 there. With a bridge, its end here
// is a port of that.
func (s *space) wire(name, bridge string, to *space) error {
	attrs := netlink.LinkAttrs{Name: name}
	if bridge != "" {
		br, err := s.h.LinkByName(bridge)
		if err != nil {
			return err
		}
		attrs.MasterIndex = br.Attrs().Index
	}
	err := s.h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(to.ns)})
	if err != nil {
		return fmt.Errorf("make pair %s: %w", name, err)
	}
	return s.up(name)
}

func prefix(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(a, 24)
	}
	return netip.PrefixFrom(a, 64)
}

// join gives a container its addresses and default routes.
func (s *space) join(addrs, gateways []netip.Addr) error {
	var errs []error
	for i, a := range addrs {
		errs = append(errs, s.up("eth0", prefix(a)))
		if gateways != nil {
			all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
			if a.Is6() {
				all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
			}
			errs = append(errs, s.via(all, gateways[i]))
		}
	}
	return errors.Join(errs...)
}
