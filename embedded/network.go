// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/ipam"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/store"
)

const (
	bridgePrefix  = "bpn-"
	defaultBridge = "bpfnet0"
)

// CreateNetwork makes a bridge network.
func (m *Manager) CreateNetwork(ctx context.Context, s api.NetworkSpec) (api.Created, error) {
	if err := checkNetworkName(s.Name); err != nil {
		return api.Created{}, err
	}
	if s.Name == DefaultNetwork {
		return api.Created{}, fmt.Errorf("network %q: is the default network, which is made when it is first used; its subnet is said with bpfnet daemon --default-subnet", s.Name)
	}
	n, err := m.makeNetwork(ctx, s)
	if err != nil {
		return api.Created{}, err
	}
	return api.Created{ID: n.ID, Name: n.Name}, nil
}

// isMode reports whether --network NAME means something else than a network.
func isMode(name string) bool {
	return name == api.ModeHost || name == api.ModeNone || strings.HasPrefix(name, api.ModeContainer+":")
}

func checkNetworkName(name string) error {
	switch {
	case isMode(name), name == "default":
		return fmt.Errorf("network %q: the name has a meaning of its own; choose another", name)
	}
	return checkName("network", name)
}

// Default makes the default network if it is missing.
func (m *Manager) Default(ctx context.Context) error {
	_, _, err := m.defaultNetwork(ctx)
	return err
}

// defaultNetwork finds the default network, or makes it.
func (m *Manager) defaultNetwork(ctx context.Context) (n *network, made bool, err error) {
	for {
		n, err = m.findNetwork(string(policy.SourceStore)+"/"+DefaultNetwork, docker("run --network"))
		var unknown *api.UnknownError
		if err == nil || !errors.As(err, &unknown) {
			return n, false, err
		}
		n, err = m.makeNetwork(ctx, api.NetworkSpec{
			Name: DefaultNetwork, Subnets: m.o.DefaultSubnets, IPv6: len(m.o.DefaultSubnets) == 0 && hasIPv6(),
			Options: map[string]string{policy.OptBridge: defaultBridge},
		})
		var taken *nameTakenError
		if errors.As(err, &taken) && taken.by == policy.SourceStore && m.isThere(DefaultNetwork) {
			continue // another one was quicker
		}
		return n, err == nil, err
	}
}

// isThere reports whether a network of that name can be joined.
func (m *Manager) isThere(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.networks {
		if n.Name == name && !n.leaving {
			return true
		}
	}
	return false
}

// hasIPv6 reports whether the kernel has IPv6 at all.
func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

// nameTakenError says whose the name is.
type nameTakenError struct {
	what, name string
	by         policy.Source
}

func (e *nameTakenError) Error() string {
	whose := "bpfnet has one of that name"
	if e.by == policy.SourceDocker {
		whose = "Docker has one of that name"
	}
	return fmt.Sprintf("%s %q: %s; choose another", e.what, e.name, whose)
}

// makeNetwork makes a network whose name is in order.
func (m *Manager) makeNetwork(ctx context.Context, s api.NetworkSpec) (*network, error) {
	n, err := m.addNetwork(s)
	if err != nil {
		return nil, err
	}
	if err := m.o.Apply(ctx); err != nil {
		_, rerr := m.removeNetwork(context.WithoutCancel(ctx), n)
		return nil, join(fmt.Errorf("network %q: the data path does not follow: %w", s.Name, err), rerr)
	}
	return n, nil
}

// addNetwork is makeNetwork without the data path.
func (m *Manager) addNetwork(s api.NetworkSpec) (*network, error) {
	if s.Driver != "" && s.Driver != "bridge" {
		return nil, fmt.Errorf("driver %q: not served; use bridge", s.Driver)
	}
	m.making.Lock()
	defer m.making.Unlock()
	foreign := m.o.Foreign()
	if slices.ContainsFunc(foreign.Networks, func(n policy.Network) bool { return n.Name == s.Name }) {
		return nil, &nameTakenError{"network", s.Name, policy.SourceDocker}
	}
	own := m.ownNetworks()
	if slices.ContainsFunc(own, func(n *network) bool { return n.Name == s.Name }) {
		return nil, &nameTakenError{"network", s.Name, policy.SourceStore}
	}
	rec := store.Network{
		ID: newID(), Name: s.Name, Created: time.Now(), Internal: s.Internal, Options: s.Options, Labels: s.Labels,
	}
	rec.Bridge = bridgePrefix + rec.ID[:idInName]
	if name := s.Options[policy.OptBridge]; name != "" {
		rec.Bridge = name
	}
	if have := len(own) + len(foreign.Networks); have >= policy.MaxNetworks-1 {
		return nil, fmt.Errorf("network %q: there are %d networks, which is all that the data path serves; remove one first", s.Name, have)
	}
	if i := slices.IndexFunc(own, func(n *network) bool { return n.Bridge == rec.Bridge }); i >= 0 {
		return nil, fmt.Errorf("bridge %s: is that of network %q; choose another name", rec.Bridge, own[i].Name)
	}
	var err error
	if rec.Subnets, err = m.subnets(s, own, foreign); err != nil {
		return nil, fmt.Errorf("network %q: %w", s.Name, err)
	}
	n, err := newNetwork(rec)
	if err != nil {
		return nil, fmt.Errorf("network %q: %w", s.Name, err)
	}

	created, err := m.o.Devices.EnsureBridge(n.bridge())
	if err != nil {
		return nil, fmt.Errorf("network %q: %w", s.Name, err)
	}
	if err := m.write(store.Batch{Networks: []store.Network{rec}}); err != nil {
		if created {
			err = join(err, m.o.Devices.DeleteLink(rec.Bridge))
		}
		return nil, fmt.Errorf("network %q: %w", s.Name, err)
	}
	m.mu.Lock()
	m.networks[rec.ID] = n
	m.changed()
	m.mu.Unlock()
	return n, nil
}

// newNetwork makes a network of a record, with all its addresses free.
func newNetwork(r store.Network) (*network, error) {
	o, err := parseOptions(r.Options, r.Internal)
	if err != nil {
		return nil, err
	}
	n := &network{Network: r, options: o, resting: make(map[netip.Addr]time.Time), endpoints: make(map[string]*endpoint)}
	for _, s := range r.Subnets {
		n.leases = append(n.leases, ipam.NewLeases(ipam.Subnet{Prefix: s.Prefix, Gateway: s.Gateway, Range: s.Range}, rest))
	}
	return n, nil
}

func (n *network) bridge() netdev.BridgeSpec {
	b := netdev.BridgeSpec{Name: n.Bridge, MTU: n.options.MTU}
	for _, s := range n.Subnets {
		b.Addrs = append(b.Addrs, netip.PrefixFrom(s.Gateway, s.Prefix.Bits()))
	}
	return b
}

// ownNetworks are all that have a bridge, also those that are about to go.
func (m *Manager) ownNetworks() []*network {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]*network, 0, len(m.networks))
	for _, n := range m.networks {
		list = append(list, n)
	}
	slices.SortFunc(list, func(a, b *network) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// subnets are those of a new network: what was asked for, and the rest from the pools.
func (m *Manager) subnets(s api.NetworkSpec, own []*network, foreign policy.State) ([]store.Subnet, error) {
	v4, v6, err := sortSubnets(s)
	if err != nil {
		return nil, err
	}
	taken, err := m.takenSubnets(own, foreign)
	if err != nil {
		return nil, err
	}
	prefixes := make([]netip.Prefix, 0, len(taken))
	for _, t := range taken {
		prefixes = append(prefixes, t.Prefix)
	}
	given4, given6 := v4.Prefix.IsValid(), v6.Prefix.IsValid()
	if !given4 {
		if v4.Prefix, err = ipam.NextSubnet(m.o.Pools, prefixes); err != nil {
			return nil, err
		}
	}
	if !given6 && s.IPv6 {
		if v6.Prefix, err = ipam.ULA(rand.Reader, prefixes); err != nil {
			return nil, err
		}
	}
	var out []store.Subnet
	for _, f := range []struct {
		ipam.Subnet
		given bool
	}{{v4, given4}, {v6, given6}} {
		if !f.Prefix.IsValid() {
			continue
		}
		sub, err := f.Normalize()
		if err != nil {
			return nil, err
		}
		if err := ipam.Overlap(sub.Prefix, taken); err != nil {
			return nil, err
		}
		out = append(out, store.Subnet{Prefix: sub.Prefix, Gateway: sub.Gateway, Range: sub.Range, Given: f.given})
	}
	return out, nil
}

// sortSubnets puts what was asked for together by family.
func sortSubnets(s api.NetworkSpec) (v4, v6 ipam.Subnet, err error) {
	of := func(a netip.Addr) *ipam.Subnet {
		if a.Is4() {
			return &v4
		}
		return &v6
	}
	for _, p := range s.Subnets {
		f := of(p.Addr())
		if f.Prefix.IsValid() {
			return v4, v6, fmt.Errorf("subnet %s: a second one of its family, behind %s; give one", p, f.Prefix)
		}
		f.Prefix = p
	}
	for _, g := range s.Gateways {
		f := of(g)
		switch {
		case f.Gateway.IsValid():
			return v4, v6, fmt.Errorf("gateway %s: a second one of its family, behind %s; give one", g, f.Gateway)
		case !f.Prefix.IsValid():
			return v4, v6, fmt.Errorf("gateway %s: has no subnet to be in; give that too, with --subnet", g)
		}
		f.Gateway = g
	}
	for _, r := range s.Ranges {
		f := of(r.Addr())
		switch {
		case f.Range.IsValid():
			return v4, v6, fmt.Errorf("ip-range %s: a second one of its family, behind %s; give one", r, f.Range)
		case !f.Prefix.IsValid():
			return v4, v6, fmt.Errorf("ip-range %s: has no subnet to be part of; give that too, with --subnet", r)
		}
		f.Range = r
	}
	return v4, v6, nil
}

// takenSubnets are what a new subnet must not overlap. Networks come before the routes that they have,
// so that an error names them.
func (m *Manager) takenSubnets(own []*network, foreign policy.State) ([]ipam.Taken, error) {
	var taken []ipam.Taken
	known := make(map[netip.Prefix]bool)
	for _, n := range own {
		for _, s := range n.Subnets {
			known[s.Prefix] = true
			taken = append(taken, ipam.Taken{Prefix: s.Prefix, By: fmt.Sprintf("network %q", n.Name)})
		}
	}
	for _, n := range foreign.Networks {
		for _, s := range n.Subnets {
			known[s] = true
			taken = append(taken, ipam.Taken{Prefix: s, By: fmt.Sprintf("Docker's network %q", n.Name)})
		}
	}
	routes, err := m.o.Devices.Routes(known)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		taken = append(taken, ipam.Taken{Prefix: r.Dst, By: "the host's route by " + r.Device})
	}
	return taken, nil
}

// RemoveNetwork removes a network that no sandbox is in.
func (m *Manager) RemoveNetwork(ctx context.Context, q api.Named) (api.Created, error) {
	n, err := m.findNetwork(q.Name, docker("network rm"))
	if err != nil {
		return api.Created{}, err
	}
	return m.removeNetwork(ctx, n)
}

func (m *Manager) removeNetwork(ctx context.Context, n *network) (api.Created, error) {
	m.mu.Lock()
	err := m.leave(n)
	m.mu.Unlock()
	if err != nil {
		return api.Created{}, err
	}
	return m.takeAway(ctx, n)
}

// withdraw removes a network again that was made for a sandbox, unless others have come to count on it.
func (m *Manager) withdraw(ctx context.Context, n *network, b *box) {
	m.mu.Lock()
	for _, other := range m.boxes {
		wanted := slices.Contains(other.joining, n) ||
			slices.ContainsFunc(other.rec.Networks, func(a store.Attach) bool { return a.NetworkID == n.ID })
		if wanted && other != b {
			m.mu.Unlock()
			return
		}
	}
	err := m.leave(n)
	m.mu.Unlock()
	if err != nil {
		return // it is wanted, or gone
	}
	if _, err := m.takeAway(ctx, n); err != nil {
		m.o.Log.Error("remove a network that was made for nothing", "err", err)
	}
}

// takeAway removes a network that nobody joins any more.
func (m *Manager) takeAway(ctx context.Context, n *network) (api.Created, error) {
	m.mu.Lock()
	batch := store.Batch{DeleteNetworks: []string{n.ID}}
	for a := range n.resting {
		batch.DeleteReleases = append(batch.DeleteReleases, store.Release{NetworkID: n.ID, Addr: a})
	}
	m.mu.Unlock()
	if err := m.write(batch); err != nil {
		m.mu.Lock()
		n.leaving = false
		m.mu.Unlock()
		return api.Created{}, fmt.Errorf("network %q: %w", n.Name, err)
	}
	m.mu.Lock()
	n.gone = true
	m.changed()
	m.mu.Unlock()
	err := join(m.o.Apply(ctx), m.o.Devices.DeleteLink(n.Bridge))
	m.mu.Lock()
	delete(m.networks, n.ID) // from now on the name and the subnets are free
	m.mu.Unlock()
	if err != nil {
		return api.Created{}, fmt.Errorf("network %q: is removed, but not all of it: %w", n.Name, err)
	}
	return api.Created{ID: n.ID, Name: n.Name}, nil
}

// leave sees to it that nobody joins the network any more, unless somebody is in it. The caller holds m.mu.
func (m *Manager) leave(n *network) error {
	if n.leaving {
		return fmt.Errorf("network %q: is being removed", n.Name)
	}
	var names []string
	for _, e := range n.endpoints {
		names = append(names, m.boxName(e.SandboxID))
	}
	if len(names) > 0 {
		slices.Sort(names)
		return fmt.Errorf("network %q: in use by %s; disconnect or remove them first", n.Name, strings.Join(names, ", "))
	}
	n.leaving = true
	return nil
}
