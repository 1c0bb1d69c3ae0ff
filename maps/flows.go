// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
)

// Flow is what the flow tables hold of one flow: the direction that opened it, and that of the answers.
type Flow struct {
	Proto uint8 // IANA's number
	// The ends of the opening direction as its packets are seen, and as they go on: others where addresses or ports
	// are translated. The identifier of an echo request stands for the port of its sender.
	From, To         netip.AddrPort
	SentFrom, SentTo netip.AddrPort
	Hook             string // where its packets are seen
	Opener, Target   uint16 // slots of the endpoints, 0: none
	Port             uint16 // slot of the published port, 0: none
	State            string // of FlowStates
	Fast             bool   // forwarded by the data path; else left to the host's stack
	Masqueraded      bool
	Sent, Answered   Traffic       // of the opening direction, of the other
	Age, Idle        time.Duration // since its first and its last packet, to about a second
}

// Traffic is an amount of packets.
type Traffic struct {
	Packets, Bytes uint64
}

// The states of a flow, as its packets tell.
const (
	FlowOpening     = "opening"     // TCP: not answered yet
	FlowEstablished = "established" // TCP
	FlowClosing     = "closing"     // TCP: one side has closed
	FlowClosed      = "closed"      // TCP: both have
	FlowReset       = "reset"       // TCP
	FlowUnanswered  = "unanswered"  // other protocols
	FlowAnswered    = "answered"
	FlowOneSided    = "one-sided" // with the host's stack: only one direction is remembered
)

// FlowStates are all of them.
func FlowStates() []string {
	return []string{FlowOpening, FlowEstablished, FlowClosing, FlowClosed, FlowReset, FlowUnanswered, FlowAnswered, FlowOneSided}
}

// half is one direction of a flow of either family.
type half struct {
	bytes, packets           uint64
	first, last              uint32
	endpoint, peer, port     uint16
	flags                    bpf.DatapathFlowFlags
	tcp                      uint8
	proto                    uint8
	hook                     bpf.DatapathHook
	from, to, newFrom, newTo netip.AddrPort
}

func half4(k *bpf.DatapathFlow4Key, v *bpf.DatapathFlow4) half {
	f := &v.F
	return half{
		bytes: f.Bytes, packets: f.Packets, first: f.FirstSeen, last: f.LastSeen, endpoint: f.Endpoint, peer: f.Peer, port: f.Port,
		flags: f.Flags, tcp: f.TcpFlags, proto: k.Proto, hook: k.Hook,
		from:    netip.AddrPortFrom(fromAddr4(k.Saddr), port16(k.Sport)),
		to:      netip.AddrPortFrom(fromAddr4(k.Daddr), port16(k.Dport)),
		newFrom: netip.AddrPortFrom(fromAddr4(v.Saddr), port16(f.Sport)),
		newTo:   netip.AddrPortFrom(fromAddr4(v.Daddr), port16(f.Dport)),
	}
}

func half6(k *bpf.DatapathFlow6Key, v *bpf.DatapathFlow6) half {
	f := &v.F
	return half{
		bytes: f.Bytes, packets: f.Packets, first: f.FirstSeen, last: f.LastSeen, endpoint: f.Endpoint, peer: f.Peer, port: f.Port,
		flags: f.Flags, tcp: f.TcpFlags, proto: k.Proto, hook: bpf.DatapathHook(k.Hook),
		from:    netip.AddrPortFrom(fromAddr(k.Saddr), port16(k.Sport)),
		to:      netip.AddrPortFrom(fromAddr(k.Daddr), port16(k.Dport)),
		newFrom: netip.AddrPortFrom(fromAddr(v.Saddr), port16(f.Sport)),
		newTo:   netip.AddrPortFrom(fromAddr(v.Daddr), port16(f.Dport)),
	}
}

func (h *half) out() bpf.DatapathHook {
	return bpf.DatapathHook(h.flags & bpf.DatapathFlowFlagsFLOW_OUT_MASK)
}

// EachFlow calls each for every flow, in the order of the tables, and ends with its error. The flow is each's until it
// returns. Packets go on meanwhile: a flow that comes or goes may be missed. It asks nobody but the maps.
func (m *Maps) EachFlow(each func(*Flow) error) error {
	v4, v6, err := m.Flows()
	if err != nil {
		return err
	}
	now := monotonicTicks()
	var flow Flow
	err = pairs(m.m["flows4"], v4, partner4, func(k *bpf.DatapathFlow4Key, v, back *bpf.DatapathFlow4) error {
		f := half4(k, v)
		if back == nil {
			flow = newFlow(now, &f, nil)
			return each(&flow)
		}
		g := half4(k, back)
		flow = newFlow(now, &f, &g)
		return each(&flow)
	})
	if err != nil {
		return err
	}
	return pairs(m.m["flows6"], v6, partner6, func(k *bpf.DatapathFlow6Key, v, back *bpf.DatapathFlow6) error {
		f := half6(k, v)
		if back == nil {
			flow = newFlow(now, &f, nil)
			return each(&flow)
		}
		g := half6(k, back)
		flow = newFlow(now, &f, &g)
		return each(&flow)
	})
}

// partner4 is the key of the other half, as partner_key4() makes it. It has none where the stack is the other end.
func partner4(k *bpf.DatapathFlow4Key, v *bpf.DatapathFlow4) (other bpf.DatapathFlow4Key, has, opens bool) {
	out := bpf.DatapathHook(v.F.Flags & bpf.DatapathFlowFlagsFLOW_OUT_MASK)
	return bpf.DatapathFlow4Key{Saddr: v.Daddr, Daddr: v.Saddr, Sport: v.F.Dport, Dport: v.F.Sport, Proto: k.Proto, Hook: out},
		out != bpf.DatapathHookHOOK_NONE, v.F.Flags&bpf.DatapathFlowFlagsFLOW_ORIGIN != 0
}

func partner6(k *bpf.DatapathFlow6Key, v *bpf.DatapathFlow6) (other bpf.DatapathFlow6Key, has, opens bool) {
	out := bpf.DatapathHook(v.F.Flags & bpf.DatapathFlowFlagsFLOW_OUT_MASK)
	return bpf.DatapathFlow6Key{Saddr: v.Daddr, Daddr: v.Saddr, Sport: v.F.Dport, Dport: v.F.Sport, Proto: k.Proto, Hook: uint8(out)},
		out != bpf.DatapathHookHOOK_NONE, v.F.Flags&bpf.DatapathFlowFlagsFLOW_ORIGIN != 0
}

// pairs reads a flow table once and calls each with the half that opened a flow and the other, which is nil where there
// is none. A half waits in memory until its other half comes; entries is about how many there are in all.
func pairs[K comparable, V any](m *ebpf.Map, entries int, partner func(*K, *V) (other K, has, opens bool), each func(k *K, v, back *V) error) error {
	waiting := make(map[K]V, max(0, entries/4)) // at most, where halves stand at random
	err := batchesUntil(m, func(k *K, v *V) error {
		other, has, opens := partner(k, v)
		if !has {
			return each(k, v, nil)
		}
		w, met := waiting[other]
		switch {
		case !met:
			waiting[*k] = *v
			return nil
		case opens:
			delete(waiting, other)
			return each(k, v, &w)
		}
		delete(waiting, other)
		return each(&other, &w, v)
	})
	if err != nil {
		return err
	}
	for k, v := range waiting { // the other half came or went just now
		if _, _, opens := partner(&k, &v); opens {
			if err := each(&k, &v, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

const tick = time.Duration(1 << 30) // of the data path's clock

// ago is how long a tick is past. The tick of a packet that comes just now may be a later one than ours.
func ago(now, then uint32) time.Duration { return max(0, time.Duration(int32(now-then))*tick) }

// newFlow puts the halves together; back is nil where there is none.
func newFlow(now uint32, f, back *half) Flow {
	out := Flow{
		Proto: f.proto, From: f.from, To: f.to, SentFrom: f.newFrom, SentTo: f.newTo, Hook: nameOf(hookNames(), int(f.hook)),
		Opener: f.endpoint, Target: f.peer, Port: f.port,
		Fast: f.out() != bpf.DatapathHookHOOK_NONE, Masqueraded: f.flags&flowSNAT != 0 && f.out() == bpf.DatapathHookHOOK_UPLINK,
		Sent: Traffic{f.packets, f.bytes}, Age: ago(now, f.first), Idle: ago(now, f.last), State: flowState(f, back),
	}
	switch {
	case back != nil:
		out.Answered = Traffic{back.packets, back.bytes}
		out.Idle = min(out.Idle, ago(now, back.last))
	case !out.Fast && f.hook == bpf.DatapathHookHOOK_UPLINK:
		// What the host itself has sent, by how its answers look.
		out.From, out.To = f.to, f.from
		out.Sent, out.Answered = Traffic{}, out.Sent
		out.SentFrom, out.SentTo = out.From, out.To
	}
	return out
}

// flowState is what flow_timeout() in bpf/lib/flow.h goes by.
func flowState(f, g *half) string {
	if f.out() == bpf.DatapathHookHOOK_NONE {
		return FlowOneSided
	}
	answered := g != nil && g.packets > 0 && f.packets > 0
	if f.proto != unix.IPPROTO_TCP {
		if answered {
			return FlowAnswered
		}
		return FlowUnanswered
	}
	both, all := f.tcp, uint8(0)
	if g != nil {
		both, all = f.tcp|g.tcp, f.tcp&g.tcp
	}
	switch {
	case both&tcpRST != 0:
		return FlowReset
	case !answered:
		return FlowOpening
	case all&tcpFIN != 0:
		return FlowClosed
	case both&tcpFIN != 0:
		return FlowClosing
	}
	return FlowEstablished
}
