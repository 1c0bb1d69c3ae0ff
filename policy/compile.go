// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The sizes of the slot tables; slot 0 stands for "none". bpf/lib/types.h has the same numbers, and
// the maps package checks that they agree.
const (
	MaxEndpoints = 4096
	MaxNetworks  = 1024
	MaxPorts     = 16384
)

// Slots gives networks, endpoints and published ports the small numbers by which the data path knows
// them. A thing keeps its number as long as it lives.
type Slots struct {
	Networks  map[string]uint16 `json:"networks"`
	Endpoints map[string]uint16 `json:"endpoints"`
	Ports     map[string]uint16 `json:"ports"`
}

// Intents is everything that Compile turns into tables.
type Intents struct {
	State   State
	Devices Devices
	// Allowed are pairs of qualified names of networks that may talk, both directions.
	Allowed [][2]string
	// Attached says on which bridge ports, by index, the programs are in place.
	Attached map[int]bool
	// DirectRouting has containers' own addresses dialled from everywhere, at published ports.
	DirectRouting bool
	// Relayed are the ports that the relay holds; Unrelayed says why it does not hold others.
	Relayed   map[PortKey]bool
	Unrelayed map[PortKey]string
}

// NetworkRow is a network as the data path knows it.
type NetworkRow struct {
	Ifindex    int // of the bridge, 0 while there is none
	MAC        MAC
	MTU        int // bytes
	NoICC      bool
	Masquerade bool // of the families that are not routed
	Internal   bool
	Mode4      GatewayMode
	Mode6      GatewayMode
	Gateway4   netip.Addr // invalid: none
	Gateway6   netip.Addr
	Source4    netip.Addr // to masquerade with; invalid: the route's
	Source6    netip.Addr
}

// Masquerades reports whether the network hides its containers' addresses of a family from the world.
func (n NetworkRow) Masquerades(is4 bool) bool {
	return n.Masquerade && n.mode(is4) != ModeRouted
}

// EndpointRow is an endpoint whose interface is known and guarded: it is READY.
type EndpointRow struct {
	Ifindex int // of the host side
	Sandbox uint32
	Network uint16
	MAC     MAC
	Addr4   netip.Addr // invalid: none
	Addr6   netip.Addr
}

// MasqueradeAddrs are a device's addresses to masquerade with.
type MasqueradeAddrs struct {
	Addr4 netip.Addr // invalid: none
	Addr6 netip.Addr
}

// PortKey is what a client dials.
type PortKey struct {
	Proto Proto
	Host  netip.AddrPort // 0.0.0.0 and :: stand for every host address of the family
}

// PortRow is where a published port leads.
type PortRow struct {
	Target   netip.AddrPort
	Endpoint uint16 // 0: nowhere, and nobody else has the port
	Slot     uint16
}

// OpenKey is a container's port that may be dialled by its own address, as far as its network's mode
// and the way that the packet came let it be.
type OpenKey struct {
	From  netip.Addr // invalid: whoever
	To    netip.AddrPort
	Proto Proto
}

// TrustedKey is a device by which a network's containers may be dialled; 0: there is one.
type TrustedKey struct {
	Network uint16
	Ifindex int
}

// SourceKey is an additional source that an endpoint may send from.
type SourceKey struct {
	Endpoint uint16
	Prefix   netip.Prefix
}

// Tables is the desired content of the maps.
type Tables struct {
	Networks  map[uint16]NetworkRow
	Endpoints map[uint16]EndpointRow
	Addrs     map[netip.Addr]uint16 // container address → endpoint slot, READY or not
	Links     map[int]uint16        // host-side interface → endpoint slot
	Subnets   map[netip.Prefix]uint16
	HostAddrs map[netip.Addr]int
	Pairs     map[[2]uint16]struct{} // lower slot first
	Ports     map[PortKey]PortRow
	// Closed are host ports that the source holds and that lead nowhere: the container is reached by
	// its own address.
	Closed  map[PortKey]PortRow
	Open    map[OpenKey]uint16 // → the published port's slot, 0: none
	Trusted map[TrustedKey]struct{}
	Sources map[SourceKey]struct{}
	// Relays are the ports that the relay is to hold, and where they lead.
	Relays map[PortKey]netip.AddrPort
	// Masquerade is by uplink, for kernels that do not tell the source of a route.
	Masquerade map[int]MasqueradeAddrs

	// Waiting says why an endpoint, by ID, is not READY.
	Waiting map[string]string
	// Problems are what cannot be served as it was asked for, sorted, each once.
	Problems []Problem
}

// assign gives every id its slot of the last round, or the lowest that was free in it: a slot freed
// now is not taken before its flows are purged. Ids beyond limit are left out and returned.
func assign(last map[string]uint16, ids []string, limit int) (map[string]uint16, []string) {
	taken := make(map[uint16]bool, len(last))
	for _, slot := range last {
		taken[slot] = true
	}
	next := make(map[string]uint16, len(ids))
	var refused []string
	free := uint16(1)
	for _, id := range ids {
		if slot, ok := last[id]; ok {
			next[id] = slot
			continue
		}
		for int(free) < limit && taken[free] {
			free++
		}
		if int(free) >= limit {
			refused = append(refused, id)
			continue
		}
		next[id] = free
		taken[free] = true
	}
	return next, refused
}

// namedPort is a port and its ID, which takes longer to make than all else that is done with it.
type namedPort struct {
	Port
	id string
}

// ID names the port among all: what is dialled and where it leads.
func (p Port) ID() string {
	id := p.Proto.String() + "/" + p.Host.String() + "/" + p.EndpointID + "/" + strconv.Itoa(int(p.Target))
	if p.Refused {
		id += "/refused"
	}
	return id
}

func (e *Endpoint) addr(is4 bool) netip.Addr {
	for _, a := range e.Addrs {
		if a = a.Unmap(); a.Is4() == is4 && !a.IsLinkLocalUnicast() {
			return a
		}
	}
	return netip.Addr{}
}

// Compile turns intents into tables. It is pure: the same input gives the same output, whatever the
// order of the lists. The slots are those for the next call.
func Compile(in Intents, last Slots) (Tables, Slots) {
	networks := slices.Clone(in.State.Networks)
	slices.SortFunc(networks, func(a, b Network) int { return strings.Compare(a.ID, b.ID) })
	endpoints := make([]*Endpoint, len(in.State.Endpoints))
	for i := range in.State.Endpoints {
		endpoints[i] = &in.State.Endpoints[i]
	}
	slices.SortStableFunc(endpoints, func(a, b *Endpoint) int { return strings.Compare(a.ID, b.ID) })
	ports := make([]namedPort, len(in.State.Ports))
	for i, p := range in.State.Ports {
		ports[i] = namedPort{p, p.ID()}
	}
	slices.SortFunc(ports, func(a, b namedPort) int { return strings.Compare(a.id, b.id) })

	t := Tables{
		Networks:   make(map[uint16]NetworkRow),
		Endpoints:  make(map[uint16]EndpointRow, len(endpoints)),
		Addrs:      make(map[netip.Addr]uint16, 2*len(endpoints)),
		Links:      make(map[int]uint16, len(endpoints)),
		Subnets:    make(map[netip.Prefix]uint16),
		HostAddrs:  make(map[netip.Addr]int),
		Pairs:      make(map[[2]uint16]struct{}),
		Ports:      make(map[PortKey]PortRow),
		Closed:     make(map[PortKey]PortRow),
		Open:       make(map[OpenKey]uint16),
		Trusted:    make(map[TrustedKey]struct{}),
		Sources:    make(map[SourceKey]struct{}),
		Relays:     make(map[PortKey]netip.AddrPort),
		Masquerade: make(map[int]MasqueradeAddrs),
		Waiting:    make(map[string]string),
	}
	var slots Slots
	var refused []string

	slots.Networks, refused = assign(last.Networks, ids(networks, func(n Network) string { return n.ID }), MaxNetworks)
	for _, id := range refused {
		t.wrong("", "network "+id, fmt.Sprintf("more than %d networks", MaxNetworks-1), "not served")
	}
	for _, a := range in.Devices.HostAddrs {
		if !a.Addr.IsLoopback() {
			t.HostAddrs[a.Addr.Unmap().WithZone("")] = a.Ifindex
		}
	}
	bridges := make(map[string]Bridge, len(in.Devices.Bridges))
	for _, b := range in.Devices.Bridges {
		bridges[b.Name] = b
	}
	byID := make(map[string]Network)
	for _, n := range networks {
		slot, ok := slots.Networks[n.ID]
		if !ok {
			continue
		}
		byID[n.ID] = n
		t.Networks[slot] = networkRow(n, bridges[n.Bridge])
		t.options(n, slot, in.Devices)
		for _, s := range n.Subnets {
			t.Subnets[s.Masked()] = slot
		}
	}
	t.pairs(in.Allowed, networks, slots.Networks)

	for _, u := range in.Devices.Uplinks {
		if m := masqueradeAddrs(u); m != (MasqueradeAddrs{}) {
			t.Masquerade[u.Ifindex] = m
		}
	}

	slots.Endpoints, refused = assign(last.Endpoints, ids(endpoints, func(e *Endpoint) string { return e.ID }), MaxEndpoints)
	for _, id := range refused {
		t.Waiting[id] = fmt.Sprintf("more than %d endpoints", MaxEndpoints-1)
	}
	sandboxes := sandboxIDs(endpoints, slots.Endpoints)
	links := make(map[seat]Link, len(in.Devices.Links))
	for _, l := range in.Devices.Links {
		links[seat{l.Bridge, l.PeerMAC}] = l
	}
	targets := make(map[string]*Endpoint, len(endpoints))
	for _, e := range endpoints {
		slot, ok := slots.Endpoints[e.ID]
		if !ok {
			continue
		}
		n, ok := byID[e.NetworkID]
		if !ok {
			t.Waiting[e.ID] = "its network is not served"
			continue
		}
		targets[e.ID] = e
		t.endpoint(e, slot, n, slots.Networks[n.ID], sandboxes[e.SandboxID], links, in.Attached)
	}

	slots.Ports, refused = assign(last.Ports, ids(ports, func(p namedPort) string { return p.id }), MaxPorts)
	t.surplus(ports, refused, endpoints, byID)
	mates := make(map[string][]*Endpoint) // by sandbox
	for _, e := range endpoints {
		if _, ok := targets[e.ID]; ok && len(ports) > 0 {
			mates[e.SandboxID] = append(mates[e.SandboxID], e)
		}
	}
	for _, p := range ports {
		slot, ok := slots.Ports[p.id]
		if !ok {
			continue
		}
		e, ok := targets[p.EndpointID]
		if !ok {
			continue
		}
		if p.Refused || byID[e.NetworkID].Internal {
			t.close(p.Port, slot, e)
			continue
		}
		for _, m := range mates[e.SandboxID] {
			t.opening(p.Port, slot, m, m.ID == e.ID, byID[m.NetworkID], in.DirectRouting)
		}
		t.port(p.Port, slot, e, slots.Endpoints[e.ID], byID[e.NetworkID], in)
	}
	for _, o := range in.State.Openings {
		from, to := targets[o.From], targets[o.To]
		if from == nil || to == nil {
			continue
		}
		a, b := from.addr(true), to.addr(true) // the Engine opens a link over IPv4 only
		if from.NetworkID == to.NetworkID && a.IsValid() && b.IsValid() && byID[from.NetworkID].NoICC {
			t.Open[OpenKey{From: a, To: netip.AddrPortFrom(b, o.Port), Proto: o.Proto}] = 0
		}
	}
	t.Problems = append(t.Problems, in.State.Problems...)
	slices.SortFunc(t.Problems, CompareProblems)
	t.Problems = slices.Compact(t.Problems)
	return t, slots
}

func ids[T any](list []T, id func(T) string) []string {
	out := make([]string, 0, len(list))
	for _, v := range list {
		out = append(out, id(v))
	}
	return out
}

func networkRow(n Network, b Bridge) NetworkRow {
	row := NetworkRow{
		NoICC: n.NoICC, Masquerade: !n.NoMasquerade && !n.Internal, Internal: n.Internal, MTU: n.MTU,
		Mode4: n.Mode4, Mode6: n.Mode6, Source4: n.Source4, Source6: n.Source6,
	}
	for _, g := range n.Gateways {
		if g = g.Unmap(); g.Is4() {
			row.Gateway4 = g
		} else {
			row.Gateway6 = g
		}
	}
	row.Ifindex, row.MAC = b.Ifindex, b.MAC
	if b.MTU != 0 {
		row.MTU = b.MTU
	}
	return row
}

// masqueradeAddrs takes the first global address of each family, as the kernel does without a hint.
func masqueradeAddrs(u Uplink) MasqueradeAddrs {
	var m MasqueradeAddrs
	for _, p := range u.Addrs {
		switch a := p.Addr().Unmap(); {
		case a.IsLinkLocalUnicast() || a.IsLoopback():
		case a.Is4() && !m.Addr4.IsValid():
			m.Addr4 = a
		case a.Is6() && !m.Addr6.IsValid():
			m.Addr6 = a
		}
	}
	return m
}

func (t *Tables) pairs(allowed [][2]string, networks []Network, slots map[string]uint16) {
	byName := make(map[string]uint16)
	for _, n := range networks {
		if slot, ok := slots[n.ID]; ok {
			byName[n.QualifiedName()] = slot
		}
	}
	for _, pair := range allowed {
		a, okA := byName[pair[0]]
		b, okB := byName[pair[1]]
		if okA && okB && a != b {
			t.Pairs[[2]uint16{min(a, b), max(a, b)}] = struct{}{}
		}
	}
}

// sandboxIDs numbers network namespaces by the lowest slot of their endpoints, so that the number
// lives as long as that endpoint.
func sandboxIDs(endpoints []*Endpoint, slots map[string]uint16) map[string]uint32 {
	out := make(map[string]uint32)
	for _, e := range endpoints {
		slot, ok := slots[e.ID]
		if have, seen := out[e.SandboxID]; ok && (!seen || uint32(slot) < have) {
			out[e.SandboxID] = uint32(slot)
		}
	}
	return out
}

// seat is what tells a container's interface from others.
type seat struct {
	bridge string
	mac    MAC
}

func (t *Tables) endpoint(e *Endpoint, slot uint16, n Network, net uint16, sandbox uint32, links map[seat]Link, attached map[int]bool) {
	for _, a := range e.Addrs {
		if a = a.Unmap(); a.IsValid() && !a.IsLinkLocalUnicast() {
			t.Addrs[a] = slot
		}
	}
	link, found := links[seat{n.Bridge, e.MAC}]
	switch {
	case !found || e.MAC.IsZero():
		t.Waiting[e.ID] = fmt.Sprintf("no port of %s has %s behind it", n.Bridge, e.MAC)
		return
	case t.Networks[net].Ifindex == 0:
		t.Waiting[e.ID] = fmt.Sprintf("there is no bridge %s", n.Bridge)
		return
	case !attached[link.Ifindex]:
		t.Waiting[e.ID] = fmt.Sprintf("no programs on %s yet", link.Name)
		return
	}
	t.Links[link.Ifindex] = slot
	t.Endpoints[slot] = EndpointRow{
		Ifindex: link.Ifindex, Sandbox: sandbox, Network: net, MAC: e.MAC,
		Addr4: e.addr(true), Addr6: e.addr(false),
	}
	for _, p := range e.Allowed {
		t.Sources[SourceKey{Endpoint: slot, Prefix: p.Masked()}] = struct{}{}
	}
}

// wrong notes a problem.
func (t *Tables) wrong(network, setting, text, instead string) {
	t.Problems = append(t.Problems, Problem{Network: network, Setting: setting, Text: text, Instead: instead})
}

// surplus names the ports that no slot was left for, and their containers.
func (t *Tables) surplus(ports []namedPort, refused []string, endpoints []*Endpoint, networks map[string]Network) {
	if len(refused) == 0 {
		return
	}
	names := make(map[string]*Endpoint, len(endpoints))
	for _, e := range endpoints {
		names[e.ID] = e
	}
	without := make(map[string]bool, len(refused))
	for _, id := range refused {
		without[id] = true
	}
	for _, p := range ports {
		if !without[p.id] {
			continue
		}
		e := names[p.EndpointID]
		if e == nil {
			e = &Endpoint{}
		}
		n := networks[e.NetworkID]
		t.wrong(n.QualifiedName(), fmt.Sprintf("port %s/%s of %s", p.Host, p.Proto, e.Name),
			fmt.Sprintf("more than %d published ports", MaxPorts-1), "not served")
	}
}

// options puts down which devices a network trusts, and checks its options against the host.
func (t *Tables) options(n Network, slot uint16, d Devices) {
	for _, name := range n.Trusted {
		ifindex := d.ifindex(name)
		switch {
		case n.Internal: // reported by whoever read the options
		case ifindex == 0:
			t.wrong(n.QualifiedName(), OptTrusted, fmt.Sprintf("there is no device %q with an address", name), "nobody is let in by it")
		default:
			t.Trusted[TrustedKey{Network: slot}] = struct{}{}
			t.Trusted[TrustedKey{Network: slot, Ifindex: ifindex}] = struct{}{}
		}
	}
	for _, s := range []struct {
		key  string
		addr netip.Addr
	}{{OptSource4, n.Source4}, {OptSource6, n.Source6}} {
		if s.addr.IsValid() && !t.isLocal(s.addr) {
			t.wrong(n.QualifiedName(), s.key, s.addr.String()+" is no address of this host", "used all the same: answers come back only if they are routed here")
		}
	}
	if n.HostBinding.IsValid() && !t.isLocal(n.HostBinding) {
		t.wrong(n.QualifiedName(), OptHostBinding, n.HostBinding.String()+" is no address of this host", "what is published on it is not reached")
	}
}

// ifindex is that of an uplink or a bridge, 0 if there is none of that name.
func (d Devices) ifindex(name string) int {
	for _, u := range d.Uplinks {
		if u.Name == name {
			return u.Ifindex
		}
	}
	for _, b := range d.Bridges {
		if b.Name == name {
			return b.Ifindex
		}
	}
	return 0
}

// isLocal reports whether the host answers to the address, or it stands for all.
func (t *Tables) isLocal(a netip.Addr) bool {
	_, ok := t.HostAddrs[a.Unmap().WithZone("")]
	return ok || a.IsUnspecified() || a.IsLoopback()
}

// opening adds the container's own port behind a published one, where something may let others dial it.
// Of a container's endpoints the one that publishes has it, and all those on routed networks.
func (t *Tables) opening(p Port, slot uint16, e *Endpoint, publishes bool, n Network, directRouting bool) {
	is4 := p.Host.Addr().Unmap().Is4()
	to := e.addr(is4)
	routed := n.Mode(is4) == ModeRouted
	if n.Internal || !to.IsValid() || p.Target == 0 || !routed && !(publishes && (directRouting || len(n.Trusted) > 0)) {
		return
	}
	key := OpenKey{To: netip.AddrPortFrom(to, p.Target), Proto: p.Proto}
	if _, taken := t.Open[key]; !taken {
		t.Open[key] = slot
	}
}

// close has a host port lead nowhere: whoever's socket its source holds there must not answer. Where it
// holds none, the port may be another program's.
func (t *Tables) close(p Port, slot uint16, e *Endpoint) {
	host := netip.AddrPortFrom(p.Host.Addr().Unmap(), p.Host.Port())
	target := e.addr(host.Addr().Is4())
	if !target.IsValid() {
		target = e.addr(!host.Addr().Is4())
	}
	if target.IsValid() && host.Port() != 0 && !(p.Relay && host.Addr().Is6() && target.Is4()) {
		t.Closed[PortKey{p.Proto, host}] = PortRow{Target: netip.AddrPortFrom(target, p.Target), Slot: slot}
	}
}

// port adds a published port. Over IPv6 a container without such an address is reached by its IPv4
// one: the host's own sockets can be sent there; all else is for whoever holds the port's socket, the
// relay or docker-proxy. Without that the port may be another program's, and is not served at all.
func (t *Tables) port(p Port, slot uint16, e *Endpoint, endpoint uint16, n Network, in Intents) {
	host := netip.AddrPortFrom(p.Host.Addr().Unmap(), p.Host.Port())
	key := PortKey{Proto: p.Proto, Host: host}
	target := e.addr(host.Addr().Is4())
	if !target.IsValid() && host.Addr().Is6() {
		target = e.addr(true)
	}
	about := fmt.Sprintf("port %s of %s", p, e.Name)
	if !target.IsValid() || host.Port() == 0 || p.Target == 0 {
		t.wrong(n.QualifiedName(), about, "the container has no such address", "not served")
		return
	}
	row := PortRow{Target: netip.AddrPortFrom(target, p.Target), Endpoint: endpoint, Slot: slot}
	if n.Mode(target.Is4()) == ModeRouted {
		if !host.Addr().IsUnspecified() {
			t.wrong(n.QualifiedName(), about, "the network is routed", fmt.Sprintf("the host's address is without effect: port %d of %s is open", p.Target, target))
		}
		t.close(p, slot, e)
		return
	}
	if held, ok := t.Ports[key]; ok {
		t.wrong(n.QualifiedName(), about, fmt.Sprintf("already leads to %s", held.Target), "not served")
		return
	}
	if _, ok := t.Relays[key]; ok {
		return // of another container, which was first
	}
	if p.Proto == SCTP && p.Target != host.Port() {
		t.wrong(n.QualifiedName(), about, "SCTP keeps its port numbers; publish it under its own", "not served")
	}
	if host.Addr() != n.HostBinding && !t.isLocal(host.Addr()) {
		t.wrong(n.QualifiedName(), about, host.Addr().String()+" is no address of this host", "the port is not reached")
	}
	if p.Relay && host.Addr().Is6() && target.Is4() {
		t.Relays[key] = row.Target
		if why := in.Unrelayed[key]; why != "" {
			t.wrong(n.QualifiedName(), about, why, "not served on IPv6")
		}
		if !in.Relayed[key] {
			return
		}
	}
	t.Ports[key] = row
}

// Equal reports whether two tables would have the data path do the same.
func (t Tables) Equal(o Tables) bool {
	return maps.Equal(t.Networks, o.Networks) && maps.Equal(t.Endpoints, o.Endpoints) &&
		maps.Equal(t.Addrs, o.Addrs) && maps.Equal(t.Links, o.Links) &&
		maps.Equal(t.Subnets, o.Subnets) && maps.Equal(t.HostAddrs, o.HostAddrs) &&
		maps.Equal(t.Pairs, o.Pairs) && maps.Equal(t.Ports, o.Ports) && maps.Equal(t.Sources, o.Sources) &&
		maps.Equal(t.Masquerade, o.Masquerade) && maps.Equal(t.Closed, o.Closed) && maps.Equal(t.Open, o.Open) &&
		maps.Equal(t.Trusted, o.Trusted)
}

// SortedPorts lists the published ports by what is dialled.
func (t Tables) SortedPorts() []PortKey {
	return slices.SortedFunc(maps.Keys(t.Ports), func(a, b PortKey) int {
		return cmp.Or(cmp.Compare(a.Host.Port(), b.Host.Port()), cmp.Compare(a.Proto, b.Proto),
			a.Host.Addr().Compare(b.Host.Addr()))
	})
}
