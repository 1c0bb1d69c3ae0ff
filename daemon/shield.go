// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// shield is the shield as the reconciler keeps it.
type shield struct {
	programs *loader.Shield
	writer   *bpfmaps.ShieldWriter
	devices  *netdev.Devices
	log      *slog.Logger
	mode     string
	rate     int
	written  bool // rate and deny list, since the last look at what the maps hold
	denied   []netip.Prefix
	// Of the last round: the uplinks by index, and why the shield is not on some.
	names   map[int]string
	why     map[int]string
	refused map[int]string // by the device itself; it stands until the next look at everything
	told    map[int]string // as logged
	wake    func()         // for another round
}

func (d *Daemon) openShield() error {
	if d.cfg.Shield == "" {
		return d.loader.RemoveShield()
	}
	programs, err := d.loader.LoadShield(d.cfg.Shield)
	if err != nil {
		return err
	}
	writer, err := bpfmaps.NewShieldWriter(programs.Maps())
	if err != nil {
		programs.Close()
		return err
	}
	d.shield = &shield{
		programs: programs, writer: writer, devices: d.devices, log: d.log, mode: d.cfg.Shield, rate: d.cfg.ShieldSynRate,
		names: make(map[int]string), why: make(map[int]string), refused: make(map[int]string), told: make(map[int]string), wake: d.wake,
	}
	return nil
}

// apply brings the shield's maps to what is wanted, and the shield to the uplinks. It reports whether there is
// something new to show. A device that refuses is no error: it runs on without.
func (s *shield) apply(uplinks []policy.Uplink, denied []netip.Prefix, resync bool) (bool, error) {
	var errs []error
	if resync {
		errs = append(errs, s.writer.Resync())
		s.written = false
	}
	changed := len(denied) != len(s.denied)
	if !s.written || !slices.Equal(denied, s.denied) {
		err := errors.Join(s.writer.SynRate(s.rate), s.writer.Deny(denied))
		errs = append(errs, err)
		s.written, s.denied = err == nil, denied
	}
	names, why := make(map[int]string), make(map[int]string)
	on, macs := make(map[int]bool), make(map[int]policy.MAC)
	for _, u := range uplinks {
		names[u.Ifindex] = u.Name
		switch {
		case !u.Ethernet:
			why[u.Ifindex] = "its packets have no Ethernet header"
		case u.Tagged:
			why[u.Ifindex] = "it carries VLANs, and a driver may hide their tags from XDP"
		default:
			on[u.Ifindex], macs[u.Ifindex] = true, u.MAC
		}
	}
	// The maps first: from its first packet on, the shield knows whom it is for.
	errs = append(errs, s.writer.Devices(macs), s.programs.Detach(on))
	maps.DeleteFunc(s.refused, func(ifindex int, _ string) bool { return resync || !on[ifindex] })
	for ifindex := range on {
		if refused, ok := s.refused[ifindex]; ok {
			why[ifindex] = refused
			continue
		}
		if err := s.programs.Attach(ifindex); err != nil && !goneDevice(err) {
			why[ifindex] = s.explain(ifindex, err)
			s.refused[ifindex] = why[ifindex]
		}
	}
	for ifindex, text := range why {
		switch told, ok := s.told[ifindex]; {
		case s.why[ifindex] != text:
			s.wake() // a bridge in the making looks like an uplink for a round
		case !ok || told != text:
			s.log.Warn("the shield is not on an uplink", "device", names[ifindex], "why", text)
			s.told[ifindex] = text
		}
	}
	changed = changed || !mapsEqual(names, s.names) || !mapsEqual(why, s.why)
	s.names, s.why = names, why
	return changed, errors.Join(errs...)
}

// explain says in a user's words why a device refused the shield, and what to do.
func (s *shield) explain(ifindex int, err error) string {
	switch {
	case errors.Is(err, loader.ErrForeignXDP):
		return s.foreign(ifindex) + " is on it, and stays; the shield comes when it is gone"
	case errors.Is(err, loader.ErrNoNativeXDP):
		return fmt.Sprintf("%v; behind the driver it runs with --shield-mode generic", err)
	}
	return err.Error()
}

// foreign names the XDP program on a device.
func (s *shield) foreign(ifindex int) string {
	list, err := s.devices.List()
	if err != nil {
		return "another XDP program"
	}
	i := slices.IndexFunc(list, func(d netdev.Device) bool { return d.Ifindex == ifindex })
	if i < 0 || list[i].XDP == 0 {
		return "another XDP program"
	}
	p, err := loader.ProgramByID(list[i].XDP)
	if errors.Is(err, fs.ErrNotExist) || p.Name == "" {
		return fmt.Sprintf("another XDP program (id %d)", list[i].XDP)
	}
	return fmt.Sprintf("the XDP program %q (id %d)", p.Name, p.ID)
}

// show is what readers see of the shield.
func (s *shield) show() *api.Shield {
	out := &api.Shield{Mode: s.mode, SynRate: s.rate, Denied: len(s.denied), Devices: []api.ShieldDevice{}}
	for ifindex, name := range s.names {
		out.Devices = append(out.Devices, api.ShieldDevice{Device: name, Why: s.why[ifindex]})
	}
	slices.SortFunc(out.Devices, func(a, b api.ShieldDevice) int { return cmp.Compare(a.Device, b.Device) })
	return out
}

// Denied is the deny list, which is there without a shield too.
func (d *Daemon) Denied(context.Context) (api.DenyList, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return api.DenyList{Prefixes: slices.Clone(d.denied), Shield: d.shield != nil}, nil
}

// Deny puts prefixes on the deny list.
func (d *Daemon) Deny(ctx context.Context, s api.DenySpec) (api.DenyResult, error) {
	if err := d.checkDeny(s); err != nil {
		return api.DenyResult{}, err
	}
	return d.changeDenied(ctx, func(list []netip.Prefix) []netip.Prefix {
		list = slices.Concat(list, s.Prefixes)
		slices.SortFunc(list, netip.Prefix.Compare)
		return slices.Compact(list)
	})
}

// Undeny takes prefixes off it.
func (d *Daemon) Undeny(ctx context.Context, s api.DenySpec) (api.DenyResult, error) {
	if err := checkPrefixes(s.Prefixes); err != nil {
		return api.DenyResult{}, err
	}
	gone := make(map[netip.Prefix]bool)
	for _, p := range s.Prefixes {
		gone[p] = true
	}
	return d.changeDenied(ctx, func(list []netip.Prefix) []netip.Prefix {
		return slices.DeleteFunc(slices.Clone(list), func(p netip.Prefix) bool { return gone[p] })
	})
}

// changeDenied replaces the deny list, in the store first.
func (d *Daemon) changeDenied(ctx context.Context, change func([]netip.Prefix) []netip.Prefix) (api.DenyResult, error) {
	out := api.DenyResult{Shield: d.shield != nil}
	var err error
	if out.Changed, err = d.storeDenied(change); err != nil || !out.Shield { // one that was stored already need not be in force
		return out, err
	}
	return out, d.Flush(ctx)
}

// storeDenied replaces the deny list, in the store and for the next round, and returns by how many prefixes it
// changed. No round waits for the disk.
func (d *Daemon) storeDenied(change func([]netip.Prefix) []netip.Prefix) (int, error) {
	d.denying.Lock()
	defer d.denying.Unlock()
	d.mu.Lock()
	have := d.denied
	d.mu.Unlock()
	next := change(have)
	changed := max(len(next)-len(have), len(have)-len(next))
	if len(next) > bpfmaps.MaxDenied {
		return changed, fmt.Errorf("the deny list holds %d prefixes at most: %d would be too many", bpfmaps.MaxDenied, len(next)-bpfmaps.MaxDenied)
	}
	if changed == 0 {
		return 0, nil
	}
	if err := d.store.SetDenied(next); err != nil {
		return changed, err
	}
	d.mu.Lock()
	d.denied = next
	d.mu.Unlock()
	return changed, nil
}

func checkPrefixes(list []netip.Prefix) error {
	if len(list) == 0 {
		return errors.New("want a prefix")
	}
	for _, p := range list {
		if !p.IsValid() || p.Addr().Is4In6() {
			return fmt.Errorf("prefix %q: want one like 203.0.113.0/24 or 2001:db8::/32", p)
		}
		if m := p.Masked(); m != p {
			return fmt.Errorf("prefix %s: has bits beyond its length; did you mean %s?", p, m)
		}
	}
	return nil
}

// checkDeny refuses what would cut the host off, unless that is meant.
func (d *Daemon) checkDeny(s api.DenySpec) error {
	if err := checkPrefixes(s.Prefixes); err != nil || s.Force {
		return err
	}
	d.round.Lock()
	hosts := d.seen.HostAddrs
	d.round.Unlock()
	for _, p := range s.Prefixes {
		if p.Bits() == 0 {
			return fmt.Errorf("prefix %s: is everybody; if that is meant, say --force", p)
		}
		for _, h := range hosts {
			if p.Contains(h.Addr) && !h.Addr.IsLoopback() {
				return fmt.Errorf("prefix %s: has this host's own address %s in it, and its neighbours; if that is meant, say --force", p, h.Addr)
			}
		}
	}
	return nil
}
