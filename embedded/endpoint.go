// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/bpfnet/bpfnet/ipam"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/store"
)

const (
	linkPrefix = "bpv-" // of host ends
	// idInName is how much of an ID a device's name has room for: IFNAMSIZ is 16, with the zero.
	idInName = 11
)

// enrol claims an endpoint with addresses in each network. Nothing is made yet: strike takes it back. have
// are the endpoints that the sandbox is to keep.
func (m *Manager) enrol(b *box, have []*endpoint, list []store.Attach) (enrolled []*endpoint, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() {
		if err != nil {
			detach(enrolled)
			free(enrolled, time.Time{})
		}
	}()
	for _, a := range list {
		n := m.networks[a.NetworkID]
		if n == nil || n.leaving {
			return enrolled, fmt.Errorf("its network %s has been removed; take it out: bpfnet network disconnect %[1]s %s", short(a.NetworkID), b.rec.Name)
		}
		e := &endpoint{net: n, Endpoint: store.Endpoint{
			ID: newID(), NetworkID: n.ID, SandboxID: b.id, Aliases: a.Aliases,
			Name: freeDevice(slices.Concat(have, enrolled)),
		}, rested: make(map[netip.Addr]time.Time)}
		e.Link = linkPrefix + e.ID[:idInName]
		if e.Addrs, err = m.lease(n, a); err != nil {
			return enrolled, err
		}
		for _, addr := range e.Addrs {
			if since, ok := n.resting[addr]; ok {
				e.rested[addr] = since
			}
		}
		e.MAC = macFor(e)
		n.endpoints[e.ID] = e
		enrolled = append(enrolled, e)
	}
	return enrolled, nil
}

// strike takes enrol back.
func (m *Manager) strike(list []*endpoint) {
	m.mu.Lock()
	defer m.mu.Unlock()
	detach(list)
	free(list, time.Time{})
}

// lease takes an address of each family of the network, those asked for or the lowest that are free. The
// caller holds m.mu.
func (m *Manager) lease(n *network, a store.Attach) (addrs []netip.Addr, err error) {
	for _, want := range []netip.Addr{a.IP4, a.IP6} {
		if want.IsValid() && !n.gateway(want.Is4()).IsValid() {
			return nil, fmt.Errorf("address %s: network %q has no subnet of its family", want, n.Name)
		}
	}
	for i, s := range n.Subnets {
		want := a.IP4
		if s.Prefix.Addr().Is6() {
			want = a.IP6
		}
		addr := want
		if want.IsValid() {
			err = m.mayTake(n, s, want)
			if err == nil {
				err = n.leases[i].Take(want)
			}
		} else if addr, err = n.leases[i].Allocate(time.Now()); err != nil {
			err = fmt.Errorf("network %q: %w", n.Name, err)
		}
		if err != nil {
			for j, got := range addrs {
				n.leases[j].Release(got, time.Time{})
			}
			return nil, err
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

// mayTake checks an address that was asked for. The caller holds m.mu.
func (m *Manager) mayTake(n *network, s store.Subnet, a netip.Addr) error {
	if !s.Given {
		return fmt.Errorf("address %s: network %q has a subnet of bpfnet's choice; a fixed address needs one that was made with --subnet", a, n.Name)
	}
	if !s.Prefix.Contains(a) {
		return fmt.Errorf("address %s: outside of network %q, which has %s; choose an address in it", a, n.Name, s.Prefix)
	}
	for _, e := range n.endpoints {
		if slices.Contains(e.Addrs, a) {
			return fmt.Errorf("address %s: is taken in network %q by sandbox %q; choose another, or none to get one that is free", a, n.Name, m.boxName(e.SandboxID))
		}
	}
	return nil
}

// boxName is a sandbox's name. The caller holds m.mu.
func (m *Manager) boxName(id string) string {
	if b := m.boxes[id]; b != nil {
		return b.rec.Name
	}
	return short(id)
}

// detach takes endpoints out of their networks. The caller holds m.mu.
func detach(list []*endpoint) {
	for _, e := range list {
		e.live = false
		delete(e.net.endpoints, e.ID)
	}
}

// free gives addresses back, to rest from that time on; at the zero time they were not used, and are as
// before. The caller holds m.mu.
func free(list []*endpoint, at time.Time) {
	for _, e := range list {
		for _, a := range e.Addrs {
			l := e.net.leasesOf(a)
			if l == nil {
				continue
			}
			l.Release(a, at)
			if since, ok := e.rested[a]; ok && at.IsZero() {
				l.Rest(a, since)
			}
		}
	}
}

// free is the function of that name, for those who do not hold m.mu.
func (m *Manager) free(list []*endpoint, at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	free(list, at)
}

// recordEnrol puts endpoints into a batch.
func (m *Manager) recordEnrol(batch *store.Batch, list []*endpoint) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range list {
		batch.Endpoints = append(batch.Endpoints, e.Endpoint)
		for _, a := range e.Addrs {
			if _, ok := e.net.resting[a]; ok { // it was the last resort
				batch.DeleteReleases = append(batch.DeleteReleases, store.Release{NetworkID: e.NetworkID, Addr: a})
				delete(e.net.resting, a)
			}
		}
	}
}

// recordLeave takes endpoints out with a batch, and has their addresses rest from that time on, over a
// restart too. Releases that are over go with it. At the zero time the addresses were not used.
func (m *Manager) recordLeave(batch *store.Batch, list []*endpoint, at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range list {
		batch.DeleteEndpoints = append(batch.DeleteEndpoints, e.ID)
		if e.net.gone {
			continue
		}
		if at.IsZero() {
			for a, since := range e.rested {
				batch.Releases = append(batch.Releases, store.Release{NetworkID: e.NetworkID, Addr: a, At: since})
				e.net.resting[a] = since
			}
			continue
		}
		for a, since := range e.net.resting {
			if at.Sub(since) > rest {
				batch.DeleteReleases = append(batch.DeleteReleases, store.Release{NetworkID: e.NetworkID, Addr: a})
				delete(e.net.resting, a)
			}
		}
		for _, a := range e.Addrs {
			batch.Releases = append(batch.Releases, store.Release{NetworkID: e.NetworkID, Addr: a, At: at})
			e.net.resting[a] = at
		}
	}
}

// leasesOf are those of the subnet that an address is in; nil if it is in none.
func (n *network) leasesOf(a netip.Addr) *ipam.Leases {
	for i, s := range n.Subnets {
		if s.Prefix.Contains(a) {
			return n.leases[i]
		}
	}
	return nil
}

// take and rest are what an earlier run did with an address.
func (n *network) take(a netip.Addr) error {
	if l := n.leasesOf(a); l != nil {
		return l.Take(a)
	}
	return nil
}

func (n *network) rest(a netip.Addr, since time.Time) {
	if l := n.leasesOf(a); l != nil {
		l.Rest(a, since)
		n.resting[a] = since
	}
}

// freeDevice is the lowest of eth0, eth1… that is free.
func freeDevice(have []*endpoint) string {
	for i := 0; ; i++ {
		name := fmt.Sprintf("eth%d", i)
		if !slices.ContainsFunc(have, func(e *endpoint) bool { return e.Name == name }) {
			return name
		}
	}
}

// byDevice orders endpoints as the sandbox sees them: eth10 after eth9.
func byDevice(a, b *endpoint) int {
	return cmp.Or(cmp.Compare(len(a.Name), len(b.Name)), cmp.Compare(a.Name, b.Name))
}

// macFor is made of the IPv4 address, as Docker's is: what answers for the address again has the MAC
// again that others remember. 02:42 is locally administered.
func macFor(e *endpoint) policy.MAC {
	mac := policy.MAC{0x02, 0x42}
	for _, a := range e.Addrs {
		if a.Is4() {
			b := a.As4()
			copy(mac[2:], b[:])
			return mac
		}
	}
	copy(mac[2:], e.ID)
	return mac
}

func (e *endpoint) veth() netdev.VethSpec {
	v := netdev.VethSpec{Host: e.Link, Name: e.Name, MAC: e.MAC, MTU: e.net.options.MTU}
	for _, a := range e.Addrs {
		for _, s := range e.net.Subnets {
			if s.Prefix.Contains(a) {
				v.Addrs = append(v.Addrs, netip.PrefixFrom(a, s.Prefix.Bits()))
			}
		}
	}
	return v
}

// plugIn makes the endpoints' devices. Nothing can be sent over one that is not guarded. What is made
// when it fails, the caller deletes.
func (m *Manager) plugIn(ns *os.File, list []*endpoint) error {
	for _, e := range list {
		ifindex, err := m.o.Devices.CreateVeth(ns, e.veth())
		if err != nil {
			return err
		}
		if err := m.o.Guard(ifindex); err != nil {
			return fmt.Errorf("guard interface %s: %w", e.Link, err)
		}
		if err := m.o.Devices.PlugIn(ns, e.veth(), e.net.Bridge); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manager) deleteLinks(list []*endpoint) error {
	var errs []error
	for _, e := range list {
		errs = append(errs, m.o.Devices.DeleteLink(e.Link))
	}
	return join(errs...)
}

// setRoutes gives a sandbox with these endpoints its way out.
func (m *Manager) setRoutes(ns *os.File, list []*endpoint) error {
	v4, v6 := gateways(networksOf(list))
	return m.o.Devices.SetDefaultRoutes(ns, v4.gateway(true), v6.gateway(false))
}

// serve waits until the data path serves the endpoints.
func (m *Manager) serve(ctx context.Context, list []*endpoint) error {
	if err := m.o.Apply(ctx); err != nil {
		return fmt.Errorf("the data path does not follow: %w", err)
	}
	for _, e := range list {
		if ok, why := m.o.Ready(e.ID); !ok {
			return fmt.Errorf("the data path does not serve %s in network %q: %s", e.Name, e.net.Name, why)
		}
	}
	return nil
}

func networksOf(list []*endpoint) []*network {
	out := make([]*network, 0, len(list))
	for _, e := range list {
		out = append(out, e.net)
	}
	return out
}

// gateways are the networks that lead a sandbox which is in all of these out of them, and that its
// published ports go with; nil where there is none of the family.
func gateways(list []*network) (v4, v6 *network) {
	var candidates []policy.Candidate
	for _, n := range list {
		candidates = append(candidates, policy.Candidate{
			Endpoint: n.ID, Network: n.Name, Bridge: true, Internal: n.Internal,
			V4: n.gateway(true).IsValid(), V6: n.gateway(false).IsValid(),
		})
	}
	id4, id6 := policy.GatewayEndpoints(candidates)
	for _, n := range list {
		if n.ID == id4 {
			v4 = n
		}
		if n.ID == id6 {
			v6 = n
		}
	}
	return v4, v6
}

// gateway is the bridge's address of a family; invalid if there is none.
func (n *network) gateway(is4 bool) netip.Addr {
	if n != nil {
		for _, s := range n.Subnets {
			if s.Prefix.Addr().Is4() == is4 {
				return s.Gateway
			}
		}
	}
	return netip.Addr{}
}

// names are what neighbours may call the sandbox by in this network.
func (e *endpoint) names(box string) []string {
	out := []string{box}
	for _, a := range e.Aliases {
		if !slices.ContainsFunc(out, func(have string) bool { return strings.EqualFold(have, a) }) {
			out = append(out, a)
		}
	}
	return out
}
