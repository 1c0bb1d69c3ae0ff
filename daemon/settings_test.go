// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
)

func TestPlanMasquerade(t *testing.T) {
	p := planMasquerade(netdev.PortRange{First: 32768, Last: 60999}, []netdev.PortRange{{First: 5000, Last: 5001}})
	require.Equal(t, []bpfmaps.PortRange{{First: 1024, Count: 31744}, {First: 61000, Count: 4536}}, p.ranges)
	require.Equal(t, map[uint16]struct{}{5000: {}, 5001: {}}, p.reserved, "others' are not used")
	require.Nil(t, p.reserve, "the host leaves enough")

	// The host takes nearly all: 20,000 are taken out of its range, and the two never overlap.
	wide := netdev.PortRange{First: 1024, Last: 65000}
	p = planMasquerade(wide, nil)
	require.Equal(t, &netdev.PortRange{First: 45536, Last: 65000}, p.reserve)
	require.Equal(t, []bpfmaps.PortRange{{First: 45536, Count: 20000}}, p.ranges)

	// Read back, the reservation is joined with a neighbour's: still ours to use, and there already.
	joined := mergeRanges([]netdev.PortRange{{First: 45000, Last: 45535}}, *p.reserve)
	require.Equal(t, []netdev.PortRange{{First: 45000, Last: 65000}}, joined)
	p = planMasquerade(wide, joined)
	require.Len(t, p.reserved, 536)
	require.NotContains(t, p.reserved, uint16(45536))
	require.True(t, covers(joined, *p.reserve))
	require.False(t, covers([]netdev.PortRange{{First: 45000, Last: 60000}}, *p.reserve))
}

func TestTimeouts(t *testing.T) {
	got, err := Config{Timeouts: map[string]time.Duration{"udp": 5 * time.Second}}.timeouts()
	require.NoError(t, err)
	require.Equal(t, 5*time.Second, got["udp"])
	require.GreaterOrEqual(t, got["tcp-established"], 2*time.Hour+4*time.Minute, "RFC 5382 REQ-5")
	require.EqualValues(t, 5, toTicks(got["udp"]), "ticks of 1.07 s, rounded up")
	_, err = Config{Timeouts: map[string]time.Duration{"upd": time.Minute}}.timeouts()
	require.ErrorContains(t, err, `timeout "upd": unknown; use one of icmp, other,`)
	_, err = Config{Timeouts: map[string]time.Duration{"udp": time.Millisecond}}.timeouts()
	require.ErrorContains(t, err, "out of range; use 2s to 8760h")
}

// What the RFCs on translators ask of timeouts, and where the defaults are below: docs/nat-behaviour.md.
func TestNATTimeouts(t *testing.T) {
	ticks := tickTimeouts(defaultTimeouts)
	least := func(what string, got uint32, want time.Duration) {
		t.Helper()
		// A flow has expired when it has rested for more ticks than this.
		require.GreaterOrEqual(t, time.Duration(got)*tick, want, what)
	}
	least("RFC 4787 REQ-5", ticks.UDPNew, 2*time.Minute)
	least("RFC 4787 REQ-5", ticks.UDP, 2*time.Minute)
	least("RFC 5382 REQ-5, established", ticks.TCPEstablished, 2*time.Hour+4*time.Minute)
	least("RFC 5382 REQ-5, transitory", ticks.TCPFin, 4*time.Minute)
	least("RFC 5508 REQ-2", ticks.ICMP, time.Minute)
	// The deviations, on purpose: who changes them changes the document.
	require.Equal(t, time.Minute, defaultTimeouts["tcp-syn"])
	require.Equal(t, time.Minute, defaultTimeouts["tcp-closed"])
	require.Equal(t, 3*time.Minute, defaultTimeouts["udp"])
}
