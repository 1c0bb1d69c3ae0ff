// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/policy"
)

// Flags of the flow's direction, as flow_open() sets them.
const (
	flowRouted = bpf.DatapathFlowFlagsFLOW_ROUTED
	flowNAT    = bpf.DatapathFlowFlagsFLOW_NAT
	flowOrigin = bpf.DatapathFlowFlagsFLOW_ORIGIN
	flowSNAT   = bpf.DatapathFlowFlagsFLOW_SNAT
	tcpFIN     = 1
	tcpRST     = 4
)

// direction is one entry of a flow, of either family.
type direction struct {
	key   policy.Tuple // as the packet is seen
	hook  bpf.DatapathHook
	value policy.Tuple // as it goes on
	flags bpf.DatapathFlowFlags
	// Of an entry that leads into a container.
	ifindex    int
	dmac, smac policy.MAC
	endpoint   uint16
	peer       uint16
	packets    uint64
}

// Adopted says what an Adopt did.
type Adopted struct {
	Flows   int    // in the tables now that were not
	Full    int    // that found no room
	entries [2]int // put into flows4, flows6
}

// Added is by how much the gauge of the flow tables has to grow.
func (a Adopted) Added() (v4, v6 int) { return a.entries[0], a.entries[1] }

// Adopt puts flows into the tables that the host's stack has forwarded so far. A flow that is there
// stays as it is. Where it leaves by an uplink, the entry is of an older generation, so that its first
// packet finds out the route. Half of the room is left to flows to come.
func (w *Writer) Adopt(t policy.Tables, list []policy.Adopted) (Adopted, error) {
	var out Adopted
	var errs []error
	room := [2]int{int(w.m.m["flows4"].MaxEntries()) / 2, int(w.m.m["flows6"].MaxEntries()) / 2}
	v4, v6, err := w.m.Flows()
	if err != nil {
		return out, err
	}
	room[0], room[1] = room[0]-v4, room[1]-v6
	var held []uint16
	for _, a := range list {
		family := 0
		if a.Orig.Src.Addr().Is6() {
			family = 1
		}
		if room[family]-out.entries[family] < 2 {
			out.Full++
			continue
		}
		forward, reverse := directions(t, a)
		// The half that answers come by first: it says who holds the tuple.
		added, err := w.putDirection(a, reverse)
		if errors.Is(err, ebpf.ErrKeyExist) {
			continue
		}
		out.entries[family] += added
		if err == nil {
			added, err = w.putDirection(a, forward)
			out.entries[family] += added
		}
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			errs = append(errs, fmt.Errorf("adopt a flow: %w", err))
			continue
		}
		out.Flows++
		if a.SNAT && reverse.hook == bpf.DatapathHookHOOK_UPLINK {
			held = append(held, a.Reply.Dst.Port())
		}
	}
	return out, errors.Join(append(errs, w.hold(held))...)
}

// directions makes the two entries of a flow, as flow_open() would.
func directions(t policy.Tables, a policy.Adopted) (forward, reverse direction) {
	forward = direction{
		key: a.Orig, value: a.Reply.Inverse(), hook: bpf.DatapathHookHOOK_UPLINK,
		flags: flowRouted | flowOrigin, endpoint: a.Opener, peer: a.Target, packets: 1,
	}
	reverse = direction{
		key: a.Reply, value: a.Orig.Inverse(), hook: bpf.DatapathHookHOOK_UPLINK,
		flags: flowRouted, endpoint: a.Target, peer: a.Opener,
	}
	if a.Answered {
		reverse.packets = 1
	}
	if a.SNAT {
		forward.flags |= flowSNAT
	}
	if forward.key != forward.value {
		forward.flags |= flowNAT
		reverse.flags |= flowNAT
	}
	into := func(d *direction, slot uint16) {
		e := t.Endpoints[slot]
		d.ifindex, d.dmac, d.smac = e.Ifindex, e.MAC, t.Networks[e.Network].MAC
	}
	if a.Opener != 0 {
		forward.hook = bpf.DatapathHookHOOK_CONTAINER
		into(&reverse, a.Opener)
	}
	if a.Target != 0 {
		reverse.hook = bpf.DatapathHookHOOK_CONTAINER
		into(&forward, a.Target)
	}
	forward.flags |= bpf.DatapathFlowFlags(reverse.hook)
	reverse.flags |= bpf.DatapathFlowFlags(forward.hook)
	return forward, reverse
}

func (w *Writer) putDirection(a policy.Adopted, d direction) (int, error) {
	now := monotonicTicks()
	var k4 bpf.DatapathFlow4Key
	var v4 bpf.DatapathFlow4
	f := &v4.F
	f.Packets, f.FirstSeen, f.LastSeen = d.packets, now, now
	f.Ifindex, f.Sport, f.Dport = uint32(d.ifindex), port16(d.value.Src.Port()), port16(d.value.Dst.Port())
	f.Generation = uint16(w.generation - 1)
	f.Endpoint, f.Peer, f.Port, f.Flags = d.endpoint, d.peer, a.Port, d.flags
	f.Dmac, f.Smac = d.dmac, d.smac
	if d.key.Src.Addr().Is4() {
		k4.Saddr, k4.Daddr = addr4(d.key.Src.Addr()), addr4(d.key.Dst.Addr())
		k4.Sport, k4.Dport, k4.Proto, k4.Hook = port16(d.key.Src.Port()), port16(d.key.Dst.Port()), a.Proto, d.hook
		v4.Saddr, v4.Daddr = addr4(d.value.Src.Addr()), addr4(d.value.Dst.Addr())
		return one(w.m.m["flows4"].Update(k4, v4, ebpf.UpdateNoExist))
	}
	k6 := bpf.DatapathFlow6Key{
		Saddr: addr(d.key.Src.Addr()), Daddr: addr(d.key.Dst.Addr()),
		Sport: port16(d.key.Src.Port()), Dport: port16(d.key.Dst.Port()), Proto: a.Proto, Hook: uint8(d.hook),
	}
	v6 := bpf.DatapathFlow6{Saddr: addr(d.value.Src.Addr()), Daddr: addr(d.value.Dst.Addr())}
	v6.F = *f
	return one(w.m.m["flows6"].Update(k6, v6, ebpf.UpdateNoExist))
}

func one(err error) (int, error) {
	if err != nil {
		return 0, err
	}
	return 1, nil
}

// monotonicTicks is the data path's clock.
func monotonicTicks() uint32 {
	return uint32(uint64(monotonic()) >> 30)
}

// hold has the data path look for flows at ports that netfilter chose, outside of the range that we choose
// from. They stay so until a daemon starts and finds no flow there any more.
func (w *Writer) hold(ports []uint16) error {
	for _, p := range ports {
		w.held[p] = struct{}{}
		if w.classBytes == nil || w.classBytes[classPorts+int(p)]&byte(bpf.DatapathPortBitsPORT_HELD) != 0 {
			continue
		}
		b := w.classBytes[classPorts+int(p)] | byte(bpf.DatapathPortBitsPORT_HELD)
		if _, err := w.class.WriteAt([]byte{b}, int64(classPorts+int(p))); err != nil {
			return fmt.Errorf("write port_class: %w", err)
		}
		w.classBytes[classPorts+int(p)] = b
	}
	return nil
}

// readHeld finds the ports that an earlier daemon has marked as held and that are so still.
func (w *Writer) readHeld() error {
	w.held = make(map[uint16]struct{})
	have := make([]byte, 65536)
	if _, err := w.class.ReadAt(have, classPorts); err != nil {
		return fmt.Errorf("read port_class: %w", err)
	}
	if !slices.ContainsFunc(have, func(b byte) bool { return b&byte(bpf.DatapathPortBitsPORT_HELD) != 0 }) {
		return nil
	}
	return w.m.eachFlow(func(proto uint8, hook uint8, key policy.Tuple, _ policy.Tuple, f flow) {
		if p := key.Dst.Port(); hook == uint8(bpf.DatapathHookHOOK_UPLINK) && have[p]&byte(bpf.DatapathPortBitsPORT_HELD) != 0 {
			w.held[p] = struct{}{}
		}
	})
}

// flow is what both families' entries share.
type flow struct {
	packets  uint64
	lastSeen uint32
	flags    bpf.DatapathFlowFlags
	tcpFlags uint8
}

// eachFlow reads the flow tables, entry by entry.
func (m *Maps) eachFlow(each func(proto, hook uint8, key, value policy.Tuple, f flow)) error {
	tuple := func(s netip.Addr, sport uint16, d netip.Addr, dport uint16) policy.Tuple {
		return policy.Tuple{Src: netip.AddrPortFrom(s, port16(sport)), Dst: netip.AddrPortFrom(d, port16(dport))}
	}
	err := batches(m.m["flows4"], func(k bpf.DatapathFlow4Key, v bpf.DatapathFlow4) {
		each(k.Proto, uint8(k.Hook),
			tuple(fromAddr4(k.Saddr), k.Sport, fromAddr4(k.Daddr), k.Dport),
			tuple(fromAddr4(v.Saddr), v.F.Sport, fromAddr4(v.Daddr), v.F.Dport),
			flow{v.F.Packets, v.F.LastSeen, v.F.Flags, v.F.TcpFlags})
	})
	if err != nil {
		return err
	}
	return batches(m.m["flows6"], func(k bpf.DatapathFlow6Key, v bpf.DatapathFlow6) {
		each(k.Proto, k.Hook,
			tuple(fromAddr(k.Saddr), k.Sport, fromAddr(k.Daddr), k.Dport),
			tuple(fromAddr(v.Saddr), v.F.Sport, fromAddr(v.Daddr), v.F.Dport),
			flow{v.F.Packets, v.F.LastSeen, v.F.Flags, v.F.TcpFlags})
	})
}

// batches reads a hash that others write meanwhile: what comes and goes may be missed.
func batches[K, V any](m *ebpf.Map, each func(K, V)) error {
	return batchesUntil(m, func(k *K, v *V) error {
		each(*k, *v)
		return nil
	})
}

// batchesUntil is the same, and ends with the first error of each, which keeps neither of its arguments.
func batchesUntil[K, V any](m *ebpf.Map, each func(*K, *V) error) error {
	size := min(1024, max(128, m.MaxEntries()/8)) // small ones are read for every packet that is asked about
	keys, values := make([]K, size), make([]V, size)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			if err := each(&keys[i], &values[i]); err != nil {
				return err
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", m, err)
		}
	}
}

// Live are the flows that netfilter would have to know if the host's stack were to go on with them:
// those that are translated, or that a container has with the world.
func (m *Maps) Live() ([]policy.Tracked, error) {
	type id struct {
		proto uint8
		key   policy.Tuple
	}
	const (
		container = uint8(bpf.DatapathHookHOOK_CONTAINER)
		uplink    = uint8(bpf.DatapathHookHOOK_UPLINK)
	)
	var out []policy.Tracked
	answers := make(map[id]flow)
	var flags []uint8
	err := m.eachFlow(func(proto, hook uint8, key, value policy.Tuple, f flow) {
		to := uint8(f.flags & bpf.DatapathFlowFlagsFLOW_OUT_MASK)
		if hook != container && hook != uplink || to != container && to != uplink || f.flags&flowRouted == 0 {
			return
		}
		if f.flags&flowOrigin == 0 {
			answers[id{proto, key}] = f
			return
		}
		if f.flags&flowNAT == 0 && hook == container && to == container {
			return
		}
		out = append(out, policy.Tracked{Proto: proto, Orig: key, Reply: value.Inverse()})
		flags = append(flags, f.tcpFlags)
	})
	if err != nil {
		return nil, err
	}
	kept := out[:0]
	for i, k := range out {
		answer, ok := answers[id{k.Proto, k.Reply}]
		if !ok || k.Proto == uint8(policy.TCP) && ((flags[i]|answer.tcpFlags)&tcpRST != 0 || flags[i]&answer.tcpFlags&tcpFIN != 0) {
			continue
		}
		k.Answered = answer.packets > 0
		kept = append(kept, k)
	}
	return kept, nil
}
