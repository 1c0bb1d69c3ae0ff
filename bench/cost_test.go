// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// Needs root and a Docker Engine. The client of the group asks over UDP and ends with the first datagram that is lost, and
// the group counts endpoints and flows after each restart.
func TestRestart(t *testing.T) {
	const endpoints, flows = 100, 50_000
	got := measureAll(t, restartOf(endpoints, flows, 2*flows))
	at := func(metric string) float64 {
		v, ok := got[Key{Scenario: Restart, Mode: Bpfnet, Metric: metric, At: endpoints}]
		require.True(t, ok, metric)
		return v
	}
	require.Positive(t, at("p99"))
	require.Positive(t, at("p99-quiet"))
	promise.Kept(t, promise.Cost, "A restart of the daemon loses no packet, and its tables stay as full as they are.",
		"%d endpoints, %d flows: reconciled in %v, p99 of requests meanwhile %.2f of the quiet one", endpoints, flows,
		time.Duration(at("reconciled")*1e9).Round(time.Millisecond), at("p99")/at("p99-quiet"))
}

// Needs root. Each way to drop drops what is made, and one that does not is no measurement.
func TestDrop(t *testing.T) {
	lab.NeedRoot(t)
	records := measured(t, dropGroup())
	for _, mode := range dropModes {
		rec := records[Key{Scenario: Drop, Mode: mode, Family: 4, Metric: "drops"}]
		require.Equal(t, "1/s", rec.Unit)
		require.Positive(t, rec.CPU.Median)
	}

	d := newDropper(t, RawDrop)
	d.lab.Host.MustRun(t, "iptables", "-t", "raw", "-I", "PREROUTING", "-j", "ACCEPT")
	_, err := d.probe(shortly).Measure(t.Context())
	require.ErrorContains(t, err, "0 of ")

	drops := func(mode string) float64 {
		return records[Key{Scenario: Drop, Mode: mode, Family: 4, Metric: "drops"}].Median
	}
	better := max(drops(RawDrop), drops(NetdevDrop))
	promise.Kept(t, promise.Cost, "The shield drops what is denied before the kernel has made a packet of it.",
		"%.2f million packets a second and CPU, %.1f times as many as a rule of nftables or iptables", drops(Bpfnet)/1e6, drops(Bpfnet)/better)
}

// Needs root and a Docker Engine. The flood is of whole SYNs, reaches the container, and leaves room for others.
func TestFlood(t *testing.T) {
	lab.NeedRoot(t)
	p := newFlooded(t, Bpfnet)
	f := p.newFlood(t, floodRate/10, 500*time.Millisecond)
	for range 100 {
		randomSource(f.frame)
		require.NoError(t, packet.VerifyChecksums(f.frame))
	}
	asked := func() (n uint64) {
		require.NoError(t, p.at.Do(func() error {
			b, err := os.ReadFile("/proc/thread-self/net/netstat")
			if err != nil {
				return err
			}
			lines := strings.Split(string(b), "\n") // TcpExt: names, then values
			i := slices.Index(strings.Fields(lines[0]), "TCPReqQFullDoCookies")
			_, err = fmt.Sscan(strings.Fields(lines[1])[i], &n)
			return err
		}))
		return n
	}
	before := asked()
	s, err := f.crr(t.Context(), 100*time.Millisecond)
	require.NoError(t, err)
	require.Positive(t, s.Value)
	require.Greater(t, asked(), before, "no SYN of the flood found the container's queue full")
}

// Needs root and a Docker Engine. All watchers look on while both are measured, and one that has ended is no measurement.
func TestWatched(t *testing.T) {
	lab.NeedRoot(t)
	got := measureAll(t, watchedGroup())
	for _, metric := range []string{"rr", "crr"} {
		for _, n := range []int{0, 3} {
			require.Positive(t, got[Key{Scenario: Watched, Mode: Bpfnet, Family: 4, Metric: metric, At: n}], "%s at %d", metric, n)
		}
	}

	s := newSpot(t, Bpfnet, spotOpts{})
	stands := s.watch(t)
	require.NoError(t, stands())
	s.bpfnet.Kill()
	lab.Eventually(t, 10*time.Second, "reading /metrics fails", func() bool { return stands() != nil })
	require.ErrorContains(t, stands(), "reading /metrics has ended: ")
}
