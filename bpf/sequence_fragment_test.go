// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"bytes"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/policy"
)

// Fragments of sequences: UDP datagrams in two parts, of which the first may get lost on the way.

// sendFragments sends a datagram where p would have gone, and compares what becomes of its parts.
func (s *sequence) sendFragments(p sent) {
	t := p.packet.Tuple
	p.packet.Proto, p.packet.Reset, p.packet.Answer, p.flags = policy.UDP, false, false, ""
	whole := packet.UDP(t.Src, t.Dst, packet.MAC(p.frame[6:12], p.frame[:6]), packet.Payload(bytes.Repeat([]byte{0xa5}, 32)))
	s.frags++
	parts := packet.Fragment(whole, 24, s.frags)
	first, second := p, p
	first.frame, second.frame = parts[0], parts[1]
	s.say("%s dev %d: fragments of %s %s gateway %v mark %#x", p.program, p.packet.Device, p.packet.Proto, t, p.packet.Gateway, p.ctx.Mark)
	if p.hook == bpf.DatapathHookHOOK_CONTAINER && s.d.once(4) {
		s.say("the first is lost")
		lost := second
		lost.packet.Tuple = policy.Tuple{Src: at(t.Src.Addr(), 0), Dst: at(t.Dst.Addr(), 0)}
		s.judge(lost, s.unopened(lost, s.m.tables.Explain(s.m.host, lost.packet), "fragment_not_found"))
		return
	}
	w := s.expect(first)
	r, _, on := s.judge(first, w)
	if !on {
		return
	}
	if r.action == actRedirect {
		_, out := tupleOf(withoutFragment(r.out))
		s.translated(first, w, out)
	}
	if w.flow != nil {
		s.travel(first, w)
	}
	src, dst := addrsOf(r.out)
	w = s.expect(second)
	if r, _, on = s.judge(second, w); !on {
		return
	}
	if src2, dst2 := addrsOf(r.out); src2 != src || dst2 != dst {
		s.fail("its second part left from %s to %s, the first from %s to %s", src2, dst2, src, dst)
	}
	if w.flow != nil {
		s.counts.fragments++
		s.travel(second, w)
	}
}

// withoutFragment takes an IPv6 fragment's header away.
func withoutFragment(frame []byte) []byte {
	const at, ipv6Fragment = 14 + 40, 44
	if frame[14]>>4 != 6 || frame[20] != ipv6Fragment {
		return frame
	}
	out := append(bytes.Clone(frame[:at]), frame[at+8:]...)
	out[20] = frame[at]
	return out
}
