// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"time"
)

// takeOver carries flows over from tables of another version or size. The maps hold what is served by now,
// so that the new programs can judge.
func (d *Daemon) takeOver() error {
	began := time.Now()
	taken, err := d.loader.TakeOver(d.writer.Hold)
	if err != nil {
		return fmt.Errorf("take over from another version's programs: %w", err)
	}
	if len(taken.Tables) > 0 {
		d.moved = true
		d.log.Info("flow tables carried over to another shape or size", "tables", taken.Tables, "entries", taken.Flows, "took", time.Since(began))
	}
	if taken.Lost > 0 {
		d.log.Warn("flow tables are full: entries were left behind; see --flows", "entries", taken.Lost)
	}
	return nil
}
