// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"net/netip"

	"github.com/bpfnet/bpfnet/policy"
)

// seat is an address on a network.
type seat struct {
	network string // ID
	addr    netip.Addr
}

// announceMoves tells the neighbours of addresses that have come back with another MAC: without, they
// would send to the old one until their entries age. Engines from 28 on announce their containers
// themselves; 20.10 derives the MAC from the address, so that only --mac-address makes a difference.
// d.seats remembers who sat where, also of those that are gone, for as long as the network lives.
func (d *Daemon) announceMoves(state policy.State, devices policy.Devices) error {
	bridges := make(map[string]string, len(state.Networks))
	for _, n := range state.Networks {
		bridges[n.ID] = n.Bridge
	}
	for s := range d.seats {
		if _, ok := bridges[s.network]; !ok {
			delete(d.seats, s)
		}
	}
	var errs []error
	for _, e := range state.Endpoints {
		if e.MAC.IsZero() {
			continue
		}
		var moved []netip.Addr
		for _, a := range e.Addrs {
			if old, ok := d.seats[seat{e.NetworkID, a}]; ok && old != e.MAC {
				moved = append(moved, a)
			}
		}
		if len(moved) > 0 {
			var ports []int
			here := false
			for _, l := range devices.Links {
				switch {
				case l.Bridge != bridges[e.NetworkID]:
				case l.PeerMAC == e.MAC:
					here = true
				default:
					ports = append(ports, l.Ifindex)
				}
			}
			if !here {
				continue // a later round sees its link
			}
			for _, b := range devices.Bridges {
				if b.Name == bridges[e.NetworkID] {
					errs = append(errs, d.devices.Announce(b.Ifindex, ports, e.MAC, moved))
				}
			}
		}
		d.sitDown([]policy.Endpoint{e})
	}
	return errors.Join(errs...)
}

// sitDown remembers where endpoints are.
func (d *Daemon) sitDown(list []policy.Endpoint) {
	if d.seats == nil {
		d.seats = make(map[seat]policy.MAC)
	}
	for _, e := range list {
		for _, a := range e.Addrs {
			d.seats[seat{e.NetworkID, a}] = e.MAC
		}
	}
}
