// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. Rates add up to the packets that were sent; blocks stand one below the other.
func TestStatsWatch(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue", "-p", "8080:80")
	w.sandbox(t, "peer", "blue")
	to, _ := w.b.Addrs(t, "web", "blue")
	peer := w.b.NS(t, "peer")
	type rates struct {
		Seconds    float64
		Containers []struct {
			Name   string
			Rx, Tx struct{ Packets float64 }
		}
		Ports []struct {
			Name        string
			Connections float64
		}
	}
	watch := w.b.StartCLI(t, "stats", "--watch", "--interval", "200ms", "-o", "json")
	sums := func() (lines int, rx, tx, connections float64) {
		s := watch.Stdout()
		for line := range strings.Lines(s[:strings.LastIndexByte(s, '\n')+1]) {
			var r rates
			require.NoError(t, json.Unmarshal([]byte(line), &r), line)
			lines++
			for _, c := range r.Containers {
				if c.Name == "web" {
					rx += c.Rx.Packets * r.Seconds
					tx += c.Tx.Packets * r.Seconds
				}
			}
			for _, p := range r.Ports {
				connections += p.Connections * r.Seconds
			}
		}
		return lines, rx, tx, connections
	}
	lab.Eventually(t, 10*time.Second, "it watches", func() bool { n, _, _, _ := sums(); return n > 0 })
	_, rx, tx, _ := sums()
	const pings = 50
	peer.MustRun(t, "ping", "-q", "-c", fmt.Sprint(pings), "-i", "0.002", to.String())
	for range 3 {
		w.Client.MustGet(t, "--network", "tcp", at(lab.Host4, 8080))
	}
	var lines int
	var connections float64
	lab.Eventually(t, 10*time.Second, "all were counted", func() bool {
		n, r, s, c := sums()
		lines, connections = n, c
		return r-rx > pings+2.5 && s-tx > pings+2.5 && c > 2.5
	})
	assert.InDelta(t, 3, connections, 0.01)
	require.NoError(t, watch.Signal(os.Interrupt))
	require.NoError(t, watch.Wait(10*time.Second), "an interrupt is no error")
	assert.Greater(t, lines, 1)

	text := w.b.StartCLI(t, "stats", "--watch", "--interval", "200ms", "web")
	lab.Eventually(t, 10*time.Second, "a block below the other", func() bool {
		return strings.Count(text.Stdout(), "per second, over 0.2 s\n") >= 3
	})
	assert.NotContains(t, text.Stdout(), "\x1b")
}
