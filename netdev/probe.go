// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What "bpfnet doctor" looks at. Nothing here changes anything.

// Device is a device of the host namespace.
type Device struct {
	Ifindex int
	Name    string
	Kind    string // "veth", "bridge", …; "device" for hardware
	Alias   string
	Master  string // the bridge or bond that it is a port of
	MTU     int    // bytes
	XDP     uint32 // ID of the XDP program on it; 0: none
	Generic bool   // that one runs behind the driver
}

// List reads all devices, by index.
func (d *Devices) List() ([]Device, error) {
	links, err := retry("list links", d.handle.LinkList)
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	out := make([]Device, 0, len(links))
	for _, l := range links {
		a := l.Attrs()
		dev := Device{Ifindex: a.Index, Name: a.Name, Kind: l.Type(), Alias: a.Alias, Master: names[a.MasterIndex], MTU: a.MTU}
		if x := a.Xdp; x != nil && x.Attached {
			dev.XDP, dev.Generic = x.ProgId, x.AttachMode == xdpAttachedSKB
		}
		out = append(out, dev)
	}
	return out, nil
}

// xdpAttachedSKB is XDP_ATTACHED_SKB of linux/if_link.h.
const xdpAttachedSKB = 2

// Filter is a classifier on a device's clsact or ingress qdisc. They run by Pref, the lowest first.
type Filter struct {
	Pref   uint16
	Handle uint32
	Kind   string // "bpf", "u32", "matchall", …
	Name   string // of a bpf filter
	Prog   uint32 // its program's ID
	Direct bool   // the program itself says what becomes of the packet
	// Drops and Takes are for a matchall filter, which matches all: whether its action drops, and
	// whether it keeps packets from the filters behind it.
	Drops, Takes bool
	Ours         bool
}

// Filters lists the classifiers of one direction in the order in which they run.
func (d *Devices) Filters(ifindex int, egress bool) ([]Filter, error) {
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	list, err := retry("list filters", func() ([]netlink.Filter, error) {
		return d.handle.FilterList(link, filterParent(egress))
	})
	if err != nil {
		return nil, fmt.Errorf("device %d: %w", ifindex, err)
	}
	var out []Filter
	for _, f := range list {
		a := f.Attrs()
		if a.Handle == 0 {
			continue // the head of a priority, not a filter
		}
		if a.Chain != nil && *a.Chain != 0 {
			continue // reached from other filters only
		}
		row := Filter{Pref: a.Priority, Handle: a.Handle, Kind: f.Type()}
		switch f := f.(type) {
		case *netlink.BpfFilter:
			row.Name, row.Prog, row.Direct = f.Name, uint32(f.Id), f.DirectAction
			row.Ours = a.Priority == filterPriority && a.Handle == filterHandle
		case *netlink.MatchAll:
			row.Drops, row.Takes = matchAllEnds(f.Actions)
		}
		out = append(out, row)
	}
	return out, nil
}

// matchAllEnds says what a list of actions does to every packet.
func matchAllEnds(actions []netlink.Action) (drops, takes bool) {
	for _, a := range actions {
		switch a.Attrs().Action {
		case netlink.TC_ACT_SHOT:
			return true, true
		case netlink.TC_ACT_PIPE, netlink.TC_ACT_UNSPEC:
		default:
			return false, true
		}
	}
	return false, false
}

// DefaultRoute6 is an IPv6 default route.
type DefaultRoute6 struct {
	Device     string
	Advertised bool // by a router: the kernel made it, and forgets it when the router falls silent
}

// DefaultRoutes6 lists the IPv6 default routes of the main table.
func (d *Devices) DefaultRoutes6() ([]DefaultRoute6, error) {
	var out []DefaultRoute6
	err := d.defaultRoutes(netlink.FAMILY_V6, func(device string, r netlink.Route) {
		out = append(out, DefaultRoute6{Device: device, Advertised: r.Protocol == unix.RTPROT_RA})
	})
	return out, err
}

// DefaultRoutes4 lists the devices of the IPv4 default routes of the main table.
func (d *Devices) DefaultRoutes4() ([]string, error) {
	var out []string
	err := d.defaultRoutes(netlink.FAMILY_V4, func(device string, _ netlink.Route) { out = append(out, device) })
	return out, err
}

func (d *Devices) defaultRoutes(family int, each func(device string, r netlink.Route)) error {
	list, err := retry("list routes", func() ([]netlink.Route, error) {
		return d.handle.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return err
	}
	for _, r := range list {
		if r.Dst != nil {
			if ones, _ := r.Dst.Mask.Size(); ones != 0 {
				continue
			}
		}
		// One with several ways has its devices there.
		ways := []int{r.LinkIndex}
		for _, hop := range r.MultiPath {
			ways = append(ways, hop.LinkIndex)
		}
		for _, index := range ways {
			if index == 0 {
				continue
			}
			dev, err := d.linkByIndex(index)
			if err != nil {
				return err
			}
			if dev != nil {
				each(dev.name, r)
			}
		}
	}
	return nil
}

// PeerMTU is the MTU in bytes of the other end of a pair, in whatever namespace; 0: there is none, or it has gone.
func (d *Devices) PeerMTU(ifindex int) (int, error) {
	l, err := d.linkByIndex(ifindex)
	if err != nil || l == nil || !l.hasPeer() {
		return 0, err
	}
	if l.peerNS >= 0 {
		far, _ := d.far(l.peerNS, l.peer)
		return far.mtu, nil
	}
	p, err := d.linkByIndex(l.peer)
	if err != nil || p == nil {
		return 0, err
	}
	return p.mtu, nil
}
