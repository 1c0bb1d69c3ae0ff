// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes a network namespace and loads BPF programs (see datapath_host_test.go).
//
// Any frame whatsoever gets a verdict, and what it says is neither healed nor spoiled on the way.
package bpf_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	stdmaps "maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/internal/promise"
	"github.com/bpfnet/bpfnet/policy"
)

// fuzzTime is how long a plain test run plays, beside the committed corpus; go test -fuzz plays as long as it is told to.
func fuzzTime() time.Duration {
	if os.Getenv("BPFNET_FULL") == "1" {
		return time.Minute
	}
	return 10 * time.Second
}

// fuzzHooks are the programs with what their hook would see.
func fuzzHooks(h *host) []sent {
	var out []sent
	for _, slot := range []int{alice, carol, ian, quinn, peggy} {
		out = append(out,
			sent{program: "from_container", hook: bpf.DatapathHookHOOK_CONTAINER, ctx: h.sentBy(slot)},
			sent{program: "from_container", hook: bpf.DatapathHookHOOK_CONTAINER, ctx: skb{Ifindex: uint32(h.links[slot])}}, // by a netkit
			sent{program: "to_container", hook: bpf.DatapathHookHOOK_TO_CONTAINER, ctx: skb{Ifindex: uint32(h.links[slot])}},
			sent{program: "to_container", hook: bpf.DatapathHookHOOK_TO_CONTAINER, ctx: skb{Ifindex: uint32(h.links[slot]), IngressIfindex: uint32(h.links[bob])}},
			sent{program: "to_container", hook: bpf.DatapathHookHOOK_TO_CONTAINER, ctx: skb{Ifindex: uint32(h.links[slot]), IngressIfindex: uint32(h.up), Mark: acceptMark}})
	}
	return append(out,
		sent{program: "from_uplink", hook: bpf.DatapathHookHOOK_UPLINK, ctx: skb{Ifindex: uint32(h.up)}},
		sent{program: "from_uplink", hook: bpf.DatapathHookHOOK_UPLINK, ctx: skb{Ifindex: uint32(h.up), Mark: acceptMark}},
		sent{program: "from_uplink_l3", hook: bpf.DatapathHookHOOK_UPLINK, ctx: skb{Ifindex: uint32(h.up)}},
		sent{program: "from_host", hook: bpf.DatapathHookHOOK_HOST, ctx: skb{Ifindex: 1}},
		sent{program: "from_bridge", hook: bpf.DatapathHookHOOK_BRIDGE, ctx: skb{Ifindex: uint32(h.bridges[netOne])}},
		sent{program: "to_uplink", hook: bpf.DatapathHookHOOK_TO_UPLINK, ctx: skb{Ifindex: uint32(h.up)}},
		sent{program: "to_uplink_l3", hook: bpf.DatapathHookHOOK_TO_UPLINK, ctx: skb{Ifindex: uint32(h.up)}})
}

// richWorld is a state with everything in it: a network of each mode, the one that keeps containers apart with a
// link in it, published ports of all protocols, accepted marks.
func richWorld() *world {
	w := newWorld(&dice{})
	options := func(n int, internal bool, given map[string]string) {
		network := w.networks[n]
		network.Internal = internal
		o, _ := policy.ParseOptions(given, internal)
		network.SetOptions(o)
		w.networks[n] = network
	}
	options(netTwo, false, map[string]string{policy.OptMode4: "nat-unprotected", policy.OptMode6: "nat-unprotected", policy.OptSource4: families[0].host1.String()})
	options(netInternal, true, map[string]string{policy.OptMode6: "isolated"})
	options(netQuiet, false, map[string]string{policy.OptICC: "false", policy.OptTrusted: "up1"})
	options(netRouted, false, map[string]string{policy.OptMode4: "routed", policy.OptMode6: "routed", policy.OptMasquerade: "false"})
	w.pairs[[2]int{netOne, netTwo}] = true
	w.openings[policy.Opening{From: endpointID(quinn), To: endpointID(rita), Proto: policy.TCP, Port: 80}] = true
	w.settings.AcceptMark, w.settings.AcceptMask = acceptMark, acceptMask
	for _, f := range families {
		for _, slot := range []int{alice, rita, peggy} {
			w.ports = append(w.ports,
				policy.Port{Proto: policy.TCP, Host: at(f.unspecified, uint16(pubAlice+slot)), EndpointID: endpointID(slot), Target: 80},
				policy.Port{Proto: policy.UDP, Host: at(f.host, uint16(pubAlice+slot)), EndpointID: endpointID(slot), Target: 80})
		}
		w.ports = append(w.ports, policy.Port{Proto: policy.TCP, Host: at(f.unspecified, pubAlice), EndpointID: endpointID(alice), Target: 80},
			policy.Port{Proto: policy.UDP, Host: at(f.unspecified, pubAlice), EndpointID: endpointID(alice), Target: 80},
			policy.Port{Proto: policy.SCTP, Host: at(f.unspecified, pubSCTP), EndpointID: endpointID(alice), Target: pubSCTP},
			policy.Port{Proto: policy.TCP, Host: at(f.unspecified, pubLate), EndpointID: endpointID(alice), Target: 80, Refused: true})
	}
	return w
}

// packetFuzzer judges single frames at all hooks, in the rich state with some flows in it.
type packetFuzzer struct {
	h     *host
	hooks []sent
	seeds [][]byte
	seen  map[string]bool
	last  counters
	marks bool // are accepted
}

func newPacketFuzzer(t testing.TB) *packetFuzzer {
	h := newHost(t, 4096)
	w := richWorld()
	tables, _ := policy.Compile(w.intents(h), policy.Slots{})
	_, err := newWriter(h).Apply(tables, w.settings)
	require.NoError(t, err)
	return &packetFuzzer{h: h, hooks: fuzzHooks(h), seeds: fuzzSeeds(h), seen: make(map[string]bool), last: h.counters(), marks: true}
}

// play reads the first byte as the hook, and whether marks are accepted, and the rest as the frame.
func (p *packetFuzzer) play(data []byte) error {
	if len(data) == 0 {
		return nil
	}
	if marks := data[0] < 128; marks != p.marks {
		p.marks = marks
		p.h.setConfig(func(c *bpf.DatapathConfig) {
			c.AcceptMask = 0
			if marks {
				c.AcceptMask = acceptMask
			}
			c.Generation++
		})
	}
	return p.verdict(p.hooks[int(data[0]&127)%len(p.hooks)], data[1:])
}

// FuzzPacket: see play. The data path cannot tell Go's fuzzer which
// of its branches were taken; feedback() has it see at least how each packet ended.
func FuzzPacket(f *testing.F) {
	p := newPacketFuzzer(f)
	for i, frame := range p.seeds {
		f.Add(append([]byte{byte(i % len(p.hooks))}, frame...))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p.h.t = t
		if err := p.play(data); err != nil {
			t.Fatalf("%v", err)
		}
	})
}

// Whatever the frame, it is judged once and counted once, and what it says is neither healed nor spoiled.
func TestPackets(t *testing.T) {
	p := newPacketFuzzer(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	n := 0
	play := func(hook int, frame []byte) {
		n++
		if err := p.play(append([]byte{byte(hook)}, frame...)); err != nil {
			t.Fatalf("%v", err)
		}
	}
	end := time.Now().Add(fuzzTime())
	for _, marks := range []int{0, 128} {
		for i := range p.hooks {
			for _, frame := range p.seeds {
				play(marks|i, frame)
			}
		}
	}
	// An emulated machine has not played the seeds in that time. A thousand changed frames show the rest.
	for changed := 0; time.Now().Before(end) || len(p.seen) <= 30 && changed < 50_000; changed += 500 {
		marks := random.IntN(2) * 128
		for range 500 {
			play(marks|random.IntN(len(p.hooks)), mutate(random, p.seeds[random.IntN(len(p.seeds))]))
		}
	}
	t.Logf("ended as %q", slices.Sorted(stdmaps.Keys(p.seen)))
	require.Greater(t, len(p.seen), 30, "ways to end")
	promise.Kept(t, promise.Model, "Any frame whatsoever is judged and counted once; no byte behind its headers changes, and its checksums stay as right or as wrong as they were.",
		"%d changed frames at %d hooks, which ended in %d ways", n, len(p.hooks), len(p.seen))
}

// fuzzSeeds are packets of all kinds, some of flows that they open.
func fuzzSeeds(h *host) [][]byte {
	var out [][]byte
	for _, f := range families {
		a, b := f.addr(alice), f.addr(bob)
		outside, server := at(f.client, 50000), at(f.client2, 443)
		h.from(alice, packet.TCP(at(a, 40000), server, toGateway(alice)))
		h.from(alice, packet.UDP(at(a, 40000), server, toGateway(alice)))
		h.uplink(packet.TCP(outside, at(f.host, pubAlice), fromOutside))
		port := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
		data := packet.Payload([]byte("some data of an odd length, 39 bytes.."))
		out = append(out,
			packet.TCP(at(a, 40000), server, toGateway(alice), data), packet.UDP(at(a, 40000), server, toGateway(alice), data),
			packet.UDP(at(a, 40000), server, toGateway(alice), packet.SkewL4(3)), packet.TCP(at(a, 40000), server, toGateway(alice), packet.SkewIP(3)),
			packet.TCP(at(a, 80), outside, toGateway(alice), packet.Flags("SA")),
			packet.ICMPEcho(a, server.Addr(), 7, 1, toGateway(alice), data), packet.SCTP(at(a, 1), server, toGateway(alice)),
			packet.TCP(at(a, 40000), at(b, 80), toNeighbour(alice, bob)), packet.TCP(at(a, 40000), at(f.host, pubAlice), toGateway(alice)),
			packet.TCP(at(a, 40000), at(f.host, 22), toGateway(alice)),
			packet.UDP(at(a, 40000), server, toGateway(alice), packet.IPOptions(1, 1, 1, 0), packet.HopByHop()),
			packet.TCP(server, port, fromOutside, packet.Flags("SA"), data), packet.UDP(server, port, fromOutside, data),
			packet.TCP(outside, at(f.host, pubAlice), fromOutside), packet.UDP(outside, at(f.host, pubAlice), fromOutside, data),
			packet.ICMPError(f.foreign, f.host, f.timeExceeded, 0, packet.TCP(port, server), fromOutside),
			packet.ICMPError(f.foreign, f.host, f.tooBig, f.tooBigCode, packet.UDP(port, server, data), fromOutside, packet.MTU(1300)),
			packet.ICMPError(a, f.client2, f.unreach, 3, packet.UDP(server, at(a, 40000), data), toGateway(alice)),
			packet.ICMPEcho(server.Addr(), f.host, 7, 1, fromOutside), packet.TCP(outside, at(a, 80), fromOutside),
			packet.UDP(at(b, 1), at(a, 2), toNeighbour(bob, alice)), packet.TCP(at(f.gateway(netOne), 1), at(a, 2), routedTo(alice)),
		)
		out = append(out, packet.Fragment(packet.UDP(at(a, 40000), server, toGateway(alice), data), 24, 77)...)
		out = append(out, packet.Fragment(packet.UDP(server, port, fromOutside, data), 24, 77)...)
	}
	for _, f := range families {
		for _, slot := range []int{carol, ian, quinn, peggy} {
			own := f.addr(slot)
			for _, dst := range []netip.AddrPort{
				at(f.client2, 443), at(f.host, pubAlice), at(f.host, pubLate), at(f.host, 22), at(f.addr(alice), 80), at(f.addr(carol), 80), at(f.in(netOne, 99), 80),
				at(f.noRoute(), 80), at(f.loopback, 80), at(f.addr(ian), 80),
			} {
				out = append(out, packet.TCP(at(own, 40000), dst, toGateway(slot)), packet.UDP(at(own, 40000), dst, toGateway(slot)))
			}
			out = append(out, packet.TCP(at(f.client2, 443), at(own, 80), fromOutside), packet.SCTP(at(own, 1), at(f.host, pubSCTP), toGateway(slot)),
				packet.TCP(at(own, 40000), at(f.client2, 443), toGateway(slot), packet.Flags("R")), packet.UDP(at(f.addr(alice), 7), at(f.host, pubAlice), fromOutside),
				packet.TCP(at(f.foreign, 1), at(f.host, uint16(pubAlice+slot)), fromOutside), packet.TCP(at(f.noRoute(), 1), at(f.host, uint16(pubAlice+slot)), fromOutside),
				packet.TCP(at(own, 40000), at(f.addr(rita), 80), toNeighbour(slot, rita)), packet.TCP(at(own, 40000), at(f.addr(rita), 81), toNeighbour(slot, rita)))
		}
	}
	a6 := families[1].addr(alice)
	return append(out,
		packet.ARP(families[0].addr(alice), families[0].addr(bob), false, packet.MAC(macOf(alice), broadcast)),
		packet.NeighborSolicit(a6, families[1].addr(bob), packet.MAC(macOf(alice), broadcast)),
		withExtensions(packet.UDP(at(a6, 1), at(families[1].client2, 2), toGateway(alice)), 3),
		append(append(bytes.Clone(macOf(bob)), macOf(alice)...), 0x88, 0xcc, 0),
	)
}

// mutate changes, cuts, repeats or inserts bytes, mostly in the headers.
func mutate(random *rand.Rand, frame []byte) []byte {
	b := bytes.Clone(frame)
	for range 1 + random.IntN(4) {
		within := min(len(b), 14+60)
		i := random.IntN(within)
		if i < 12 && random.IntN(4) > 0 {
			i = 12 + random.IntN(max(1, within-12)) // wrong MACs end too soon
			i = min(i, len(b)-1)
		}
		switch random.IntN(8) {
		case 0, 1, 2:
			b[i] ^= 1 << random.IntN(8)
		case 3, 4:
			b[i] = []byte{0, 1, 0x7f, 0x80, 0xff, byte(random.Uint32())}[random.IntN(6)]
		case 5:
			b = b[:max(14, random.IntN(len(b)+1))]
		case 6:
			b = append(b, make([]byte, random.IntN(64))...)
		case 7:
			b = slices.Insert(b, i, byte(random.Uint32()))
		}
	}
	return b
}

// verdict runs the program and checks what must hold of every frame.
func (p *packetFuzzer) verdict(at sent, frame []byte) error {
	h := p.h
	if len(frame) < 14 || len(frame) > 2000 {
		return nil
	}
	r, err := h.tryRun(at.program, frame, at.ctx)
	if err != nil {
		if errors.Is(err, unix.EINVAL) && len(frame) < 14+40 {
			return nil // the kernel's own refusal of frames that end within the IP header
		}
		return fmtFrame(err.Error(), frame, nil)
	}
	after := h.counters()
	end, err := ended(at, r, after.since(p.last))
	p.last = after
	if err != nil {
		return fmtFrame(err.Error(), frame, r.out)
	}
	feedback(r.action, end)
	p.seen[end] = true
	if r.action == actShot {
		return nil
	}
	if strings.HasSuffix(at.program, "_l3") {
		return nil // its headers are elsewhere: what it writes is tried by tests of its own
	}
	return unspoiled(frame, r.out)
}

// ended says by which one counter a packet's end is told, and whether that is the end that the action says.
func ended(at sent, r result, moved counters) (string, error) {
	lost := dropped(noFragment, "uplink")
	if n := moved[lost]; at.hook == bpf.DatapathHookHOOK_UPLINK && (r.action != actShot || len(moved) > 1) && n > 0 {
		delete(moved, lost) // of earlier fragments, which this first one shows to have been a container's
	}
	end := ""
	for k, n := range moved {
		if end != "" || n != 1 {
			return "", fmt.Errorf("one packet at %s, and these counters moved: %v", at.program, moved)
		}
		end = k
	}
	fate := strings.HasPrefix(end, "fate ")
	if end != "" && !strings.HasSuffix(end, " "+hookName(at.hook)) {
		return "", fmt.Errorf("%s counts %q", at.program, end)
	}
	straight := strings.HasPrefix(end, "fate container ") || strings.HasPrefix(end, "fate uplink ") || strings.HasPrefix(end, "fate lo ")
	switch r.action {
	case actShot:
		if end == "" || fate {
			return "", fmt.Errorf("dropped by %s, but counted as %q", at.program, end)
		}
	case actRedirect:
		if at.hook == bpf.DatapathHookHOOK_TO_CONTAINER || !straight {
			return "", fmt.Errorf("redirected by %s, but counted as %q", at.program, end)
		}
	case actPass:
		if end != "" && (!fate || straight) || end == "" && at.hook == bpf.DatapathHookHOOK_CONTAINER {
			return "", fmt.Errorf("passed by %s, but counted as %q", at.program, end)
		}
	default:
		return "", fmt.Errorf("%s returned %d", at.program, r.action)
	}
	return end, nil
}

// feedback has a branch for each end of a packet, so that the fuzzer, which sees the branches of Go only, knows a
// packet that ended in a new way.
func feedback(action int32, end string) {
	var kind, hook string
	if _, err := fmt.Sscanf(end, "drop %s %s", &kind, &hook); err != nil {
		fmt.Sscanf(end, "fate %s %s", &kind, &hook)
	}
	h := 1 + slices.Index(hookNames, hook)
	n, err := strconv.Atoi(kind)
	if err != nil {
		n = 32 + slices.Index(fateNames, kind)
	}
	// Counters of branches are told apart by their power of two.
	for range 1 << (h & 7) {
		branch.Add(1)
	}
	for range 1 << (n & 7) {
		branch.Add(1)
	}
	switch n >> 3 {
	case 0:
		branch.Add(1)
	case 1:
		branch.Add(2)
	case 2:
		branch.Add(3)
	case 3:
		branch.Add(4)
	case 4:
		branch.Add(5)
	}
	switch action {
	case actShot:
		branch.Add(6)
	case actRedirect:
		branch.Add(7)
	}
}

var branch atomic.Uint64 // so that no branch is without effect

// unspoiled checks what a frame became that was let through.
func unspoiled(frame, out []byte) error {
	if len(out) != len(frame) {
		return fmtFrame("another length", frame, out)
	}
	if bytes.Equal(frame, out) {
		return nil
	}
	ip, l4, err := packet.Skew(frame)
	ip2, l42, err2 := packet.Skew(out)
	if (err == nil) != (err2 == nil) {
		return fmtFrame("parses no more, or only now", frame, out)
	}
	if err == nil && (ip != ip2 || l4 != l42) {
		return fmtFrame("checksum wrong by another difference", frame, out)
	}
	if packet.VerifyChecksums(frame) == nil {
		if err := packet.VerifyChecksums(out); err != nil {
			return fmtFrame(err.Error(), frame, out)
		}
	}
	if end := headersEnd(frame); end < len(frame) && !bytes.Equal(frame[end:], out[end:]) {
		return fmtFrame("data changed", frame, out)
	}
	return nil
}

// headersEnd is where no program has anything to write any more: behind the transport header, or
// behind the one that an ICMP error quotes.
func headersEnd(frame []byte) int {
	const longest = 60 // of an IPv4 or TCP header
	if len(frame) < 14+20 {
		return len(frame)
	}
	l3, l4 := 14, 14+40
	proto := frame[20]
	if frame[14]>>4 == 4 {
		l4 = l3 + int(frame[14]&15)*4
		proto = frame[23]
	} else if slices.Contains([]byte{0, 43, 44, 51, 60}, proto) {
		return len(frame) // behind extension headers: the checksums say enough
	}
	switch proto {
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return l4 + 8 + longest + 20
	}
	return l4 + 20
}

func fmtFrame(what string, in, out []byte) error {
	var b strings.Builder
	b.WriteString(what + "\nin\n" + hex.Dump(in))
	if out != nil {
		b.WriteString("out\n" + hex.Dump(out))
	}
	return errors.New(b.String())
}

// The fuzzer's judge must see what it is there for.
func TestFuzzJudge(t *testing.T) {
	src, dst := netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.2:2")
	frame := packet.UDP(src, dst, packet.Payload(make([]byte, 100)))
	require.Less(t, headersEnd(frame), len(frame))
	require.Equal(t, 34+20, headersEnd(frame))
}
