// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root and a Docker Engine. Moby's tests of what is left when a container goes or a daemon restarts,
// under their own names. The container "early" runs before bpfnet starts; the Engine has its own docker-proxy.
func TestMobyHygiene(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	w := &site{Lab: l, d: l.StartDocker(t, lab.DockerOpts{Proxy: true})}
	w.networks(t)
	w.serve(t, "early", "blue", "--restart", "always", "-p", "8080:80", "-p", "5300:80/udp")
	w.b = l.StartBpfnet(t, w.d)
	w.idle(t, "peer", "red", "--restart", "always")
	for _, test := range []struct {
		name string
		run  func(t *testing.T, w *site)
	}{
		{"TestConntrackFlowsLeak", mobyFlowsLeak},
		{"TestPublishedPortAlreadyInUse", mobyPortInUse},
		{"TestRestartUserlandProxyUnder2MSL", mobyUnder2MSL},
		{"TestPortMappingRestore", mobyRestore},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, w) })
	}
}

// reaches wants the container behind a published TCP port, from outside, another network and the host.
func (w *site) reaches(t *testing.T, container string, port int) {
	t.Helper()
	for _, from := range []*lab.NS{w.Client, w.d.NS(t, "peer"), w.Host} {
		assert.Equal(t, container, from.MustGet(t, at(lab.Host4, port)).View.Host, from.Name)
		assert.Equal(t, container, from.MustGet(t, at(lab.Host6, port)).View.Host, from.Name)
	}
	assert.Equal(t, container, w.Host.MustGet(t, fmt.Sprintf("127.0.0.1:%d", port)).View.Host)
}

// The flow of a published UDP port is gone with its container, here and in the kernel's own table. Host
// port and container port differ, where the Engine itself fails (moby#53384).
func mobyFlowsLeak(t *testing.T, w *site) {
	m := w.maps(t)
	flows := func() int {
		v4, v6, err := m.Flows()
		require.NoError(t, err)
		return v4 + v6
	}
	w.serve(t, "leak", "blue", "-p", "5400:80/udp")
	w.published(t, "leak", "5400/udp")
	before := flows()
	for _, from := range []*lab.NS{w.Client, w.d.NS(t, "peer")} {
		require.Equal(t, "leak", from.MustGet(t, "--network", "udp", at(lab.Host4, 5400)).View.Host)
	}
	require.Equal(t, before+4, flows(), "two entries each")
	w.d.MustRun(t, "rm", "-f", "leak")
	w.forgotten(t, "leak")
	assert.Equal(t, before, flows())
	for _, entry := range w.Conntrack(t) {
		assert.NotContains(t, entry, "dport=5400")
	}
}

// A second container on the same host port does not start, and says why; it starts when the first has gone.
func mobyPortInUse(t *testing.T, w *site) {
	_, err := w.d.Run("run", "-d", "--name", "second", "--hostname", "second", "--network", "red", "-p", "8080:80", lab.Image, "labtool", "serve", "--tcp", "80")
	require.ErrorContains(t, err, "port is already allocated")
	assert.Equal(t, "created", w.d.Inspect(t, "second", "{{.State.Status}}"))
	w.reaches(t, "early", 8080)
	w.d.MustRun(t, "stop", "-t", "0", "early")
	w.d.MustRun(t, "start", "second")
	w.d.WaitLog(t, "second", "ready")
	w.published(t, "second", "8080/tcp")
	assert.Equal(t, "second", w.Client.MustGet(t, at(lab.Host4, 8080)).View.Host)

	// A program of the host holds it.
	w.Host.Serve(t, "--tcp", "8081")
	_, err = w.d.Run("run", "-d", "--name", "third", "-p", "8081:80", lab.Image, "sleep", "1000")
	require.ErrorContains(t, err, "address already in use")
	w.d.MustRun(t, "rm", "-f", "second", "third")
	w.d.MustRun(t, "start", "early")
	w.published(t, "early", "8080/tcp", "5300/udp")
	lab.Eventually(t, 10*time.Second, "early serves again", func() bool {
		r, err := w.Client.Get(at(lab.Host4, 8080))
		return err == nil && r.View.Host == "early"
	})
}

// A container is restarted while its connections are in TIME_WAIT: the port is free at once.
func mobyUnder2MSL(t *testing.T, w *site) {
	for range count(20) {
		w.reaches(t, "early", 8080)
		w.d.MustRun(t, "restart", "-t", "0", "early")
		w.published(t, "early", "8080/tcp", "5300/udp")
		lab.Eventually(t, 10*time.Second, "early serves again", func() bool {
			r, err := w.Client.Get(at(lab.Host4, 8080))
			return err == nil && r.View.Host == "early"
		})
	}
	w.reaches(t, "early", 8080)
}

// Ports are there again after a restart of either daemon: without live-restore the Engine's containers
// start anew (with it, see TestAcceptEngine).
func mobyRestore(t *testing.T, w *site) {
	ports := func() string {
		lines := strings.Split(w.d.MustRun(t, "port", "early"), "\n")
		slices.Sort(lines)
		return strings.Join(lines, " ")
	}
	listed := ports()
	require.Contains(t, listed, "80/tcp -> 0.0.0.0:8080")
	open := w.Client.Talk(t, "--timeout", "10s", at(lab.Host4, 8080))
	udp := w.Client.Talk(t, "--network", "udp", at(lab.Host4, 5300))
	require.Equal(t, "early", udp.Say(t, "hello").View.Host)

	w.b.Restart(t)
	assert.Equal(t, "hello", open.Say(t, "hello").Text, "a restart of bpfnet ends nothing")
	w.reaches(t, "early", 8080)

	w.d.Restart(t)
	w.ready(t, "early")
	w.ready(t, "peer")
	w.published(t, "early", "8080/tcp", "5300/udp")
	assert.Equal(t, listed, ports())
	lab.Eventually(t, 10*time.Second, "early serves again", func() bool {
		r, err := w.Client.Get(at(lab.Host4, 8080))
		return err == nil && r.View.Host == "early"
	})
	w.reaches(t, "early", 8080)
	r := open.Say(t, "hello")
	if r.Errno == "" { // its end was announced
		r = open.Say(t, "hello")
	}
	assert.True(t, isReset(r), "%+v", r)
	assert.Equal(t, "early", udp.Say(t, "hello").View.Host)
}
