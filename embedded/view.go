// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
)

// State is what the data path is to serve. The lists are shared: they are not to be changed.
func (m *Manager) State() policy.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == nil {
		s := m.makeState()
		m.state = &s
	}
	return *m.state
}

// changed has State made again. The caller holds m.mu.
func (m *Manager) changed() { m.state = nil }

func (m *Manager) makeState() policy.State {
	var s policy.State
	for _, n := range m.networks {
		if n.gone {
			continue
		}
		p := policy.Network{
			ID: n.ID, Name: n.Name, Source: policy.SourceStore, Bridge: n.Bridge, Internal: n.Internal,
		}
		p.SetOptions(n.options)
		for _, sub := range n.Subnets {
			p.Subnets = append(p.Subnets, sub.Prefix)
			p.Gateways = append(p.Gateways, sub.Gateway)
		}
		s.Networks = append(s.Networks, p)
	}
	for _, b := range m.boxes {
		for _, e := range b.endpoints {
			s.Endpoints = append(s.Endpoints, policy.Endpoint{
				ID: e.ID, NetworkID: e.NetworkID, SandboxID: b.id, Name: b.rec.Name,
				Source: policy.SourceStore, Addrs: e.Addrs, MAC: e.MAC,
			})
		}
		s.Ports = append(s.Ports, b.policyPorts()...)
	}
	slices.SortFunc(s.Networks, func(a, b policy.Network) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(s.Endpoints, func(a, b policy.Endpoint) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(s.Ports, func(a, b policy.Port) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), a.Host.Compare(b.Host))
	})
	return s
}

// View is what readers want to know beyond State.
type View struct {
	Sandboxes []api.Sandbox          // by name
	Networks  map[string]NetworkView // by ID
	Aliases   map[string][]string    // by endpoint ID
}

// NetworkView is a network as it was asked for.
type NetworkView struct {
	Created time.Time
	Ranges  []netip.Prefix
	Options map[string]string
	Labels  map[string]string
}

// View returns it.
func (m *Manager) View() View {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := View{Networks: make(map[string]NetworkView), Aliases: make(map[string][]string)}
	for _, n := range m.networks {
		if n.gone {
			continue
		}
		nv := NetworkView{Created: n.Created, Options: n.Options, Labels: n.Labels}
		for _, s := range n.Subnets {
			if s.Range.IsValid() {
				nv.Ranges = append(nv.Ranges, s.Range)
			}
		}
		v.Networks[n.ID] = nv
	}
	for _, b := range m.boxes {
		if !b.made {
			continue
		}
		v.Sandboxes = append(v.Sandboxes, m.viewBox(b))
		for _, e := range b.endpoints {
			if len(e.Aliases) > 0 {
				v.Aliases[e.ID] = e.Aliases
			}
		}
	}
	slices.SortFunc(v.Sandboxes, func(a, b api.Sandbox) int { return cmp.Compare(a.Name, b.Name) })
	return v
}

func (m *Manager) viewBox(b *box) api.Sandbox {
	r := &b.rec
	s := api.Sandbox{
		ID: r.ID, Name: r.Name, Mode: r.Mode, Join: r.JoinID, Status: r.Status, Command: r.Command,
		Created: r.Created, Started: r.Started, Ended: r.Ended, PID: r.Main.PID, StartTime: r.Main.StartTime,
		ExitCode: r.ExitCode, Why: r.Why, Hostname: r.Hostname, AutoRemove: r.AutoRemove,
		Dir: m.dir(b), Cgroup: m.cgroup(b),
	}
	for _, a := range r.Networks {
		s.Networks = append(s.Networks, m.networkName(a.NetworkID))
	}
	return s
}
