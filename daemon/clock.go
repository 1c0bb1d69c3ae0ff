// SPDX-License-Identifier: Apache-2.0

package daemon

import "time"

// clockStep is by how much the wall clock must move against the kernel's other one between two looks to be worth a
// word: what keeps it right by slewing moves it by less.
const clockStep = time.Second

// moment is a point in time by the wall clock and by one that nobody sets: flows, timers and timeouts go by that.
type moment struct {
	wall   time.Time     // without a reading of the other
	steady time.Duration // since the daemon began
}

func (d *Daemon) moment() moment {
	now := time.Now()
	return moment{now.Round(0), now.Sub(d.started)}
}

// clockSet reports, and says, whether the wall clock was set since it was asked last. Nothing goes by that clock but what is
// told: a round tells it anew.
func (d *Daemon) clockSet(now moment) bool {
	last := d.clock
	d.clock = now
	by := now.wall.Sub(last.wall) - (now.steady - last.steady)
	if last.wall.IsZero() || by.Abs() < clockStep {
		return false
	}
	d.log.Info("the wall clock was set, or the host was suspended: flows and timeouts go by another clock and are not touched", "by", by.Round(time.Millisecond))
	return true
}
