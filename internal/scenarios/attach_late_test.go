// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// guarded are the devices that carry a program, by the pins.
func (w *window) guarded(t *testing.T, program string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(w.BPFFS, "links"))
	require.NoError(t, err)
	var out []string
	links := w.Host.MustRun(t, "ip", "-o", "link")
	for _, e := range entries {
		if index, ok := strings.CutPrefix(e.Name(), program+"-"); ok {
			for line := range strings.Lines(links) {
				if f := strings.Fields(line); f[0] == index+":" {
					name, _, _ := strings.Cut(strings.TrimSuffix(f[1], ":"), "@")
					out = append(out, name)
				}
			}
		}
	}
	return out
}

// bridge is the device of a network.
func (w *window) bridge(t *testing.T, network string) string {
	t.Helper()
	return "br-" + w.d.Inspect(t, network, "{{.Id}}")[:12]
}

func (w *window) escapes() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.escaped {
		n += c
	}
	return n
}

// Needs root. A network that is made while the daemon is stopped, and one made while there is none and
// whose Engine does not answer afterwards, stand open until then, which doctor says. They are closed as
// soon as the daemon goes on, and served when the Engine tells of them.
func TestNetworkMadeUnguarded(t *testing.T) {
	for _, mode := range []string{"stopped", "killed"} {
		t.Run(mode, func(t *testing.T) {
			w := newWindow(t, true)
			require.Zero(t, w.escapes())
			if mode == "stopped" {
				require.NoError(t, syscall.Kill(w.b.PID(), syscall.SIGSTOP))
			} else {
				w.b.Kill()
			}
			w.network(t, "late")
			w.listen(t, "late")
			bridge := w.bridge(t, "late")
			late := w.start(t, 2, "late")
			// What is guarded is closed to it all the same.
			lab.Eventually(t, 10*time.Second, "packets outside", func() bool { return countOf(w, w.escaped, "outside, not masqueraded") > 0 })
			require.Zero(t, countOf(w, w.escaped, "to another network"))
			out, _ := w.b.CLI("doctor", "-o", "json")
			require.Contains(t, out, bridge+" is guarded by nothing")
			require.NotContains(t, w.guarded(t, "from_bridge"), bridge)

			// Only the kernel can tell of it now.
			require.NoError(t, syscall.Kill(w.d.PID(), syscall.SIGSTOP))
			if mode == "stopped" {
				require.NoError(t, syscall.Kill(w.b.PID(), syscall.SIGCONT))
				lab.Eventually(t, 10*time.Second, "the bridge is guarded", func() bool { return slices.Contains(w.guarded(t, "from_bridge"), bridge) })
			} else {
				w.b.Start(t) // READY
				require.Contains(t, w.guarded(t, "from_bridge"), bridge)
			}
			lab.Eventually(t, 10*time.Second, "its ports are guarded", func() bool { return len(w.guarded(t, "from_container")) == len(w.networks)+1+len(late) })
			open := w.escapes()
			m := w.site().maps(t)
			before := readCounters(t, m)
			lab.Eventually(t, 10*time.Second, "they send", func() bool { return since(t, m, before)["not_ready/container"] > 200 })
			assert.Equal(t, open, w.escapes(), "packets since it is guarded")

			require.NoError(t, syscall.Kill(w.d.PID(), syscall.SIGCONT))
			w.networks = append(w.networks, "late")
			w.flows(t, late)
			assert.Equal(t, open, w.escapes())
			out, _ = w.b.CLI("doctor", "-o", "json")
			require.NotContains(t, out, "is guarded by nothing")
		})
	}
}

// Needs root. A bridge that only bears a name as the Engine's is let go again, and others are never
// touched.
func TestForeignBridge(t *testing.T) {
	w := newWindow(t, true)
	w.Host.MustRun(t, "ip", "link", "add", "br-0123456789ab", "type", "bridge")
	w.Host.MustRun(t, "ip", "link", "add", "lan", "type", "bridge")
	lab.Eventually(t, 10*time.Second, "it is guarded", func() bool { return slices.Contains(w.guarded(t, "from_bridge"), "br-0123456789ab") })
	lab.Eventually(t, 60*time.Second, "it is let go", func() bool { return !slices.Contains(w.guarded(t, "from_bridge"), "br-0123456789ab") })
	require.NotContains(t, w.guarded(t, "from_bridge"), "lan")
}

// Needs root. The daemon is READY no sooner than every device carries its programs: it ends where the
// devices that it finds by itself refuse them, and waits for the bridges that the Engine tells of.
func TestReadyMeansGuarded(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	d.MustRun(t, "network", "create", "-o", "com.docker.network.bridge.name=lan0", "lan")
	// It stands where clsact has to be.
	l.Host.MustRun(t, "tc", "qdisc", "add", "dev", "lan0", "ingress")
	var ready atomic.Bool
	mended := make(chan struct{})
	go func() {
		defer close(mended)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for !ready.Load() {
			<-tick.C
			logs, _ := filepath.Glob(filepath.Join(l.Dir, "bpfnet.*.err"))
			for _, log := range logs {
				if text, _ := os.ReadFile(log); !strings.Contains(string(text), "devices are without their programs") {
					continue
				}
				if ready.Load() {
					t.Error("ready, though a device has no program")
				}
				if _, err := l.Host.Run(t.Context(), "tc", "qdisc", "del", "dev", "lan0", "ingress"); err != nil {
					t.Error(err)
				}
				return
			}
		}
		t.Error("ready, and nobody has missed a program")
	}()
	// Without the last two, lan0 would be an uplink until the Engine tells.
	b := l.StartBpfnet(t, d, "--attach", "clsact", "--uplink", lab.HostIf, "--uplink", lab.HostIf2)
	ready.Store(true)
	<-mended
	require.Contains(t, l.Host.MustRun(t, "tc", "filter", "show", "dev", "lan0", "ingress"), "from_bridge")

	b.Stop(t)
	l.Host.MustRun(t, "tc", "qdisc", "del", "dev", lab.HostIf, "clsact")
	l.Host.MustRun(t, "tc", "qdisc", "add", "dev", lab.HostIf, "ingress")
	out, err := b.CLI("daemon", "--docker", "off", "--attach", "clsact")
	require.Empty(t, out)
	require.ErrorContains(t, err, "has an ingress qdisc")
}
