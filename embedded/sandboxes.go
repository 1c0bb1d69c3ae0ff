// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/store"
)

// maxHostname is the kernel's limit, __NEW_UTS_LEN.
const maxHostname = 64

// CreateSandbox makes a sandbox that does not run. What is refused at its start is refused here already
// as far as it can be known.
func (m *Manager) CreateSandbox(ctx context.Context, s api.SandboxSpec) (api.SandboxInfo, error) {
	if err := checkSandbox(s); err != nil {
		return api.SandboxInfo{}, err
	}
	rec := store.Sandbox{
		ID: newID(), Name: s.Name, Hostname: s.Hostname, Mode: s.Mode, DNS: s.DNS, AutoRemove: s.AutoRemove,
		Command: s.Command, Dir: s.Dir, Env: s.Env, Created: time.Now(), Status: api.StatusCreated,
	}
	if rec.Hostname == "" && (s.Mode == "" || s.Mode == api.ModeNone) {
		rec.Hostname = short(rec.ID)
	}
	if s.Mode == api.ModeContainer {
		if err := m.mayJoin(s.Join, &rec); err != nil {
			return api.SandboxInfo{}, err
		}
	}
	var err error
	if rec.Publish, err = wishes(s); err != nil {
		return api.SandboxInfo{}, err
	}
	b, err := m.claimName(rec)
	if err != nil {
		return api.SandboxInfo{}, err
	}
	if err := m.addSandbox(ctx, b, s.Name, s.Networks); err != nil {
		m.mu.Lock()
		delete(m.boxes, b.id)
		m.mu.Unlock()
		return api.SandboxInfo{}, err
	}
	m.show(ctx)
	return m.info(b), nil
}

// checkSandbox checks what can be seen of the request alone.
func checkSandbox(s api.SandboxSpec) error {
	if s.Name != "" {
		if err := checkName("sandbox", s.Name); err != nil {
			return err
		}
	}
	switch {
	case len(s.Command) == 0 || s.Command[0] == "":
		return errors.New("sandbox: no command is given")
	case !filepath.IsAbs(s.Dir):
		return fmt.Errorf("working directory %q: is not absolute", s.Dir)
	case len(s.Hostname) > maxHostname:
		return fmt.Errorf("hostname %q: is longer than %d characters", s.Hostname, maxHostname)
	case s.Hostname != "" && !validAlias.MatchString(s.Hostname):
		return fmt.Errorf("hostname %q: is no name of a host; use letters, digits, dots, - and _", s.Hostname)
	case s.Mode != api.ModeContainer && s.Join != "":
		return fmt.Errorf("sandbox %q: cannot be joined in mode %q", s.Join, s.Mode)
	}
	for _, a := range s.DNS {
		if !a.IsValid() || a.IsUnspecified() || a.Zone() != "" {
			return fmt.Errorf("name server %q: is no address of one", a)
		}
	}
	switch s.Mode {
	case "":
		return nil
	case api.ModeHost, api.ModeNone, api.ModeContainer:
	default:
		return fmt.Errorf("mode %q: not known; use %s, %s or %s", s.Mode, api.ModeHost, api.ModeNone, api.ModeContainer)
	}
	mode := s.Mode
	if mode == api.ModeContainer {
		mode += ":" + s.Join
	}
	switch {
	case len(s.Networks) > 0:
		return fmt.Errorf("network %q: cannot go together with --network %s", s.Networks[0].Network, mode)
	case len(s.Publish) > 0 || s.PublishAll:
		return fmt.Errorf("ports: nothing can be published with --network %s, which has no network of its own", mode)
	case s.Mode == api.ModeContainer && s.Hostname != "":
		return fmt.Errorf("hostname %q: is the other sandbox's with --network %s", s.Hostname, mode)
	case s.Mode == api.ModeContainer && len(s.DNS) > 0:
		return fmt.Errorf("name servers: are the other sandbox's with --network %s", mode)
	}
	return nil
}

// mayJoin checks the sandbox whose namespace is to be shared.
func (m *Manager) mayJoin(name string, rec *store.Sandbox) error {
	other, err := m.findBox(name, func(name string) string { return "docker run --network container:" + name })
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if other.rec.Status != api.StatusRunning {
		return fmt.Errorf("sandbox %q: does not run, so its network cannot be shared; start it first", other.rec.Name)
	}
	rec.JoinID, rec.Hostname = other.id, other.rec.Hostname
	return nil
}

// claimName puts a sandbox into the model, as one that is not made yet, so that its name is taken.
func (m *Manager) claimName(rec store.Sandbox) (*box, error) {
	foreign := m.o.Foreign()
	theirs := func(name string) bool {
		return slices.ContainsFunc(foreign.Endpoints, func(e policy.Endpoint) bool { return e.Name == name })
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	ours := func(name string) bool {
		for _, b := range m.boxes {
			if b.rec.Name == name {
				return true
			}
		}
		return false
	}
	switch {
	case rec.Name == "":
		rec.Name = inventName(func(name string) bool { return ours(name) || theirs(name) })
	case ours(rec.Name):
		return nil, &nameTakenError{"sandbox", rec.Name, policy.SourceStore}
	case theirs(rec.Name):
		return nil, &nameTakenError{"sandbox", rec.Name, policy.SourceDocker}
	}
	b := &box{id: rec.ID, rec: rec}
	m.boxes[rec.ID] = b
	return b, nil
}

// addSandbox gives a sandbox its networks, and makes it. Errors name it by the name that was asked for:
// nobody knows one that was made up.
func (m *Manager) addSandbox(ctx context.Context, b *box, asked string, networks []api.Attach) (err error) {
	of := func(err error) error {
		if asked == "" {
			return err
		}
		return fmt.Errorf("sandbox %q: %w", asked, err)
	}
	var back undo
	defer func() {
		if err != nil {
			back.run()
		}
	}()
	defer m.joined(b)
	rec := b.rec
	if rec.Mode == "" && len(networks) == 0 {
		networks = []api.Attach{{Network: DefaultNetwork}}
	}
	var list []*network
	for _, a := range networks {
		n, attach, err := m.attach(ctx, b, rec.Networks, a, docker("run --network"), &back)
		if err != nil {
			return err
		}
		rec.Networks = append(rec.Networks, attach)
		list = append(list, n)
	}
	if err := m.tryAttach(b, rec.Networks); err != nil {
		return of(err)
	}
	if err := m.tryPorts(b, rec.Publish, list); err != nil {
		return of(err)
	}
	if err := os.MkdirAll(m.dir(b), 0o755); err != nil {
		return of(err)
	}
	if err := m.write(store.Batch{Sandboxes: []store.Sandbox{rec}}); err != nil {
		return join(of(err), m.removeDir(b))
	}
	m.mu.Lock()
	b.rec, b.made = rec, true
	m.mu.Unlock()
	return nil
}

// attach reads the wish for a place in a network, besides those that there are. The default network is made
// if it is missing. The caller calls joined when the record has the place, or is not to have it.
func (m *Manager) attach(ctx context.Context, b *box, have []store.Attach, a api.Attach, use instead, back *undo) (*network, store.Attach, error) {
	n, err := m.findNetwork(a.Network, use)
	var unknown *api.UnknownError
	if errors.As(err, &unknown) && isDefault(a.Network) {
		var made bool
		if n, made, err = m.defaultNetwork(ctx); made {
			back.add(func() { m.withdraw(context.WithoutCancel(ctx), n, b) })
		}
	}
	if err == nil {
		err = m.join(b, n)
	}
	if err != nil {
		return nil, store.Attach{}, err
	}
	if slices.ContainsFunc(have, func(h store.Attach) bool { return h.NetworkID == n.ID }) {
		return nil, store.Attach{}, fmt.Errorf("network %q: the sandbox is in it already; name it once", n.Name)
	}
	for _, f := range []struct {
		addr netip.Addr
		is4  bool
	}{{a.IP4, true}, {a.IP6, false}} {
		if f.addr.IsValid() && (f.addr.Is4() != f.is4 || f.addr.Zone() != "") {
			return nil, store.Attach{}, fmt.Errorf("address %s: is not of the family that it is asked for", f.addr)
		}
	}
	for _, alias := range a.Aliases {
		if err := checkAlias(alias); err != nil {
			return nil, store.Attach{}, err
		}
	}
	return n, store.Attach{NetworkID: n.ID, IP4: a.IP4, IP6: a.IP6, Aliases: a.Aliases}, nil
}

// join notes that a sandbox is about to have a place in a network.
func (m *Manager) join(b *box, n *network) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n.leaving {
		return fmt.Errorf("network %q: is being removed", n.Name)
	}
	b.joining = append(b.joining, n)
	return nil
}

// joined takes the notes of join away.
func (m *Manager) joined(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b.joining = nil
}

// isDefault reports whether a name means the default network; "default" is Docker's word for its own.
func isDefault(name string) bool {
	return name == DefaultNetwork || name == "default" || name == string(policy.SourceStore)+"/"+DefaultNetwork
}

// tryAttach checks that the addresses which were asked for can be had, and keeps none.
func (m *Manager) tryAttach(b *box, list []store.Attach) error {
	fixed := slices.DeleteFunc(slices.Clone(list), func(a store.Attach) bool { return !a.IP4.IsValid() && !a.IP6.IsValid() })
	endpoints, err := m.enrol(b, nil, fixed)
	if err != nil {
		return err
	}
	m.strike(endpoints)
	return nil
}

// Sandbox returns a sandbox.
func (m *Manager) Sandbox(_ context.Context, n api.Named) (api.SandboxInfo, error) {
	b, err := m.findBox(n.Name, docker("exec"))
	if err != nil {
		return api.SandboxInfo{}, err
	}
	return m.info(b), nil
}

func (m *Manager) info(b *box) api.SandboxInfo {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := &b.rec
	i := api.SandboxInfo{
		ID: r.ID, Name: r.Name, Mode: r.Mode, Status: r.Status, PID: r.Main.PID, StartTime: r.Main.StartTime,
		Dir: m.dir(b), Cgroup: m.cgroup(b), AutoRemove: r.AutoRemove, Hostname: r.Hostname,
		Command: r.Command, WorkDir: r.Dir, Env: r.Env,
	}
	if other := m.boxes[r.JoinID]; r.Mode == api.ModeContainer && other != nil {
		i.JoinPID = other.rec.Main.PID
	}
	return i
}

// RemoveSandbox removes a sandbox, with force also one that runs.
func (m *Manager) RemoveSandbox(ctx context.Context, s api.SandboxRemoval) (api.Created, error) {
	b, err := m.findBox(s.Name, docker("rm"))
	if err != nil {
		return api.Created{}, err
	}
	m.mu.Lock()
	done := api.Created{ID: b.id, Name: b.rec.Name}
	m.mu.Unlock()
	if s.Force {
		if err := m.end(ctx, b, syscall.SIGKILL, 0); err != nil {
			return api.Created{}, fmt.Errorf("sandbox %q: %w", done.Name, err)
		}
	}
	b.verb.Lock()
	defer b.verb.Unlock()
	m.mu.Lock()
	runs, removed := b.ended != nil, b.removed
	m.mu.Unlock()
	switch {
	case removed && s.Force: // it was one of --rm
		return done, nil
	case removed:
		return api.Created{}, &api.UnknownError{What: "sandbox", Name: s.Name}
	case runs:
		return api.Created{}, fmt.Errorf("sandbox %q: runs; stop it first, or use --force", done.Name)
	}
	if err := m.write(store.Batch{DeleteSandboxes: []string{b.id}}); err != nil {
		return api.Created{}, fmt.Errorf("sandbox %q: %w", done.Name, err)
	}
	m.mu.Lock()
	b.removed = true
	delete(m.boxes, b.id)
	m.mu.Unlock()
	m.show(ctx)
	if err := m.removeDir(b); err != nil {
		return api.Created{}, fmt.Errorf("sandbox %q: is removed, but not its files: %w", done.Name, err)
	}
	return done, nil
}
