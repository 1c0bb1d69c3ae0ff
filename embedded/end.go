// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/sandbox"
	"github.com/bpfnet/bpfnet/store"
)

// waitMost is how long WaitSandbox waits, less than a request may take.
const waitMost = 20 * time.Second

// unknownCode stands for an exit code that nobody has seen, as with Docker.
const unknownCode = 255

// outcome is how a run of a sandbox ended.
type outcome struct {
	code      *int   // nil: unknown
	why       string // it is
	unstarted bool   // there was no process: the sandbox is as before the start
	keep      bool   // also one that is to be removed at its end
	reported  bool   // by the runner, which has ended what was left in the cgroup
}

// SandboxRuns takes the process of a start that was granted.
func (m *Manager) SandboxRuns(ctx context.Context, s api.SandboxRunning) (api.Result, error) {
	b, err := m.lockBox(s.ID, docker("start"))
	if err != nil {
		return api.Result{}, err
	}
	defer b.verb.Unlock()
	m.mu.Lock()
	rec, starting := b.rec, b.starting
	m.mu.Unlock()
	if !starting {
		return api.Result{}, fmt.Errorf("sandbox %q: has no start under way", rec.Name)
	}
	// One that is quick has ended by now; its runner will say how.
	main, err := identify(s.PID)
	if err != nil && !errors.Is(err, sandbox.ErrGone) {
		return api.Result{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	rec.Status, rec.Started = api.StatusRunning, time.Now()
	rec.Ended, rec.ExitCode, rec.Why = time.Time{}, nil, ""
	rec.Main = store.Process{PID: s.PID}
	if main != nil {
		rec.Main = main.Process
	}
	if err := m.write(store.Batch{Sandboxes: []store.Sandbox{rec}}); err != nil {
		main.close()
		return api.Result{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	m.mu.Lock()
	b.rec, b.main, b.starting = rec, main, false
	m.mu.Unlock()
	if main != nil {
		m.follow(b, main)
	}
	m.show(ctx)
	return api.Result{Changed: true}, nil
}

// SandboxEnded takes the end of a sandbox from its runner. One that is known already is no error.
func (m *Manager) SandboxEnded(ctx context.Context, s api.SandboxExited) (api.Result, error) {
	b, err := m.lockBox(s.ID, docker("rm"))
	if err != nil {
		var unknown *api.UnknownError
		if errors.As(err, &unknown) { // it was one of --rm
			return api.Result{}, nil
		}
		return api.Result{}, err
	}
	defer b.verb.Unlock()
	m.mu.Lock()
	runs, rec := b.ended != nil, b.rec
	m.mu.Unlock()
	switch {
	case runs:
		return api.Result{Changed: true}, m.finish(ctx, b, outcome{code: &s.Code, unstarted: s.Unstarted, keep: s.Unstarted, reported: true})
	case rec.Status == api.StatusExited && rec.ExitCode == nil && !s.Unstarted:
		// It was buried before its runner had the word.
		rec.ExitCode, rec.Why = &s.Code, ""
		_ = m.removeExit(b)
		if err := m.write(store.Batch{Sandboxes: []store.Sandbox{rec}}); err != nil {
			return api.Result{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
		}
		m.setRecord(b, rec)
		m.show(ctx)
		return api.Result{Changed: true}, nil
	}
	return api.Result{}, nil
}

func (m *Manager) setRecord(b *box, rec store.Sandbox) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b.rec = rec
	m.changed()
}

// finish ends a run: interfaces, ports and addresses are free again, and the sandbox is as how says, or
// gone if it was to be removed. The process has ended whatever the store and the data path say, so that
// nothing stops it. The caller holds b.verb.
func (m *Manager) finish(ctx context.Context, b *box, how outcome) error {
	now := time.Now()
	m.mu.Lock()
	rec, endpoints, ports, ended := b.rec, b.endpoints, b.ports, b.ended
	unstarted := how.unstarted && b.starting
	m.mu.Unlock()
	if ended == nil {
		return nil
	}
	rec.Published = nil
	rec.Main, rec.Runner = store.Process{}, store.Process{}
	at := now
	if unstarted {
		at = time.Time{} // the addresses were not used
	} else {
		rec.Status, rec.Ended, rec.ExitCode, rec.Why = api.StatusExited, now, how.code, how.why
		if rec.Started.IsZero() {
			rec.Started = now
		}
	}
	remove := rec.AutoRemove && !how.keep
	var batch store.Batch
	if remove {
		batch.DeleteSandboxes = []string{b.id}
	} else {
		batch.Sandboxes = []store.Sandbox{rec}
	}
	m.recordLeave(&batch, endpoints, at)
	m.record(batch)

	m.mu.Lock()
	b.runner.close()
	b.main.close()
	b.rec, b.endpoints, b.ports, b.runner, b.main, b.starting = rec, nil, nil, nil, nil, false
	detach(endpoints)
	if remove {
		b.removed = true
		delete(m.boxes, b.id)
	}
	m.changed()
	m.mu.Unlock()

	var errs []error
	if len(endpoints) > 0 {
		errs = append(errs, m.o.Apply(ctx))
	} else {
		m.show(ctx)
	}
	// Somebody waits for the runner, and the end of a device takes tens of milliseconds. Nothing can be
	// sent over it any more, and its addresses rest, unless a new run may ask for them by name.
	linger := how.reported && !unstarted && !fixed(rec)
	if !linger {
		errs = append(errs, m.deleteLinks(endpoints))
	}
	m.free(endpoints, at)
	m.dropPorts(ports)
	if !how.reported {
		errs = append(errs, sandbox.KillCgroup(m.cgroup(b)), sandbox.RemoveCgroup(m.cgroup(b)))
	}
	if remove {
		errs = append(errs, m.removeDir(b))
	} else {
		errs = append(errs, m.removeFiles(b))
	}
	errs = append(errs, m.writeHosts(networksOf(endpoints), nil))
	m.mu.Lock()
	b.ended = nil
	m.mu.Unlock()
	if !linger {
		close(ended)
		return join(errs...)
	}
	m.lingering.Go(func() {
		defer close(ended)
		if err := m.deleteLinks(endpoints); err != nil {
			m.o.Log.Error("delete a sandbox's interfaces; the daemon's next start tries again", "sandbox", rec.Name, "err", err)
		}
	})
	return join(errs...)
}

// fixed reports whether a sandbox has addresses that it asked for.
func fixed(rec store.Sandbox) bool {
	return slices.ContainsFunc(rec.Networks, func(a store.Attach) bool { return a.IP4.IsValid() || a.IP6.IsValid() })
}

// StopSandbox ends a sandbox's process and waits until nothing is left of its run. One that does not run
// is no error.
func (m *Manager) StopSandbox(ctx context.Context, s api.SandboxStop) (api.Created, error) {
	b, err := m.findBox(s.Name, docker("stop"))
	if err != nil {
		return api.Created{}, err
	}
	m.mu.Lock()
	name := b.rec.Name
	m.mu.Unlock()
	if err := m.end(ctx, b, syscall.SIGTERM, s.Grace); err != nil {
		return api.Created{}, fmt.Errorf("sandbox %q: %w", name, err)
	}
	return api.Created{ID: b.id, Name: name}, nil
}

// end sends a signal to a sandbox's process, after grace SIGKILL to all of it, and waits for the end.
// The caller does not hold b.verb.
func (m *Manager) end(ctx context.Context, b *box, sig syscall.Signal, grace time.Duration) error {
	m.mu.Lock()
	ended, starting, main := b.ended, b.starting, b.main
	m.mu.Unlock()
	switch {
	case ended == nil:
		return nil
	case starting:
		return errStarting
	}
	if main.lives() && sig != syscall.SIGKILL {
		if err := main.watch.Signal(sig); err != nil && !errors.Is(err, sandbox.ErrGone) && main.lives() {
			return err
		}
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-ended:
		return nil
	case <-timer.C:
	case <-ctx.Done():
		return fmt.Errorf("still runs; wait longer, or stop it with less time to end: %w", ctx.Err())
	}
	// The process itself may have been moved to another cgroup.
	if main.lives() {
		if err := main.kill(); err != nil {
			return err
		}
	}
	if err := sandbox.KillCgroup(m.cgroup(b)); err != nil {
		return err
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("was killed and has not ended yet: %w", ctx.Err())
	}
}

// WaitSandbox waits for a sandbox's end, for a while.
func (m *Manager) WaitSandbox(ctx context.Context, n api.Named) (api.SandboxWaited, error) {
	b, err := m.findBox(n.Name, docker("wait"))
	if err != nil {
		return api.SandboxWaited{}, err
	}
	m.mu.Lock()
	ended := b.ended
	m.mu.Unlock()
	if ended != nil {
		timer := time.NewTimer(waitMost)
		defer timer.Stop()
		select {
		case <-ended:
		case <-timer.C:
			return api.SandboxWaited{Running: true}, nil
		case <-ctx.Done():
			return api.SandboxWaited{Running: true}, nil
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	w := api.SandboxWaited{}
	switch {
	case b.rec.ExitCode != nil:
		w.Code = *b.rec.ExitCode
	case b.rec.Status == api.StatusExited:
		w.Code = unknownCode
	}
	return w, nil
}
