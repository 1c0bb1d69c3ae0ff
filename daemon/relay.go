// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/bpfnet/bpfnet/policy"
)

// relayLost has the next round start the relay again.
func (d *Daemon) relayLost() {
	d.mu.Lock()
	d.resync = true
	d.mu.Unlock()
	d.wake()
}

// withoutRelay leaves the Engine's containers with IPv4 only unpublished on IPv6 addresses, as the Engine
// does, unless they are asked for: a socket of the relay's can be in its way.
func (d *Daemon) withoutRelay(s policy.State) policy.State {
	if d.cfg.Relay != RelayAll {
		s.Ports = slices.DeleteFunc(slices.Clone(s.Ports), func(p policy.Port) bool { return p.Relay })
	}
	return s
}

// yieldFor is how long a new interface may stay unknown until its container is taken for one that does
// not matter to the relay.
const yieldFor = 2 * time.Second

// relayYields has the relay make room when something joins a network with IPv6: it may be a container
// with IPv4 only that is being connected, and then the Engine is about to bind the ports that the relay has
// for it. It has some ten milliseconds until then.
func (d *Daemon) relayYields(bridge string) {
	if d.cfg.Relay != RelayAll {
		return
	}
	d.mu.Lock()
	dual := false
	for _, n := range d.engine.Networks {
		for _, s := range n.Subnets {
			dual = dual || n.Bridge == bridge && !n.Internal && s.Addr().Is6()
		}
	}
	d.mu.Unlock()
	if !dual {
		return
	}
	if err := d.relay.Yield(); err != nil {
		d.log.Warn("have the relay make room for the Engine", "err", err)
	}
	d.mu.Lock()
	d.yieldedIn, d.yielded = d.begun, time.Now()
	d.mu.Unlock()
	time.AfterFunc(yieldFor, d.wake)
}

// relayResumes has the relay take its ports again once it is known who has joined: whoever that is, the
// tables say by now whether the relay is still to have his.
func (d *Daemon) relayResumes(round uint64, devices policy.Devices) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.yielded.IsZero() || round <= d.yieldedIn {
		return
	}
	if time.Since(d.yielded) < yieldFor {
		for _, l := range devices.Links {
			if _, known := d.tables.Links[l.Ifindex]; !known {
				return
			}
		}
		for _, e := range d.engine.Endpoints {
			if strings.HasPrefix(e.SandboxID, "ep-") { // it is not said yet whose it is
				return
			}
		}
	}
	d.yielded = time.Time{}
	d.relay.Resume()
}

// relayPorts has the relay serve what the tables say, and reports whether it holds other ports than
// before, or cannot get others.
func (d *Daemon) relayPorts(again bool) (changed bool, err error) {
	want := d.tables.Relays
	if d.cfg.Relay == RelayNone {
		want = nil
	}
	held, failed, err := d.relay.Apply(want, again)
	unheld := make(map[policy.PortKey]string, len(failed))
	for key, why := range failed {
		unheld[key] = why.Error()
	}
	for key := range d.relayed {
		if !held[key] {
			d.own.HoldUnrelayed()
			break
		}
	}
	changed = !maps.Equal(held, d.relayed) || !maps.Equal(unheld, d.unheld)
	d.relayed, d.unheld = held, unheld
	return changed, err
}
