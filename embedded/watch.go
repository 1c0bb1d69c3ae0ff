// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/bpfnet/bpfnet/sandbox"
	"github.com/bpfnet/bpfnet/store"
)

// runnerWait is how long a sandbox whose process has ended is left to its runner, which ends what is
// left in the cgroup and reports the exit code. A runner that hangs for longer is not waited for.
const runnerWait = 15 * time.Second

// process is a process that is watched.
type process struct {
	store.Process
	watch *sandbox.Watch
	let   chan struct{} // closed when it is let go
	once  sync.Once
}

// open begins to watch a process. It fails with sandbox.ErrGone.
func open(id store.Process) (*process, error) {
	w, err := sandbox.Open(sandbox.ID(id))
	if err != nil {
		return nil, err
	}
	return &process{Process: id, watch: w, let: make(chan struct{})}, nil
}

// identify is open for a process that is known by its number only.
func identify(pid int) (*process, error) {
	id, err := sandbox.Identify(pid)
	if err != nil {
		return nil, err
	}
	return open(store.Process(id))
}

func (p *process) close() {
	if p == nil {
		return
	}
	p.once.Do(func() {
		close(p.let)
		_ = p.watch.Close()
	})
}

// lives reports whether the process runs, as far as the kernel has told. One that was let go does not:
// its run has ended.
func (p *process) lives() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.watch.Done():
		return false
	case <-p.let:
		return false
	default:
		return true
	}
}

// done is closed at the process's end.
func (p *process) done() <-chan struct{} {
	if p == nil {
		ended := make(chan struct{})
		close(ended)
		return ended
	}
	return p.watch.Done()
}

// kill ends the process; one that has ended is no error.
func (p *process) kill() error {
	if err := p.watch.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, sandbox.ErrGone) && p.lives() {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return nil
}

// death is the end of a sandbox's process or of its runner.
type death struct {
	box *box
	of  *process
}

// follow has Run hear of the process's end.
func (m *Manager) follow(b *box, p *process) {
	m.watches.Go(func() {
		select {
		case <-p.watch.Done():
		case <-p.let:
			return
		case <-m.closed:
			return
		}
		select {
		case m.deaths <- death{b, p}:
		case <-p.let:
		case <-m.closed:
		}
	})
}

// Run clears up behind sandboxes whose processes end, until ctx does. Everything runs on then.
func (m *Manager) Run(ctx context.Context) error {
	var work sync.WaitGroup
	defer work.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case d := <-m.deaths:
			work.Go(func() { m.mourn(ctx, d) })
		}
	}
}

// mourn ends a sandbox whose process, or whose runner, has ended.
func (m *Manager) mourn(ctx context.Context, d death) {
	b := d.box
	m.mu.Lock()
	runner, ended, main := b.runner, b.ended, b.main == d.of
	m.mu.Unlock()
	if ended == nil {
		return
	}
	if main {
		timer := time.NewTimer(runnerWait)
		defer timer.Stop()
		select {
		case <-ctx.Done():
			return // the next start finds out
		case <-ended:
			return
		case <-runner.done():
		case <-timer.C:
		}
	}

	b.verb.Lock()
	defer b.verb.Unlock()
	m.mu.Lock()
	isMain, isRunner := b.main == d.of, b.runner == d.of
	starting, lives := b.starting, b.main.lives()
	m.mu.Unlock()
	var err error
	switch {
	case isRunner && starting:
		err = m.finish(ctx, b, outcome{unstarted: true})
	case isMain, isRunner && !lives:
		err = m.finish(ctx, b, m.readOutcome(b))
	}
	if err != nil {
		m.o.Log.Error("clear up behind a sandbox", "sandbox", b.id, "err", err)
	}
}

// readOutcome is how a sandbox ended that nobody has reported.
func (m *Manager) readOutcome(b *box) outcome {
	code, ok, err := sandbox.ReadExit(m.dir(b))
	if err != nil {
		m.o.Log.Warn("read a sandbox's exit code", "sandbox", b.id, "err", err)
	}
	if ok {
		return outcome{code: &code}
	}
	return outcome{why: "the process that ran it was killed"}
}
