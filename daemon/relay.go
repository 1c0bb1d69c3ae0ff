// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"maps"
)

// relayLost has the next round start the relay again.
func (d *Daemon) relayLost() {
	d.mu.Lock()
	d.resync = true
	d.mu.Unlock()
	d.wake()
}

// relayPorts has the relay serve what the tables say, and reports whether it holds other ports than
// before. Until the Engine has reported its full state, what it asked for before is served.
func (d *Daemon) relayPorts(reported, again bool) (changed bool, err error) {
	want := d.tables.Relays
	if d.cfg.NoRelay {
		want = nil
	}
	held, failed, err := d.relay.Apply(want, again)
	for key, why := range failed {
		if d.unheld[key] == nil {
			d.log.Warn("publish a port for IPv6; it is not", "host", key.Host.String(), "proto", key.Proto.String(), "err", why)
		}
	}
	d.unheld = failed
	changed = !maps.Equal(held, d.relayed)
	d.relayed = held
	return changed, err
}
