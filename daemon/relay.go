// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"maps"

	"github.com/bpfnet/bpfnet/policy"
)

// relayLost has the next round start the relay again.
func (d *Daemon) relayLost() {
	d.mu.Lock()
	d.resync = true
	d.mu.Unlock()
	d.wake()
}

// relayPorts has the relay serve what the tables say, and reports whether it holds other ports than
// before, or cannot get others.
func (d *Daemon) relayPorts(again bool) (changed bool, err error) {
	want := d.tables.Relays
	if d.cfg.NoRelay {
		want = nil
	}
	held, failed, err := d.relay.Apply(want, again)
	unheld := make(map[policy.PortKey]string, len(failed))
	for key, why := range failed {
		unheld[key] = why.Error()
	}
	changed = !maps.Equal(held, d.relayed) || !maps.Equal(unheld, d.unheld)
	d.relayed, d.unheld = held, unheld
	return changed, err
}
