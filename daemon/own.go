// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"slices"

	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/policy"
)

// What the embedded engine needs of the daemon.

// foreign is what the other engine holds.
func (d *Daemon) foreign() policy.State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.engine
}

// guard puts the programs on a link before it becomes a bridge port. They stay until a round has seen
// it as one, or it is gone.
func (d *Daemon) guard(ifindex int) error {
	d.mu.Lock()
	d.guarded[ifindex] = true
	d.mu.Unlock()
	err := errors.Join(d.loader.Attach(loader.FromContainer, ifindex), d.loader.Attach(loader.ToContainer, ifindex))
	if err != nil {
		d.unguard(ifindex)
	}
	return err
}

func (d *Daemon) unguard(ifindex int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.guarded, ifindex)
}

// settleGuards forgets the guarded links that are served ports by now, or gone.
func (d *Daemon) settleGuards(devices policy.Devices) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.guarded) == 0 {
		return
	}
	for _, l := range devices.Links {
		delete(d.guarded, l.Ifindex)
	}
	for ifindex := range d.guarded {
		if !deviceExists(ifindex) {
			delete(d.guarded, ifindex)
		}
	}
}

// show has readers see what is new and does not matter to the data path.
func (d *Daemon) show(context.Context) error {
	d.round.Lock()
	defer d.round.Unlock()
	d.mu.Lock()
	_, state := d.state()
	d.mu.Unlock()
	byHand, err := d.byHand(d.seen, state)
	if err != nil {
		return err
	}
	state.Endpoints = slices.Concat(state.Endpoints, byHand)
	return d.writeSnapshot(state)
}

// ready says whether the last round's tables serve an endpoint, and if not, why.
func (d *Daemon) ready(endpointID string) (bool, string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.snapshot.Endpoints {
		if e.ID == endpointID {
			return e.Ready, e.Why
		}
	}
	return false, "the data path does not know it yet"
}
