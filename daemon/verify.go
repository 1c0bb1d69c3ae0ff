// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/policy"
)

// verifyEvery is how often the kernel is asked whether programs and pins are where they were put: nobody
// tells when one is taken away.
const verifyEvery = 5 * time.Second

// verifyLoop looks at that beside the rounds, which it does not hold up.
func (d *Daemon) verifyLoop(ctx context.Context) error {
	tick := time.NewTicker(verifyEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if d.verify() {
				signal(d.urgent)
			}
		}
	}
}

// verify looks for what others have taken away, and says so. It reports whether programs are to be put back,
// which a round does.
func (d *Daemon) verify() (lost bool) {
	v, err := d.loader.Verify()
	if len(v.Lost) > 0 || err != nil {
		d.round.Lock()
		d.ownPins = false // a pin may be left of what the loader has forgotten
		d.round.Unlock()
	}
	for _, a := range v.Lost {
		if a.Hook != "cgroup" && !deviceExists(a.Ifindex) {
			continue // gone with its device, which a round knows or will
		}
		lost = true
		if loader.IsStrict(a.Program) && d.strict != nil {
			d.round.Lock()
			d.strict.programs.Forget()
			d.round.Unlock()
		}
		d.log.Warn("a program was taken off by other hands, and is put back", "program", a.Program, "device", d.deviceName(a), "hook", a.Hook)
	}
	ahead := make(map[string]bool)
	for _, a := range v.Ahead {
		device := d.deviceName(a.Attachment)
		text := fmt.Sprint(a.Name, a.ID, device, a.Hook)
		if ahead[text] = true; !d.ahead[text] {
			d.log.Warn("a program of others runs before bpfnet's and can keep packets from it: bpfnet doctor tells more",
				"program", a.Name, "id", a.ID, "device", device, "hook", a.Hook)
		}
	}
	d.ahead = ahead
	if v.Repinned > 0 {
		d.log.Warn("pins were gone, and are made again", "below", d.cfg.BPFFS, "count", v.Repinned)
	}
	// Said once: the network runs on, but not beyond this process.
	if text := fmt.Sprint(err); err != nil && text != d.unpinned {
		d.log.Error("programs and maps are not pinned as they should be; if the daemon ends now, the network does", "err", err)
	}
	d.unpinned = ""
	if err != nil {
		d.unpinned = fmt.Sprint(err)
	}
	if slices.ContainsFunc(v.Lost, func(a loader.Attachment) bool { return a.Hook == "cgroup" }) {
		if err := d.loader.AttachCgroup(); err != nil {
			d.log.Error("put programs back on the cgroup", "err", err)
		}
	}
	return lost
}

// deviceName is that of the last round, or a cgroup; of a device that is not known, its number.
func (d *Daemon) deviceName(a loader.Attachment) string {
	d.round.Lock()
	defer d.round.Unlock()
	return cmp.Or(d.placeOf(a, d.deviceNames()), fmt.Sprint(a.Ifindex))
}

// reportUplinks logs which devices lead to the world, when that changes.
func (d *Daemon) reportUplinks(uplinks []policy.Uplink) {
	var now []string
	for _, u := range uplinks {
		now = append(now, fmt.Sprintf("%s (device %d) %s", u.Name, u.Ifindex, u.Addrs))
	}
	if d.uplinks != nil && !slices.Equal(now, d.uplinks) {
		d.log.Info("uplinks have changed, and are served as they are now", "uplinks", now)
	}
	d.uplinks = append([]string{}, now...)
}
