// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. The host starts anew, in the order of the systemd units: bpfnet, and when it is READY the
// Engine, whose containers have a restart policy. From before, a remote host sends to a container's address
// all the time, and from its first instruction a container of another network does. Nothing arrives.
//
//	client ── host (bpfnet, dockerd; blue: sink, web; red: rogue)
func TestSwitchBoot(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	// Nothing but bpfnet guards them.
	l.Host.MustRun(t, "iptables", "-P", "FORWARD", "ACCEPT")
	w := &site{Lab: l, d: l.StartDocker(t, lab.DockerOpts{})}
	for _, n := range []string{"blue", "red"} {
		subnet := map[string]string{"blue": "172.30.1.0/24", "red": "172.30.2.0/24"}[n]
		w.d.MustRun(t, "network", "create", "-o", "com.docker.network.bridge.name="+n+"0", "--subnet", subnet, n)
	}
	w.b = l.StartBpfnet(t, w.d)
	const sink = "172.30.1.9"
	target := fmt.Sprintf("%s:%d", sink, probePort)
	flood := []string{"udp-count", "--count", "1000000", "--interval", "2ms", target}
	run := func(name, network string, args ...string) {
		t.Helper()
		w.d.MustRun(t, append([]string{"run", "-d", "--restart", "always", "--name", name, "--hostname", name, "--network", network}, args...)...)
		w.ready(t, name)
	}
	run("sink", "blue", "--ip", sink, lab.Image, "labtool", "udp-sink", "--listen", fmt.Sprintf(":%d", probePort))
	run("web", "blue", "-p", "8080:80", lab.Image, "labtool", "serve", "--tcp", "80")
	run("rogue", "red", append([]string{lab.Image, "labtool"}, flood...)...)
	l.Client.Start(t, l.Tool, flood...)

	// The host goes down. What was in the kernel is gone, what was on disk is there.
	w.d.Stop(t)
	w.b.Stop(t)
	entries, err := os.ReadDir(l.BPFFS)
	require.NoError(t, err)
	for _, e := range entries {
		require.NoError(t, os.RemoveAll(filepath.Join(l.BPFFS, e.Name())))
	}
	for _, dev := range []string{"docker0", "blue0", "red0"} {
		l.Host.MustRun(t, "ip", "link", "del", dev)
	}

	// And up.
	w.b.Start(t)
	began := time.Now()
	m := w.maps(t)
	w.d.Start(t)
	for _, name := range []string{"sink", "web", "rogue"} {
		w.ready(t, name)
	}
	for _, why := range []string{"direct_access/uplink", "isolated/container"} {
		lab.Eventually(t, 10*time.Second, why+" is counted", func() bool { return readCounters(t, m)[why] > 200 })
	}
	t.Logf("probed for %v: %v", time.Since(began).Round(time.Millisecond), readCounters(t, m).drops())
	l.Client.MustGet(t, at(lab.Host4, 8080))

	// One that may, so that the sink is known to count.
	_, _ = w.d.Get("web", "--network", "udp", "--timeout", "100ms", target)
	w.d.MustRun(t, "stop", "sink")
	lines := strings.Split(strings.TrimSpace(w.d.MustRun(t, "logs", "sink")), "\n")
	var last struct{ Received int }
	require.NoError(t, json.Unmarshal([]byte(lines[len(lines)-1]), &last), lines)
	assert.Equal(t, 1, last.Received, "datagrams that reached the sink; %v", lines)
}
