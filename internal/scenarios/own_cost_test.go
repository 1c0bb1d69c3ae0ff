// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// sample are the times that one thing took, again and again.
type sample []time.Duration

func (s sample) quantile(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(s))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func (s sample) String() string {
	return fmt.Sprintf("p50 %.1f ms, p99 %.1f ms, of %d", ms(s.quantile(0.5)), ms(s.quantile(0.99)), len(s))
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func timed(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

// nominal is what one yardstick took, half of the time, on the machine that the limits below were
// set on.
const nominal = 50 * time.Millisecond

// yardstick says how fast the machine is, at this moment, at what all of this is made of: a small
// file made durable, a veth pair made and deleted, and the processor's work, of which five starts of
// the command stand for a typical share. It returns a limit in this machine's time: longer where the
// yardstick is, never shorter.
func yardstick(t *testing.T, w *site) (limit func(time.Duration) time.Duration) {
	t.Helper()
	l := w.Lab
	f, err := os.Create(filepath.Join(l.Dir, "yardstick"))
	require.NoError(t, err)
	defer f.Close()
	var syncs, veths, processes sample
	for range 20 {
		syncs = append(syncs, timed(func() {
			_, err := f.Write(make([]byte, 4096))
			require.NoError(t, err)
			require.NoError(t, f.Sync())
		}))
		veths = append(veths, timed(func() {
			l.Host.MustRun(t, "ip", "link", "add", "yard0", "type", "veth", "peer", "name", "yard1")
			l.Host.MustRun(t, "ip", "link", "del", "yard0")
		}))
		processes = append(processes, timed(func() { w.b.MustCLI(t, "--help") }))
	}
	took := syncs.quantile(0.5) + veths.quantile(0.5) + 5*processes.quantile(0.5)
	slow := max(1, float64(took)/float64(nominal))
	t.Logf("yardstick %.2f times the nominal: write and fsync: %v; veth added and deleted: %v; bpfnet --help: %v", slow, syncs, veths, processes)
	return func(d time.Duration) time.Duration { return time.Duration(float64(d) * slow) }
}

// Needs root. "bpfnet run --rm -- true" takes 100 ms at most, half of the time.
func TestOwnCostRun(t *testing.T) {
	w := newOwnSite(t)
	limit := yardstick(t, w)
	var took sample
	for range max(count(200), 50) {
		took = append(took, timed(func() { w.b.MustCLI(t, "run", "--rm", "--", "true") }))
	}
	t.Logf("run --rm -- true: %v", took)
	require.LessOrEqual(t, took.quantile(0.5), limit(100*time.Millisecond))

	var published sample
	for range max(count(100), 20) {
		published = append(published, timed(func() {
			w.b.MustCLI(t, "run", "--rm", "--network", "blue", "--network", "red", "-p", "8080:80", "--", "true")
		}))
	}
	t.Logf("run with two networks, IPv6 and a port: %v", published)
}

// Needs root. "network create" takes 50 ms at most, half of the time, where there are 500 already.
func TestOwnCostNetworks(t *testing.T) {
	w := newOwnSite(t)
	const networks = 500
	var first, last sample
	for i := range networks {
		took := timed(func() {
			w.b.MustCLI(t, "network", "create", "--subnet", fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250), fmt.Sprintf("n%d", i))
		})
		if i < 50 {
			first = append(first, took)
		}
	}
	limit := yardstick(t, w)
	for i := range 50 { // none removed meanwhile: the kernel's end of a bridge holds up the next one's beginning
		last = append(last, timed(func() {
			w.b.MustCLI(t, "network", "create", "--subnet", fmt.Sprintf("10.200.%d.0/24", i), fmt.Sprintf("more%d", i))
		}))
	}
	t.Logf("network create, the first: %v; with %d present: %v", first, networks, last)
	var pooled sample
	for i := range 10 { // from the pools, which have about 30 subnets
		pooled = append(pooled, timed(func() { w.b.MustCLI(t, "network", "create", fmt.Sprintf("pooled%d", i)) }))
	}
	t.Logf("with a subnet of the pools: %v", pooled)
	require.LessOrEqual(t, last.quantile(0.5), limit(50*time.Millisecond))
	require.LessOrEqual(t, pooled.quantile(0.5), limit(50*time.Millisecond))
}

// Needs root. A daemon that finds 1,000 endpoints in its store has them in its tables after a second.
// The kernel has its programs from the start before.
func TestOwnCostStart(t *testing.T) {
	w := newOwnSite(t)
	const networks, sandboxes = 10, 100
	rounds := max(count(50), 5)
	starts := func() (s sample) {
		for i := range rounds {
			if i%2 == 0 {
				w.b.Stop(t)
			} else {
				w.b.Kill()
			}
			s = append(s, timed(func() { w.b.Start(t) }))
		}
		return s
	}
	empty := starts()
	var attach []string
	for i := range networks {
		name := fmt.Sprintf("n%d", i)
		w.b.MustCLI(t, "network", "create", "--subnet", fmt.Sprintf("10.100.%d.0/24", i), name)
		attach = append(attach, "--network", name)
	}
	for i := range sandboxes {
		w.b.MustCLI(t, append(append([]string{"run", "-d", "--name", fmt.Sprintf("s%d", i)}, attach...), "--", "sleep", "100000")...)
	}
	require.Equal(t, networks*sandboxes, w.readyEndpoints(t))
	limit := yardstick(t, w)
	took := starts()
	require.Equal(t, networks*sandboxes, w.readyEndpoints(t), "READY=1 is said when all are")
	t.Logf("from exec to READY=1: %v; with %d endpoints: %v; resident %d KiB", empty, networks*sandboxes, took, lab.ResidentKiB(t, w.b.PID()))
	require.LessOrEqual(t, took.quantile(0.5), limit(time.Second))
}

// readyEndpoints counts the endpoints that take packets.
func (w *site) readyEndpoints(t *testing.T) (n int) {
	t.Helper()
	for _, e := range w.b.Snapshot(t).Endpoints {
		if e.Ready {
			n++
		}
	}
	return n
}
