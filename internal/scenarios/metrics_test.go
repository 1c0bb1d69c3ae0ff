// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// scrape reads the metrics of a daemon by its socket, as series and value.
func (w *site) scrape(t *testing.T) map[string]float64 {
	t.Helper()
	return scrapeBy(t, func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", w.b.Socket)
	})
}

func scrapeBy(t *testing.T, dial func(context.Context) (net.Conn, error)) map[string]float64 {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableKeepAlives: true,
	}}
	resp, err := client.Get("http://bpfnet/metrics")
	require.NoError(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode, "%s", text)
	out := make(map[string]float64)
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndexByte(strings.TrimSpace(line), ' ')
		out[line[:at]], err = strconv.ParseFloat(strings.TrimSpace(line[at+1:]), 64)
		require.NoError(t, err, line)
	}
	return out
}

// Needs root. Metrics are what stats shows, go on over a restart of the daemon, and go with the container. A
// taken port is named with its owner, and all else runs.
func TestMetrics(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	owner := l.Host.Serve(t, "--tcp", "9633")
	file := filepath.Join(l.Dir, "config.yaml")
	require.NoError(t, os.WriteFile(file, []byte("metrics-listen: 127.0.0.1:9633\n"), 0o600))
	w := ownSite(t, l, "--config", file)
	lab.Eventually(t, 10*time.Second, "the owner of the port in the log", func() bool {
		return strings.Contains(w.b.Log(), fmt.Sprintf("in use by labtool (pid %d); stop that, or choose another port", owner.PID()))
	})
	w.sandbox(t, "web", "blue", "-p", "8080:80")
	w.sandbox(t, "client", "blue")
	v4, _ := w.b.Addrs(t, "web", "blue")
	for range 3 {
		w.b.MustGet(t, "client", "--bind", "0.0.0.0:0", v4.String()+":80")
	}
	const (
		received = `bpfnet_endpoint_receive_bytes_total{container="web",network="blue"}`
		port     = `bpfnet_published_port_connections_total{container="web",host="0.0.0.0:8080",network="blue",proto="tcp"}`
	)
	var stats struct {
		Containers []struct {
			Name    string
			RxBytes uint64 `json:"rx_bytes"`
		}
	}
	var got map[string]float64
	// Neighbour discovery goes on: the two are compared when nothing comes between.
	lab.Eventually(t, 10*time.Second, "metrics that agree with stats", func() bool {
		before := w.scrape(t)
		w.b.StatsJSON(t, &stats)
		got = w.scrape(t)
		for _, c := range stats.Containers {
			if c.Name == "web" && c.RxBytes > 0 {
				return before[received] == float64(c.RxBytes) && got[received] == float64(c.RxBytes)
			}
		}
		return false
	})
	assert.Contains(t, got, port)
	assert.EqualValues(t, 2, got[`bpfnet_endpoints{network="blue",state="ready"}`])
	assert.Positive(t, got["bpfnet_reconcile_duration_seconds_count"])
	assert.Zero(t, got["bpfnet_reconcile_errors_total"])
	assert.GreaterOrEqual(t, got[`bpfnet_map_entries{map="endpoints"}`], 4.0, "two families each")
	fast := 0.0
	for series, v := range got {
		if strings.HasPrefix(series, `bpfnet_forwarded_packets_total{fate="container"`) {
			fast += v
		}
	}
	assert.Positive(t, fast)

	owner.Kill()
	w.b.Restart(t)
	again := w.scrape(t)
	for series, v := range got {
		if strings.HasPrefix(series, "bpfnet_endpoint_") || strings.HasPrefix(series, "bpfnet_published_port_") || strings.HasPrefix(series, "bpfnet_forwarded_") {
			assert.GreaterOrEqual(t, again[series], v, series)
		}
	}
	// The port is free now.
	byPort := scrapeBy(t, func(ctx context.Context) (c net.Conn, err error) {
		lab.Eventually(t, 10*time.Second, "a listener on port 9633", func() bool {
			_ = w.Host.Do(func() error { c, err = net.Dial("tcp", "127.0.0.1:9633"); return nil })
			return err == nil
		})
		return c, err
	})
	assert.GreaterOrEqual(t, byPort[received], got[received])

	// The configuration is read again: a broken one changes nothing.
	require.NoError(t, os.WriteFile(file, []byte("metrics-limit: 1\nmetrics-lisen: 127.0.0.1:9633\n"), 0o600))
	require.NoError(t, syscall.Kill(w.b.PID(), syscall.SIGHUP))
	lab.Eventually(t, 10*time.Second, "a refused configuration", func() bool {
		return strings.Contains(w.b.Log(), "config.yaml:2: metrics-lisen: no such key; the nearest are metrics-listen,")
	})
	assert.Zero(t, w.scrape(t)[`bpfnet_metrics_folded{kind="container"}`])
	require.NoError(t, os.WriteFile(file, []byte("metrics-limit: 1\nmetrics-listen: 127.0.0.1:9633\nflows: 5000\n"), 0o600))
	require.NoError(t, syscall.Kill(w.b.PID(), syscall.SIGHUP))
	lab.Eventually(t, 10*time.Second, "one container that is over the limit", func() bool {
		return w.scrape(t)[`bpfnet_metrics_folded{kind="container"}`] == 1
	})
	assert.Contains(t, w.b.Log(), "applied=metrics-limit needs_a_restart=flows")

	w.b.MustCLI(t, "rm", "--force", "web")
	for series := range w.scrape(t) {
		assert.NotContains(t, series, `container="web"`)
	}
}
