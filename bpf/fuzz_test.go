// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes a network namespace and loads BPF programs (see datapath_host_test.go).
//
// Any frame whatsoever gets a verdict, and what it says is neither healed nor spoiled on the way.
package bpf_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

func FuzzFromContainer(f *testing.F) { fuzz(f, "from_container") }

func FuzzFromUplink(f *testing.F) { fuzz(f, "from_uplink") }

func FuzzToContainer(f *testing.F) { fuzz(f, "to_container") }

// mutations of the seeds that a plain test run adds.
const mutations = 3000

func fuzz(f *testing.F, program string) {
	h := newHost(f, 4096)
	ctx := map[string]skb{
		"from_container": {Ifindex: uint32(h.links[alice])},
		"from_uplink":    {Ifindex: uint32(h.up)},
		"to_container":   {Ifindex: uint32(h.links[alice]), IngressIfindex: uint32(h.links[bob])},
	}[program]
	seeds := fuzzSeeds(h)
	for _, frame := range seeds {
		f.Add(frame)
	}
	seed := rand.Uint64()
	f.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range mutations {
		if err := verdict(h, program, mutate(random, seeds[random.IntN(len(seeds))]), ctx); err != nil {
			f.Fatalf("%v", err)
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		h.t = t
		if err := verdict(h, program, frame, ctx); err != nil {
			t.Fatalf("%v", err)
		}
	})
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
func verdict(h *host, program string, frame []byte, ctx skb) error {
	if len(frame) < 14 || len(frame) > 2000 {
		return nil
	}
	r, err := h.tryRun(program, frame, ctx)
	if err != nil {
		if errors.Is(err, unix.EINVAL) && len(frame) < 14+40 {
			return nil // the kernel's own refusal of frames that end within the IP header
		}
		return fmtFrame(err.Error(), frame, nil)
	}
	switch r.action {
	case actShot:
		return nil
	case actPass, actRedirect:
	default:
		return fmtFrame("unknown action", frame, r.out)
	}
	if len(r.out) != len(frame) {
		return fmtFrame("another length", frame, r.out)
	}
	if bytes.Equal(frame, r.out) {
		return nil
	}
	ip, l4, err := packet.Skew(frame)
	ip2, l42, err2 := packet.Skew(r.out)
	if (err == nil) != (err2 == nil) {
		return fmtFrame("parses no more, or only now", frame, r.out)
	}
	if err == nil && (ip != ip2 || l4 != l42) {
		return fmtFrame("checksum wrong by another difference", frame, r.out)
	}
	if packet.VerifyChecksums(frame) == nil {
		if err := packet.VerifyChecksums(r.out); err != nil {
			return fmtFrame(err.Error(), frame, r.out)
		}
	}
	if end := headersEnd(frame); end < len(frame) && !bytes.Equal(frame[end:], r.out[end:]) {
		return fmtFrame("data changed", frame, r.out)
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
