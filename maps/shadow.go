// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/bpfnet/bpfnet/bpf"
)

// readOnly are the maps that no program on a device writes: the daemon's tables, and what the sock programs keep.
var readOnly = []string{
	"config", "endpoint_slots", "network_slots", "port_slots", "endpoints", "links", "ports", "pairs", "open_ports", "trusted",
	"host_addrs", "masquerade_addrs", "subnets", "allowed_sources", "port_class", "reservations", "device_sockets",
}

// ReadOnly reports whether the map of that name is one that no program on a device writes.
func ReadOnly(name string) bool { return slices.Contains(readOnly, name) }

// ShadowEntries is how large the shadow of a map is to be that has so many entries.
func ShadowEntries(name string, entries uint32) uint32 {
	switch name {
	case "flows4", "flows6":
		return shadowFlows
	case "syns4", "syns6", "frags":
		return min(entries, 1024)
	case "endpoint_stats", "port_stats": // nobody looks at them
		return 1
	}
	return entries
}

// shadowFlows is more than a packet makes and looks at.
const shadowFlows = 128

// Shadow is what the data path keeps, flows and counters, for programs that are to be asked and not to act: maps that only
// these write. What they would find in the live ones is put into them.
type Shadow struct {
	own, live *Maps
	v4        shadowTables[bpf.DatapathFlow4Key, bpf.DatapathFlow4, bpf.DatapathSyn4]
	v6        shadowTables[bpf.DatapathFlow6Key, bpf.DatapathFlow6, bpf.DatapathSyn6]
	counted   map[Judged]uint64
	gauge     bpf.DatapathFlowGauge
	flows     []bpf.DatapathEndpointFlows
}

// Judged is what became of a packet, by the counter that it moved. The zero value: none did, and it was passed on.
type Judged struct {
	Reason string // of a drop
	Fate   string // where it was not dropped
	Hook   string
}

// Opened is a flow that a packet has opened. Slots are 0 for none.
type Opened struct {
	Endpoint, Peer uint16 // slots of who opened it, and of whom it reaches
	Port           uint16 // slot of the published port
	// How the packet leaves. An echo has its identifier as source port.
	Src, Dst netip.AddrPort
	SNAT     bool
	Ifindex  int  // of the device that it leaves by; 0: it is left to the stack, or Waits
	Waits    bool // until its client acknowledges what the container sends
}

// NewShadow makes the shadow of live in own, which has all maps by the live ones' names.
func NewShadow(own, live *Maps) *Shadow {
	s := &Shadow{own: own, live: live}
	s.v4.use(own, live, "flows4", "syns4")
	s.v6.use(own, live, "flows6", "syns6")
	s.v4.partner = func(k bpf.DatapathFlow4Key, f bpf.DatapathFlow4) (bpf.DatapathFlow4Key, bool) {
		out := f.F.Flags & bpf.DatapathFlowFlagsFLOW_OUT_MASK
		return bpf.DatapathFlow4Key{
			Saddr: f.Daddr, Daddr: f.Saddr, Sport: f.F.Dport, Dport: f.F.Sport, Proto: k.Proto, Hook: bpf.DatapathHook(out),
		}, out != 0
	}
	s.v6.partner = func(k bpf.DatapathFlow6Key, f bpf.DatapathFlow6) (bpf.DatapathFlow6Key, bool) {
		out := f.F.Flags & bpf.DatapathFlowFlagsFLOW_OUT_MASK
		return bpf.DatapathFlow6Key{
			Saddr: f.Daddr, Daddr: f.Saddr, Sport: f.F.Dport, Dport: f.F.Sport, Proto: k.Proto, Hook: uint8(out),
		}, out != 0
	}
	// No packet is of hook 0.
	s.v4.filler = func(n int) bpf.DatapathFlow4Key { return bpf.DatapathFlow4Key{Saddr: uint32(n)} }
	s.v6.filler = func(n int) bpf.DatapathFlow6Key {
		return bpf.DatapathFlow6Key{Saddr: bpf.DatapathAddr{W: [4]uint32{uint32(n)}}}
	}
	return s
}

// Begin forgets what runs have found in the live maps, and looks at these anew.
func (s *Shadow) Begin() error {
	s.v4.begin()
	s.v6.begin()
	if err := s.live.m["flow_gauge"].Lookup(uint32(0), &s.gauge); err != nil {
		return fmt.Errorf("read flow_gauge: %w", err)
	}
	c, err := s.live.config()
	if err != nil {
		return err
	}
	s.flows = nil
	if c.EndpointFlows == 0 {
		return nil
	}
	if s.flows, err = array[bpf.DatapathEndpointFlows](s.live.m["endpoint_flows"]); err != nil {
		return fmt.Errorf("read endpoint_flows: %w", err)
	}
	return nil
}

// Reset has the next run find the live flow tables, as far as runs since Begin have looked at them.
func (s *Shadow) Reset() error {
	if err := s.own.m["flow_gauge"].Put(uint32(0), s.gauge); err != nil {
		return fmt.Errorf("write the shadow of flow_gauge: %w", err)
	}
	if s.flows != nil {
		if err := setArray(s.own.m["endpoint_flows"], s.flows); err != nil {
			return fmt.Errorf("write the shadow of endpoint_flows: %w", err)
		}
	}
	return errors.Join(s.v4.reset(s.gauge.Entries[0]), s.v6.reset(s.gauge.Entries[1]))
}

// Fetch looks up in the live tables what the last run has put down, and reports whether it has met something there that it
// did not know: then it is to be run again, after Reset.
func (s *Shadow) Fetch() (more bool, err error) {
	more4, err4 := s.v4.fetch()
	more6, err6 := s.v6.fetch()
	return more4 || more6, errors.Join(err4, err6)
}

// Judged is what became of the one packet since the last call.
func (s *Shadow) Judged() (Judged, error) {
	now := make(map[Judged]uint64)
	err := errors.Join(
		s.count(s.own.m["drops"], func(kind int, hook string, n uint64) { now[Judged{Reason: reasonNames()[kind], Hook: hook}] = n }),
		s.count(s.own.m["fates"], func(kind int, hook string, n uint64) { now[Judged{Fate: fateNames()[kind], Hook: hook}] = n }),
	)
	if err != nil {
		return Judged{}, err
	}
	var out Judged
	for j, n := range now {
		if n == s.counted[j] {
			continue
		}
		if out != (Judged{}) {
			err = errors.New("one packet was counted twice")
		}
		out = j
	}
	s.counted = now
	return out, err
}

// count calls f for every counter that is not zero, in one system call for all of them.
func (s *Shadow) count(m *ebpf.Map, f func(kind int, hook string, packets uint64)) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	hooks := hookNames()
	hooks = hooks[:len(hooks)-1] // HOOK_COUNT
	keys := make([]uint32, m.MaxEntries())
	values := make([]bpf.DatapathCount, len(keys)*cpus)
	var cursor ebpf.MapBatchCursor
	got, err := m.BatchLookup(&cursor, keys, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("read %s: %w", m, err)
	}
	for i, key := range keys[:got] {
		if packets, _ := sum(values[i*cpus : (i+1)*cpus]); packets != 0 {
			f(int(key)/len(hooks), hooks[int(key)%len(hooks)], packets)
		}
	}
	return nil
}

// Opened is the flow that the last run has opened; false: none.
func (s *Shadow) Opened() (out Opened, found bool, err error) {
	err4 := s.v4.opened(func(k bpf.DatapathFlow4Key, f bpf.DatapathFlow4, waits bool) {
		if out.from(f.F.Endpoint, f.F.Peer, f.F.Port, f.F.Flags, f.F.Ifindex, waits) {
			found = true
			out.Src, out.Dst = pair4(f.Saddr, f.F.Sport), pair4(f.Daddr, f.F.Dport)
			if waits { // the answers' half
				out.Src, out.Dst = pair4(k.Daddr, k.Dport), pair4(k.Saddr, k.Sport)
			}
		}
	})
	err6 := s.v6.opened(func(k bpf.DatapathFlow6Key, f bpf.DatapathFlow6, waits bool) {
		if out.from(f.F.Endpoint, f.F.Peer, f.F.Port, f.F.Flags, f.F.Ifindex, waits) {
			found = true
			out.Src, out.Dst = addrPort(f.Saddr, f.F.Sport), addrPort(f.Daddr, f.F.Dport)
			if waits {
				out.Src, out.Dst = addrPort(k.Daddr, k.Dport), addrPort(k.Saddr, k.Sport)
			}
		}
	})
	return out, found, errors.Join(err4, err6)
}

// from takes what both families' entries share, and reports whether the entry is the one that tells of the flow.
func (o *Opened) from(endpoint, peer, port uint16, flags bpf.DatapathFlowFlags, ifindex uint32, waits bool) bool {
	switch {
	case waits:
		endpoint, peer = peer, endpoint
	case flags&flowOrigin == 0:
		return false
	}
	o.Endpoint, o.Peer, o.Port, o.Waits = endpoint, peer, port, waits
	o.SNAT = !waits && flags&bpf.DatapathFlowFlagsFLOW_SNAT != 0
	if !waits {
		o.Ifindex = int(ifindex)
	}
	return true
}

// pair4 keeps 0.0.0.0 an address.
func pair4(a uint32, port uint16) netip.AddrPort {
	addr := fromAddr4(a)
	if !addr.IsValid() {
		addr = netip.IPv4Unspecified()
	}
	return netip.AddrPortFrom(addr, port16(port))
}

// FlowKnown reports whether the live tables have a flow whose packets look so at the hook ("container", "uplink" or "host"),
// or are waiting for one.
func (s *Shadow) FlowKnown(hook string, proto uint8, src, dst netip.AddrPort) (bool, error) {
	h := slices.Index(hookNames(), hook)
	if h < 0 {
		return false, fmt.Errorf("no hook %q", hook)
	}
	if src.Addr().Is4() {
		k := bpf.DatapathFlow4Key{
			Saddr: addr4(src.Addr()), Daddr: addr4(dst.Addr()), Sport: port16(src.Port()), Dport: port16(dst.Port()),
			Proto: proto, Hook: bpf.DatapathHook(h),
		}
		return s.v4.known(k)
	}
	k := bpf.DatapathFlow6Key{
		Saddr: addr(src.Addr()), Daddr: addr(dst.Addr()), Sport: port16(src.Port()), Dport: port16(dst.Port()), Proto: proto, Hook: uint8(h),
	}
	return s.v6.known(k)
}

// shadowTables are the flow tables of a family: flows by key K, and what waits to become one.
type shadowTables[K comparable, F, S any] struct {
	flows, syns, liveFlows, liveSyns *ebpf.Map
	partner                          func(K, F) (K, bool)
	filler                           func(n int) K
	// What runs since Begin have met in the live ones.
	metFlows map[K]F
	metSyns  map[K]S
}

func (t *shadowTables[K, F, S]) use(own, live *Maps, flows, syns string) {
	t.flows, t.syns, t.liveFlows, t.liveSyns = own.m[flows], own.m[syns], live.m[flows], live.m[syns]
}

func (t *shadowTables[K, F, S]) begin() {
	t.metFlows, t.metSyns = make(map[K]F), make(map[K]S)
}

// reset leaves as much room as the live table has that holds so many entries.
func (t *shadowTables[K, F, S]) reset(entries int64) error {
	err := errors.Join(empty[K, F](t.flows), empty[K, S](t.syns), putAll(t.flows, t.metFlows), putAll(t.syns, t.metSyns))
	if err != nil {
		return err
	}
	var zero F
	room := max(int64(t.liveFlows.MaxEntries())-entries, 0)
	for n := int64(0); n < int64(t.flows.MaxEntries())-int64(len(t.metFlows))-room; n++ {
		if err := t.flows.Put(t.filler(int(n)), zero); err != nil {
			return fmt.Errorf("fill the shadow of %s: %w", t.liveFlows, err)
		}
	}
	return nil
}

func (t *shadowTables[K, F, S]) fetch() (more bool, err error) {
	var keys []K
	err = errors.Join(
		batches(t.flows, func(k K, _ F) { keys = append(keys, k) }),
		batches(t.syns, func(k K, _ S) { keys = append(keys, k) }),
	)
	if err != nil {
		return false, err
	}
	for _, k := range keys {
		if _, met := t.metSyns[k]; !met {
			var v S
			found, err := lookUp(t.liveSyns, k, &v)
			if err != nil {
				return false, err
			}
			if found {
				t.metSyns[k], more = v, true
			}
		}
		met, err := t.meet(k)
		if err != nil {
			return false, err
		}
		more = more || met
	}
	return more, nil
}

// meet takes over what the live table has under the key, and its other half. It reports whether that is new.
func (t *shadowTables[K, F, S]) meet(k K) (bool, error) {
	if _, met := t.metFlows[k]; met {
		return false, nil
	}
	var v F
	found, err := lookUp(t.liveFlows, k, &v)
	if err != nil || !found {
		return false, err
	}
	t.metFlows[k] = v
	other, has := t.partner(k, v)
	if _, met := t.metFlows[other]; !has || met {
		return true, nil
	}
	var half F
	if found, err = lookUp(t.liveFlows, other, &half); found {
		t.metFlows[other] = half
	}
	return true, err
}

func (t *shadowTables[K, F, S]) known(k K) (bool, error) {
	var f F
	var s S
	flow, err := lookUp(t.liveFlows, k, &f)
	if err != nil || flow {
		return flow, err
	}
	return lookUp(t.liveSyns, k, &s)
}

// opened calls f for every entry that the last run has made.
func (t *shadowTables[K, F, S]) opened(f func(k K, v F, waits bool)) error {
	return errors.Join(
		batches(t.flows, func(k K, v F) {
			if _, met := t.metFlows[k]; !met {
				f(k, v, false)
			}
		}),
		batches(t.syns, func(k K, v S) {
			if _, met := t.metSyns[k]; !met {
				f(k, answerOf[F](v), true)
			}
		}),
	)
}

// answerOf is the answers' half of a flow that waits.
func answerOf[F any](syn any) F {
	var half any
	switch s := syn.(type) {
	case bpf.DatapathSyn4:
		half = s.Answer
	case bpf.DatapathSyn6:
		half = s.Answer
	}
	out, _ := half.(F)
	return out
}

// lookUp reports whether the map has the key.
func lookUp(m *ebpf.Map, key, value any) (bool, error) {
	err := m.Lookup(key, value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read %s: %w", m, err)
	}
	return true, nil
}

func empty[K, V any](m *ebpf.Map) error {
	var keys []K
	if err := batches(m, func(k K, _ V) { keys = append(keys, k) }); err != nil {
		return err
	}
	for _, k := range keys {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("empty %s: %w", m, err)
		}
	}
	return nil
}

func putAll[K comparable, V any](m *ebpf.Map, all map[K]V) error {
	for k, v := range all {
		if err := m.Put(k, v); err != nil {
			return fmt.Errorf("write %s: %w", m, err)
		}
	}
	return nil
}

// array reads all of an array.
func array[V any](m *ebpf.Map) ([]V, error) {
	keys, values := make([]uint32, m.MaxEntries()), make([]V, m.MaxEntries())
	var cursor ebpf.MapBatchCursor
	if _, err := m.BatchLookup(&cursor, keys, values, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, err
	}
	return values, nil
}

// setArray writes all of an array.
func setArray[V any](m *ebpf.Map, values []V) error {
	keys := make([]uint32, len(values))
	for i := range keys {
		keys[i] = uint32(i)
	}
	_, err := m.BatchUpdate(keys, values, nil)
	return err
}
