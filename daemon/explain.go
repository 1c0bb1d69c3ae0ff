// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/explain"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// Explain says what becomes of a connection's first packet: by the tables of the last round, and by the programs, which are
// asked on the live maps. Nothing is sent and nothing written.
func (d *Daemon) Explain(_ context.Context, q api.Question) (e api.Explanation, err error) {
	for range explainTries {
		// A round may have written the maps meanwhile: then the next look is behind it.
		if e, err = d.explain(q); err != nil || e.Disagree == "" {
			break
		}
	}
	return e, err
}

// explainTries is how often the two accounts have to contradict each other before it is believed.
const explainTries = 3

func (d *Daemon) explain(q api.Question) (api.Explanation, error) {
	v := d.view()
	a, err := v.ask(q)
	if err != nil {
		return api.Explanation{}, err
	}
	r := &routes{v: v, devices: d.devices}
	if err := a.place(r); err != nil {
		return api.Explanation{}, err
	}
	a.judge(r)
	if a.runs() {
		dry, err := d.loader.Dry()
		if err != nil {
			return api.Explanation{}, fmt.Errorf("load the programs to be asked: %w", err)
		}
		if err := a.choosePort(dry.FlowKnown); err != nil {
			return api.Explanation{}, err
		}
		if err := a.run(dry); err != nil {
			return api.Explanation{}, err
		}
	}
	if r.err != nil {
		return api.Explanation{}, r.err
	}
	return a.tell(), nil
}

// view is what the last round has left.
type view struct {
	tables  policy.Tables
	slots   policy.Slots
	state   policy.State
	devices policy.Devices
	host    policy.Host
	// denied is who is kept out by the uplinks of shielded, by index.
	denied   []netip.Prefix
	shielded map[int]bool
}

func (d *Daemon) view() *view {
	d.round.Lock()
	defer d.round.Unlock()
	v := &view{
		tables: d.applied, slots: d.slots, state: d.known, devices: d.seen,
		host:     policy.Host{DirectRouting: d.cfg.AllowDirectRouting, AcceptMark: d.cfg.AcceptMark, AcceptMask: d.cfg.AcceptMask},
		shielded: make(map[int]bool),
	}
	if d.shield != nil {
		v.denied = d.shield.denied
		for ifindex := range d.shield.names {
			v.shielded[ifindex] = d.shield.why[ifindex] == ""
		}
	}
	return v
}

// The kinds of a side.
const (
	sideContainer = "container"
	sideHost      = "host"
	sideOutside   = "outside"
	sideNobody    = "nobody"
)

// side is one end of a question.
type side struct {
	kind string
	// addr is invalid while it is to be chosen, of a name.
	addr netip.Addr
	// Of containers: all interfaces that the name may mean, until pair has chosen one.
	all      []policy.Endpoint
	endpoint policy.Endpoint
	slot     uint16
	// network is that of the container, or of the address that nobody has.
	network policy.Network
}

func (s *side) is(e policy.Endpoint, v *view) {
	s.kind, s.endpoint, s.slot = sideContainer, e, v.slots.Endpoints[e.ID]
	s.network = v.network(e.NetworkID)
}

func (v *view) network(id string) policy.Network {
	for _, n := range v.state.Networks {
		if n.ID == id {
			return n
		}
	}
	return policy.Network{}
}

// row is the network as the data path knows it.
func (v *view) row(n policy.Network) policy.NetworkRow {
	return v.tables.Networks[v.slots.Networks[n.ID]]
}

// side says what a word of a question means. It fails with api.UnknownError.
func (v *view) side(flag, word string) (side, error) {
	if word == "" {
		return side{}, fmt.Errorf("%s: want the name of a container, an address, or \"host\"", flag)
	}
	if word == sideHost {
		return side{kind: sideHost}, nil
	}
	if a, err := netip.ParseAddr(word); err == nil {
		return v.address(flag, a)
	}
	name, network, _ := strings.Cut(word, ":")
	var all []policy.Endpoint
	for _, e := range v.state.Endpoints {
		if name != "" && (e.Name == name || policy.Qualify(e.Source, e.Name) == name || e.SandboxID == name || len(name) >= 12 && strings.HasPrefix(e.SandboxID, name)) {
			all = append(all, e)
		}
	}
	if len(all) == 0 {
		return side{}, v.unknown(flag, name)
	}
	for _, e := range all {
		if e.SandboxID != all[0].SandboxID {
			return side{}, fmt.Errorf("%s %q: there are several of that name; say %s or %s", flag, name,
				policy.Qualify(all[0].Source, all[0].Name), policy.Qualify(e.Source, e.Name))
		}
	}
	if network != "" {
		in := slices.DeleteFunc(slices.Clone(all), func(e policy.Endpoint) bool {
			n := v.network(e.NetworkID)
			return n.Name != network && n.QualifiedName() != network
		})
		if len(in) == 0 {
			return side{}, fmt.Errorf("%s %q: %s is not in network %q; it is in %s", flag, word, name, network, strings.Join(v.networksOf(all), " and "))
		}
		all = in
	}
	s := side{kind: sideContainer, all: all}
	if len(all) == 1 {
		s.is(all[0], v)
	}
	return s, nil
}

func (v *view) networksOf(all []policy.Endpoint) (names []string) {
	for _, e := range all {
		names = append(names, v.network(e.NetworkID).Name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// unknown says that no container has the name, and which are near, or that it is a network's.
func (v *view) unknown(flag, name string) error {
	for _, n := range v.state.Networks {
		if n.Name == name || n.QualifiedName() == name {
			return fmt.Errorf("%s %q: is a network; name a container in it, or an address of its subnet", flag, name)
		}
	}
	names := []string{sideHost}
	for _, e := range v.state.Endpoints {
		names = append(names, e.Name)
	}
	slices.Sort(names)
	return &api.UnknownError{What: "container", Name: name, Nearest: netdev.Nearest(name, slices.Compact(names))}
}

// address says whose an address is.
func (v *view) address(flag string, a netip.Addr) (side, error) {
	a = a.Unmap()
	if a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || a.IsLinkLocalUnicast() && a.Is6() {
		return side{}, fmt.Errorf("%s %s: want an address that is one host's, on whatever link", flag, a)
	}
	s := side{addr: a}
	if slot := v.tables.Addrs[a]; slot != 0 {
		for _, e := range v.state.Endpoints {
			if v.slots.Endpoints[e.ID] == slot {
				s.is(e, v)
				return s, nil
			}
		}
	}
	if _, own := v.tables.HostAddrs[a]; own || a.IsLoopback() {
		s.kind = sideHost
		return s, nil
	}
	s.kind = sideOutside
	bits := -1
	for _, n := range v.state.Networks {
		for _, p := range n.Subnets {
			if p.Contains(a) && p.Bits() > bits {
				s.kind, s.network, bits = sideNobody, n, p.Bits()
			}
		}
	}
	return s, nil
}

// asked is a question on its way to its answer.
type asked struct {
	v        *view
	from, to side
	packet   policy.Packet
	at       explain.Place

	verdict policy.Verdict
	socket  bool // the host's socket itself is sent on
	// stack is the device of the container to which the host's stack sends the packet; 0: it does not.
	stack int
	why   string // the programs are not asked
	// What they say; ran: they have been asked.
	ran bool
	out explain.Outcome
}

// ask reads a question.
func (v *view) ask(q api.Question) (*asked, error) {
	a := &asked{v: v}
	var err error
	if a.from, err = v.side("--from", q.From); err != nil {
		return nil, err
	}
	if a.to, err = v.side("--to", q.To); err != nil {
		return nil, err
	}
	if a.packet.Proto, err = askedProto(q.Proto, q.Port); err != nil {
		return nil, err
	}
	if err := a.pair(q); err != nil {
		return nil, err
	}
	src, dst := a.from.addr, a.to.addr
	if q.Source.IsValid() {
		src = q.Source.Unmap()
		switch {
		case a.from.kind != sideContainer:
			return nil, errors.New("--source: only a container's packets are looked at for the address that they claim")
		case src.Is4() != dst.Is4():
			return nil, fmt.Errorf("--source %s: is of another family than %s", src, dst)
		}
	}
	if a.packet.Proto == unix.IPPROTO_ICMP && dst.Is6() {
		a.packet.Proto = unix.IPPROTO_ICMPV6
	}
	a.packet.Tuple = policy.Tuple{Src: netip.AddrPortFrom(src, askedFrom), Dst: netip.AddrPortFrom(dst, q.Port)}
	return a, nil
}

func askedProto(word string, port uint16) (policy.Proto, error) {
	switch {
	case word == "icmp" && port != 0:
		return 0, errors.New("--port: icmp has none; leave it out, or say --proto tcp")
	case word == "icmp" || word == "" && port == 0:
		return unix.IPPROTO_ICMP, nil
	}
	proto, err := policy.ParseProto(word)
	switch {
	case err != nil:
		return 0, fmt.Errorf("--proto %q: want tcp, udp, sctp or icmp", word)
	case port == 0:
		return 0, fmt.Errorf("--proto %s: which port? Say it with --port", word)
	}
	return proto, nil
}

// pair chooses interfaces and addresses, of one family, and refuses what is not bpfnet's to explain.
func (a *asked) pair(q api.Question) error {
	from, to := &a.from, &a.to
	if from.kind == sideNobody {
		return fmt.Errorf("--from %s: lies in network %s, and no container has it", from.addr, from.network.Name)
	}
	// Of several interfaces, the one in a network that both are in.
	for _, s := range []struct{ one, other *side }{{from, to}, {to, from}} {
		if len(s.one.all) < 2 {
			continue
		}
		others := s.other.all
		if s.other.kind == sideContainer && len(others) == 0 {
			others = []policy.Endpoint{s.other.endpoint}
		}
		var common []policy.Endpoint
		for _, e := range s.one.all {
			shared := slices.ContainsFunc(others, func(o policy.Endpoint) bool { return o.NetworkID == e.NetworkID })
			if shared || s.other.kind == sideNobody && s.other.network.ID == e.NetworkID {
				common = append(common, e)
			}
		}
		if len(common) == 1 {
			s.one.is(common[0], a.v)
			s.one.all = common
		}
	}
	for _, s := range []struct {
		flag, word string
		side       *side
	}{{"--from", q.From, from}, {"--to", q.To, to}} {
		if s.side.kind == sideContainer && s.side.endpoint.ID == "" {
			var say []string
			for _, name := range a.v.networksOf(s.side.all) {
				say = append(say, s.word+":"+name)
			}
			return fmt.Errorf("%s %q: is in several networks; say %s", s.flag, s.word, strings.Join(say, " or "))
		}
	}
	switch {
	case from.kind == sideContainer && to.kind == sideContainer && from.endpoint.SandboxID == to.endpoint.SandboxID:
		return fmt.Errorf("--from and --to are both %s: what a container sends itself never leaves it", from.endpoint.Name)
	case from.kind == sideContainer && to.addr.IsLoopback():
		return fmt.Errorf("--to %s: is the container itself, wherever it is dialled in one", to.addr)
	case from.kind == sideHost && to.kind == sideHost && q.Port == 0:
		return errors.New("--from and --to are both the host")
	case from.kind == sideOutside && (to.kind == sideOutside || to.kind == sideHost && to.addr.IsLoopback()):
		return fmt.Errorf("neither %s nor %s is a container or what others know the host by: such packets are none of bpfnet's", q.From, q.To)
	case from.kind == sideHost && to.kind == sideOutside:
		return fmt.Errorf("--to %s: is no container: what the host itself sends there is none of bpfnet's", q.To)
	}
	return a.addresses(q)
}

// addresses chooses those of the sides that were named.
func (a *asked) addresses(q api.Question) error {
	given := cmp.Or(a.to.addr, a.from.addr, q.Source.Unmap())
	if a.from.addr.IsValid() && a.to.addr.IsValid() && a.from.addr.Is4() != a.to.addr.Is4() {
		return fmt.Errorf("%s and %s are of two families", a.from.addr, a.to.addr)
	}
	var why error
	for _, is4 := range []bool{true, false} {
		if given.IsValid() && given.Is4() != is4 {
			continue
		}
		to, err := a.addressOf(&a.to, &a.from, is4)
		if err == nil {
			var from netip.Addr
			if from, err = a.addressOf(&a.from, &a.to, is4); err == nil {
				if a.from.kind == sideHost && a.to.kind == sideHost && !a.from.addr.IsValid() {
					from = to
				}
				a.from.addr, a.to.addr = from, to
				return nil
			}
		}
		why = cmp.Or(why, err)
	}
	return why
}

// addressOf is the address of a family by which the other side knows it.
func (a *asked) addressOf(s, other *side, is4 bool) (netip.Addr, error) {
	family := map[bool]string{true: "IPv4", false: "IPv6"}[is4]
	if s.addr.IsValid() {
		return s.addr, nil
	}
	if s.kind == sideContainer {
		for _, addr := range s.endpoint.Addrs {
			if addr = addr.Unmap(); addr.Is4() == is4 && !addr.IsLinkLocalUnicast() {
				return addr, nil
			}
		}
		return netip.Addr{}, fmt.Errorf("%s has no %s address in network %s", s.endpoint.Name, family, s.network.Name)
	}
	// The host: the gateway of the other's network, or an uplink's address.
	if other.kind == sideContainer || other.kind == sideNobody {
		row := a.v.row(other.network)
		if gw := map[bool]netip.Addr{true: row.Gateway4, false: row.Gateway6}[is4]; gw.IsValid() {
			return gw, nil
		}
	}
	for _, u := range a.v.devices.Uplinks {
		for _, p := range u.Addrs {
			if addr := p.Addr().Unmap(); addr.Is4() == is4 && !addr.IsLinkLocalUnicast() {
				return addr, nil
			}
		}
	}
	if other.kind == sideHost {
		return map[bool]netip.Addr{true: netip.AddrFrom4([4]byte{127, 0, 0, 1}), false: netip.IPv6Loopback()}[is4], nil
	}
	return netip.Addr{}, fmt.Errorf("the host has no %s address there", family)
}

// madeUp is the MAC of whoever nobody knows.
var madeUp = policy.MAC{0x02, 0, 0, 0, 0, 0x01}

// place says by which device the packet comes, and between which MACs.
func (a *asked) place(r *routes) error {
	p := &a.packet
	dst := p.Tuple.Dst.Addr()
	switch a.from.kind {
	case sideContainer:
		row := a.v.row(a.from.network)
		p.From, p.Device = policy.FromContainer, a.v.link(a.from)
		a.at.Bridge, a.at.Src, a.at.Dst = row.Ifindex, a.from.endpoint.MAC, row.MAC
		r.bridge, r.inside = row.Ifindex, a.from.addr
		p.Gateway = dst == row.Gateway4 || dst == row.Gateway6 || !contains(a.from.network.Subnets, dst)
		if !p.Gateway {
			a.at.Dst = madeUp
			if a.to.kind == sideContainer {
				a.at.Dst = a.to.endpoint.MAC
			}
		}
		if p.Device == 0 {
			a.why = "the container's interface is not known"
		}
	case sideOutside:
		p.From = policy.FromUplink
		a.at.Src = madeUp
		u, err := a.uplink(r)
		if err != nil {
			return err
		}
		p.Device, a.at.Dst = u.Ifindex, u.MAC
		if !u.Ethernet {
			a.why = u.Name + " has no link layer: its program cannot be shown a packet by hand"
		}
		r.target(a)
	case sideHost:
		p.From, p.Device = policy.FromHost, loIfindex
		if a.to.kind == sideContainer {
			a.stack = a.v.link(a.to)
			a.at.Src, a.at.Dst = a.v.row(a.to.network).MAC, a.to.endpoint.MAC
			if a.stack == 0 {
				a.why = "the container's interface is not known"
			}
		}
	}
	return nil
}

// link is the index of the host's side of a container's interface, READY or not; 0: unknown.
func (v *view) link(s side) int {
	if row, ok := v.tables.Endpoints[s.slot]; ok {
		return row.Ifindex
	}
	for _, l := range v.devices.Links {
		if l.Bridge == s.network.Bridge && l.PeerMAC == s.endpoint.MAC && !s.endpoint.MAC.IsZero() {
			return l.Ifindex
		}
	}
	return 0
}

// uplink is the one by which the host would answer.
func (a *asked) uplink(r *routes) (policy.Uplink, error) {
	hop, err := r.devices.RouteOf(netip.Addr{}, a.from.addr, 0)
	if err != nil {
		return policy.Uplink{}, err
	}
	for _, u := range a.v.devices.Uplinks {
		if u.Ifindex == hop.Ifindex {
			return u, nil
		}
	}
	if len(a.v.devices.Uplinks) == 0 {
		return policy.Uplink{}, errors.New("the host has no uplink: nothing comes from outside")
	}
	if hop.Ifindex != 0 {
		return policy.Uplink{}, fmt.Errorf("--from %s: is behind %s, which is no uplink", a.from.addr, cmp.Or(deviceName(hop.Ifindex), "a device"))
	}
	return a.v.devices.Uplinks[0], nil
}

// deviceName is empty where there is no such device.
func deviceName(ifindex int) string {
	dev, err := net.InterfaceByIndex(ifindex)
	if err != nil {
		return ""
	}
	return dev.Name
}

// routes asks the host's routes as the data path does: for a packet that enters by a network's bridge.
type routes struct {
	v       *view
	devices *netdev.Devices
	bridge  int
	// inside is the container's address: nobody else's comes by the bridge.
	inside netip.Addr
	err    error // the first
}

// target has the bridge be that of whom the packet is for.
func (r *routes) target(a *asked) {
	slot := r.v.tables.Addrs[a.packet.Tuple.Dst.Addr()]
	if row, ok := r.v.tables.Published(a.packet.Proto, a.packet.Tuple.Dst); ok && slot == 0 {
		slot = row.Endpoint
	}
	ep := r.v.tables.Endpoints[slot]
	r.bridge, r.inside = r.v.tables.Networks[ep.Network].Ifindex, ep.Addr4
	if a.packet.Tuple.Dst.Addr().Is6() {
		r.inside = ep.Addr6
	}
}

func (r *routes) way(_, to netip.Addr) policy.Way {
	if r.bridge == 0 || !r.inside.IsValid() || r.inside.Is4() != to.Is4() {
		return policy.WayOut
	}
	hop, err := r.devices.RouteOf(r.inside, to, r.bridge)
	switch {
	case err != nil:
		r.err = cmp.Or(r.err, err)
		return policy.WayOut
	case hop.Encap:
		return policy.WayNone
	case hop.Ifindex == 0:
		return policy.WayStack
	}
	return policy.WayOut
}

// askedFrom is the first of those that the packet is tried to be sent from.
const askedFrom = 40000

var hookOf = map[policy.Origin]string{policy.FromContainer: "container", policy.FromUplink: "uplink", policy.FromHost: "host"}

// choosePort finds a source port, or identifier, whose packet belongs to no flow yet.
func (a *asked) choosePort(known func(hook string, proto uint8, src, dst netip.AddrPort) (bool, error)) error {
	t := &a.packet.Tuple
	for port := askedFrom; port < 1<<16; port++ {
		t.Src = netip.AddrPortFrom(t.Src.Addr(), uint16(port))
		taken, err := known(hookOf[a.packet.From], uint8(a.packet.Proto), t.Src, t.Dst)
		if err != nil || !taken {
			return err
		}
	}
	return errors.New("every source port has a flow to there already")
}

// judge asks policy.
func (a *asked) judge(r *routes) {
	host := a.v.host
	host.Route = r.way
	t := a.v.tables
	if a.packet.From == policy.FromHost && a.to.kind != sideHost {
		a.verdict = a.byStack()
		return
	}
	if src := a.packet.Tuple.Src.Addr(); a.packet.From == policy.FromUplink && a.v.shielded[a.packet.Device] && contains(a.v.denied, src) {
		a.why = "the shield comes before them"
		a.verdict = policy.Verdict{
			Path: policy.PathNone, Reason: "denied", To: a.packet.Tuple.Dst, Steps: []string{fmt.Sprintf("%s is on the shield's deny list", src)},
		}
		return
	}
	a.verdict = t.Explain(host, a.packet)
	for _, s := range []side{a.from, a.to} {
		if why := t.Waiting[s.endpoint.ID]; why != "" {
			a.verdict.Steps = append(a.verdict.Steps, fmt.Sprintf("%s is not ready: %s", s.endpoint.Name, why))
		}
	}
	dst := a.packet.Tuple.Dst
	row, published := t.Published(a.packet.Proto, dst)
	_, ready := t.Endpoints[row.Endpoint]
	if a.packet.From != policy.FromHost || !published || !ready || a.packet.Proto == policy.SCTP {
		return
	}
	a.socket = true
	a.why = "the program at the host's cgroup sends the socket itself there, and cannot be shown one by hand: explained by policy alone"
	a.verdict = policy.Verdict{
		Path: policy.PathContainer, Endpoint: row.Endpoint, Port: row.Slot, To: row.Target,
		Steps: []string{
			fmt.Sprintf("published: %s leads to %s", dst, row.Target),
			"the host's socket is sent there itself, by the sock programs: no packet has the address that was dialled",
		},
	}
}

// byStack is what becomes of what the host sends to an address in a network: its stack and the bridge have it, and the
// container's own program the last word.
func (a *asked) byStack() policy.Verdict {
	v := policy.Verdict{Path: policy.PathStack, To: a.packet.Tuple.Dst}
	say := func(format string, args ...any) { v.Steps = append(v.Steps, fmt.Sprintf(format, args...)) }
	drop := func(reason, why string) {
		v.Path, v.Reason = policy.PathNone, reason
		say("%s", why)
	}
	mode := a.to.network.Mode(v.To.Addr().Is4())
	_, ready := a.v.tables.Endpoints[a.to.slot]
	switch {
	case a.to.kind == sideNobody:
		say("%s lies in network %s, and nobody has it: the bridge asks in vain", v.To.Addr(), a.to.network.Name)
	case !ready:
		drop("not_ready", fmt.Sprintf("%s is not ready: %s", a.to.endpoint.Name, a.v.tables.Waiting[a.to.endpoint.ID]))
	case a.packet.Tuple.Src.Addr().IsLoopback():
		drop("loopback_address", fmt.Sprintf("%s does not leave the host", a.packet.Tuple.Src.Addr()))
	case mode == policy.ModeIsolated:
		drop("internal", "the network's gateway mode is isolated: not even the host reaches it")
	default:
		say("the host reaches its containers by its own stack and the bridge")
	}
	return v
}

// runs reports whether the programs are to be asked; else it has said why not.
func (a *asked) runs() bool {
	if a.why == "" && a.packet.From == policy.FromHost && a.to.kind == sideNobody {
		a.why = "no program of bpfnet sees it: the bridge finds nobody"
	}
	return a.why == ""
}

// run asks the programs.
func (a *asked) run(r explain.Runner) (err error) {
	if a.stack != 0 {
		a.out, err = explain.AskToContainer(r, a.packet, a.at.Link, a.stack)
	} else {
		a.out, err = explain.Ask(r, a.packet, a.at)
	}
	a.ran = err == nil
	return err
}

// tell words the answer.
func (a *asked) tell() api.Explanation {
	t := a.packet.Tuple
	ports := a.packet.Proto != unix.IPPROTO_ICMP && a.packet.Proto != unix.IPPROTO_ICMPV6
	word := func(p netip.AddrPort) string {
		if !ports {
			return p.Addr().String()
		}
		return p.String()
	}
	e := api.Explanation{
		From: a.describe(&a.from), To: a.describe(&a.to), Proto: "icmp",
		Path: a.verdict.Path.String(), Reason: a.verdict.Reason, Why: a.why,
		Sent:     api.Ends{From: word(t.Src), To: word(t.Dst)},
		Received: api.Ends{From: word(t.Src), To: word(a.verdict.To)},
		Policy:   api.Policy{Path: a.verdict.Path.String(), Reason: a.verdict.Reason, Steps: notNone(a.verdict.Steps)},
	}
	if ports {
		e.Proto = a.packet.Proto.String()
	}
	e.From.Device, e.To.Device = deviceName(a.v.link(a.from)), deviceName(a.v.link(a.to))
	if a.packet.From == policy.FromUplink {
		e.From.Device = deviceName(a.packet.Device)
	}
	if a.verdict.SNAT {
		e.Received.From = "the address of the route"
		if a.verdict.Source.IsValid() {
			e.Received.From = a.verdict.Source.String()
		}
	}
	if a.socket {
		e.Path, e.Policy.Path = "socket", "socket"
		e.Received.From = "an address of the host"
	}
	if a.verdict.Port != 0 {
		e.Port = a.port(a.verdict.Port)
	}
	if a.ran {
		e.DataPath = &api.DataPath{
			Path: a.out.Path.String(), Reason: a.out.Reason, Hook: a.out.Hook, Programs: a.out.Programs,
			ByState: explain.ByState(a.verdict, a.out),
		}
		e.Disagree = explain.Differ(a.verdict, a.out)
		e.Path, e.Reason = e.DataPath.Path, e.DataPath.Reason
		if a.verdict.SNAT && a.out.SNAT {
			e.Received.From = word(a.out.Src)
		}
		if a.out.Uplink != 0 && a.to.kind == sideOutside {
			e.To.Device = deviceName(a.out.Uplink)
		}
	}
	if e.Path == policy.PathNone.String() {
		e.Received = api.Ends{}
	}
	return e
}

func notNone(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

func (a *asked) describe(s *side) api.Side {
	out := api.Side{Kind: s.kind, Addr: s.addr, Network: s.network.Name}
	if s.kind == sideContainer {
		out.Name = s.endpoint.Name
	}
	return out
}

// port is the published port of a slot.
func (a *asked) port(slot uint16) *api.Port {
	for _, key := range a.v.tables.SortedPorts() {
		row := a.v.tables.Ports[key]
		if row.Slot != slot {
			continue
		}
		out := &api.Port{Slot: slot, Proto: key.Proto.String(), Host: key.Host.String(), Target: row.Target.String()}
		for _, e := range a.v.state.Endpoints {
			if a.v.slots.Endpoints[e.ID] == row.Endpoint {
				out.Endpoint, out.Container, out.SandboxID, out.Network = e.ID, e.Name, e.SandboxID, a.v.network(e.NetworkID).Name
			}
		}
		return out
	}
	return nil
}
