// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes a network namespace and loads BPF programs (see datapath_host_test.go).
//
// Sequences of packets and changes of state, held against a model step by step: policy.Explain over the
// compiled tables says what becomes of a packet that belongs to no flow, a flow table in Go what becomes of
// the others.
package bpf_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/internal/promise"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/policy"
)

// dice makes choices out of bytes; all are the first when they have run out.
type dice struct{ data []byte }

func (d *dice) n(sides int) int {
	if len(d.data) == 0 {
		return 0
	}
	v := d.data[0]
	d.data = d.data[1:]
	return int(v) % sides
}

func pick[T any](d *dice, list ...T) T { return list[d.n(len(list))] }

// once says true in one of so many cases.
func (d *dice) once(in int) bool { return d.n(in) == in-1 }

// world is the state that is compiled: five networks with the devices of the host, endpoints at their places.
type world struct {
	networks map[int]policy.Network
	single   map[int]bool // endpoints with IPv4 only
	there    map[int]bool // endpoints
	ports    []policy.Port
	pairs    map[[2]int]bool
	openings map[policy.Opening]bool
	settings maps.Settings
}

const (
	acceptMark, acceptMask = 0x10, 0xff
	idleTimeout            = 100 // ticks, each of them
)

func networkID(n int) string { return fmt.Sprintf("n%d", n) }

func endpointID(slot int) string { return fmt.Sprintf("e%d", slot) }

// newWorld chooses the options that a network keeps for its life, and what there is at first.
func newWorld(d *dice) *world {
	w := &world{
		networks: make(map[int]policy.Network), single: make(map[int]bool), there: make(map[int]bool),
		pairs: make(map[[2]int]bool), openings: make(map[policy.Opening]bool),
		settings: maps.Settings{
			SNAT:     []maps.PortRange{{First: snatFirst, Count: snatCount}, {First: snatFirst2, Count: snatCount2}},
			Reserved: map[uint16]struct{}{snatHole: {}}, HashSeed: 12345,
			Timeouts: maps.Timeouts{
				TCPSyn: idleTimeout, TCPEstablished: idleTimeout, TCPFin: idleTimeout, TCPClosed: idleTimeout,
				UDPNew: idleTimeout, UDP: idleTimeout, ICMP: idleTimeout, Other: idleTimeout,
			},
		},
	}
	for n := netOne; n <= netRouted; n++ {
		network := policy.Network{ID: networkID(n), Name: networkID(n), Source: policy.SourceStore, Bridge: fmt.Sprintf("br%d", n)}
		for i, f := range families {
			network.Subnets = append(network.Subnets, netip.PrefixFrom(f.in(n, 0), []int{16, 64}[i]))
			network.Gateways = append(network.Gateways, f.gateway(n))
		}
		given := make(map[string]string)
		network.Internal = d.once(6)
		given[policy.OptICC] = pick(d, "true", "true", "false")
		given[policy.OptMasquerade] = pick(d, "true", "true", "true", "false")
		modes := []string{"nat", "nat", "routed", "nat-unprotected", "isolated"}
		given[policy.OptMode4], given[policy.OptMode6] = pick(d, modes...), pick(d, modes...)
		given[policy.OptTrusted] = pick(d, "", "", "up1", "br2")
		given[policy.OptSource4] = pick(d, "", "", families[0].host1.String())
		options, _ := policy.ParseOptions(given, network.Internal)
		network.SetOptions(options)
		w.networks[n] = network
	}
	for slot := range places {
		w.there[slot] = slot != late
	}
	w.single[bob] = d.once(2)
	for range d.n(12) {
		w.change(d)
	}
	return w
}

// change does one of the things that happen to a running host, and says what.
func (w *world) change(d *dice) string {
	switch d.n(8) {
	default:
		p := policy.Port{
			Proto:      pick(d, policy.TCP, policy.UDP, policy.TCP, policy.UDP, policy.SCTP),
			EndpointID: endpointID(pick(d, endpointSlots...)), Target: pick(d, uint16(80), 8081), Refused: d.once(12),
		}
		f := pick(d, families...)
		p.Host = at(pick(d, f.unspecified, f.unspecified, f.host, f.host1, f.gateway(netOne)), pick(d, uint16(pubAlice), pubBob))
		w.ports = append(w.ports, p)
		return fmt.Sprintf("publish %s of %s", p, p.EndpointID)
	case 1:
		if len(w.ports) == 0 {
			return "nothing to withdraw"
		}
		i := d.n(len(w.ports))
		p := w.ports[i]
		w.ports = slices.Delete(slices.Clone(w.ports), i, i+1)
		return fmt.Sprintf("withdraw %s of %s", p, p.EndpointID)
	case 2:
		slot := pick(d, endpointSlots...)
		w.there[slot] = !w.there[slot]
		return fmt.Sprintf("endpoint %d there: %v", slot, w.there[slot])
	case 3:
		pair := [2]int{netOne + d.n(5), netOne + d.n(5)}
		w.pairs[pair] = !w.pairs[pair]
		return fmt.Sprintf("pair %v allowed: %v", pair, w.pairs[pair])
	case 4:
		o := policy.Opening{
			From: endpointID(pick(d, quinn, alice)), To: endpointID(pick(d, rita, bob)),
			Proto: pick(d, policy.TCP, policy.UDP), Port: 80,
		}
		w.openings[o] = !w.openings[o]
		return fmt.Sprintf("link %v: %v", o, w.openings[o])
	case 5:
		w.settings.DirectRouting = !w.settings.DirectRouting
		return fmt.Sprintf("direct routing: %v", w.settings.DirectRouting)
	case 6:
		w.settings.AcceptMark, w.settings.AcceptMask = pick(d, uint32(0), acceptMark), pick(d, uint32(0), acceptMask)
		if w.settings.AcceptMask == 0 {
			w.settings.AcceptMark = 0
		}
		return fmt.Sprintf("mark accepted: %#x/%#x", w.settings.AcceptMark, w.settings.AcceptMask)
	}
}

var endpointSlots = []int{alice, bob, late, carol, alice2, ian, quinn, rita, peggy}

func (w *world) intents(h *host) policy.Intents {
	in := policy.Intents{Attached: make(map[int]bool), DirectRouting: w.settings.DirectRouting}
	for n, network := range w.networks {
		in.State.Networks = append(in.State.Networks, network)
		in.Devices.Bridges = append(in.Devices.Bridges, policy.Bridge{
			Ifindex: h.bridges[n], Name: network.Bridge, MAC: policy.MAC(bridgeMAC(n)), MTU: 1500, Up: true,
		})
		for _, g := range network.Gateways {
			in.Devices.HostAddrs = append(in.Devices.HostAddrs, policy.HostAddr{Addr: g, Ifindex: h.bridges[n]})
		}
	}
	for slot, there := range w.there {
		if !there {
			continue
		}
		e := policy.Endpoint{
			ID: endpointID(slot), NetworkID: networkID(places[slot].network), SandboxID: fmt.Sprint("s", places[slot].sandbox),
			Name: endpointID(slot), MAC: policy.MAC(macOf(slot)), Addrs: []netip.Addr{families[0].addr(slot)},
		}
		if !w.single[slot] {
			e.Addrs = append(e.Addrs, families[1].addr(slot))
		}
		if slot == peggy {
			e.Allowed = []netip.Prefix{netip.PrefixFrom(families[0].foreign, 32)}
		}
		in.State.Endpoints = append(in.State.Endpoints, e)
		in.Devices.Links = append(in.Devices.Links, policy.Link{
			Ifindex: h.links[slot], Bridge: fmt.Sprintf("br%d", places[slot].network), PeerMAC: e.MAC,
		})
		in.Attached[h.links[slot]] = true
	}
	in.State.Ports = w.ports
	for pair, allowed := range w.pairs {
		if allowed {
			in.Allowed = append(in.Allowed, [2]string{w.networks[pair[0]].QualifiedName(), w.networks[pair[1]].QualifiedName()})
		}
	}
	for o, open := range w.openings {
		if open {
			in.State.Openings = append(in.State.Openings, o)
		}
	}
	for name, index := range map[string]int{"up0": h.up, "up1": h.up1} {
		u := policy.Uplink{Ifindex: index, Name: name, Ethernet: true}
		for _, f := range families {
			a := map[string]netip.Addr{"up0": f.host, "up1": f.host1}[name]
			u.Addrs = append(u.Addrs, netip.PrefixFrom(a, 24))
		}
		in.Devices.Uplinks = append(in.Devices.Uplinks, u)
	}
	for _, f := range families {
		in.Devices.HostAddrs = append(in.Devices.HostAddrs, policy.HostAddr{Addr: f.host, Ifindex: h.up}, policy.HostAddr{Addr: f.host1, Ifindex: h.up1})
	}
	return in
}

// flowKey is how a packet looks at a hook.
type flowKey struct {
	hook  bpf.DatapathHook
	proto policy.Proto
	tuple policy.Tuple
}

// modelFlow is a flow as the model knows it. Index 0 of its entries is the direction that opened it.
type modelFlow struct {
	opener   policy.Packet
	verdict  policy.Verdict
	keys     [2]flowKey
	slots    [2]uint16 // of the container that sends in a direction, 0: none
	devices  [2]int    // that a direction leads to, where that is a container's
	renewed  [2]uint32 // generation
	onesided bool
	over     bool // may be: it was reset or closed
	answered bool // while it waits: its container has sent something
	idle     int  // ticks
}

// model is what the data path ought to know.
type model struct {
	tables     policy.Tables
	slots      policy.Slots
	host       policy.Host
	generation uint32
	flows      map[flowKey]*modelFlow
	// waiting are the world's TCP connections that no client has confirmed, by how answers look.
	waiting map[flowKey]*modelFlow
}

func (m *model) forget(f *modelFlow) {
	for _, k := range f.keys {
		if m.flows[k] == f {
			delete(m.flows, k)
		}
	}
}

// sent is one packet on its way into the data path.
type sent struct {
	program string
	hook    bpf.DatapathHook
	packet  policy.Packet
	ctx     skb
	flags   string // TCP's
	frame   []byte
	quoted  *quote // by an ICMP error
}

// want is what is to become of a packet.
type want struct {
	action int32
	count  string
	tuple  policy.Tuple // as it leaves
	// fresh: the model cannot know the source port that is chosen for it.
	fresh  bool
	either bool // it may keep its own all the same: whose tuple it takes may be over
	routed bool
	flow   *modelFlow // that it travels along
	dir    int
	opens  bool
	waits  bool
}

func hookName(h bpf.DatapathHook) string { return hookNames[h] }

func reasonNumber(t testing.TB, name string) bpf.DatapathReason {
	i := slices.Index(maps.Reasons(), name)
	require.Positive(t, i, "no reason %q", name)
	return bpf.DatapathReason(i)
}

func (s *sequence) dropped(p sent, reason string) want {
	return want{action: actShot, count: reasonName(reasonNumber(s.h.t, reason)) + " " + hookName(p.hook)}
}

func (s *sequence) passed(p sent, fate string) want {
	w := want{action: actPass, tuple: p.packet.Tuple}
	if fate != "" {
		w.count = "fate " + fate + " " + hookName(p.hook)
	}
	return w
}

// sequence is one run.
type sequence struct {
	h      *host
	writer *maps.Writer
	d      *dice
	w      *world
	m      *model
	last   []delivery
	frags  uint32 // fragmented datagrams so far
	log    []string
	data   []byte
	before counters
	counts *sequenceCounts
}

// sequenceCounts is what runs have shown.
type sequenceCounts struct {
	packets, changes, forwarded, dropped, trips int
	errors, fragments                           int // ICMP's that travelled along a flow; and later fragments that did
	seen                                        map[string]bool
}

// delivery is a packet that arrived.
type delivery struct {
	out   []byte
	slot  int // who got it, by place; 0: outside or the host
	onLo  bool
	proto policy.Proto
}

func (s *sequence) say(format string, args ...any) {
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

func (s *sequence) fail(format string, args ...any) {
	s.h.t.Helper()
	s.h.t.Fatalf("%s\nafter\n%s\ngo test fuzz v1\n[]byte(%q)", fmt.Sprintf(format, args...), strings.Join(s.log, "\n"), s.data)
}

// apply compiles the world and writes it as the daemon does; the model loses what is gone.
func (s *sequence) apply() {
	in := s.w.intents(s.h)
	old := s.m.tables
	s.m.tables, s.m.slots = policy.Compile(in, s.m.slots)
	_, err := s.writer.Apply(s.m.tables, s.w.settings)
	require.NoError(s.h.t, err)
	s.m.generation = s.h.config().Generation
	s.m.host = policy.Host{
		DirectRouting: s.w.settings.DirectRouting, AcceptMark: s.w.settings.AcceptMark, AcceptMask: s.w.settings.AcceptMask,
		Route: func(_, to netip.Addr) policy.Way {
			if to == families[0].noRoute() || to == families[1].noRoute() {
				return policy.WayStack
			}
			return policy.WayOut
		},
	}
	gone := func(slot uint16) bool {
		was, had := old.Endpoints[slot]
		is, has := s.m.tables.Endpoints[slot]
		return slot != 0 && (had || !has) && (!has || was.Ifindex != is.Ifindex || was.Addr4 != is.Addr4 || was.Addr6 != is.Addr6)
	}
	live := livePorts(s.m.tables)
	for _, f := range s.m.flows {
		if gone(f.slots[0]) || gone(f.slots[1]) || f.verdict.Port != 0 && !live[f.verdict.Port] {
			s.m.forget(f)
		}
	}
	for k, f := range s.m.waiting {
		if gone(f.slots[1]) || f.verdict.Port != 0 && !live[f.verdict.Port] {
			delete(s.m.waiting, k)
		}
	}
}

func livePorts(t policy.Tables) map[uint16]bool {
	out := make(map[uint16]bool)
	for _, rows := range []map[policy.PortKey]policy.PortRow{t.Ports, t.Closed} {
		for _, row := range rows {
			out[row.Slot] = true
		}
	}
	for _, slot := range t.Open {
		out[slot] = true
	}
	return out
}

// sweepUntilDone runs expire or purge: one round may pass over who stands behind the deleted.
func (h *host) sweepUntilDone(program string) {
	for range 10 {
		if h.sweep(program).Deleted == [2]uint32{} {
			return
		}
	}
	h.t.Fatalf("%s finds more and more", program)
}

// step is one packet or one change.
func (s *sequence) step() {
	var high int
	if len(s.d.data) > 0 {
		high = int(s.d.data[0]) / 16
	}
	switch kind := s.d.n(16); {
	case kind == 0:
		s.counts.changes++
		s.say("%s", s.w.change(s.d))
		s.apply()
	case kind == 1:
		s.counts.changes++
		if s.d.once(2) {
			s.say("60 ticks")
			s.h.age(60)
			for k, f := range s.m.flows {
				if k == f.keys[0] {
					f.idle += 60
				}
			}
			s.h.sweepUntilDone("expire")
			for _, f := range s.m.flows {
				if f.idle > idleTimeout {
					s.m.forget(f)
				}
			}
		} else {
			s.say("renew")
			require.NoError(s.h.t, s.writer.Renew())
			s.m.generation++
		}
	case kind < 8 && high >= 12 && len(s.last) > 0:
		s.sendError(s.last[s.d.n(len(s.last))])
	case kind < 8 && len(s.last) > 0:
		s.send(s.reply(s.last[s.d.n(len(s.last))]))
	case kind < 12 && high >= 14:
		s.sendFragments(s.fromContainer())
	case kind < 12:
		s.send(s.fromContainer())
	case kind < 15 && high >= 14:
		s.sendFragments(s.fromUplink())
	case kind < 15:
		s.send(s.fromUplink())
	default:
		s.send(s.fromHost())
	}
}

var (
	innerPorts = []uint16{40000, 40001, 80}
	dialled    = []uint16{80, pubAlice, pubBob, 80, pubAlice}
)

// protocol chooses how to speak between two addresses.
func (s *sequence) protocol(p *sent, src, dst netip.Addr, sport, dport uint16) {
	p.packet.Tuple = policy.Tuple{Src: at(src, sport), Dst: at(dst, dport)}
	switch s.d.n(8) {
	default:
		p.packet.Proto, p.flags = policy.TCP, pick(s.d, "S", "S", "S", "A", "SA", "FA", "R")
	case 1, 2:
		p.packet.Proto = policy.UDP
	case 3:
		p.packet.Proto = policy.SCTP
	case 4:
		p.packet.Proto = unix.IPPROTO_ICMP
		if dst.Is6() {
			p.packet.Proto = unix.IPPROTO_ICMPV6
		}
		p.packet.Tuple = policy.Tuple{Src: at(src, sport), Dst: at(dst, 0)}
		if s.d.once(4) {
			p.packet.Tuple = policy.Tuple{Src: at(src, 0), Dst: at(dst, sport)}
		}
	}
	p.packet.Reset, p.packet.Answer = p.flags == "R", p.flags == "SA"
}

// build makes the frame.
func (s *sequence) build(p *sent, smac, dmac net.HardwareAddr) {
	options := []packet.Option{packet.MAC(smac, dmac), packet.Payload(bytes.Repeat([]byte{0xa5}, s.d.n(40)))}
	if s.d.once(16) {
		options = append(options, packet.SkewL4(3))
	}
	t := p.packet.Tuple
	switch p.packet.Proto {
	case policy.TCP:
		p.frame = packet.TCP(t.Src, t.Dst, append(options, packet.Flags(p.flags))...)
	case policy.UDP:
		if t.Src.Addr().Is4() && s.d.once(16) {
			options = append(options, packet.NoUDPChecksum())
		}
		p.frame = packet.UDP(t.Src, t.Dst, options...)
	case policy.SCTP:
		p.frame = packet.SCTP(t.Src, t.Dst, options...)
	default:
		if t.Dst.Port() == 0 {
			p.frame = packet.ICMPEcho(t.Src.Addr(), t.Dst.Addr(), t.Src.Port(), 1, options...)
		} else {
			p.frame = packet.ICMPEchoReply(t.Src.Addr(), t.Dst.Addr(), t.Dst.Port(), 1, options...)
		}
	}
}

func (s *sequence) fromContainer() sent {
	slot, f := pick(s.d, endpointSlots...), pick(s.d, families...)
	p := sent{program: "from_container", hook: bpf.DatapathHookHOOK_CONTAINER, ctx: s.h.sentBy(slot)}
	src := f.addr(slot)
	if s.d.once(12) {
		src = pick(s.d, f.addr(bob), f.addr(alice), f.foreign, f.loopback, f.unspecified)
	}
	peer := pick(s.d, endpointSlots...)
	dst := pick(s.d, f.addr(peer), f.addr(peer), f.host, f.client, f.client2, f.host1, f.gateway(places[peer].network), f.addr(peer), f.host, f.client2,
		f.noRoute(), f.in(places[peer].network, 99), f.loopback, f.unspecified)
	same := places[peer].network == places[slot].network && (dst == f.addr(peer) || dst == f.in(places[peer].network, 99))
	p.packet.From, p.packet.Device = policy.FromContainer, s.h.links[slot]
	p.packet.Gateway = same == s.d.once(12)
	s.protocol(&p, src, dst, pick(s.d, innerPorts...), pick(s.d, dialled...))
	dmac := bridgeMAC(places[slot].network)
	if !p.packet.Gateway {
		dmac = macOf(peer)
	}
	s.build(&p, macOf(slot), dmac)
	return p
}

func (s *sequence) fromUplink() sent {
	f := pick(s.d, families...)
	device := pick(s.d, s.h.up, s.h.up, s.h.up1)
	p := sent{program: "from_uplink", hook: bpf.DatapathHookHOOK_UPLINK, ctx: skb{Ifindex: uint32(device)}}
	p.packet.From, p.packet.Device = policy.FromUplink, device
	if s.d.once(6) {
		p.ctx.Mark = acceptMark
		p.packet.Mark = acceptMark
	}
	src := pick(s.d, f.client, f.client2, f.foreign, f.client, f.client2, f.foreign, f.client, f.noRoute(), f.host, f.addr(alice), f.loopback, f.unspecified)
	to := f.addr(pick(s.d, endpointSlots...))
	dst := pick(s.d, f.host, f.host, f.host1, to, f.host, f.gateway(netOne), to, f.host, f.in(netTwo, 99), f.client2, f.loopback)
	s.protocol(&p, src, dst, pick(s.d, uint16(50000), 50001, snatFirst), pick(s.d, dialled...))
	s.build(&p, outsideMAC, s.macOfUplink(device))
	return p
}

func (s *sequence) macOfUplink(device int) net.HardwareAddr {
	if device == s.h.up1 {
		return up1MAC
	}
	return upMAC
}

func (s *sequence) fromHost() sent {
	f := pick(s.d, families...)
	p := sent{program: "from_host", hook: bpf.DatapathHookHOOK_HOST, ctx: skb{Ifindex: 1}}
	p.packet.From, p.packet.Device = policy.FromHost, 1
	src := pick(s.d, f.loopback, f.host, f.host1)
	dst := pick(s.d, f.loopback, f.host, f.host1, f.gateway(netOne))
	s.protocol(&p, src, dst, pick(s.d, uint16(50000), 50001), pick(s.d, dialled...))
	s.build(&p, zeroMAC, zeroMAC)
	return p
}

// back is something that is sent from where a packet arrived to where it came from, and its MACs.
func (s *sequence) back(d delivery) (p sent, smac, dmac net.HardwareAddr) {
	sender := net.HardwareAddr(d.out[6:12])
	switch {
	case d.slot != 0:
		p = sent{program: "from_container", hook: bpf.DatapathHookHOOK_CONTAINER, ctx: s.h.sentBy(d.slot)}
		p.packet.From, p.packet.Device = policy.FromContainer, s.h.links[d.slot]
		p.packet.Gateway = bytes.Equal(sender, bridgeMAC(places[d.slot].network))
		return p, macOf(d.slot), sender
	case d.onLo:
		p = sent{program: "from_host", hook: bpf.DatapathHookHOOK_HOST, ctx: skb{Ifindex: 1}}
		p.packet.From, p.packet.Device = policy.FromHost, 1
		return p, zeroMAC, zeroMAC
	}
	device := pick(s.d, s.h.up, s.h.up, s.h.up1)
	p = sent{program: "from_uplink", hook: bpf.DatapathHookHOOK_UPLINK, ctx: skb{Ifindex: uint32(device)}}
	p.packet.From, p.packet.Device = policy.FromUplink, device
	return p, outsideMAC, s.macOfUplink(device)
}

// reply answers a packet from where it arrived.
func (s *sequence) reply(d delivery) sent {
	p, smac, dmac := s.back(d)
	_, t := tupleOf(d.out)
	p.packet.Proto, p.packet.Tuple = d.proto, t.Inverse()
	if d.proto == policy.TCP {
		p.flags = pick(s.d, "SA", "A", "A", "A", "FA", "R", "S")
		p.packet.Reset, p.packet.Answer = p.flags == "R", p.flags == "SA"
	}
	s.build(&p, smac, dmac)
	return p
}

// tupleOf reads a frame without IP options and extension headers.
func tupleOf(frame []byte) (policy.Proto, policy.Tuple) {
	var src, dst netip.Addr
	proto, l4 := policy.Proto(frame[23]), 34
	if frame[14]>>4 == 6 {
		proto, l4 = policy.Proto(frame[20]), 54
		src, dst = netip.AddrFrom16([16]byte(frame[22:38])), netip.AddrFrom16([16]byte(frame[38:54]))
	} else {
		src, dst = netip.AddrFrom4([4]byte(frame[26:30])), netip.AddrFrom4([4]byte(frame[30:34]))
	}
	one, two := binary.BigEndian.Uint16(frame[l4:]), binary.BigEndian.Uint16(frame[l4+2:])
	switch proto {
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		id := binary.BigEndian.Uint16(frame[l4+4:])
		if frame[l4] == 8 || frame[l4] == 128 {
			one, two = id, 0
		} else {
			one, two = 0, id
		}
	}
	return proto, policy.Tuple{Src: at(src, one), Dst: at(dst, two)}
}

func hopLimit(frame []byte) byte {
	if frame[14]>>4 == 6 {
		return frame[21]
	}
	return frame[22]
}

// expect is the model's word on a packet, before the data path has seen it.
func (s *sequence) expect(p sent) want {
	key := flowKey{p.hook, p.packet.Proto, p.packet.Tuple}
	f, dir := s.m.flows[key], 0
	if f != nil && f.keys[0] != key {
		dir = 1
	}
	if p.hook != bpf.DatapathHookHOOK_CONTAINER {
		return s.expectFromUplink(p, f, dir)
	}
	if f == nil && strings.ContainsAny(p.flags, "AR") {
		f, dir = s.m.waiting[key], 1
	}
	w := s.expectFromContainer(p, f, dir)
	if f != nil && w.flow == f && f == s.m.waiting[key] && !p.packet.Reset {
		f.answered = true
	}
	return w
}

func (s *sequence) expectFromContainer(p sent, f *modelFlow, dir int) want {
	t := s.m.tables
	v := t.Explain(s.m.host, p.packet)
	if f != nil && f.renewed[dir] == s.m.generation {
		if owner, ok := t.Endpoints[f.slots[dir]]; ok && owner.Ifindex == p.packet.Device {
			return s.along(p, f, dir)
		}
	}
	if v.Early {
		return s.fresh(p, v)
	}
	if f != nil {
		me := t.Endpoints[t.Links[p.packet.Device]]
		owner, ok := t.Endpoints[f.slots[dir]]
		if ok && owner.Sandbox == me.Sandbox {
			if f.renewed[dir] == s.m.generation {
				return s.along(p, f, dir)
			}
			keep, reason := s.renewed(p, f, dir)
			if keep {
				f.renewed[dir] = s.m.generation
				return s.along(p, f, dir)
			}
			s.m.forget(f)
			if reason != "" {
				return s.dropped(p, reason)
			}
		} else {
			s.m.forget(f)
		}
	}
	return s.fresh(p, v)
}

// renewed says whether a flow may go on after a change, or why not.
func (s *sequence) renewed(p sent, f *modelFlow, dir int) (keep bool, reason string) {
	t := s.m.tables
	if f.onesided {
		return false, ""
	}
	opener := f.opener
	opener.Reset = false
	if opener.From == policy.FromUplink { // whichever way and mark it came by, as long as there is one
		opener.Device, opener.Mark = 0, s.m.host.AcceptMark
	}
	v := t.Explain(s.m.host, opener)
	translated := f.keys[0].tuple != f.keys[1].tuple.Inverse()
	if f.verdict.Port != 0 && translated {
		if dir == 1 && livePorts(t)[f.verdict.Port] {
			return true, ""
		} else if dir == 1 {
			return false, "stale_flow"
		}
		return v.Port == f.verdict.Port && v.Endpoint == f.verdict.Endpoint, ""
	}
	if peer := f.slots[1-dir]; peer != 0 && t.Endpoints[peer].Ifindex != f.devices[dir] {
		return false, ""
	}
	if v.Path == policy.PathNone {
		return false, v.Reason
	}
	return true, ""
}

func (s *sequence) expectFromUplink(p sent, f *modelFlow, dir int) want {
	t := s.m.tables
	question := p.packet
	if f != nil {
		if f.renewed[dir] == s.m.generation {
			return s.along(p, f, dir)
		}
		if dir == 1 {
			if t.Endpoints[f.slots[0]].Ifindex != f.devices[1] {
				s.m.forget(f)
				return s.dropped(p, "stale_flow")
			}
			f.renewed[1] = s.m.generation
			return s.along(p, f, dir)
		}
		question.Reset = false
		if f.keys[0].tuple == f.keys[1].tuple.Inverse() {
			question.Mark = s.m.host.AcceptMark
		}
	}
	world := p.hook == bpf.DatapathHookHOOK_UPLINK && p.packet.Proto == policy.TCP
	question.Reset = question.Reset && !world
	v := t.Explain(s.m.host, question)
	if f != nil {
		if v.Path == policy.PathContainer && v.Endpoint == f.verdict.Endpoint && v.Port == f.verdict.Port && v.To == f.verdict.To && v.SNAT == f.verdict.SNAT {
			f.renewed[0] = s.m.generation
			return s.along(p, f, dir)
		}
		s.m.forget(f)
		if v.Path == policy.PathContainer && p.packet.Reset {
			return s.dropped(p, "no_flow")
		}
	}
	if world && v.Path == policy.PathContainer {
		return s.wait(p, v)
	}
	return s.fresh(p, v)
}

// wait is TCP from the world that belongs to no flow: it waits until the client acknowledges what the container sent.
func (s *sequence) wait(p sent, v policy.Verdict) want {
	key := flowKey{bpf.DatapathHookHOOK_CONTAINER, policy.TCP, policy.Tuple{Src: v.To, Dst: p.packet.Tuple.Src}}
	f := s.m.waiting[key]
	if f != nil && f.keys[0].tuple.Dst != p.packet.Tuple.Dst {
		f = nil
	}
	switch {
	case f != nil && f.answered && (p.flags == "A" || p.flags == "FA"):
		delete(s.m.waiting, key)
		return s.fresh(p, v)
	case f == nil && p.packet.Reset:
		return s.dropped(p, "no_flow")
	case f == nil && s.m.flows[key] != nil:
		return s.fresh(p, v)
	case f == nil || f.renewed[1] != s.m.generation:
		f = s.newFlow(p, v, key)
		s.m.waiting[key] = f
	}
	return want{action: actRedirect, count: "fate container uplink", tuple: key.tuple.Inverse(), routed: true, flow: f, waits: true}
}

// along is a packet of a flow that stands.
func (s *sequence) along(p sent, f *modelFlow, dir int) want {
	if f.onesided {
		w := s.passed(p, "stack")
		w.flow = f
		return w
	}
	w := want{action: actRedirect, tuple: f.keys[1-dir].tuple.Inverse(), flow: f, dir: dir, routed: f.verdict.Routed}
	to := f.keys[1-dir].hook
	if to == bpf.DatapathHookHOOK_CONTAINER {
		if row, ok := s.m.tables.Endpoints[f.slots[1-dir]]; !ok || row.Ifindex != f.devices[dir] {
			return s.dropped(p, "stale_flow")
		}
	}
	fate := map[bpf.DatapathHook]string{
		bpf.DatapathHookHOOK_CONTAINER: "container", bpf.DatapathHookHOOK_UPLINK: "uplink", bpf.DatapathHookHOOK_HOST: "lo",
	}[to]
	w.count = "fate " + fate + " " + hookName(p.hook)
	return w
}

// fresh is a packet that belongs to no flow.
func (s *sequence) fresh(p sent, v policy.Verdict) want {
	switch v.Path {
	case policy.PathNone:
		return s.dropped(p, v.Reason)
	case policy.PathBridge:
		return s.passed(p, "bridge")
	case policy.PathHost:
		return s.passed(p, "")
	case policy.PathStack:
		w := s.passed(p, "stack")
		if _, own := s.m.tables.HostAddrs[p.packet.Tuple.Dst.Addr()]; own && p.hook == bpf.DatapathHookHOOK_CONTAINER {
			w.flow, w.opens = &modelFlow{
				opener: p.packet, verdict: v, onesided: true, slots: [2]uint16{s.m.tables.Links[p.packet.Device]},
				keys: [2]flowKey{{p.hook, p.packet.Proto, p.packet.Tuple}}, renewed: [2]uint32{s.m.generation, s.m.generation},
			}, true
		}
		return w
	}
	out := policy.Tuple{Src: p.packet.Tuple.Src, Dst: v.To}
	to, fate := bpf.DatapathHook(bpf.DatapathHookHOOK_CONTAINER), "container"
	if v.Path == policy.PathUplink {
		to, fate = bpf.DatapathHookHOOK_UPLINK, "uplink"
	}
	if v.SNAT {
		source := v.Source
		if !source.IsValid() {
			f := families[0]
			if v.To.Addr().Is6() {
				f = families[1]
			}
			source = f.host
		}
		out.Src = at(source, out.Src.Port())
	}
	w := want{action: actRedirect, count: "fate " + fate + " " + hookName(p.hook), tuple: out, routed: v.Routed, opens: true}
	f := s.newFlow(p, v, flowKey{to, p.packet.Proto, out.Inverse()})
	w.flow = f
	ports := p.packet.Proto == policy.TCP || p.packet.Proto == policy.UDP
	echo := (p.packet.Proto == unix.IPPROTO_ICMP || p.packet.Proto == unix.IPPROTO_ICMPV6) && p.packet.Tuple.Src.Port() != 0
	held := s.m.flows[f.keys[1]]
	held2 := held != nil && held != f
	switch {
	case v.SNAT && (ports || echo):
		w.fresh = true
	case held2 && (held.over || held.idle > 0):
		w.fresh, w.either = ports, true
	case held2 && v.SNAT:
		return s.dropped(p, "snat_exhausted")
	case held2 && !ports:
		return s.dropped(p, "flow_collision")
	case held2:
		w.fresh = true
	}
	return w
}

// newFlow is the flow that a packet opens, with the key of its answers.
func (s *sequence) newFlow(p sent, v policy.Verdict, answers flowKey) *modelFlow {
	f := &modelFlow{
		opener: p.packet, verdict: v, renewed: [2]uint32{s.m.generation, s.m.generation},
		keys:  [2]flowKey{{p.hook, p.packet.Proto, p.packet.Tuple}, answers},
		slots: [2]uint16{0, v.Endpoint}, devices: [2]int{s.m.tables.Endpoints[v.Endpoint].Ifindex},
	}
	if p.hook == bpf.DatapathHookHOOK_CONTAINER {
		f.slots[0] = s.m.tables.Links[p.packet.Device]
		f.devices[1] = p.packet.Device
	}
	return f
}

// judge has the data path judge a packet and compares. It reports whether the packet goes on, and what counted it.
func (s *sequence) judge(p sent, w want) (r result, got string, on bool) {
	h := s.h
	s.counts.packets++
	r = h.run(p.program, p.frame, p.ctx)
	after := h.counters()
	moved := after.since(s.before)
	s.before = after
	for k, n := range moved {
		if n != 1 || got != "" {
			s.fail("one packet moved %v", moved)
		}
		got = k
	}
	feedback(r.action, got)
	s.counts.seen[got] = true
	if r.action != w.action || got != w.count {
		if w.either && (w.count == "" || r.action == actShot) {
			return r, got, false
		}
		s.fail("action %d %q, the model says %d %q\n%s\nby policy: %q", r.action, s.name(got), w.action, s.name(w.count), hex.Dump(p.frame),
			s.m.tables.Explain(s.m.host, p.packet).Steps)
	}
	if r.action == actShot {
		s.counts.dropped++
		return r, got, false
	}
	if err := unspoiled(p.frame, r.out); err != nil {
		s.fail("%v", err)
	}
	if r.action == actPass && !bytes.Equal(p.frame, r.out) {
		s.fail("changed on its way to %s\n%s%s", w.count, hex.Dump(p.frame), hex.Dump(r.out))
	}
	hops := byte(0)
	if w.routed && r.action == actRedirect {
		hops = 1
	}
	if hopLimit(r.out) != hopLimit(p.frame)-hops {
		s.fail("hop limit %d became %d, want %d less", hopLimit(p.frame), hopLimit(r.out), hops)
	}
	return r, got, true
}

// send has the data path judge a packet, compares, and notes what came of it.
func (s *sequence) send(p sent) {
	h := s.h
	s.say("%s dev %d: %s %s %s gateway %v mark %#x", p.program, p.packet.Device, p.packet.Proto, p.packet.Tuple, p.flags, p.packet.Gateway, p.ctx.Mark)
	w := s.expect(p)
	r, got, on := s.judge(p, w)
	if !on {
		return
	}
	if r.action == actPass {
		if w.flow != nil {
			s.travel(p, w)
		}
		return
	}
	_, out := tupleOf(r.out)
	s.counts.forwarded++
	s.translated(p, w, out)
	f := w.flow
	if !w.opens && f.opener.Proto == p.packet.Proto && w.dir == 1 {
		s.counts.trips++
		if out != f.keys[0].tuple.Inverse() {
			s.fail("%s answers %s but arrives as %s", p.packet.Tuple, f.keys[0].tuple, out)
		}
	}
	s.travel(p, w)
	d := delivery{out: r.out, proto: p.packet.Proto, onLo: strings.HasPrefix(got, "fate lo")}
	if slot := f.slots[1-w.dir]; slot != 0 {
		for place, index := range h.links {
			if index == s.m.tables.Endpoints[slot].Ifindex {
				d.slot = place
			}
		}
	}
	s.last = append(s.last, d)
	if len(s.last) > 8 {
		s.last = s.last[1:]
	}
}

func (s *sequence) name(count string) string {
	var n int
	if _, err := fmt.Sscanf(count, "drop %d", &n); err == nil {
		return count + " (" + maps.Reasons()[n] + ")"
	}
	return count
}

// translated compares the tuple that a packet left with, and learns what the model could not know.
func (s *sequence) translated(p sent, w want, out policy.Tuple) {
	f := w.flow
	if !w.fresh || w.either && out == w.tuple {
		if out != w.tuple {
			s.fail("left as %s, the model says %s", out, w.tuple)
		}
		if w.opens {
			if held := s.m.flows[f.keys[1]]; held != nil {
				s.m.forget(held)
			}
		}
		return
	}
	if out.Dst != w.tuple.Dst || out.Src.Addr() != w.tuple.Src.Addr() {
		s.fail("left as %s, the model says %s from some port", out, w.tuple)
	}
	f.keys[1].tuple = out.Inverse()
	if held := s.m.flows[f.keys[1]]; held != nil {
		if !held.over && held.idle == 0 {
			s.fail("left as %s, which is another flow's: %+v", out, held.keys)
		}
		s.m.forget(held)
	}
	port := int(out.Src.Port())
	switch in := port >= snatFirst && port < snatFirst+snatCount && port != snatHole || port >= snatFirst2 && port < snatFirst2+snatCount2; {
	case w.flow.verdict.Path == policy.PathUplink && p.packet.Proto <= policy.UDP && p.packet.Proto != unix.IPPROTO_ICMP && !in:
		s.fail("%d is no port for masquerading", port)
	case port == 0:
		s.fail("left from port 0")
	}
}

// travel notes that a packet has gone along its flow.
func (s *sequence) travel(p sent, w want) {
	f := w.flow
	if w.waits || f == s.m.waiting[f.keys[1]] {
		return
	}
	if w.opens {
		if old := s.m.flows[f.keys[0]]; old != nil {
			s.m.forget(old)
		}
		s.m.flows[f.keys[0]] = f
		if !f.onesided {
			s.m.flows[f.keys[1]] = f
		}
	}
	f.idle = 0
	f.over = f.over || strings.ContainsAny(p.flags, "FR")
}

// newWriter writes the maps of the host as the daemon does.
func newWriter(h *host) *maps.Writer {
	h.t.Helper()
	writer, err := maps.NewWriter(maps.Use(h.coll.Maps))
	require.NoError(h.t, err)
	writer.Bury = func(maps.Gone) error {
		h.sweepUntilDone("purge")
		return nil
	}
	return writer
}

// runSequence plays bytes as packets and changes.
func runSequence(h *host, writer *maps.Writer, data []byte, counts *sequenceCounts) {
	d := &dice{data: data}
	s := &sequence{
		h: h, writer: writer, d: d, w: newWorld(d), data: data, counts: counts,
		m: &model{flows: make(map[flowKey]*modelFlow), waiting: make(map[flowKey]*modelFlow)},
	}
	s.apply()
	h.reset()
	s.before = h.counters()
	for len(d.data) > 0 {
		s.step()
	}
	s.compareTables()
}

// compareTables holds the two flow tables against each other, and the gauge.
func (s *sequence) compareTables() {
	entries := [2]int64{}
	for k := range s.m.flows {
		if k.tuple.Src.Addr().Is4() {
			entries[0]++
		} else {
			entries[1]++
		}
	}
	have := [2]int64{int64(s.h.entries(families[0])), int64(s.h.entries(families[1]))}
	if have != entries || s.h.gauge() != entries {
		s.fail("%d entries, gauge %d, the model says %d", have, s.h.gauge(), entries)
	}
}

func newSequenceCounts() *sequenceCounts { return &sequenceCounts{seen: make(map[string]bool)} }

// FuzzSequence: see sequence.
func FuzzSequence(f *testing.F) {
	h := newHost(f, 4096)
	writer, counts := newWriter(h), newSequenceCounts()
	f.Fuzz(func(t *testing.T, data []byte) {
		h.t = t
		runSequence(h, writer, data[:min(len(data), 4096)], counts)
	})
}

// Whatever is sent and whatever changes meanwhile, each packet goes where the model says.
func TestSequences(t *testing.T) {
	h := newHost(t, 4096)
	writer, counts := newWriter(h), newSequenceCounts()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	// An emulated machine plays few in that time.
	all := func() bool { return counts.trips > 0 && counts.errors > 0 && counts.fragments > 0 }
	end := time.Now().Add(fuzzTime())
	for played := 0; time.Now().Before(end) || !all() && played < 1000; played++ {
		data := make([]byte, 200+random.IntN(1200))
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		runSequence(h, writer, data, counts)
	}
	require.NotZero(t, counts.trips)
	require.NotZero(t, counts.errors)
	require.NotZero(t, counts.fragments)
	promise.Kept(t, promise.Model, "Each packet goes where the model of the policy and of its flows says, whatever changes meanwhile, and answers come back as what was sent.",
		"%d packets of random sequences with %d changes of state: %d forwarded, %d of them back along their flow, %d dropped, none against the model",
		counts.packets, counts.changes, counts.forwarded, counts.trips, counts.dropped)
}
