// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"time"

	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// newcomers are the ports of bridges that are served for the first time: of containers that ran before
// their network was served. Until their flows are taken over, they are not READY.
func (d *Daemon) newcomers(devices policy.Devices, networks []policy.Network) map[int]bool {
	served := make(map[string]bool)
	for _, n := range networks {
		served[n.Bridge] = n.Source == policy.SourceDocker
	}
	fresh := make(map[string]bool)
	adopted := make(map[int]bool)
	for _, b := range devices.Bridges {
		fresh[b.Name] = served[b.Name] && !d.adopted[b.Ifindex]
		adopted[b.Ifindex] = d.adopted[b.Ifindex] || served[b.Name]
	}
	d.adopted = adopted
	out := make(map[int]bool)
	for _, l := range devices.Links {
		if fresh[l.Bridge] {
			out[l.Ifindex] = true
		}
	}
	return out
}

// without is a set less another.
func without(set, less map[int]bool) map[int]bool {
	out := make(map[int]bool, len(set))
	for k, v := range set {
		out[k] = v && !less[k]
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
