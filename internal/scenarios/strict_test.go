// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// programsAt counts the programs of strict mode at a cgroup.
func programsAt(t *testing.T, dir string) (n int) {
	t.Helper()
	f, err := os.Open(dir)
	require.NoError(t, err)
	defer f.Close()
	for _, at := range []ebpf.AttachType{ebpf.AttachCGroupInetEgress, ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetSockCreate} {
		res, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: at})
		require.NoError(t, err)
		n += len(res.Programs)
	}
	return n
}

// Needs root. In strict mode the containers of a network that was made while no daemon runs have no
// traffic either, not even among themselves, until there is a daemon; those that are READY, and those
// that share the host's network, do not notice.
func TestStrict(t *testing.T) {
	w := newWindow(t, false)
	w.noFrames = true
	containers := filepath.Join(w.Cgroup, "containers")
	w.d.Serve(t, "--name", "old", "--network", "host", "--", "--tcp", "8001", "--udp", "8001")
	w.b = w.StartBpfnet(t, w.d, "--strict-cgroup", containers)
	for _, n := range w.networks {
		w.site().ready(t, "in-"+n)
	}
	require.Equal(t, 3, programsAt(t, containers))
	known := w.start(t, 2, "blue", "red")
	w.flows(t, known)

	w.b.Kill()
	m := w.site().maps(t)
	w.network(t, "late")
	w.listen(t, "late")
	late := w.start(t, 3, "late")
	// One that is READY elsewhere has a new address that is not.
	w.d.MustRun(t, "network", "connect", "late", known[0].name)
	sent := readCounters(t, m)["not_ready/strict"]
	require.NotZero(t, sent)
	lab.Eventually(t, 10*time.Second, "they go on", func() bool { return readCounters(t, m)["not_ready/strict"] > sent+200 })
	w.nothingEscaped(t)
	w.unheard(t, late)
	require.Zero(t, countOf(w, w.heard, known[0].name+"@late"))
	// Nor does anything come in, from the host or from outside.
	in4, _ := w.d.Addrs(t, "in-late", "late")
	ns := w.d.NS(t, "in-late")
	ns.Serve(t, "--udp", "80", "--tcp", "80")
	for _, network := range []string{"tcp", "udp"} {
		_, err := w.Host.Get("--network", network, "--timeout", noAnswer.String(), at(in4, 80))
		assert.Error(t, err, network)
		_, err = w.Client.Get("--network", network, "--timeout", noAnswer.String(), at(in4, 80))
		assert.Error(t, err, network)
		// Its loopback is its own.
		ns.MustGet(t, "--network", network, "127.0.0.1:80")
		ns.MustGet(t, "--network", network, at(in4, 80))
	}
	// What shares the host's network is the host: a socket of before strict mode, and a new one.
	w.d.Serve(t, "--name", "new", "--network", "host", "--", "--tcp", "8002", "--udp", "8002")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	for _, network := range []string{"tcp", "udp"} {
		w.Client.MustGet(t, "--network", network, at(lab.Host4, 8001))
		w.Client.MustGet(t, "--network", network, at(lab.Host6, 8002))
		w.d.MustGet(t, "new", "--network", network, at(lab.Client24, 7000))
	}
	// Those that are READY go on, also with new sockets.
	w.d.NS(t, known[1].name).MustGet(t, at(lab.Client24, 7000))

	w.b.Start(t)
	w.networks = append(w.networks, "late")
	w.flows(t, late)
	w.flows(t, known)
	w.d.NS(t, known[0].name).MustGet(t, at(in4, 80))
	w.Host.MustGet(t, at(in4, 80))
	w.nothingEscaped(t)

	out, _ := w.b.CLI("doctor")
	require.Contains(t, out, "programs are where they should be")

	// Without the flag the programs go, and with cleanup.
	w.b.Stop(t)
	plain := w.StartBpfnet(t, w.d)
	require.Zero(t, programsAt(t, containers))
	plain.Stop(t)
	w.b.Start(t)
	require.Equal(t, 3, programsAt(t, containers))
	w.b.Stop(t)
	w.b.MustCLI(t, "cleanup", "--leave-open")
	require.Zero(t, programsAt(t, containers))
}
