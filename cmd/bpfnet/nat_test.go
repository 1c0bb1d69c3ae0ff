// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/maps"
)

func sampleMasquerade() maps.Masquerade {
	host, other := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1")
	https, dns := netip.MustParseAddrPort("203.0.113.9:443"), netip.MustParseAddrPort("203.0.113.10:53")
	return maps.Masquerade{
		Ranges: []maps.PortRange{{First: 1024, Count: 100}, {First: 65000, Count: 100}}, Ports: 160, Tries: 32, Refused: 7,
		Used: []maps.MasqueradeUse{
			{Proto: protoUDP, From: host, To: dns, Endpoint: 9, Ports: 16},
			{Proto: protoTCP, From: host, To: https, Endpoint: 8, Ports: 40},
			{Proto: protoTCP, From: host, To: https, Endpoint: 9, Ports: 110},
			{Proto: protoTCP, From: other, To: https, Endpoint: 9, Ports: 1},
			{Proto: protoTCP, From: host, To: dns, Endpoint: 9, Ports: 160},
			{Proto: protoICMP, From: host, To: netip.MustParseAddrPort("203.0.113.9:0"), Endpoint: 99, Ports: 2},
		},
	}
}

func TestNATOutput(t *testing.T) {
	for name, args := range map[string][]string{
		"nat.txt":       {"nat"},
		"nat.json":      {"nat", "-o", "json"},
		"nat-limit.txt": {"nat", "--limit", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			w := readable(t)
			w.counters.masquerade = sampleMasquerade()
			golden(t, filepath.Join("testdata", name), w.must(args...))
		})
	}
	w := readable(t)
	require.Equal(t, "Ports:     0 towards each destination (no range)\nRefused:   0 packets (snat_exhausted)\n\n"+
		"PROTO   FROM   TO   TAKEN   ROOM   FULL   REFUSAL   MOST BY\n", w.must("nat"))
	assert.Contains(t, w.fails(statusUsage, "nat", "--limit", "-2"), "--limit -2: want a number of destinations, or 0")
	assert.Contains(t, w.fails(statusUsage, "nat", "web"), `unexpected argument "web"`)
}

// The chance of being refused is that of finding none of the free ports in so many tries, of all that are in the ranges.
func TestRefusal(t *testing.T) {
	n := natOf(sampleMasquerade(), sampleSnapshot())
	require.Len(t, n.Destinations, 5)
	full, busy, last := n.Destinations[0], n.Destinations[1], n.Destinations[4]
	assert.Equal(t, [2]float64{1, 1}, [2]float64{full.Full, full.Refusal})
	assert.Equal(t, [2]any{150, "web"}, [2]any{busy.Taken, busy.Most})
	assert.Equal(t, 110, busy.MostTaken)
	assert.InDelta(t, 0.9375, busy.Full, 1e-9)
	assert.InDelta(t, 0.19371148445850067, busy.Refusal, 1e-9, "(190/200)^32")
	assert.Equal(t, [2]any{"icmp", maps.EchoIdentifiers}, [2]any{last.Proto, last.Room})
	assert.Empty(t, last.Most, "nobody is known by that slot")
}
