// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. Connections from a container to one address and port at full rate, for twenty seconds: the
// masquerade never runs out, however they are closed.
func TestAcceptEgressFlood(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	// The container's own ports last for as long, too.
	w.idle(t, "peer", "blue", "--sysctl", "net.ipv4.tcp_tw_reuse=1", "--sysctl", "net.ipv4.ip_local_port_range=1024 65535")
	w.Client2.Serve(t, "--tcp", "7000")
	m := w.maps(t)
	peer := w.d.NS(t, "peer")
	for _, to := range []string{at(lab.Client24, 7000), at(lab.Client26, 7000)} {
		for _, end := range []string{"rst", "fin"} {
			t.Run(to+" "+end, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				before := readCounters(t, m)
				out, err := peer.Run(ctx, w.Tool, "flood-connect", "--workers", "4", "--close", end,
					"--duration", fmt.Sprintf("%ds", count(20)), "--timeout", "10s", to) // three SYNs: some may be lost
				require.NoError(t, err)
				var got struct {
					OK, Failed int
					Errors     map[string]int
				}
				require.NoError(t, json.Unmarshal([]byte(out), &got))
				t.Logf("%d connections; %v", got.OK, since(t, m, before).drops())
				require.Zero(t, got.Failed, "%v", got.Errors)
				require.Greater(t, got.OK, 1000*count(20)/2)
				require.Zero(t, since(t, m, before)["snat_exhausted/container"])
				require.Zero(t, since(t, m, before)["flow_table_full/container"])
			})
		}
	}
}

// Needs root. With nobody there to expire flows, a table of seconds is never in the way: twice as many
// flows as it has room for are served, one after another.
func TestAcceptSmallTable(t *testing.T) {
	const flows = 1024
	w := newSite(t, lab.Opts{}, lab.DockerOpts{}, "--flows", fmt.Sprint(flows),
		"--timeout", "tcp-syn=2s", "--timeout", "tcp-fin=2s", "--timeout", "tcp-closed=2s", "--timeout", "udp-new=2s", "--timeout", "udp=2s")
	w.serve(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.idle(t, "peer", "blue", "--sysctl", "net.ipv4.tcp_tw_reuse=1")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	m := w.maps(t)
	require.EqualValues(t, 2*flows, m.Map("flows4").MaxEntries())
	w.b.Kill()
	peer := w.d.NS(t, "peer")
	for _, c := range []struct {
		name string
		from *lab.NS
		to   string
	}{
		{"egress", peer, at(lab.Client24, 7000)},
		{"egress v6", peer, at(lab.Client26, 7000)},
		{"published", w.Client, at(lab.Host4, 8080)},
	} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(c.name+" "+network, func(t *testing.T) {
				table := "flows4"
				if strings.Contains(c.name, "v6") {
					table = "flows6" // smaller
				}
				total := int(m.Map(table).MaxEntries()) // two entries a flow: this is twice its size
				before := readCounters(t, m)
				start := time.Now()
				var slowest time.Duration
				for i := range total {
					took, err := exchange(c.from, network, c.to)
					require.NoError(t, err, "flow %d: %v", i, since(t, m, before))
					slowest = max(slowest, took)
				}
				v4, v6, err := m.Flows()
				require.NoError(t, err)
				t.Logf("%d flows in %v, the slowest %v; entries %d and %d; %v", total, time.Since(start), slowest, v4, v6, since(t, m, before).drops())
			})
		}
	}
}

// exchange is one flow of its own. Who gets no answer over UDP asks again, for five seconds, as a
// resolver does.
func exchange(from *lab.NS, network, to string) (time.Duration, error) {
	start := time.Now()
	c, err := dial(from, network, "", to)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 1024)
	for tries := 1; ; tries++ {
		if network == "udp" {
			if _, err := c.Write([]byte("hello")); err != nil {
				return 0, err
			}
			_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		} else {
			// The server speaks first. Where there was no room for the flow, its SYN-ACKs ask again: after 1, 3 and 7 s (RFC 6298).
			_ = c.SetReadDeadline(time.Now().Add(8 * time.Second))
		}
		_, err := c.Read(buf)
		if err == nil || network == "tcp" || tries == 10 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return time.Since(start), err
		}
	}
}
