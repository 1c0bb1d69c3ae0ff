// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/store"
)

// StartSandbox gives the namespace of the asking process's thread its interfaces, or takes note of one
// that is there. The sandbox runs when SandboxRuns has named its process; until then the asking process
// stands for it.
func (m *Manager) StartSandbox(ctx context.Context, s api.SandboxStart) (api.SandboxGrant, error) {
	b, err := m.lockBox(s.Name, docker("start"))
	if err != nil {
		return api.SandboxGrant{}, err
	}
	defer b.verb.Unlock()
	if err := m.start(ctx, b, api.PeerPID(ctx), s.TID); err != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		return api.SandboxGrant{}, fmt.Errorf("sandbox %q: %w", b.rec.Name, err)
	}
	return api.SandboxGrant{Files: m.files(b)}, nil
}

// run is what a start has made.
type run struct {
	rec       store.Sandbox
	runner    *process
	endpoints []*endpoint
	ports     []*port
}

// start makes a run of a sandbox, or nothing. The caller holds b.verb.
func (m *Manager) start(ctx context.Context, b *box, pid, tid int) (err error) {
	if err := m.mayStart(b); err != nil {
		return err
	}
	if pid == 0 {
		return errors.New("it is not known which process asks; start it over the daemon's unix socket")
	}
	var back undo
	defer func() {
		if err != nil {
			back.run()
		}
	}()
	r := &run{rec: b.rec}
	if r.runner, err = identify(pid); err != nil {
		return err
	}
	back.add(r.runner.close)
	if api.PeerPID(ctx) != pid { // looked at behind that: as long as it lives, it is the one
		return errors.New("the process that asks has ended")
	}
	if ownsNames(r.rec.Mode) {
		if err := m.furnish(b, r, tid, &back); err != nil {
			return err
		}
	}
	back.add(func() { _ = m.removeFiles(b) })
	if err := m.writeFiles(b); err != nil {
		return err
	}
	if err := m.commitStart(b, r); err != nil {
		return err
	}
	// What follows is taken back as an end is.
	back = undo{func() { _ = m.finish(context.WithoutCancel(ctx), b, outcome{unstarted: true, keep: true}) }}
	if ownsNames(r.rec.Mode) {
		if err := m.writeHosts(networksOf(r.endpoints), b); err != nil {
			return err
		}
	}
	if len(r.endpoints) == 0 {
		return nil // SandboxRuns tells the readers
	}
	return m.serve(ctx, r.endpoints)
}

// mayStart checks that the sandbox does not run, and that the one does whose namespace it shares.
func (m *Manager) mayStart(b *box) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case b.starting:
		return errStarting
	case b.ended != nil:
		return errors.New("runs already; stop it first")
	case b.rec.Mode != api.ModeContainer:
		return nil
	}
	other := m.boxes[b.rec.JoinID]
	switch {
	case other == nil:
		return fmt.Errorf("the sandbox %s, whose network it shares, has been removed", short(b.rec.JoinID))
	case other.rec.Status != api.StatusRunning:
		return fmt.Errorf("shares the network of sandbox %q, which does not run; start that first", other.rec.Name)
	}
	return nil
}

// furnish makes the interfaces and the host's ports.
func (m *Manager) furnish(b *box, r *run, tid int, back *undo) (err error) {
	ns, err := m.openNS(fmt.Sprintf("/proc/%d/task/%d/ns/net", r.runner.PID, tid))
	if err != nil {
		return err
	}
	defer ns.Close()
	if !r.runner.lives() {
		return fmt.Errorf("process %d has ended", r.runner.PID) // and the file may be another's
	}
	if r.endpoints, err = m.enrol(b, nil, r.rec.Networks); err != nil {
		return err
	}
	back.add(func() { m.strike(r.endpoints) })
	if r.ports, _, err = m.choosePorts(b, r.rec.Publish, networksOf(r.endpoints), nil); err != nil {
		return err
	}
	back.add(func() { m.dropPorts(r.ports) })
	r.rec.Published = published(r.ports)

	if err := m.o.Devices.LoopbackUp(ns); err != nil {
		return err
	}
	if len(r.endpoints) == 0 {
		return nil
	}
	back.add(func() { _ = m.deleteLinks(r.endpoints) })
	if err := m.plugIn(ns, r.endpoints); err != nil {
		return err
	}
	return m.setRoutes(ns, r.endpoints)
}

// openNS opens a namespace that a sandbox may have: not the host's.
func (m *Manager) openNS(path string) (*os.File, error) {
	ns, err := netdev.OpenNetNS(path)
	if err != nil {
		return nil, err
	}
	id, err := readNS(path)
	if err == nil && id == m.host {
		err = fmt.Errorf("namespace %s: is the host's; a sandbox needs one of its own", path)
	}
	if err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// commitStart makes the run count.
func (m *Manager) commitStart(b *box, r *run) error {
	r.rec.Runner = r.runner.Process
	batch := store.Batch{Sandboxes: []store.Sandbox{r.rec}}
	m.recordEnrol(&batch, r.endpoints)
	if err := m.write(batch); err != nil {
		return err
	}
	m.mu.Lock()
	b.rec, b.endpoints, b.ports, b.runner = r.rec, r.endpoints, r.ports, r.runner
	b.starting, b.ended = true, make(chan struct{})
	setLive(r.endpoints)
	m.changed()
	m.mu.Unlock()
	m.follow(b, r.runner)
	return nil
}

// setLive marks endpoints that are in the store. The caller holds m.mu.
func setLive(list []*endpoint) {
	for _, e := range list {
		e.live = true
	}
}
