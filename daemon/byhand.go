// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/store"
)

// A device that somebody made a port of a served bridge by hand is guarded like any other, and closed:
// no engine tells of its endpoint. The user may.

func byHandID(device string) string { return "byhand/" + device }

// byHand are the endpoints of those that are ports of served bridges now. An address that an engine has
// given away since is the engine's.
func (d *Daemon) byHand(devices policy.Devices, state policy.State) ([]policy.Endpoint, error) {
	list, err := d.store.ByHand()
	if err != nil || len(list) == 0 {
		return nil, err
	}
	taken := make(map[netip.Addr]bool)
	for _, e := range state.Endpoints {
		for _, a := range e.Addrs {
			taken[a] = true
		}
	}
	var out []policy.Endpoint
	for _, h := range list {
		i := slices.IndexFunc(devices.Links, func(l policy.Link) bool { return l.Name == h.Device })
		if i < 0 {
			continue
		}
		link := devices.Links[i]
		n := slices.IndexFunc(state.Networks, func(n policy.Network) bool { return n.Bridge == link.Bridge })
		if n < 0 {
			continue
		}
		e := policy.Endpoint{
			ID: byHandID(h.Device), SandboxID: byHandID(h.Device), Name: h.Device, Source: policy.SourceStore,
			NetworkID: state.Networks[n].ID, MAC: h.MAC,
		}
		if e.MAC.IsZero() {
			e.MAC = link.PeerMAC
		}
		for _, a := range h.Addrs {
			if !taken[a] && contains(state.Networks[n].Subnets, a) {
				e.Addrs, taken[a] = append(e.Addrs, a), true
			}
		}
		if len(e.Addrs) > 0 {
			out = append(out, e)
		}
	}
	return out, nil
}

func contains(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// AllowEndpoint serves a device that somebody made a port of a served bridge.
func (d *Daemon) AllowEndpoint(ctx context.Context, e api.ByHand) (api.Result, error) {
	h, err := d.checkByHand(e)
	if err != nil {
		return api.Result{}, err
	}
	changed, err := d.store.AllowByHand(h)
	if err != nil {
		return api.Result{}, err
	}
	if err := d.Flush(ctx); err != nil {
		return api.Result{}, err
	}
	if ready, why := d.ready(byHandID(e.Device)); !ready {
		return api.Result{}, fmt.Errorf("device %s: is not served yet: %s", e.Device, why)
	}
	return api.Result{Changed: changed}, nil
}

func (d *Daemon) checkByHand(e api.ByHand) (store.ByHand, error) {
	h := store.ByHand{Device: e.Device}
	if e.MAC != "" {
		mac, err := net.ParseMAC(e.MAC)
		if err != nil || len(mac) != len(h.MAC) {
			return h, fmt.Errorf("mac %q: want one like 02:42:ac:11:00:02", e.MAC)
		}
		copy(h.MAC[:], mac)
	}
	dev, err := net.InterfaceByName(e.Device)
	if err != nil {
		return h, &api.UnknownError{What: "device", Name: e.Device, Nearest: d.portNames()}
	}
	link, ok, err := d.devices.Link(dev.Index)
	if err != nil {
		return h, err
	}
	d.mu.Lock()
	_, state := d.state()
	d.mu.Unlock()
	i := slices.IndexFunc(state.Networks, func(n policy.Network) bool { return ok && n.Bridge == link.Bridge })
	if i < 0 {
		return h, fmt.Errorf("device %s: is no port of a served network's bridge: nothing is in its way", e.Device)
	}
	if h.MAC.IsZero() && link.PeerMAC.IsZero() {
		return h, fmt.Errorf("device %s: is no end of a pair, so nobody can see who is behind it; say so by --mac", e.Device)
	}
	n := state.Networks[i]
	for _, x := range state.Endpoints {
		mac := h.MAC
		if mac.IsZero() {
			mac = link.PeerMAC
		}
		if x.NetworkID == n.ID && x.MAC == mac {
			return h, fmt.Errorf("device %s: is that of %s already", e.Device, x.Name)
		}
	}
	if len(e.Addrs) == 0 {
		return h, errors.New("want the address that is behind the device")
	}
	for _, a := range e.Addrs {
		a = a.Unmap()
		if !contains(n.Subnets, a) {
			return h, fmt.Errorf("address %s: is not in network %s (%v)", a, n.Name, n.Subnets)
		}
		if slices.Contains(n.Gateways, a) {
			return h, fmt.Errorf("address %s: is the gateway of network %s", a, n.Name)
		}
		if slices.ContainsFunc(h.Addrs, func(b netip.Addr) bool { return a.Is4() == b.Is4() }) {
			return h, fmt.Errorf("address %s: a second one of its family; want one", a)
		}
		for _, x := range state.Endpoints {
			if slices.Contains(x.Addrs, a) {
				return h, fmt.Errorf("address %s: is that of %s", a, x.Name)
			}
		}
		h.Addrs = append(h.Addrs, a)
	}
	return h, nil
}

// portNames are the ports of served bridges.
func (d *Daemon) portNames() []string {
	d.round.Lock()
	defer d.round.Unlock()
	var out []string
	for _, l := range d.seen.Links {
		out = append(out, l.Name)
	}
	return out
}

// DisallowEndpoint takes AllowEndpoint back: what is under way ends.
func (d *Daemon) DisallowEndpoint(ctx context.Context, n api.Named) (api.Result, error) {
	changed, err := d.store.DisallowByHand(n.Name)
	if err != nil {
		return api.Result{}, err
	}
	return api.Result{Changed: changed}, d.Flush(ctx)
}
