// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// engine grants what it is asked for, makes no interface, and takes down all that it hears.
type engine struct {
	handler
	t      *testing.T
	dir    string
	cgroup string // of all sandboxes; empty: none

	mu       sync.Mutex
	heard    []any // requests, in their order
	boxes    map[string]*api.SandboxInfo
	grant    api.SandboxGrant
	fails    map[string]error // by the name of the verb
	runner   int              // who started last
	ownNetNS bool             // the thread that was shown then is not in the host's network namespace
	waits    int              // answers of WaitSandbox that it still runs
}

func newEngine(t *testing.T) *engine {
	return &engine{
		t: t, dir: t.TempDir(), boxes: make(map[string]*api.SandboxInfo), fails: make(map[string]error),
	}
}

// hear takes a request down, and says whether it is to fail.
func (e *engine) hear(verb string, request any) error {
	e.heard = append(e.heard, request)
	return e.fails[verb]
}

// requests returns what was heard since the last call.
func (e *engine) requests() []any {
	e.mu.Lock()
	defer e.mu.Unlock()
	heard := e.heard
	e.heard = nil
	return heard
}

// box finds a sandbox by its name or ID.
func (e *engine) box(word string) (*api.SandboxInfo, error) {
	for id, b := range e.boxes {
		if id == word || b.Name == word {
			return b, nil
		}
	}
	return nil, &api.UnknownError{What: "sandbox", Name: word}
}

func (e *engine) drop(b *api.SandboxInfo) error {
	delete(e.boxes, b.ID)
	return os.RemoveAll(b.Dir)
}

// info is a copy of a sandbox's state.
func (e *engine) info(word string) api.SandboxInfo {
	e.mu.Lock()
	defer e.mu.Unlock()
	b, err := e.box(word)
	require.NoError(e.t, err)
	return *b
}

// set changes what the engine does from now on.
func (e *engine) set(change func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change()
}

// fail has verbs fail from now on, by their names.
func (e *engine) fail(verbs map[string]error) { e.set(func() { e.fails = verbs }) }

// lastStart is who started last, and whether in a network namespace of its own.
func (e *engine) lastStart() (runner int, ownNetNS bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.runner, e.ownNetNS
}

func (e *engine) CreateNetwork(_ context.Context, s api.NetworkSpec) (api.Created, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return api.Created{ID: id("f1"), Name: s.Name}, e.hear("CreateNetwork", s)
}

func (e *engine) RemoveNetwork(_ context.Context, n api.Named) (api.Created, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if n.Name == "busy" {
		return api.Created{}, errors.New(`network "busy": is used by web`)
	}
	return api.Created{ID: id("f1"), Name: n.Name}, e.hear("RemoveNetwork", n)
}

func (e *engine) Connect(_ context.Context, c api.Connection) (api.Result, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return api.Result{Changed: true}, e.hear("Connect", c)
}

func (e *engine) Disconnect(_ context.Context, c api.Connection) (api.Result, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return api.Result{Changed: true}, e.hear("Disconnect", c)
}

func (e *engine) CreateSandbox(_ context.Context, s api.SandboxSpec) (api.SandboxInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.hear("CreateSandbox", s); err != nil {
		return api.SandboxInfo{}, err
	}
	b := api.SandboxInfo{
		ID: id(fmt.Sprintf("%x", 0xab00+len(e.boxes))), Name: s.Name, Mode: s.Mode, Status: api.StatusCreated,
		Cgroup: e.cgroup, AutoRemove: s.AutoRemove, Hostname: s.Hostname, Command: s.Command, WorkDir: s.Dir, Env: s.Env,
	}
	b.Dir = filepath.Join(e.dir, b.ID)
	if err := os.Mkdir(b.Dir, 0o700); err != nil {
		return api.SandboxInfo{}, err
	}
	e.boxes[b.ID] = &b
	return b, nil
}

func (e *engine) Sandbox(_ context.Context, n api.Named) (api.SandboxInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b, err := e.box(n.Name)
	if err != nil {
		return api.SandboxInfo{}, err
	}
	return *b, nil
}

func (e *engine) StartSandbox(ctx context.Context, s api.SandboxStart) (api.SandboxGrant, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.hear("StartSandbox", s); err != nil {
		return api.SandboxGrant{}, err
	}
	b, err := e.box(s.Name)
	if err != nil {
		return api.SandboxGrant{}, err
	}
	e.runner, e.ownNetNS = api.PeerPID(ctx), false
	if s.TID != 0 {
		shown, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d/ns/net", e.runner, s.TID))
		if err != nil {
			return api.SandboxGrant{}, err
		}
		host, err := os.Stat("/proc/self/ns/net")
		if err != nil {
			return api.SandboxGrant{}, err
		}
		e.ownNetNS = !os.SameFile(shown, host)
	}
	b.Status = "starting"
	return e.grant, nil
}

func (e *engine) SandboxRuns(_ context.Context, s api.SandboxRunning) (api.Result, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.hear("SandboxRuns", s); err != nil {
		return api.Result{}, err
	}
	b, err := e.box(s.ID)
	if err != nil {
		return api.Result{}, err
	}
	b.Status, b.PID = api.StatusRunning, s.PID
	return api.Result{Changed: true}, nil
}

func (e *engine) SandboxEnded(_ context.Context, s api.SandboxExited) (api.Result, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.hear("SandboxEnded", s); err != nil {
		return api.Result{}, err
	}
	b, err := e.box(s.ID)
	if err != nil {
		return api.Result{}, err
	}
	b.PID, b.Status = 0, api.StatusExited
	if s.Unstarted {
		b.Status = api.StatusCreated
	}
	if b.AutoRemove {
		return api.Result{Changed: true}, e.drop(b)
	}
	return api.Result{Changed: true}, nil
}

func (e *engine) StopSandbox(_ context.Context, s api.SandboxStop) (api.Created, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b, err := e.box(s.Name)
	if err != nil {
		return api.Created{}, err
	}
	return api.Created{ID: b.ID, Name: b.Name}, e.hear("StopSandbox", s)
}

func (e *engine) WaitSandbox(_ context.Context, n api.Named) (api.SandboxWaited, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, err := e.box(n.Name); err != nil {
		return api.SandboxWaited{}, err
	}
	e.waits--
	return api.SandboxWaited{Running: e.waits >= 0, Code: 5}, e.hear("WaitSandbox", n)
}

func (e *engine) RemoveSandbox(_ context.Context, s api.SandboxRemoval) (api.Created, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b, err := e.box(s.Name)
	if err != nil {
		return api.Created{}, err
	}
	return api.Created{ID: b.ID, Name: b.Name}, errors.Join(e.hear("RemoveSandbox", s), e.drop(b))
}

func (e *engine) PublishPorts(_ context.Context, p api.PortChange) (api.PublishedPorts, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return api.PublishedPorts{Ports: []string{"80/tcp -> 0.0.0.0:8080", "80/tcp -> [::]:8080"}}, e.hear("PublishPorts", p)
}

func (e *engine) UnpublishPorts(_ context.Context, p api.PortChange) (api.PublishedPorts, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return api.PublishedPorts{Ports: []string{"80/tcp -> 0.0.0.0:8080"}}, e.hear("UnpublishPorts", p)
}

// eventually waits until the engine's state is as it should be.
func (e *engine) eventually(what string, cond func() bool) {
	e.t.Helper()
	lab.Eventually(e.t, 20*time.Second, what, func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return cond()
	})
}
