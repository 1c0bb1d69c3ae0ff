// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/policy"
)

// MaxDenied is how many prefixes the deny list holds.
const MaxDenied = 65536

// ShieldWriter fills the maps of the shield. It is their only writer and not safe for concurrent use.
type ShieldWriter struct {
	m       *Maps
	denied4 map[bpf.ShieldDeny4Key]uint32 // index into shield_hits
	denied6 map[bpf.ShieldDeny6Key]uint32
	devices map[uint32]bpf.ShieldShieldDevice
	used    []bool // indices
	next    uint32 // where to look for a free one
}

// NewShieldWriter reads what the maps hold.
func NewShieldWriter(m *Maps) (*ShieldWriter, error) {
	w := &ShieldWriter{m: m}
	return w, w.Resync()
}

// Resync reads back what the maps hold, so that the next writes mend what anything else changed.
func (w *ShieldWriter) Resync() error {
	if err := errors.Join(
		readHash(w.m.m["shield_deny4"], &w.denied4), readHash(w.m.m["shield_deny6"], &w.denied6),
		readHash(w.m.m["shield_devices"], &w.devices),
	); err != nil {
		return fmt.Errorf("shield: %w", err)
	}
	w.used = make([]bool, MaxDenied)
	for _, i := range w.denied4 {
		w.used[i] = true
	}
	for _, i := range w.denied6 {
		w.used[i] = true
	}
	return nil
}

// Deny brings the deny list to these prefixes. It goes on after an error.
func (w *ShieldWriter) Deny(list []netip.Prefix) error {
	want4, want6 := make(map[bpf.ShieldDeny4Key]uint32), make(map[bpf.ShieldDeny6Key]uint32)
	for _, p := range list {
		if a := p.Masked().Addr(); a.Is4() {
			want4[bpf.ShieldDeny4Key{Prefixlen: uint32(p.Bits()), Addr: addr4(a)}] = 0
		} else {
			want6[bpf.ShieldDeny6Key{Prefixlen: uint32(p.Bits()), Addr: bpf.ShieldAddr(addr(a))}] = 0
		}
	}
	if err := errors.Join(
		deny(w, w.m.m["shield_deny4"], w.denied4, want4), deny(w, w.m.m["shield_deny6"], w.denied6, want6),
	); err != nil {
		return fmt.Errorf("shield: %w", err)
	}
	return nil
}

// deny brings one family's map to the keys of want.
func deny[K comparable](w *ShieldWriter, m *ebpf.Map, have, want map[K]uint32) error {
	for k, i := range have {
		if _, ok := want[k]; ok {
			want[k] = i
		} else {
			w.used[i] = false
		}
	}
	_, gone := remove(m, have, want)
	errs := []error{gone}
	none := make([]uint64, ebpf.MustPossibleCPU())
	for k := range want {
		if _, ok := have[k]; ok {
			continue
		}
		i, ok := w.free()
		if !ok {
			return errors.Join(gone, fmt.Errorf("more than %d prefixes", MaxDenied))
		}
		// Its last owner's packets are not this one's.
		if err := w.m.m["shield_hits"].Put(i, none); err != nil {
			errs = append(errs, fmt.Errorf("write shield_hits: %w", err))
		}
		want[k] = i
	}
	_, added := put(m, have, want)
	return errors.Join(append(errs, added)...)
}

// free takes an index that no prefix has.
func (w *ShieldWriter) free() (uint32, bool) {
	for range w.used {
		i := w.next
		w.next = (w.next + 1) % MaxDenied
		if !w.used[i] {
			w.used[i] = true
			return i, true
		}
	}
	return 0, false
}

// Devices says which MACs the frames have that the shield judges, by device.
func (w *ShieldWriter) Devices(macs map[int]policy.MAC) error {
	want := make(map[uint32]bpf.ShieldShieldDevice, len(macs))
	for ifindex, mac := range macs {
		want[uint32(ifindex)] = bpf.ShieldShieldDevice{Mac: mac}
	}
	_, gone := remove(w.m.m["shield_devices"], w.devices, want)
	_, added := put(w.m.m["shield_devices"], w.devices, want)
	if err := errors.Join(gone, added); err != nil {
		return fmt.Errorf("shield: %w", err)
	}
	return nil
}

// SynRate sets how many connections a second a source may open to published ports; 0: any number. It may
// run ahead by one second's worth.
func (w *ShieldWriter) SynRate(perSecond int) error {
	var c bpf.ShieldShieldConfig
	if perSecond > 0 {
		c.SynInterval = max(1, uint64(time.Second)/uint64(perSecond))
		c.SynBurst = uint64(time.Second)
	}
	if err := w.m.m["shield_config"].Put(uint32(0), c); err != nil {
		return fmt.Errorf("shield: write its config: %w", err)
	}
	return nil
}

// Denied is a prefix of the deny list and what it has kept away.
type Denied struct {
	Prefix  netip.Prefix `json:"prefix"`
	Packets uint64       `json:"packets"`
}

// Denied reads the deny list as the shield has it; nothing where there is no shield.
func (m *Maps) Denied() ([]Denied, error) {
	if m.m["shield_hits"] == nil {
		return nil, nil
	}
	var denied4 map[bpf.ShieldDeny4Key]uint32
	var denied6 map[bpf.ShieldDeny6Key]uint32
	if err := errors.Join(readHash(m.m["shield_deny4"], &denied4), readHash(m.m["shield_deny6"], &denied6)); err != nil {
		return nil, err
	}
	indices := make(map[netip.Prefix]uint32, len(denied4)+len(denied6))
	for k, i := range denied4 {
		a := fromAddr4(k.Addr)
		if !a.IsValid() {
			a = netip.IPv4Unspecified()
		}
		indices[netip.PrefixFrom(a, int(k.Prefixlen))] = i
	}
	for k, i := range denied6 {
		indices[netip.PrefixFrom(fromAddr(bpf.DatapathAddr(k.Addr)), int(k.Prefixlen))] = i
	}
	out := make([]Denied, 0, len(indices))
	for p, i := range indices {
		var values []uint64
		if err := m.m["shield_hits"].Lookup(i, &values); err != nil {
			return nil, fmt.Errorf("read shield_hits: %w", err)
		}
		d := Denied{Prefix: p}
		for _, n := range values {
			d.Packets += n
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b Denied) int {
		return cmp.Or(cmp.Compare(b.Packets, a.Packets), a.Prefix.Compare(b.Prefix))
	})
	return out, nil
}
