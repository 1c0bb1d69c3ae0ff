// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/policy"
)

// assemble sorts devices and addresses into the roles that policy knows. It is pure, apart
// from peerMAC, which is asked for the far ends of served links in other namespaces.
//
// links must be sorted by index. override replaces the uplinks found, if not empty.
func assemble(links []device, addrs []address, served map[string]bool, override []string, peerMAC func(near *device) policy.MAC) policy.Devices {
	byIndex := make(map[int]*device, len(links))
	for i := range links {
		byIndex[links[i].index] = &links[i]
	}
	prefixes := make(map[int][]netip.Prefix)
	var out policy.Devices
	for _, a := range addrs {
		prefixes[a.index] = append(prefixes[a.index], a.prefix)
		out.HostAddrs = append(out.HostAddrs, policy.HostAddr{Addr: a.prefix.Addr(), Ifindex: a.index})
	}
	forced := make(map[string]bool, len(override))
	for _, name := range override {
		forced[name] = true
	}

	for i := range links {
		d := &links[i]
		if d.kind == "bridge" {
			out.Bridges = append(out.Bridges, policy.Bridge{
				Ifindex: d.index, Name: d.name, MAC: d.mac, MTU: d.mtu, Up: d.up, Addrs: prefixes[d.index],
			})
		}
		if br := byIndex[d.master]; br != nil && br.kind == "bridge" && served[br.name] {
			l := policy.Link{Ifindex: d.index, Name: d.name, Bridge: br.name, PeerNS: d.peerNS}
			switch {
			case !d.hasPeer():
			case d.peerNS >= 0:
				l.PeerMAC = peerMAC(d)
			case byIndex[d.peer] != nil:
				l.PeerMAC = byIndex[d.peer].mac
			}
			out.Links = append(out.Links, l)
			continue
		}
		if served[d.name] {
			continue
		}
		is := isUplink(d, prefixes[d.index], byIndex)
		if len(forced) > 0 {
			is = forced[d.name]
		}
		if is {
			out.Uplinks = append(out.Uplinks, policy.Uplink{
				Ifindex: d.index, Name: d.name, Ethernet: d.ethernet, MTU: d.mtu, Addrs: prefixes[d.index],
				MAC: d.mac, Tagged: tagged(d, links),
			})
		}
	}
	return out
}

// isUplink reports whether a device that is no served bridge leads out of the host: it has an
// address of its own and is neither loopback nor part of another device.
func isUplink(d *device, prefixes []netip.Prefix, byIndex map[int]*device) bool {
	if d.loopback || len(prefixes) == 0 || enslaved(d, byIndex) {
		return false
	}
	// What this package made leads into sandboxes, also before whoever asked for it says so.
	if d.own {
		return false
	}
	if !d.hasPeer() {
		return true
	}
	// The near end of a pair whose far end is a bridge port here belongs to that bridge.
	if d.peerNS < 0 {
		if p := byIndex[d.peer]; p != nil && enslaved(p, byIndex) {
			return false
		}
	}
	// Other runtimes leave the near ends of their containers' pairs with no address but the
	// link-local one that the kernel gives to any device.
	for _, p := range prefixes {
		if !p.Addr().IsLinkLocalUnicast() {
			return true
		}
	}
	return false
}

// tagged reports whether VLANs have devices of their own on top of this one.
func tagged(d *device, links []device) bool {
	return slices.ContainsFunc(links, func(l device) bool { return l.kind == "vlan" && l.peerNS < 0 && l.peer == d.index })
}

// enslaved reports whether the device is a port of a bridge, a bond or the like. A member of a
// VRF is none: it keeps its addresses and receives for itself.
func enslaved(d *device, byIndex map[int]*device) bool {
	if d.master == 0 {
		return false
	}
	m := byIndex[d.master]
	return m == nil || m.kind != "vrf"
}

// checkUplinks reports the first name that is not a device or cannot be an uplink.
func checkUplinks(names []string, links []device) error {
	byIndex := make(map[int]*device, len(links))
	byName := make(map[string]*device, len(links))
	var have []string
	for i := range links {
		d := &links[i]
		byIndex[d.index], byName[d.name] = d, d
	}
	for i := range links {
		if d := &links[i]; !d.loopback && !enslaved(d, byIndex) {
			have = append(have, d.name)
		}
	}
	for _, name := range names {
		d := byName[name]
		switch {
		case d == nil:
			near := Nearest(name, have)
			if len(near) == 0 {
				return fmt.Errorf("uplink %q: no such device, and there is none that could be meant", name)
			}
			return fmt.Errorf("uplink %q: no such device; nearest: %s", name, strings.Join(near, ", "))
		case d.loopback:
			return fmt.Errorf("uplink %q: the loopback device leads nowhere; leave it out", name)
		case enslaved(d, byIndex):
			master := "another device"
			if m := byIndex[d.master]; m != nil {
				master = m.name
			}
			return fmt.Errorf("uplink %q: it is a port of %s; name that instead", name, master)
		}
	}
	return nil
}
