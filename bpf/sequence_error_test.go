// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/policy"
)

// ICMP errors of sequences: about packets that have arrived, and about some that nobody sent.

// quote is the packet that an error is about, as whom it is for has sent it.
type quote struct {
	proto policy.Proto
	tuple policy.Tuple
}

// unsentPort is no packet's.
const unsentPort = 39999

// frame is the quoted packet where no frame of it is at hand.
func (q quote) frame() []byte {
	switch q.proto {
	case policy.TCP:
		return packet.TCP(q.tuple.Src, q.tuple.Dst)
	case policy.UDP:
		return packet.UDP(q.tuple.Src, q.tuple.Dst)
	case policy.SCTP:
		return packet.SCTP(q.tuple.Src, q.tuple.Dst)
	}
	if q.tuple.Dst.Port() == 0 {
		return packet.ICMPEcho(q.tuple.Src.Addr(), q.tuple.Dst.Addr(), q.tuple.Src.Port(), 1)
	}
	return packet.ICMPEchoReply(q.tuple.Src.Addr(), q.tuple.Dst.Addr(), q.tuple.Dst.Port(), 1)
}

// errorAbout is the error that whoever got a packet makes of it, or a router on its way.
func (s *sequence) errorAbout(d delivery) sent {
	p, smac, dmac := s.back(d)
	_, t := tupleOf(d.out)
	q, about := quote{d.proto, t}, d.out
	if s.d.once(4) {
		if t.Src.Port() == 0 {
			q.tuple.Dst = at(t.Dst.Addr(), unsentPort)
		} else {
			q.tuple.Src = at(t.Src.Addr(), unsentPort)
		}
		about = q.frame()
	}
	f, icmp := families[0], policy.Proto(unix.IPPROTO_ICMP)
	if t.Src.Addr().Is6() {
		f, icmp = families[1], unix.IPPROTO_ICMPV6
	}
	from := t.Dst.Addr()
	if p.hook == bpf.DatapathHookHOOK_UPLINK && s.d.once(3) {
		from = f.foreign
	}
	p.quoted, p.packet.Proto, p.packet.Tuple = &q, icmp, policy.Tuple{Src: at(from, 0), Dst: at(t.Src.Addr(), 0)}
	kind, code := f.unreach, uint8(1)
	switch s.d.n(3) {
	case 1:
		kind, code = f.timeExceeded, 0
	case 2:
		kind, code = f.tooBig, f.tooBigCode
	}
	p.frame = packet.ICMPError(from, t.Src.Addr(), kind, code, about, packet.MAC(smac, dmac))
	return p
}

// expectError is the model's word on an error; ok is false where it has none.
func (s *sequence) expectError(p sent) (w want, ok bool) {
	key := flowKey{p.hook, p.quoted.proto, p.quoted.tuple.Inverse()}
	f, dir := s.m.flows[key], 0
	if f != nil && f.keys[0] != key {
		dir = 1
	}
	if p.hook == bpf.DatapathHookHOOK_CONTAINER {
		if f == nil {
			f, dir = s.m.waiting[key], 1
		}
		return s.expectContainersError(p, f, dir), true
	}
	if f != nil {
		return s.along(p, f, dir), true
	}
	dst := p.packet.Tuple.Dst.Addr()
	if _, own := s.m.tables.HostAddrs[dst]; !own && !dst.IsLoopback() && s.inSubnet(dst) {
		return w, false // judged as what dials the container is
	}
	return s.passed(p, ""), true
}

func (s *sequence) inSubnet(a netip.Addr) bool {
	for p := range s.m.tables.Subnets {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// expectContainersError is expectError for what a container sends: f is the flow that it is about, if any.
func (s *sequence) expectContainersError(p sent, f *modelFlow, dir int) want {
	t := s.m.tables
	v := t.Explain(s.m.host, p.packet)
	if v.Early {
		return s.fresh(p, v)
	}
	if f != nil && !f.onesided {
		owner, there := t.Endpoints[f.slots[dir]]
		if there && owner.Sandbox == t.Endpoints[t.Links[p.packet.Device]].Sandbox {
			if f.renewed[dir] == s.m.generation {
				return s.along(p, f, dir)
			}
			keep, reason := s.renewed(p, f, dir)
			if keep {
				f.renewed[dir] = s.m.generation
				return s.along(p, f, dir)
			}
			if reason != "" { // the flow is left to its own packets
				return s.dropped(p, reason)
			}
		}
	}
	return s.unopened(p, v, "no_flow")
}

// unopened is what becomes of a container's packet that belongs to no flow and can open none; beyond, it is dropped for
// the reason.
func (s *sequence) unopened(p sent, v policy.Verdict, reason string) want {
	_, host := s.m.tables.HostAddrs[p.packet.Tuple.Dst.Addr()]
	switch {
	case v.Early, v.Path == policy.PathNone && v.Reason != "no_route":
		return s.fresh(p, v)
	case !p.packet.Gateway:
		return s.passed(p, "bridge")
	case host:
		return s.passed(p, "stack")
	}
	return s.dropped(p, reason)
}

// sendError has the data path judge an error and compares. It is no packet of its flow: it keeps none alive.
func (s *sequence) sendError(d delivery) {
	p := s.errorAbout(d)
	s.say("%s dev %d: error %s about %s %s gateway %v", p.program, p.packet.Device, p.packet.Tuple, p.quoted.proto, p.quoted.tuple, p.packet.Gateway)
	w, ok := s.expectError(p)
	if !ok {
		return
	}
	r, _, on := s.judge(p, w)
	if !on || r.action == actPass {
		return
	}
	s.counts.errors++
	src, dst := addrsOf(r.out)
	from := p.packet.Tuple.Src.Addr()
	if from == p.quoted.tuple.Dst.Addr() { // whom the packet was for, and no router
		from = w.tuple.Src.Addr()
	}
	if src != from || dst != w.tuple.Dst.Addr() {
		s.fail("left from %s to %s, the model says from %s to %s", src, dst, from, w.tuple.Dst.Addr())
	}
	header := 20
	if src.Is6() {
		header = 40
	}
	proto, quoted := tupleOf(append(make([]byte, 14), r.out[14+header+8:]...))
	if proto != p.quoted.proto || quoted != w.tuple.Inverse() {
		s.fail("quotes %s %s, which was sent as %s", proto, quoted, w.tuple.Inverse())
	}
}

// addrsOf are the addresses of a frame's outer header.
func addrsOf(frame []byte) (src, dst netip.Addr) {
	if frame[14]>>4 == 6 {
		return netip.AddrFrom16([16]byte(frame[22:38])), netip.AddrFrom16([16]byte(frame[38:54]))
	}
	return netip.AddrFrom4([4]byte(frame[26:30])), netip.AddrFrom4([4]byte(frame[30:34]))
}
