// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
)

// testFlow is a flow as the data path would have it, by its two halves.
type testFlow struct {
	proto              uint8
	hook, out          bpf.DatapathHook
	from, to           string // as seen
	sentFrom, sentTo   string // as they go on; empty: the same
	flags              bpf.DatapathFlowFlags
	tcp, answerTCP     uint8
	packets, answers   uint64
	age, idle, quieter uint32 // ticks; quieter: of the answers
	lost               bool   // no answers' half
}

// put writes both halves.
func (f testFlow) put(t *testing.T, m *Maps) {
	t.Helper()
	parse := func(s, other string) netip.AddrPort {
		if s == "" {
			s = other
		}
		return netip.MustParseAddrPort(s)
	}
	from, to := parse(f.from, ""), parse(f.to, "")
	sentFrom, sentTo := parse(f.sentFrom, f.from), parse(f.sentTo, f.to)
	now := monotonicTicks()
	put := func(seenFrom, seenTo, from, to netip.AddrPort, hook, out bpf.DatapathHook, flags bpf.DatapathFlowFlags, tcp uint8, packets uint64, idle uint32, endpoint, peer uint16) {
		var v bpf.DatapathFlow4
		v.F.Packets, v.F.Bytes, v.F.FirstSeen, v.F.LastSeen = packets, 100*packets, now-f.age, now-idle
		v.F.Sport, v.F.Dport, v.F.Endpoint, v.F.Peer, v.F.Port = port16(from.Port()), port16(to.Port()), endpoint, peer, 9
		v.F.TcpFlags, v.F.Flags = tcp, flags|bpf.DatapathFlowFlags(out)
		if from.Addr().Is4() {
			v.Saddr, v.Daddr = addr4(from.Addr()), addr4(to.Addr())
			k := bpf.DatapathFlow4Key{Saddr: addr4(seenFrom.Addr()), Daddr: addr4(seenTo.Addr()), Sport: port16(seenFrom.Port()), Dport: port16(seenTo.Port()), Proto: f.proto, Hook: hook}
			require.NoError(t, m.m["flows4"].Put(k, v))
			return
		}
		v6 := bpf.DatapathFlow6{Saddr: addr(from.Addr()), Daddr: addr(to.Addr())}
		v6.F = v.F
		k := bpf.DatapathFlow6Key{Saddr: addr(seenFrom.Addr()), Daddr: addr(seenTo.Addr()), Sport: port16(seenFrom.Port()), Dport: port16(seenTo.Port()), Proto: f.proto, Hook: uint8(hook)}
		require.NoError(t, m.m["flows6"].Put(k, v6))
	}
	put(from, to, sentFrom, sentTo, f.hook, f.out, f.flags|flowOrigin, f.tcp, f.packets, f.idle, 3, 4)
	if f.out != bpf.DatapathHookHOOK_NONE && !f.lost {
		put(sentTo, sentFrom, to, from, f.out, f.hook, f.flags, f.answerTCP, f.answers, f.quieter, 4, 3)
	}
}

const (
	hookContainer = bpf.DatapathHookHOOK_CONTAINER
	hookUplink    = bpf.DatapathHookHOOK_UPLINK
	hookNone      = bpf.DatapathHookHOOK_NONE
	tcpSYN        = 2
	tcpACK        = 16
)

func allFlows(t *testing.T, m *Maps) (out []Flow) {
	t.Helper()
	require.NoError(t, m.EachFlow(func(f *Flow) error {
		out = append(out, *f)
		return nil
	}))
	return out
}

// Needs root. Two halves are one flow, whichever is read first.
func TestEachFlow(t *testing.T) {
	for _, c := range []struct {
		name  string
		put   testFlow
		state string
		fast  bool
	}{
		{"masqueraded", testFlow{proto: unix.IPPROTO_TCP, hook: hookContainer, out: hookUplink, from: "10.1.0.2:4000", to: "203.0.113.9:443",
			sentFrom: "192.0.2.1:1030", flags: flowSNAT | flowNAT, tcp: tcpSYN | tcpACK, answerTCP: tcpSYN | tcpACK, packets: 5, answers: 4, age: 100, idle: 9, quieter: 7}, FlowEstablished, true},
		{"IPv6", testFlow{proto: unix.IPPROTO_TCP, hook: hookUplink, out: hookContainer, from: "[fd01::2]:4000", to: "[2001:db8::1]:8080",
			sentTo: "[fd02::3]:80", flags: flowNAT, tcp: tcpSYN, packets: 1, age: 2}, FlowOpening, true},
		{"one side closed", testFlow{proto: unix.IPPROTO_TCP, hook: hookContainer, out: hookContainer, from: "10.1.0.2:1", to: "10.1.0.3:1",
			tcp: tcpFIN, packets: 5, answers: 4}, FlowClosing, true},
		{"both closed", testFlow{proto: unix.IPPROTO_TCP, hook: hookContainer, out: hookContainer, from: "10.1.0.2:1", to: "10.1.0.3:1",
			tcp: tcpFIN, answerTCP: tcpFIN, packets: 5, answers: 4}, FlowClosed, true},
		{"reset", testFlow{proto: unix.IPPROTO_TCP, hook: hookContainer, out: hookContainer, from: "10.1.0.2:1", to: "10.1.0.3:1",
			tcp: tcpSYN, answerTCP: tcpRST, packets: 1, answers: 1}, FlowReset, true},
		{"UDP", testFlow{proto: unix.IPPROTO_UDP, hook: hookContainer, out: hookContainer, from: "10.1.0.2:1", to: "10.1.0.3:53", packets: 2, answers: 1}, FlowAnswered, true},
		{"UDP without an answer", testFlow{proto: unix.IPPROTO_UDP, hook: hookContainer, out: hookContainer, from: "10.1.0.2:1", to: "10.1.0.3:53", packets: 2}, FlowUnanswered, true},
		{"half of it", testFlow{proto: unix.IPPROTO_UDP, hook: hookContainer, out: hookContainer, from: "10.1.0.2:1", to: "10.1.0.3:53", packets: 2, lost: true}, FlowUnanswered, true},
		{"with the host", testFlow{proto: unix.IPPROTO_TCP, hook: hookContainer, out: hookNone, from: "10.1.0.2:1", to: "10.1.0.1:22", packets: 2, idle: 3, age: 3}, FlowOneSided, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMaps(t)
			c.put.put(t, m)
			got := allFlows(t, m)
			require.Len(t, got, 1)
			f := got[0]
			want := func(s, other string) netip.AddrPort {
				if s == "" {
					s = other
				}
				return netip.MustParseAddrPort(s)
			}
			require.Equal(t, [4]netip.AddrPort{want(c.put.from, ""), want(c.put.to, ""), want(c.put.sentFrom, c.put.from), want(c.put.sentTo, c.put.to)},
				[4]netip.AddrPort{f.From, f.To, f.SentFrom, f.SentTo})
			require.Equal(t, c.state, f.State)
			require.Contains(t, FlowStates(), f.State)
			require.Equal(t, c.fast, f.Fast)
			require.Equal(t, c.put.flags&flowSNAT != 0, f.Masqueraded)
			require.Equal(t, Traffic{c.put.packets, 100 * c.put.packets}, f.Sent)
			require.Equal(t, Traffic{c.put.answers, 100 * c.put.answers}, f.Answered)
			require.Equal(t, [3]uint16{3, 4, 9}, [3]uint16{f.Opener, f.Target, f.Port})
			idle := c.put.idle
			if !c.put.lost && c.fast {
				idle = min(idle, c.put.quieter)
			}
			require.InDelta(t, time.Duration(c.put.age)*tick, f.Age, float64(2*tick))
			require.InDelta(t, time.Duration(idle)*tick, f.Idle, float64(2*tick))
		})
	}
}

// Needs root. What the host itself has sent is told as it was sent, though the entry is made for the answers.
func TestFlowOfTheHost(t *testing.T) {
	m := newMaps(t)
	v := bpf.DatapathFlow4{}
	v.F.Flags, v.F.Packets = flowOrigin, 3
	k := bpf.DatapathFlow4Key{
		Saddr: addr4(netip.MustParseAddr("203.0.113.9")), Daddr: addr4(netip.MustParseAddr("192.0.2.1")),
		Dport: port16(77), Proto: unix.IPPROTO_ICMP, Hook: hookUplink,
	}
	require.NoError(t, m.m["flows4"].Put(k, v))
	f := allFlows(t, m)[0]
	require.Equal(t, "192.0.2.1:77", f.From.String())
	require.Equal(t, "203.0.113.9:0", f.To.String())
	require.Equal(t, [2]Traffic{{}, {Packets: 3}}, [2]Traffic{f.Sent, f.Answered})
	require.False(t, f.Fast)
}

// Needs root. Many flows are read whole, each once, and an error ends the reading.
func TestEachFlowMany(t *testing.T) {
	m := newMaps(t)
	const flows = 500 // of a table with room for 1,024 entries
	for i := range uint16(flows) {
		f := testFlow{proto: unix.IPPROTO_UDP, hook: hookContainer, out: hookContainer, from: "10.1.0.2:1", packets: 1}
		f.to = netip.AddrPortFrom(netip.MustParseAddr("10.1.0.3"), i+1).String()
		f.put(t, m)
	}
	var ports []uint16
	for _, f := range allFlows(t, m) {
		ports = append(ports, f.To.Port())
	}
	slices.Sort(ports)
	require.Len(t, ports, flows)
	require.Len(t, slices.Compact(ports), flows)
	enough, n := errors.New("enough"), 0
	require.ErrorIs(t, m.EachFlow(func(*Flow) error {
		if n++; n == 7 {
			return enough
		}
		return nil
	}), enough)
	require.Equal(t, 7, n)
}
