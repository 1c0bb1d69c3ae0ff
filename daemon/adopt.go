// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"time"

	"github.com/bpfnet/bpfnet/loader"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// newcomers are the ports of bridges that no program guards yet: containers that ran before their
// network was served.
func (d *Daemon) newcomers(devices policy.Devices, pinned []loader.Attachment) map[int]bool {
	guarded := make(map[int]bool)
	for _, a := range pinned {
		if a.Program == loader.FromBridge {
			guarded[a.Ifindex] = true
		}
	}
	fresh := make(map[string]bool)
	for _, b := range devices.Bridges {
		fresh[b.Name] = !guarded[b.Ifindex]
	}
	out := make(map[int]bool)
	for _, l := range devices.Links {
		if fresh[l.Bridge] && !d.attached[l.Ifindex] {
			out[l.Ifindex] = true
		}
	}
	return out
}

// adopt takes over the flows that netfilter has translated so far for containers on new's interfaces.
// Their programs are in place, and their endpoints not READY: no packet of theirs is forwarded, by us or
// by the stack, between the look at what netfilter knows and the next write.
func (d *Daemon) adopt(in policy.Intents, fresh map[int]bool) (bpfmaps.Adopted, error) {
	begin := time.Now()
	tracked, err := netdev.Tracked()
	if err != nil || len(tracked) == 0 {
		return bpfmaps.Adopted{}, err
	}
	// As the tables will be.
	tables, _ := policy.Compile(in, d.slots)
	is := func(slot uint16) bool { return slot != 0 && fresh[tables.Endpoints[slot].Ifindex] }
	var list []policy.Adopted
	for _, k := range tracked {
		if a, ok := tables.Adopt(k); ok && (is(a.Opener) || is(a.Target)) {
			list = append(list, a)
		}
	}
	if len(list) == 0 {
		return bpfmaps.Adopted{}, nil
	}
	got, err := d.writer.Adopt(tables, list)
	if err != nil {
		return got, err
	}
	d.log.Info("took over flows from netfilter", "count", got.Flows, "tracked", len(tracked), "took", time.Since(begin).Round(time.Millisecond))
	if got.Full > 0 {
		d.log.Warn("left flows to their end: the flow tables are half full", "count", got.Full)
	}
	return got, nil
}

// count tells the data path what adopt has added.
func (d *Daemon) count(a bpfmaps.Adopted) error {
	if a.Flows == 0 {
		return nil
	}
	v4, v6 := a.Added()
	if err := d.loader.AddToGauge(v4, v6); err != nil {
		return fmt.Errorf("count adopted flows: %w", err)
	}
	return nil
}
