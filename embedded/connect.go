// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/store"
)

// Connect gives a sandbox an interface in another network; of one that does not run it is for its start.
func (m *Manager) Connect(ctx context.Context, c api.Connection) (_ api.Result, err error) {
	use := func(name string) string { return "docker network connect " + name + " " + c.Sandbox }
	b, err := m.lockBox(c.Sandbox, func(name string) string { return "docker network connect " + c.Network + " " + name })
	if err != nil {
		return api.Result{}, err
	}
	defer b.verb.Unlock()
	m.mu.Lock()
	rec := b.rec
	m.mu.Unlock()
	if err := m.mayConnect(b); err != nil {
		return api.Result{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	var back undo
	defer func() {
		if err != nil {
			back.run()
		}
	}()
	defer m.joined(b)
	n, attach, err := m.attach(ctx, b, nil, c.Attach, use, &back)
	if err != nil {
		return api.Result{}, err
	}
	if slices.ContainsFunc(rec.Networks, func(a store.Attach) bool { return a.NetworkID == n.ID }) {
		return api.Result{}, fmt.Errorf("sandbox %q: is in network %q already", rec.Name, n.Name)
	}
	rec.Networks = append(slices.Clone(rec.Networks), attach)
	if err := m.connect(ctx, b, rec, attach); err != nil {
		return api.Result{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	return api.Result{Changed: true}, nil
}

// mayConnect checks that the sandbox can be in networks.
func (m *Manager) mayConnect(b *box) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case b.rec.Mode == api.ModeHost:
		return errors.New("has the host's network, and cannot be connected to another")
	case b.rec.Mode == api.ModeNone:
		return errors.New("was made to have no network, and cannot be connected to one")
	case b.rec.Mode == api.ModeContainer:
		return fmt.Errorf("shares the network of sandbox %q; connect that", m.boxName(b.rec.JoinID))
	case b.starting:
		return errStarting
	case b.ended == nil && b.rec.Status == api.StatusExited:
		return errors.New("has ended; start it first")
	}
	return nil
}

// connect is Connect with all that is to be known. The caller holds b.verb.
func (m *Manager) connect(ctx context.Context, b *box, rec store.Sandbox, attach store.Attach) (err error) {
	m.mu.Lock()
	runs, have, ports := b.ended != nil, b.endpoints, b.ports
	m.mu.Unlock()
	if !runs {
		if err := m.tryAttach(b, []store.Attach{attach}); err != nil {
			return err
		}
		return m.setWish(ctx, b, rec)
	}
	ns, err := m.openNSOf(b)
	if err != nil {
		return err
	}
	defer ns.Close()
	var back undo
	defer func() {
		if err != nil {
			back.run()
		}
	}()
	fresh, err := m.enrol(b, have, []store.Attach{attach})
	if err != nil {
		return err
	}
	back.add(func() { m.strike(fresh) })
	all := slices.Concat(have, fresh)
	slices.SortFunc(all, byDevice)
	next, added, err := m.choosePorts(b, rec.Publish, networksOf(all), ports)
	if err != nil {
		return err
	}
	back.add(func() { m.undoPorts(added, ports) })
	rec.Published = published(next)

	back.add(func() { _ = m.deleteLinks(fresh) })
	if err := m.plugIn(ns, fresh); err != nil {
		return err
	}
	back.add(func() { _ = m.setRoutes(ns, have) })
	if err := m.setRoutes(ns, all); err != nil {
		return err
	}
	batch := store.Batch{Sandboxes: []store.Sandbox{rec}}
	m.recordEnrol(&batch, fresh)
	if err := m.write(batch); err != nil {
		return err
	}
	m.mu.Lock()
	before := b.rec
	m.mu.Unlock()
	m.setRun(b, rec, all, next)
	back.add(func() {
		undone := store.Batch{Sandboxes: []store.Sandbox{before}}
		m.recordLeave(&undone, fresh, time.Time{})
		m.record(undone)
		m.setRun(b, before, have, ports)
		_ = m.o.Apply(context.WithoutCancel(ctx))
		_ = m.writeHosts(networksOf(all), b)
	})
	if err := m.writeHosts(networksOf(all), b); err != nil {
		return err
	}
	if err := m.serve(ctx, fresh); err != nil {
		return err
	}
	m.dropPorts(without(ports, next))
	return nil
}

// setRun replaces what a run has.
func (m *Manager) setRun(b *box, rec store.Sandbox, endpoints []*endpoint, ports []*port) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range b.endpoints {
		e.live = false
	}
	setLive(endpoints)
	b.rec, b.endpoints, b.ports = rec, endpoints, ports
	m.changed()
}

// setWish replaces the record of a sandbox that does not run.
func (m *Manager) setWish(ctx context.Context, b *box, rec store.Sandbox) error {
	if err := m.write(store.Batch{Sandboxes: []store.Sandbox{rec}}); err != nil {
		return err
	}
	m.setRecord(b, rec)
	m.show(ctx)
	return nil
}

// openNSOf opens the namespace of a running sandbox.
func (m *Manager) openNSOf(b *box) (*os.File, error) {
	m.mu.Lock()
	main := b.main
	m.mu.Unlock()
	if !main.lives() {
		return nil, errors.New("is just ending")
	}
	ns, err := m.openNS(fmt.Sprintf("/proc/%d/ns/net", main.PID))
	if err == nil && !main.lives() {
		ns.Close()
		err = errors.New("is just ending")
	}
	return ns, err
}

// Disconnect takes a sandbox out of a network. The network may have been removed meanwhile.
func (m *Manager) Disconnect(ctx context.Context, c api.Connection) (api.Result, error) {
	b, err := m.lockBox(c.Sandbox, func(name string) string { return "docker network disconnect " + c.Network + " " + name })
	if err != nil {
		return api.Result{}, err
	}
	defer b.verb.Unlock()
	m.mu.Lock()
	rec, starting := b.rec, b.starting
	m.mu.Unlock()
	if starting {
		return api.Result{}, fmt.Errorf("sandbox %q: %w", rec.Name, errStarting)
	}
	id, err := m.attachedID(c, rec)
	if err != nil {
		return api.Result{}, err
	}
	rec.Networks = slices.DeleteFunc(slices.Clone(rec.Networks), func(a store.Attach) bool { return a.NetworkID == id })
	if err := m.disconnect(ctx, b, rec, id); err != nil {
		return api.Result{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	return api.Result{Changed: true}, nil
}

// attachedID is the ID of the network that is meant, of those that the sandbox is in.
func (m *Manager) attachedID(c api.Connection, rec store.Sandbox) (string, error) {
	n, err := m.findNetwork(c.Network, func(name string) string { return "docker network disconnect " + name + " " + c.Sandbox })
	for _, a := range rec.Networks {
		if err == nil && a.NetworkID == n.ID {
			return n.ID, nil
		}
		if err != nil && c.Network != "" && strings.HasPrefix(a.NetworkID, c.Network) {
			return a.NetworkID, nil // it was removed, and the ID is all that is left
		}
	}
	if err != nil {
		return "", err
	}
	return "", fmt.Errorf("sandbox %q: is not in network %q", rec.Name, n.Name)
}

// disconnect is Disconnect with all that is to be known. The caller holds b.verb.
func (m *Manager) disconnect(ctx context.Context, b *box, rec store.Sandbox, networkID string) error {
	m.mu.Lock()
	runs, have, ports := b.ended != nil, b.endpoints, b.ports
	m.mu.Unlock()
	if !runs {
		return m.setWish(ctx, b, rec)
	}
	var stay, out []*endpoint
	for _, e := range have {
		if e.NetworkID == networkID {
			out = append(out, e)
		} else {
			stay = append(stay, e)
		}
	}
	ns, err := m.openNSOf(b)
	if err != nil {
		return err
	}
	defer ns.Close()
	next, added, err := m.choosePorts(b, rec.Publish, networksOf(stay), ports)
	if err != nil {
		return err
	}
	rec.Published = published(next)
	now := time.Now()
	batch := store.Batch{Sandboxes: []store.Sandbox{rec}}
	m.recordLeave(&batch, out, now)
	if err := m.write(batch); err != nil {
		m.undoPorts(added, ports)
		return err
	}
	m.setRun(b, rec, stay, next)
	m.mu.Lock()
	detach(out)
	m.mu.Unlock()
	err = join(
		m.o.Apply(ctx),
		m.deleteLinks(out),
		m.setRoutes(ns, stay),
		m.writeHosts(networksOf(have), b),
	)
	m.free(out, now)
	m.dropPorts(without(ports, next))
	return err
}
