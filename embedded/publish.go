// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/store"
)

// PublishPorts publishes ports of a running sandbox, now and whenever it is started again.
func (m *Manager) PublishPorts(ctx context.Context, c api.PortChange) (api.PublishedPorts, error) {
	b, err := m.lockBox(c.Name, docker("run -p PORTS")) // an Engine publishes when it makes a container
	if err != nil {
		return api.PublishedPorts{}, err
	}
	defer b.verb.Unlock()
	rec, endpoints, ports, err := m.mayPublish(b)
	if err != nil {
		return api.PublishedPorts{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	networks := networksOf(endpoints)
	if v4, v6 := gateways(networks); v4 == nil && v6 == nil {
		return api.PublishedPorts{}, fmt.Errorf("sandbox %q: is in no network that leads out of the host; connect it to one that is not internal", rec.Name)
	}
	if rec.Publish, err = readPorts(rec.Publish, c.Ports); err != nil {
		return api.PublishedPorts{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	next, added, err := m.choosePorts(b, rec.Publish, networks, ports)
	if err != nil {
		return api.PublishedPorts{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	if err := m.changePorts(ctx, b, rec, next); err != nil {
		m.undoPorts(added, ports)
		return api.PublishedPorts{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	return api.PublishedPorts{Ports: lines(added)}, nil
}

// UnpublishPorts takes published ports back. Each is meant by what is said of it.
func (m *Manager) UnpublishPorts(ctx context.Context, c api.PortChange) (api.PublishedPorts, error) {
	b, err := m.lockBox(c.Name, docker("run -p PORTS"))
	if err != nil {
		return api.PublishedPorts{}, err
	}
	defer b.verb.Unlock()
	rec, _, ports, err := m.mayPublish(b)
	if err != nil {
		return api.PublishedPorts{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	next := ports
	for _, s := range c.Ports {
		w, err := readPort(s)
		if err != nil {
			return api.PublishedPorts{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
		}
		meant := func(h store.PortWish) bool { return matches(w, h, ports) }
		if !slices.ContainsFunc(rec.Publish, meant) {
			return api.PublishedPorts{}, fmt.Errorf("sandbox %q: does not publish %s; it publishes %s", rec.Name, describe(w), joinNames(lines(next)))
		}
		rec.Publish = slices.DeleteFunc(slices.Clone(rec.Publish), meant)
		next = slices.DeleteFunc(slices.Clone(next), func(p *port) bool { return meant(p.wish) })
	}
	if err := m.changePorts(ctx, b, rec, next); err != nil {
		return api.PublishedPorts{}, fmt.Errorf("sandbox %q: %w", rec.Name, err)
	}
	dropped := without(ports, next)
	m.dropPorts(dropped)
	return api.PublishedPorts{Ports: lines(dropped)}, nil
}

// matches reports whether a port that there is was meant: by the sandbox's port, and the host's address
// and ports as far as they are said. A single host port also means the one that was chosen.
func matches(w, have store.PortWish, ports []*port) bool {
	switch {
	case w.Proto != have.Proto || w.Target != have.Target || w.Host.IsValid() && w.Host != have.Host:
		return false
	case w.First == 0 || w.First == have.First && w.Last == have.Last:
		return true
	}
	return w.First == w.Last && slices.ContainsFunc(ports, func(p *port) bool { return p.wish == have && p.Host.Port() == w.First })
}

// mayPublish checks that the sandbox runs, and returns what it has.
func (m *Manager) mayPublish(b *box) (store.Sandbox, []*endpoint, []*port, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case b.rec.Mode != "":
		return b.rec, nil, nil, errors.New("has no network of its own, so that nothing can be published")
	case b.starting:
		return b.rec, nil, nil, errStarting
	case b.ended == nil:
		return b.rec, nil, nil, errors.New("does not run; start it first")
	}
	return b.rec, b.endpoints, b.ports, nil
}

// changePorts replaces the ports of a running sandbox.
func (m *Manager) changePorts(ctx context.Context, b *box, rec store.Sandbox, next []*port) error {
	m.mu.Lock()
	before, endpoints, ports := b.rec, b.endpoints, b.ports
	m.mu.Unlock()
	rec.Published = published(next)
	if err := m.write(store.Batch{Sandboxes: []store.Sandbox{rec}}); err != nil {
		return err
	}
	m.setRun(b, rec, endpoints, next)
	if err := m.o.Apply(ctx); err != nil {
		m.record(store.Batch{Sandboxes: []store.Sandbox{before}})
		m.setRun(b, before, endpoints, ports)
		return join(fmt.Errorf("the data path does not follow: %w", err), m.o.Apply(context.WithoutCancel(ctx)))
	}
	return nil
}

// lines are ports as "bpfnet port" prints them.
func lines(list []*port) []string {
	var out []string
	for _, p := range list {
		out = append(out, fmt.Sprintf("%d/%s -> %s", p.Target, p.Proto, p.Host))
	}
	return out
}

// joinNames lists names in a sentence; none is "nothing".
func joinNames(names []string) string {
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}
