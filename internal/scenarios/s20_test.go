// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bufio"
	"encoding/json"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s20: an Engine in a swarm. A service that publishes with mode=host is served as any container; doctor
// says what is not.
func s20(t *testing.T, w *world) {
	assert.Equal(t, "ok", w.finding(t, "swarm").State)
	noRegistry(t, w.Host)
	w.MustRun(t, "swarm", "init", "--advertise-addr", lab.Host4.String())
	t.Cleanup(func() { w.MustRun(t, "swarm", "leave", "--force") })
	found := w.finding(t, "swarm")
	assert.Equal(t, "note", found.State)
	assert.Contains(t, found.Detail, "mode=host are served")
	assert.Contains(t, found.Detail, "mode=ingress, the default, and overlay networks are not")

	w.MustRun(t, "service", "create", "--detach", "--no-resolve-image", "--name", "web", "--publish", "mode=host,published=8090,target=80",
		"--publish", "mode=host,published=8090,target=80,protocol=udp", lab.Image, "labtool", "serve", "--tcp", "80", "--udp", "80", "--text", "task")
	for _, network := range []string{"tcp", "udp"} {
		lab.Eventually(t, time.Minute, "the service answers by "+network, func() bool {
			r, err := w.Client.Get("--network", network, "--timeout", noAnswer.String(), addrPort(lab.Host4, "8090"))
			return err == nil && r.View.Text == "task" && remote(t, r) == lab.Client4
		})
		for _, to := range []string{"127.0.0.1:8090", "[::1]:8090"} {
			r := w.Host.MustGet(t, "--network", network, to)
			assert.Equal(t, "task", r.View.Text, "%s %s", network, to)
		}
	}

	// The bridge of the swarm is guarded like any other, and its containers' way out is masqueraded.
	w.MustRun(t, "run", "-d", "--name", "out", "--network", "docker_gwbridge", lab.Image, "labtool", "serve", "--tcp", "80", "--udp", "80")
	w.WaitLog(t, "out", "ready")
	w.ready(t, "out", "docker_gwbridge")
	w.Serve(t, "--name apart", "--tcp 80 --udp 80")
	out, apart := w.NS(t, "out"), w.v4(t, "apart", w.Default())
	w.closed(t, out, isolated, apart)
	w.closed(t, w.NS(t, "apart"), isolated, w.v4(t, "out", "docker_gwbridge"))
	w.closed(t, w.Client, drop{"direct_access", "uplink"}, w.v4(t, "out", "docker_gwbridge"))
	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	open(t, out, []netip.Addr{lab.HostB4}, lab.Internet4)
}

// finding is what doctor says of one check.
func (w *world) finding(t *testing.T, check string) (out struct{ Check, State, Detail, Fix string }) {
	t.Helper()
	text, _ := w.bpfnet.CLI("doctor", "-o", "json") // its exit status tells of others, too
	all := []struct{ Check, State, Detail, Fix string }{}
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		var in struct {
			Findings []struct{ Check, State, Detail, Fix string }
		}
		require.NoError(t, json.Unmarshal([]byte(text), &in), text)
		all = in.Findings
	}
	for _, f := range all {
		if f.Check == check {
			return f
		}
	}
	t.Fatalf("doctor says nothing of %s: %s", check, text)
	return out
}

// noRegistry lets the Engine know at once that no registry can be asked for an image. It waits for the
// name server's answer otherwise, twenty seconds at a time.
func noRegistry(t *testing.T, host *lab.NS) {
	t.Helper()
	f, err := os.Open("/etc/resolv.conf")
	require.NoError(t, err)
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil && !a.IsLoopback() {
			host.MustRun(t, "ip", "route", "add", "unreachable", a.String())
			t.Cleanup(func() { host.MustRun(t, "ip", "route", "del", "unreachable", a.String()) })
		}
	}
}
