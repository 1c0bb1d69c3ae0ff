// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/reserve"
	"github.com/bpfnet/bpfnet/store"
)

// port is a published port that is held.
type port struct {
	store.Published
	wish store.PortWish
	// hold is nil where a program of the host took the port while no daemon ran, and while the port is
	// moved to other addresses.
	hold *reserve.Port
}

// release lets the host's port go. The caller holds m.mu, or nobody else knows the port.
func (p *port) release() {
	if p.hold != nil {
		_ = p.hold.Close()
		p.hold = nil
	}
}

// wishes are the ports that a sandbox asks for.
func wishes(s api.SandboxSpec) ([]store.PortWish, error) {
	out, err := readPorts(nil, s.Publish)
	if err != nil || !s.PublishAll {
		return out, err
	}
	for _, e := range s.Expose {
		w, err := readPort(api.PortSpec{Proto: e.Proto, Target: e.Target})
		if err != nil {
			return nil, err
		}
		// One that is published by -p is not published again.
		if !slices.ContainsFunc(out, func(h store.PortWish) bool { return h.Proto == w.Proto && h.Target == w.Target }) {
			out = append(out, w)
		}
	}
	return out, nil
}

// readPorts checks ports, also against each other and those that there are, and returns all.
func readPorts(have []store.PortWish, specs []api.PortSpec) ([]store.PortWish, error) {
	out := slices.Clone(have)
	for _, s := range specs {
		w, err := readPort(s)
		if err != nil {
			return nil, err
		}
		for i, h := range out {
			if h == w || h.First != 0 && h.First == h.Last && h.First == w.First && w.First == w.Last && sameHost(h, w) {
				if i < len(have) {
					return nil, fmt.Errorf("port %s: is published already, as %s; unpublish that first, or publish another port", describe(w), describe(h))
				}
				return nil, fmt.Errorf("port %s: is asked for twice; give it once", describe(w))
			}
		}
		out = append(out, w)
	}
	return out, nil
}

// sameHost reports whether two ports of one number cannot be beside each other.
func sameHost(a, b store.PortWish) bool {
	return a.Proto == b.Proto && (!a.Host.IsValid() || !b.Host.IsValid() ||
		a.Host.Is4() == b.Host.Is4() && (a.Host == b.Host || a.Host.IsUnspecified() || b.Host.IsUnspecified()))
}

func readPort(s api.PortSpec) (store.PortWish, error) {
	proto, err := policy.ParseProto(s.Proto)
	if err != nil {
		return store.PortWish{}, err
	}
	w := store.PortWish{Proto: proto, Host: s.Host.Unmap(), First: s.First, Last: cmp.Or(s.Last, s.First), Target: s.Target}
	switch {
	case w.Target == 0:
		return w, fmt.Errorf("port %s: the sandbox's port is missing", describe(w))
	case w.First > w.Last || w.First == 0 && w.Last != 0:
		return w, fmt.Errorf("host ports %d-%d/%s: is no range; write the lower one first, from 1 on", w.First, w.Last, proto)
	case w.Host.Zone() != "":
		return w, fmt.Errorf("host address %s: is of one link only; publish on another, or on all", w.Host)
	}
	return w, nil
}

// describe is a port in the words of -p.
func describe(w store.PortWish) string {
	var b strings.Builder
	if w.Host.IsValid() {
		b.WriteString(netip.AddrPortFrom(w.Host, 0).String())
		host := strings.TrimSuffix(b.String(), "0")
		b.Reset()
		b.WriteString(host)
	}
	switch {
	case w.First != w.Last:
		fmt.Fprintf(&b, "%d-%d:", w.First, w.Last)
	case w.First != 0:
		fmt.Fprintf(&b, "%d:", w.First)
	case w.Host.IsValid():
		b.WriteByte(':')
	}
	fmt.Fprintf(&b, "%d/%s", w.Target, w.Proto)
	return b.String()
}

// choosePorts holds host ports for a sandbox that is in these networks, and claims them. What it has is
// kept as far as it still fits; added are those that were not held before. After an error all is held as
// before; to take it back later, there is undoPorts. A sandbox that nothing leads out of has no ports.
func (m *Manager) choosePorts(b *box, want []store.PortWish, networks []*network, have []*port) (next, added []*port, err error) {
	v4, v6 := gateways(networks)
	if v4 == nil && v6 == nil || len(want) == 0 {
		return nil, nil, nil
	}
	var binding netip.Addr
	if n := cmp.Or(v4, v6); n != nil {
		binding = n.options.HostBinding
	}
	foreign := m.o.Foreign()
	m.porting.Lock()
	defer m.porting.Unlock()
	defer func() {
		if err != nil {
			m.undoPorts(added, have)
			next, added = nil, nil
		}
	}()
	for _, w := range want {
		var hosts []netip.Addr
		for _, h := range policy.ExpandHost(w.Host, 0, binding, v6 != nil || m.o.Relayed != nil && w.Proto != policy.SCTP) {
			hosts = append(hosts, h.Addr())
		}
		kept, fresh, err := m.choosePort(w, hosts, have, foreign)
		if err != nil {
			return nil, added, err
		}
		m.mu.Lock()
		if have := len(m.claims) + len(foreign.Ports); have+len(fresh) > policy.MaxPorts-1 {
			err = fmt.Errorf("port %s: there are %d published ports, and the data path serves %d; unpublish some first", describe(w), have, policy.MaxPorts-1)
			m.mu.Unlock()
			m.dropPorts(fresh)
			return nil, added, err
		}
		for _, p := range fresh {
			m.claims[p] = b
		}
		m.mu.Unlock()
		next = append(append(next, kept...), fresh...)
		added = append(added, fresh...)
	}
	return next, added, nil
}

// choosePort holds one port on all of these addresses. The caller holds m.porting.
func (m *Manager) choosePort(w store.PortWish, hosts []netip.Addr, have []*port, foreign policy.State) (kept, fresh []*port, err error) {
	missing := slices.Clone(hosts)
	first, last := w.First, w.Last
	var old []*port
	for _, p := range have {
		if p.wish != w {
			continue
		}
		first, last = p.Host.Port(), p.Host.Port() // those who know the number are to find it again
		if slices.Contains(hosts, p.Host.Addr()) {
			kept = append(kept, p)
			missing = slices.DeleteFunc(missing, func(a netip.Addr) bool { return a == p.Host.Addr() })
		} else {
			old = append(old, p)
		}
	}
	if len(missing) == 0 {
		return kept, nil, nil
	}
	// All addresses and one of them exclude each other.
	m.mu.Lock()
	for _, p := range old {
		p.release()
	}
	m.mu.Unlock()
	taken := portsTaken{m.claimed(old), foreign}
	fresh, err = m.holdPort(w, missing, first, last, taken)
	if err != nil && first != 0 && (first != w.First || last != w.Last) {
		// Another number, for all of them.
		kept = nil
		fresh, err = m.holdPort(w, hosts, w.First, w.Last, taken)
	}
	return kept, fresh, err
}

// undoPorts takes back what choosePorts has made of the ports that the sandbox had.
func (m *Manager) undoPorts(added, had []*port) {
	m.dropPorts(added)
	for _, p := range had {
		m.mu.Lock()
		held := p.hold != nil
		m.mu.Unlock()
		if !held {
			m.holdAgain(p)
		}
	}
}

// holdAgain holds a port that is not held for the moment. Where somebody was quicker, the data path still
// is before him.
func (m *Manager) holdAgain(p *port) {
	if m.o.Relayed != nil && m.o.Relayed(policy.PortKey{Proto: p.Proto, Host: p.Host}) {
		return
	}
	hold, err := reserve.Hold(p.Proto, p.Host)
	if err != nil {
		m.o.Log.Warn("hold a published port again; it is served all the same", "port", p.Host.String(), "proto", p.Proto.String(), "err", err)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p.hold = hold
}

// portsTaken are the host ports that cannot be had: those of bpfnet, with the sandbox's ID for the
// endpoint's, and those of Docker.
type portsTaken struct {
	ours    []policy.Port
	foreign policy.State
}

// holdPort holds a port out of a range on all of these addresses.
func (m *Manager) holdPort(w store.PortWish, hosts []netip.Addr, first, last uint16, taken portsTaken) ([]*port, error) {
	conflict := func(number uint16) error {
		for _, h := range hosts {
			host := netip.AddrPortFrom(h, number)
			if p, ok := policy.Taken(taken.ours, w.Proto, host); ok {
				return publishedBy(w.Proto, host, p, "sandbox", m.lockedBoxName(p.EndpointID))
			}
			if p, ok := policy.Taken(taken.foreign.Ports, w.Proto, host); ok {
				return publishedBy(w.Proto, host, p, "Docker's container", containerOf(taken.foreign, p.EndpointID))
			}
		}
		return nil
	}
	if first != 0 && first == last {
		if err := conflict(first); err != nil {
			return nil, err
		}
	}
	held, number, err := reserve.FreePort(w.Proto, hosts, first, last, func(n uint16) bool { return conflict(n) != nil })
	if err != nil {
		return nil, err
	}
	out := make([]*port, 0, len(held))
	for i, h := range held {
		out = append(out, &port{
			Published: store.Published{Proto: w.Proto, Host: netip.AddrPortFrom(hosts[i], number), Target: w.Target},
			wish:      w, hold: h,
		})
	}
	return out, nil
}

func publishedBy(proto policy.Proto, host netip.AddrPort, p policy.Port, what, name string) error {
	return fmt.Errorf("host port %s/%s: is published by %s %q (%s); publish another port, or none to get one that is free", host, proto, what, name, p)
}

// containerOf is the name of the container that has an endpoint.
func containerOf(s policy.State, endpointID string) string {
	for _, e := range s.Endpoints {
		if e.ID == endpointID {
			return e.Name
		}
	}
	return short(endpointID)
}

// claimed are the host ports that are held, but for some, with the sandbox's ID for the endpoint's.
func (m *Manager) claimed(but []*port) []policy.Port {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]policy.Port, 0, len(m.claims))
	for p, b := range m.claims {
		if slices.Contains(but, p) {
			continue
		}
		out = append(out, policy.Port{Proto: p.Proto, Host: p.Host, EndpointID: b.id, Target: p.Target})
	}
	return out
}

func (m *Manager) lockedBoxName(id string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boxName(id)
}

// Held is another descriptor of the socket that holds a port, for the relay.
func (m *Manager) Held(key policy.PortKey) (fd int, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := range m.claims {
		if p.Proto == key.Proto && p.Host == key.Host && p.hold != nil {
			fd, err := p.hold.Dup()
			return fd, err == nil
		}
	}
	return -1, false
}

// HoldUnrelayed holds the ports that the relay held for an earlier daemon and has given up since.
func (m *Manager) HoldUnrelayed() {
	m.mu.Lock()
	var list []*port
	for p := range m.claims {
		if p.hold == nil {
			list = append(list, p)
		}
	}
	m.mu.Unlock()
	for _, p := range list {
		m.holdAgain(p)
	}
}

// dropPorts lets host ports go.
func (m *Manager) dropPorts(list []*port) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range list {
		p.release()
		delete(m.claims, p)
	}
}

// tryPorts checks that the ports can be had, and keeps none.
func (m *Manager) tryPorts(b *box, want []store.PortWish, networks []*network) error {
	_, added, err := m.choosePorts(b, want, networks, nil)
	m.dropPorts(added)
	return err
}

func published(list []*port) []store.Published {
	var out []store.Published
	for _, p := range list {
		out = append(out, p.Published)
	}
	return out
}

// without are the ports of a that are not in b.
func without(a, b []*port) []*port {
	return slices.DeleteFunc(slices.Clone(a), func(p *port) bool { return slices.Contains(b, p) })
}

// policyPorts are the sandbox's ports, each with the endpoint that leads out by its family. Over IPv6 a
// sandbox without such a way is reached at its IPv4 address.
func (b *box) policyPorts() []policy.Port {
	if len(b.ports) == 0 {
		return nil
	}
	v4, v6 := gateways(networksOf(b.endpoints))
	id := func(n *network) string {
		for _, e := range b.endpoints {
			if e.net == n {
				return e.ID
			}
		}
		return ""
	}
	var out []policy.Port
	for _, p := range b.ports {
		ep := id(v4)
		relay := false
		if p.Host.Addr().Is6() {
			relay = v6 == nil
			ep = cmp.Or(id(v6), ep)
		}
		if ep != "" {
			out = append(out, policy.Port{Proto: p.Proto, Host: p.Host, EndpointID: ep, Target: p.Target, Relay: relay})
		}
	}
	return out
}

// restorePorts holds the ports of a sandbox again that ran while no daemon did. A program of the host may
// have taken one meanwhile: the data path is before it, and goes on serving the sandbox.
func (m *Manager) restorePorts(b *box) {
	var list []*port
	for _, p := range b.rec.Published {
		held := &port{Published: p, wish: wishOf(b.rec.Publish, p, list)}
		m.holdAgain(held)
		list = append(list, held)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b.ports = list
	for _, p := range list {
		m.claims[p] = b
	}
}

// wishOf is what a port was allocated for: the first wish that it fits and that has no port on that
// address yet.
func wishOf(list []store.PortWish, p store.Published, done []*port) store.PortWish {
	for _, w := range list {
		fits := w.Proto == p.Proto && w.Target == p.Target && (!w.Host.IsValid() || w.Host == p.Host.Addr()) &&
			(w.First == 0 || w.First <= p.Host.Port() && p.Host.Port() <= w.Last)
		if fits && !slices.ContainsFunc(done, func(d *port) bool { return d.wish == w && d.Host.Addr() == p.Host.Addr() }) {
			return w
		}
	}
	return store.PortWish{Proto: p.Proto, Host: p.Host.Addr(), First: p.Host.Port(), Last: p.Host.Port(), Target: p.Target}
}
