// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	stdmaps "maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/policy"
)

// PortRange is a range of ports for masquerading.
type PortRange struct {
	First uint16
	Count int
}

// Timeouts are idle times in ticks of 2^30 ns.
type Timeouts struct {
	TCPSyn, TCPEstablished, TCPFin, TCPClosed, UDPNew, UDP, ICMP, Other uint32
}

// Settings is the daemon's part of the config map.
type Settings struct {
	NetnsCookie   uint64
	DropTransit4  bool // what the host forwards for others
	DropTransit6  bool
	DirectRouting bool
	// AcceptMark lets a packet with this mark, under AcceptMask, reach every port. Without a mask: none.
	AcceptMark, AcceptMask uint32
	SNAT                   []PortRange         // at most two
	Reserved               map[uint16]struct{} // within SNAT: not to be used
	HashSeed               uint32
	ReservationWait        uint32 // ticks
	Timeouts               Timeouts
	EndpointFlows          int // that one endpoint may have; 0: any
}

// realised is what the maps hold, in the data path's own shapes.
type realised struct {
	networks  map[uint32]bpf.DatapathNetwork
	slots     map[uint32]bpf.DatapathEndpoint
	portSlots map[uint32]bpf.DatapathPortSlot
	addrs     map[bpf.DatapathAddr]uint32
	links     map[uint32]uint32
	subnets   map[bpf.DatapathSubnetKey]uint32
	hostAddrs map[bpf.DatapathAddr]bpf.DatapathHostAddr
	pairs     map[bpf.DatapathPair]uint8
	ports     map[bpf.DatapathPortKey]bpf.DatapathPort
	sources   map[bpf.DatapathSourceKey]uint8
	masq      map[uint32]bpf.DatapathMasqueradeAddr
	open      map[bpf.DatapathOpenKey]uint32
	trusted   map[bpf.DatapathTrustedKey]uint8
}

// Writer brings the maps to the desired tables. It is the maps' only writer and not safe for
// concurrent use.
type Writer struct {
	m          *Maps
	class      *ebpf.Memory
	have       *realised
	settings   Settings
	generation uint32
	seed       uint32
	classBytes []byte              // ports and subnets as written
	classWant  []byte              // of writeClass alone
	held       map[uint16]struct{} // ports of adopted flows
	changed    bool                // what flows are to be judged by again
	holdUntil  uint32              // ticks

	// Former are settings in the shapes of other versions, whose programs may still be attached: what is written
	// is written there too, as far as they go. Optional.
	Former []*ebpf.Map

	// Bury is called by Apply when endpoints or published ports are gone, after they have been taken out
	// of the maps and before anything new is written: what it ends cannot be a successor's. Nothing new
	// is written before it has succeeded. Optional.
	Bury func(Gone) error
	gone Gone // not buried yet
}

// Gone is what the maps no longer hold.
type Gone struct {
	Any   bool         // flows must be purged
	Addrs []netip.Addr // of endpoints
	Ports []GonePort   // that lead elsewhere now, or nowhere
}

// GonePort is where a published port led.
type GonePort struct {
	policy.PortKey
	Target netip.AddrPort
}

// NewWriter reads what the maps hold; it changes nothing.
func NewWriter(m *Maps) (*Writer, error) {
	w := &Writer{m: m}
	mem, err := m.m["port_class"].Memory()
	if err != nil {
		return nil, fmt.Errorf("map port_class into memory: %w", err)
	}
	w.class = mem
	var cfg bpf.DatapathConfig
	if err := m.m["config"].Lookup(uint32(0), &cfg); err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	w.generation, w.seed = cfg.Generation, cfg.HashSeed
	if err := w.readHeld(); err != nil {
		return nil, err
	}
	return w, w.Resync()
}

// Resync reads back what the maps hold, so that the next Apply mends what anything else changed.
func (w *Writer) Resync() error {
	h := &realised{}
	var err error
	if h.networks, err = readArray[bpf.DatapathNetwork](w.m.m["network_slots"]); err != nil {
		return err
	}
	if h.slots, err = readArray[bpf.DatapathEndpoint](w.m.m["endpoint_slots"]); err != nil {
		return err
	}
	if h.portSlots, err = readArray[bpf.DatapathPortSlot](w.m.m["port_slots"]); err != nil {
		return err
	}
	if err := errors.Join(
		readHash(w.m.m["endpoints"], &h.addrs), readHash(w.m.m["links"], &h.links),
		readHash(w.m.m["subnets"], &h.subnets), readHash(w.m.m["host_addrs"], &h.hostAddrs),
		readHash(w.m.m["pairs"], &h.pairs), readHash(w.m.m["ports"], &h.ports),
		readHash(w.m.m["allowed_sources"], &h.sources), readHash(w.m.m["masquerade_addrs"], &h.masq),
		readHash(w.m.m["open_ports"], &h.open), readHash(w.m.m["trusted"], &h.trusted),
	); err != nil {
		return err
	}
	w.have = h
	w.classBytes = nil
	return nil
}

// readArray reads the elements of an array that are not zero.
func readArray[V comparable](m *ebpf.Map) (map[uint32]V, error) {
	keys := make([]uint32, m.MaxEntries())
	values := make([]V, m.MaxEntries())
	var cursor ebpf.MapBatchCursor
	n, err := m.BatchLookup(&cursor, keys, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("read %s: %w", m, err)
	}
	var zero V
	out := make(map[uint32]V)
	for i := range n {
		if values[i] != zero {
			out[keys[i]] = values[i]
		}
	}
	return out, nil
}

func readHash[K, V comparable](m *ebpf.Map, into *map[K]V) error {
	out := make(map[K]V)
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		out[k] = v
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read %s: %w", m, err)
	}
	*into = out
	return nil
}

func desired(t policy.Tables) *realised {
	d := &realised{
		networks:  make(map[uint32]bpf.DatapathNetwork),
		slots:     make(map[uint32]bpf.DatapathEndpoint, len(t.Endpoints)),
		portSlots: make(map[uint32]bpf.DatapathPortSlot),
		addrs:     make(map[bpf.DatapathAddr]uint32, len(t.Addrs)),
		links:     make(map[uint32]uint32, len(t.Links)),
		subnets:   make(map[bpf.DatapathSubnetKey]uint32),
		hostAddrs: make(map[bpf.DatapathAddr]bpf.DatapathHostAddr),
		pairs:     make(map[bpf.DatapathPair]uint8),
		ports:     make(map[bpf.DatapathPortKey]bpf.DatapathPort, len(t.Ports)),
		sources:   make(map[bpf.DatapathSourceKey]uint8),
		masq:      make(map[uint32]bpf.DatapathMasqueradeAddr),
		open:      make(map[bpf.DatapathOpenKey]uint32),
		trusted:   make(map[bpf.DatapathTrustedKey]uint8),
	}
	for slot, n := range t.Networks {
		d.networks[uint32(slot)] = networkValue(n)
	}
	for slot, e := range t.Endpoints {
		d.slots[uint32(slot)] = endpointValue(e)
	}
	for a, slot := range t.Addrs {
		d.addrs[addr(a)] = uint32(slot)
	}
	for ifindex, slot := range t.Links {
		d.links[uint32(ifindex)] = uint32(slot)
	}
	for p, slot := range t.Subnets {
		d.subnets[bpf.DatapathSubnetKey{Prefixlen: mappedBits(p), Addr: addr(p.Addr())}] = uint32(slot)
	}
	for a, ifindex := range t.HostAddrs {
		d.hostAddrs[addr(a)] = bpf.DatapathHostAddr{Ifindex: uint32(ifindex)}
	}
	for p := range t.Pairs {
		d.pairs[bpf.DatapathPair{A: p[0], B: p[1]}] = 1
	}
	for _, ports := range []map[policy.PortKey]policy.PortRow{t.Closed, t.Ports} {
		for k, p := range ports {
			d.ports[portKey(k)] = portValue(p)
			d.portSlots[uint32(p.Slot)] = bpf.DatapathPortSlot{Live: 1}
		}
	}
	for k, slot := range t.Open {
		d.open[openKey(k)] = uint32(slot)
		if slot != 0 {
			d.portSlots[uint32(slot)] = bpf.DatapathPortSlot{Live: 1}
		}
	}
	for k := range t.Trusted {
		d.trusted[bpf.DatapathTrustedKey{Ifindex: uint32(k.Ifindex), Net: uint32(k.Network)}] = 1
	}
	for ifindex, m := range t.Masquerade {
		d.masq[uint32(ifindex)] = bpf.DatapathMasqueradeAddr{Addr4: addr4(m.Addr4), Addr6: addr6(m.Addr6)}
	}
	for s := range t.Sources {
		d.sources[bpf.DatapathSourceKey{
			Prefixlen: 32 + mappedBits(s.Prefix), Endpoint: uint32(s.Endpoint), Addr: addr(s.Prefix.Addr()),
		}] = 1
	}
	return d
}

// Result says what an Apply did.
type Result struct {
	Changed int  // entries of the tables written or deleted; the config is not counted
	Removed bool // an endpoint or a published port went, or became another
}

// Apply brings the maps to the tables and settings. What is new is added from the general to the
// specific (an endpoint's row before the link that makes it speak, that before the port that leads
// to it), and what is gone goes the other way, so that no entry ever leads to nothing. It is
// idempotent and goes on after an error.
func (w *Writer) Apply(t policy.Tables, s Settings) (Result, error) {
	want := desired(t)
	var res Result
	var errs []error
	do := func(n int, err error) {
		res.Changed += n
		errs = append(errs, err)
	}
	m := w.m.m

	// Away with what is gone, the most specific first.
	w.note(want)
	do(remove(m["ports"], w.have.ports, want.ports))
	do(remove(m["open_ports"], w.have.open, want.open))
	do(remove(m["trusted"], w.have.trusted, want.trusted))
	removedPorts, err := zero(m["port_slots"], w.have.portSlots, want.portSlots, same)
	do(removedPorts, err)
	do(remove(m["allowed_sources"], w.have.sources, want.sources))
	do(remove(m["pairs"], w.have.pairs, want.pairs))
	do(remove(m["links"], w.have.links, want.links))
	removedSlots, err := zero(m["endpoint_slots"], w.have.slots, want.slots, sameEndpoint)
	do(removedSlots, err)
	do(remove(m["endpoints"], w.have.addrs, want.addrs))
	do(remove(m["masquerade_addrs"], w.have.masq, want.masq))
	do(remove(m["host_addrs"], w.have.hostAddrs, want.hostAddrs))
	res.Removed = removedPorts > 0 || removedSlots > 0
	w.changed = w.changed || res.Changed > 0
	if w.gone.Any = w.gone.Any || res.Removed; w.gone.Any && w.Bury != nil {
		if err := w.Bury(w.gone); err != nil {
			return res, errors.Join(append(errs, err)...)
		}
	}
	w.gone = Gone{}

	// What is new, the most general first. Subnets are guarded before anybody lives in them.
	do(put(m["network_slots"], w.have.networks, want.networks))
	do(put(m["subnets"], w.have.subnets, want.subnets))
	do(w.writeClass(t, s))
	do(put(m["masquerade_addrs"], w.have.masq, want.masq))
	do(put(m["host_addrs"], w.have.hostAddrs, want.hostAddrs))
	do(put(m["endpoints"], w.have.addrs, want.addrs))
	do(put(m["allowed_sources"], w.have.sources, want.sources))
	do(put(m["pairs"], w.have.pairs, want.pairs))
	// Who takes a slot up does not take over what an earlier owner has counted.
	errs = append(errs,
		restart[bpf.DatapathEndpointCount](m["endpoint_stats"], w.have.slots, want.slots),
		restart[bpf.DatapathPortCount](m["port_stats"], w.have.portSlots, want.portSlots))
	do(put(m["endpoint_slots"], w.have.slots, want.slots))
	do(put(m["links"], w.have.links, want.links))
	do(put(m["port_slots"], w.have.portSlots, want.portSlots))
	do(put(m["ports"], w.have.ports, want.ports))
	do(put(m["trusted"], w.have.trusted, want.trusted))
	do(put(m["open_ports"], w.have.open, want.open))

	do(remove(m["subnets"], w.have.subnets, want.subnets))
	do(zero(m["network_slots"], w.have.networks, want.networks, same))
	w.changed = w.changed || res.Changed > 0
	err = w.writeConfig(s, w.changed)
	w.changed = err != nil && w.changed
	return res, errors.Join(append(errs, err)...)
}

func remove[K, V comparable](m *ebpf.Map, have, want map[K]V) (int, error) {
	n := 0
	var errs []error
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("delete from %s: %w", m, err))
			continue
		}
		delete(have, k)
		n++
	}
	return n, errors.Join(errs...)
}

// sameEndpoint reports whether a row is still about the same interface and addresses: to the flows of
// the old one, an endpoint that has others is as good as gone.
func sameEndpoint(have, want bpf.DatapathEndpoint) bool {
	var none bpf.DatapathAddr
	return have.Ifindex == want.Ifindex && (have.Addr4 == 0 || have.Addr4 == want.Addr4) &&
		(have.Addr6 == none || have.Addr6 == want.Addr6)
}

// note remembers what is about to go.
func (w *Writer) note(want *realised) {
	for slot, h := range w.have.slots {
		if v, ok := want.slots[slot]; ok && sameEndpoint(h, v) {
			continue
		}
		if a := fromAddr4(h.Addr4); a.IsValid() {
			w.gone.Addrs = append(w.gone.Addrs, a)
		}
		if h.Addr6 != (bpf.DatapathAddr{}) {
			w.gone.Addrs = append(w.gone.Addrs, fromAddr(h.Addr6))
		}
	}
	for k, h := range w.have.ports {
		if v, ok := want.ports[k]; !ok || v != h {
			w.gone.Ports = append(w.gone.Ports, GonePort{PortKey: fromPortKey(k), Target: addrPort(h.Addr, h.Port)})
		}
	}
}

func same[V any](V, V) bool { return true }

// zero is remove for arrays. An element that is no longer the same goes too, to be written anew.
func zero[V comparable](m *ebpf.Map, have, want map[uint32]V, same func(have, want V) bool) (int, error) {
	n := 0
	var errs []error
	var none V
	for k, h := range have {
		if v, ok := want[k]; ok && same(h, v) {
			continue
		}
		if err := m.Put(k, none); err != nil {
			errs = append(errs, fmt.Errorf("clear %s: %w", m, err))
			continue
		}
		delete(have, k)
		n++
	}
	return n, errors.Join(errs...)
}

// restart sets the counters of the slots that are about to be taken up to zero, on every CPU.
func restart[C any, V comparable](m *ebpf.Map, have, want map[uint32]V) error {
	var errs []error
	for slot := range want {
		if _, ok := have[slot]; ok {
			continue
		}
		if err := m.Put(slot, make([]C, ebpf.MustPossibleCPU())); err != nil {
			errs = append(errs, fmt.Errorf("restart %s: %w", m, err))
		}
	}
	return errors.Join(errs...)
}

func put[K, V comparable](m *ebpf.Map, have, want map[K]V) (int, error) {
	n := 0
	var errs []error
	for k, v := range want {
		if h, ok := have[k]; ok && h == v {
			continue
		}
		if err := m.Put(k, v); err != nil {
			errs = append(errs, fmt.Errorf("write %s: %w", m, err))
			continue
		}
		have[k] = v
		n++
	}
	return n, errors.Join(errs...)
}

// Offsets within struct port_class.
const (
	classPorts   = 0
	classSubnets = 2 * 65536
	classSize    = classSubnets + 8192
)

// writeClass writes the bytes of port_class that changed, through memory: the engine's part belongs
// to the programs.
func (w *Writer) writeClass(t policy.Tables, s Settings) (int, error) {
	if w.classWant == nil {
		w.classWant = make([]byte, classSize)
	}
	want := w.classWant
	clear(want)
	for _, r := range s.SNAT {
		for i := range r.Count {
			port := r.First + uint16(i)
			if _, reserved := s.Reserved[port]; !reserved {
				want[classPorts+int(port)] = byte(bpf.DatapathPortBitsPORT_SNAT)
			}
		}
	}
	keys := slices.AppendSeq(slices.Collect(stdmaps.Keys(t.Ports)), stdmaps.Keys(t.Closed))
	for _, k := range keys {
		i := classPorts + int(k.Host.Port())
		want[i] &^= byte(bpf.DatapathPortBitsPORT_SNAT)
		switch k.Proto {
		case policy.TCP:
			want[i] |= byte(bpf.DatapathPortBitsPORT_TCP)
		case policy.UDP:
			want[i] |= byte(bpf.DatapathPortBitsPORT_UDP)
		case policy.SCTP:
			want[i] |= byte(bpf.DatapathPortBitsPORT_SCTP)
		}
	}
	for p := range w.held {
		want[classPorts+int(p)] |= byte(bpf.DatapathPortBitsPORT_HELD)
	}
	// Answers to what a container sends from further addresses of its own are looked up, too.
	local := stdmaps.Clone(t.Subnets)
	for src := range t.Sources {
		if n := t.Networks[t.Endpoints[src.Endpoint].Network]; !n.Masquerades(src.Prefix.Addr().Is4()) {
			local[src.Prefix] = 0
		}
	}
	for p := range local {
		bits, all := subnetBits(p)
		if all {
			for i := classSubnets; i < classSize; i++ {
				want[i] = 0xff
			}
		}
		for _, b := range bits {
			want[classSubnets+int(b>>3)] |= 1 << (b & 7)
		}
	}
	if w.classBytes == nil {
		have := make([]byte, classSize)
		if _, err := w.class.ReadAt(have, 0); err != nil {
			return 0, fmt.Errorf("read port_class: %w", err)
		}
		w.classBytes = have
	}
	if bytes.Equal(want[:65536], w.classBytes[:65536]) && bytes.Equal(want[classSubnets:], w.classBytes[classSubnets:]) {
		return 0, nil
	}
	n := 0
	for i := range want {
		if i >= 65536 && i < classSubnets || want[i] == w.classBytes[i] {
			continue
		}
		if _, err := w.class.WriteAt(want[i:i+1], int64(i)); err != nil {
			return n, fmt.Errorf("write port_class: %w", err)
		}
		w.classBytes[i] = want[i]
		n++
	}
	return n, nil
}

// HashSeed is the seed in use, 0 before the first Apply. Kept, one internal socket keeps its outer
// port over a restart.
func (w *Writer) HashSeed() uint32 { return w.seed }

// Renew makes every flow be judged again by its next packet: routes or neighbours have changed.
func (w *Writer) Renew() error {
	return w.writeConfig(w.settings, true)
}

// holdTicks is how long the data path opens no flows if the daemon dies before it says otherwise: two seconds
// at least.
const holdTicks = 3

// Hold has the data path open no flows for a moment, or lets it again. Those that are open go on.
func (w *Writer) Hold(on bool) error {
	w.holdUntil = 0
	if on {
		w.holdUntil = monotonicTicks() + holdTicks
	}
	return w.writeConfig(w.settings, false)
}

func (w *Writer) writeConfig(s Settings, renew bool) error {
	if renew {
		w.generation++
	}
	w.settings = s
	cfg := bpf.DatapathConfig{
		NetnsCookie: s.NetnsCookie, Generation: w.generation, HashSeed: s.HashSeed,
		ReservationWait: s.ReservationWait, HoldUntil: w.holdUntil,
		MaxFlows: [2]uint32{w.m.m["flows4"].MaxEntries(), w.m.m["flows6"].MaxEntries()},
	}
	if s.DropTransit4 {
		cfg.Flags |= bpf.DatapathConfigFlagsCONFIG_DROP_TRANSIT4
	}
	if s.DropTransit6 {
		cfg.Flags |= bpf.DatapathConfigFlagsCONFIG_DROP_TRANSIT6
	}
	if s.DirectRouting {
		cfg.Flags |= bpf.DatapathConfigFlagsCONFIG_DIRECT_ROUTING
	}
	cfg.AcceptMark, cfg.AcceptMask = s.AcceptMark, s.AcceptMask
	cfg.EndpointFlows = uint32(s.EndpointFlows)
	for i, r := range s.SNAT[:min(len(s.SNAT), len(cfg.Snat))] {
		cfg.Snat[i].First, cfg.Snat[i].Count = r.First, uint32(r.Count)
	}
	t := s.Timeouts
	cfg.Timeouts.TcpSyn, cfg.Timeouts.TcpEstablished = t.TCPSyn, t.TCPEstablished
	cfg.Timeouts.TcpFin, cfg.Timeouts.TcpClosed = t.TCPFin, t.TCPClosed
	cfg.Timeouts.UdpNew, cfg.Timeouts.Udp = t.UDPNew, t.UDP
	cfg.Timeouts.Icmp, cfg.Timeouts.Other = t.ICMP, t.Other
	var have bpf.DatapathConfig
	if err := w.m.m["config"].Lookup(uint32(0), &have); err != nil {
		return fmt.Errorf("read config: %w", err)
	}
	// What decides over packets of flows that are open already has them judged again.
	if !renew && (have.Flags != cfg.Flags || have.AcceptMark != cfg.AcceptMark || have.AcceptMask != cfg.AcceptMask) {
		w.generation++
		cfg.Generation = w.generation
	}
	if have != cfg {
		if err := w.m.m["config"].Put(uint32(0), cfg); err != nil {
			return fmt.Errorf("write config: %w", err)
		}
	}
	return w.tellFormer(cfg)
}

// tellFormer writes the config for programs of other versions: fields are only ever added at its end.
func (w *Writer) tellFormer(cfg bpf.DatapathConfig) error {
	if len(w.Former) == 0 {
		return nil
	}
	now, err := binary.Append(nil, binary.NativeEndian, cfg)
	if err != nil {
		return fmt.Errorf("write config of another version: %w", err)
	}
	for _, m := range w.Former {
		value := make([]byte, m.ValueSize())
		if err := m.Lookup(uint32(0), value); err != nil {
			return fmt.Errorf("read config of another version: %w", err)
		}
		copy(value, now)
		if err := m.Put(uint32(0), value); err != nil {
			return fmt.Errorf("write config of another version: %w", err)
		}
	}
	return nil
}
