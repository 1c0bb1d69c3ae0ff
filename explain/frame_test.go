// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/policy"
)

// Frames are those that the tests' own, independent builder makes, where both know how; their checksums are right.
func TestFrame(t *testing.T) {
	link := Link{Src: policy.MAC{2, 0, 0, 0, 0, 1}, Dst: policy.MAC{2, 0, 0, 0, 0, 2}}
	for _, pair := range [][2]string{{"10.1.0.2", "203.0.113.9"}, {"fd01::2", "2001:db8:f::9"}} {
		a, b := netip.MustParseAddr(pair[0]), netip.MustParseAddr(pair[1])
		src, dst := netip.AddrPortFrom(a, 40000), netip.AddrPortFrom(b, 443)
		macs := packet.MAC(net.HardwareAddr(link.Src[:]), net.HardwareAddr(link.Dst[:]))
		icmp := policy.Proto(unix.IPPROTO_ICMP)
		if a.Is6() {
			icmp = unix.IPPROTO_ICMPV6
		}
		for name, c := range map[string]struct {
			p    policy.Packet
			want []byte // nil: only its checksums are looked at
		}{
			"SYN":     {policy.Packet{Proto: policy.TCP, Tuple: policy.Tuple{Src: src, Dst: dst}}, packet.TCP(src, dst, macs, packet.Seq(0, 0))},
			"SYN-ACK": {policy.Packet{Proto: policy.TCP, Tuple: policy.Tuple{Src: src, Dst: dst}, Answer: true}, packet.TCP(src, dst, macs, packet.Seq(0, 0), packet.Flags("SA"))},
			"reset":   {policy.Packet{Proto: policy.TCP, Tuple: policy.Tuple{Src: src, Dst: dst}, Reset: true}, packet.TCP(src, dst, macs, packet.Seq(0, 0), packet.Flags("R"))},
			"UDP":     {policy.Packet{Proto: policy.UDP, Tuple: policy.Tuple{Src: src, Dst: dst}}, packet.UDP(src, dst, macs, packet.Payload(nil))},
			"SCTP":    {policy.Packet{Proto: policy.SCTP, Tuple: policy.Tuple{Src: src, Dst: dst}}, nil},
			"echo": {policy.Packet{Proto: icmp, Tuple: policy.Tuple{Src: src, Dst: netip.AddrPortFrom(b, 0)}},
				packet.ICMPEcho(a, b, 40000, 1, macs, packet.Payload(nil))},
			"echo reply": {policy.Packet{Proto: icmp, Tuple: policy.Tuple{Src: netip.AddrPortFrom(a, 0), Dst: dst}},
				packet.ICMPEchoReply(a, b, 443, 1, macs, packet.Payload(nil))},
		} {
			got := Frame(c.p, link)
			require.NoError(t, packet.VerifyChecksums(got), "%s %s", name, a)
			if c.want != nil {
				assert.Equal(t, c.want[:len(got)], got, "%s %s", name, a) // without padding
			}
		}
	}
}

func TestDiffer(t *testing.T) {
	to := netip.MustParseAddrPort("10.1.0.2:80")
	v := policy.Verdict{Path: policy.PathContainer, Endpoint: 1, Port: 2, To: to}
	o := Outcome{Path: policy.PathContainer, Endpoint: 1, Port: 2, Src: netip.MustParseAddrPort("203.0.113.9:40000"), Dst: to}
	require.Empty(t, Differ(v, o))
	for want, change := range map[string]func(v *policy.Verdict, o *Outcome){
		"policy says container, the data path dropped as isolated": func(_ *policy.Verdict, o *Outcome) { o.Path, o.Reason = policy.PathNone, "isolated" },
		"policy says dropped as isolated, the data path container": func(v *policy.Verdict, _ *Outcome) { v.Path, v.Reason = policy.PathNone, "isolated" },
		"endpoint 3 gets it":                func(v *policy.Verdict, _ *Outcome) { v.Endpoint = 3 },
		"published port 2, the data path 0": func(_ *policy.Verdict, o *Outcome) { o.Port = 0 },
		"arrives at 10.1.0.3:80":            func(v *policy.Verdict, _ *Outcome) { v.To = netip.MustParseAddrPort("10.1.0.3:80") },
		"hidden: true, the data path false": func(v *policy.Verdict, _ *Outcome) { v.SNAT = true },
		"leaves as 192.0.2.1, the data path 203.0.113.9": func(v *policy.Verdict, o *Outcome) {
			v.SNAT, o.SNAT, v.Source = true, true, netip.MustParseAddr("192.0.2.1")
		},
	} {
		v, o := v, o
		change(&v, &o)
		assert.Contains(t, Differ(v, o), want)
	}
	o.Path, o.Reason = policy.PathNone, "flow_table_full"
	assert.Empty(t, Differ(v, o), "no table tells of it")
	assert.True(t, ByState(v, o))
	o.Reason = "port_not_ready"
	assert.NotEmpty(t, Differ(v, o), "it is published")
	v.Path = policy.PathHost
	assert.Empty(t, Differ(v, o), "the Engine's socket has it")
}
