// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// Needs root. Ports are counted by address, destination and holder; of the ranges, what is published or reserved has none.
func TestMasquerade(t *testing.T) {
	m := newMaps(t)
	w, err := NewWriter(m)
	require.NoError(t, err)
	s := settings()
	s.SNAT, s.Reserved = []PortRange{{First: 8000, Count: 100}, {First: 61000, Count: 10}}, map[uint16]struct{}{61003: {}, 5: {}}
	_, err = w.Apply(tables(), s) // publishes 8080
	require.NoError(t, err)
	out := testFlow{proto: unix.IPPROTO_TCP, hook: hookContainer, out: hookUplink, from: "10.1.0.2:4000", to: "203.0.113.9:443", flags: flowSNAT | flowNAT, packets: 1}
	for i, sent := range []string{"192.0.2.1:8000", "192.0.2.1:8001", "192.0.2.7:8000"} {
		f := out
		f.from, f.sentFrom = netip.AddrPortFrom(netip.MustParseAddr("10.1.0.2"), uint16(4000+i)).String(), sent
		f.put(t, m)
	}
	for _, f := range []testFlow{
		{proto: unix.IPPROTO_UDP, hook: hookContainer, out: hookUplink, from: "[fd01::2]:4000", to: "[2001:db8::9]:443", sentFrom: "[2001:db8::1]:8000", flags: flowSNAT | flowNAT, packets: 1},
		{proto: unix.IPPROTO_ICMP, hook: hookContainer, out: hookUplink, from: "10.1.0.2:7", to: "203.0.113.9:0", sentFrom: "192.0.2.1:8", flags: flowSNAT | flowNAT, packets: 1},
		// Who holds none: one to a published port, one that is not masqueraded, one of a protocol without ports.
		{proto: unix.IPPROTO_TCP, hook: hookUplink, out: hookContainer, from: "203.0.113.9:4000", to: "192.0.2.1:8080", sentTo: "10.1.0.2:80", flags: flowNAT, packets: 1},
		{proto: unix.IPPROTO_TCP, hook: hookContainer, out: hookUplink, from: "10.1.0.2:5000", to: "203.0.113.9:443", packets: 1},
		{proto: 50, hook: hookContainer, out: hookUplink, from: "10.1.0.2:0", to: "203.0.113.9:0", sentFrom: "192.0.2.1:0", flags: flowSNAT | flowNAT, packets: 1},
	} {
		f.put(t, m)
	}
	refused := make([]uint64, ebpf.MustPossibleCPU())
	refused[0] = 5
	require.NoError(t, m.m["snat_stats"].Put(m.m["snat_stats"].MaxEntries()-1, refused))
	got, err := m.Masquerade()
	require.NoError(t, err)
	require.Equal(t, s.SNAT, got.Ranges)
	require.Equal(t, 110-2, got.Ports)
	require.Equal(t, 32, got.Tries)
	require.EqualValues(t, 5, got.Refused)
	require.ElementsMatch(t, []MasqueradeUse{
		{unix.IPPROTO_TCP, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddrPort("203.0.113.9:443"), 3, 2},
		{unix.IPPROTO_TCP, netip.MustParseAddr("192.0.2.7"), netip.MustParseAddrPort("203.0.113.9:443"), 3, 1},
		{unix.IPPROTO_UDP, netip.MustParseAddr("2001:db8::1"), netip.MustParseAddrPort("[2001:db8::9]:443"), 3, 1},
		{unix.IPPROTO_ICMP, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddrPort("203.0.113.9:0"), 3, 1},
	}, got.Used)

	_, err = w.Apply(policy.Tables{}, s)
	require.NoError(t, err)
	got, err = m.Masquerade()
	require.NoError(t, err)
	require.Equal(t, 110-1, got.Ports, "8080 is free again")
}
