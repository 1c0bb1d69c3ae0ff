// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. The daemon is killed, started, stopped and started under traffic of its own sandboxes,
// which keep their addresses, ports and processes, and lose nothing.
func TestOwnLife(t *testing.T) {
	for _, attach := range []string{"tcx", "clsact"} {
		t.Run(attach, func(t *testing.T) {
			w := newOwnSite(t, "--attach", attach)
			w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
			w.sandbox(t, "peer", "blue")
			w.sandbox(t, "far", "red")
			w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
			w.works(t)
			all := func() map[string]placed {
				return map[string]placed{
					"web": w.placed(t, "web", "blue"), "peer": w.placed(t, "peer", "blue"), "far": w.placed(t, "far", "red"),
				}
			}
			before, held := all(), w.b.Belongings(t)

			tr := begin(t, w)
			// Finer; ping itself would use a whole processor for that.
			tr.streams["fine, published tcp"] = w.Client.Stream(t, "--interval", "1ms", "--duration", "5m", at(lab.Host4, 8080))
			tr.streams["fine, container udp"] = w.b.NS(t, "peer").Stream(t, "--network", "udp", "--interval", "1ms", "--duration", "5m",
				at(before["web"].V4, 80))
			same := func(what string) {
				t.Helper()
				tr.flow(t)
				w.works(t)
				assert.Equal(t, before, all(), what)
				assert.Equal(t, held, w.b.Belongings(t), what)
			}
			w.b.Kill()
			tr.flow(t)
			w.works(t)
			w.b.Start(t)
			same("started after SIGKILL")
			w.b.Restart(t)
			same("restarted")
			w.b.Stop(t)
			tr.flow(t)
			w.works(t)
			// Reading needs no daemon, and is told the same.
			assert.Equal(t, before["web"].Ports, w.b.MustCLI(t, "port", "web"))
			assert.Contains(t, w.b.MustCLI(t, "ps"), "web")
			w.b.Start(t)
			same("started after a stop")
			tr.end(t, true)

			// The ports are still held, and the names still known.
			_, err := w.Host.Run(t.Context(), w.Tool, "serve", "--tcp", "8080", "--family", "4")
			assert.ErrorContains(t, err, "address already in use")
			w.b.MustGet(t, "peer", "web:80")
			// And nobody is given an address that a sandbox has.
			w.sandbox(t, "late", "blue")
			late4, late6 := w.b.Addrs(t, "late", "blue")
			for name, p := range before {
				assert.NotEqual(t, p.V4, late4, name)
				assert.NotEqual(t, p.V6, late6, name)
			}
			w.b.MustCLI(t, "rm", "-f", "web", "peer", "far", "late")
		})
	}
}

// kill ends a sandbox's process as the kernel's out-of-memory killer would.
func (w *site) kill(t *testing.T, name string) {
	t.Helper()
	pid := w.b.Sandbox(t, name).PID
	require.NotZero(t, pid, name)
	require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
	lab.Eventually(t, 10*time.Second, name+"'s process is gone", func() bool { return !alive(pid) })
}

// alive says that a process runs; a zombie does not.
func alive(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// status waits until the snapshot tells that of a sandbox.
func (w *site) status(t *testing.T, name, status string) api.Sandbox {
	t.Helper()
	var s api.Sandbox
	lab.Eventually(t, 10*time.Second, name+" is "+status, func() bool {
		s = w.b.Sandbox(t, name)
		return s.Status == status
	})
	return s
}

// Needs root. Sandboxes whose process dies while no daemon runs are cleaned up by the next one: links,
// addresses, ports, cgroups, and the record where it was to be removed.
func TestOwnDeathWithoutDaemon(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "stays", "blue")
	before := w.b.Belongings(t)
	w.sandbox(t, "told", "blue", "-p", "8081:80", "--ip", w.in(t, "blue", 101))
	w.sandbox(t, "untold", "blue", "-p", "8082:80", "--ip", w.in(t, "blue", 102))
	w.sandbox(t, "removed", "blue", "--rm", "-p", "8083:80", "--ip", w.in(t, "blue", 103))
	w.sandbox(t, "ended", "red", "-p", "8084:80")

	w.b.Stop(t)
	w.kill(t, "told") // its runner lives, and writes down how it ended
	w.kill(t, "removed")
	w.b.KillRunner(t, "untold") // nobody is left to write down anything
	w.kill(t, "untold")
	require.NoError(t, syscall.Kill(w.b.Sandbox(t, "ended").PID, syscall.SIGTERM)) // labtool ends with 0
	lab.Eventually(t, 10*time.Second, "runners have gone", func() bool {
		return strings.Count(strings.Join(w.b.Belongings(t), "\n"), "runner") == 1
	})
	w.b.Start(t)

	for name, want := range map[string]int{"told": 128 + int(syscall.SIGKILL), "ended": 0} {
		s := w.status(t, name, api.StatusExited)
		require.NotNil(t, s.ExitCode, name)
		assert.Equal(t, want, *s.ExitCode, name)
	}
	s := w.status(t, "untold", api.StatusExited)
	assert.Nil(t, s.ExitCode, "nobody knows")
	assert.NotEmpty(t, s.Why)
	assert.Contains(t, w.b.MustCLI(t, "ps", "--all"), s.Why, "the reason is shown")
	lab.Eventually(t, 10*time.Second, "the one with --rm is gone", func() bool {
		return !strings.Contains(w.b.MustCLI(t, "ps", "--all"), "removed")
	})
	assert.Len(t, w.b.InspectNetwork(t, "blue").Containers, 1)
	assert.Empty(t, w.b.InspectNetwork(t, "red").Containers)
	assert.Empty(t, w.b.Snapshot(t).Ports)

	// Ports and addresses are to be had again; the ended ones start again where they were.
	w.Host.Serve(t, "--tcp", "8083")
	for name, last := range map[string]string{"told": "101", "untold": "102"} {
		w.b.MustCLI(t, "start", name)
		w.b.WaitLog(t, name, "ready")
		v4, _ := w.b.Addrs(t, name, "blue")
		assert.True(t, strings.HasSuffix(v4.String(), "."+last), v4)
	}
	w.sandbox(t, "next", "blue", "--ip", w.in(t, "blue", 103))
	w.Client.MustGet(t, at(lab.Host4, 8081))
	w.Client.MustGet(t, at(lab.Host4, 8082))
	w.b.MustCLI(t, "rm", "-f", "told", "untold", "ended", "next")
	w.belongs(t, before)
}

// in is the address of a network's IPv4 subnet with that last number.
func (w *site) in(t *testing.T, network string, last byte) string {
	t.Helper()
	for _, c := range w.b.InspectNetwork(t, network).IPAM.Config {
		p, err := netip.ParsePrefix(c.Subnet)
		require.NoError(t, err)
		if p.Addr().Is4() {
			a := p.Addr().As4()
			a[3] = last
			return netip.AddrFrom4(a).String()
		}
	}
	t.Fatalf("network %s has no IPv4 subnet", network)
	return ""
}

// Needs root. After a reboot there are no processes, namespaces, devices or pins: networks come back
// as they were, sandboxes are told to have ended, and start again.
func TestOwnReboot(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp", "--network-alias", "www")
	w.sandbox(t, "peer", "blue")
	w.sandbox(t, "far", "red")
	w.sandbox(t, "brief", "red", "--rm")
	w.b.MustCLI(t, "create", "--name", "never", "--network", "red", "--", "true")
	w.b.MustCLI(t, "network", "allow", "blue", "red")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	inspect := func(network string) lab.NetworkInspect {
		n := w.b.InspectNetwork(t, network)
		n.Containers = nil
		return n
	}
	networks := map[string]lab.NetworkInspect{}
	for _, name := range []string{"blue", "red", "bpfnet"} {
		networks[name] = inspect(name)
	}
	bridges := func() map[string]string {
		out := map[string]string{}
		for _, n := range w.b.Snapshot(t).Networks {
			out[n.Bridge] = w.addresses(t, n.Bridge)
		}
		return out
	}
	devices := bridges()
	require.Len(t, devices, 3)

	// The wish of a power cut: nobody gets to say anything.
	w.b.Kill()
	w.b.KillSandboxes(t)
	w.b.ForgetNetworks(t)
	require.NotContains(t, w.Host.MustRun(t, "ip", "-br", "link"), "blue0")
	w.b.Start(t)

	for name, want := range networks {
		assert.Equal(t, want, inspect(name))
	}
	assert.Equal(t, devices, bridges())
	ps := w.b.MustCLI(t, "ps", "--all")
	for _, name := range []string{"web", "peer", "far"} {
		s := w.b.Sandbox(t, name)
		assert.Equal(t, api.StatusExited, s.Status, name)
		assert.Nil(t, s.ExitCode, name)
		assert.NotEmpty(t, s.Why, name)
		assert.Contains(t, ps, s.Why)
	}
	assert.Equal(t, api.StatusCreated, w.b.Sandbox(t, "never").Status)
	assert.NotContains(t, ps, "brief", "it was to be removed")
	assert.Empty(t, w.b.Snapshot(t).Endpoints)
	assert.Empty(t, w.b.Snapshot(t).Ports)
	var raw []any
	require.NoError(t, json.Unmarshal([]byte(w.b.MustCLI(t, "ps", "-o", "json")), &raw))
	assert.Empty(t, raw, "none runs")

	w.b.MustCLI(t, "start", "web", "peer", "far", "never")
	for _, name := range []string{"web", "peer", "far"} {
		w.b.WaitLog(t, name, "ready")
	}
	assert.Equal(t, "0", w.b.MustCLI(t, "wait", "never"))
	// What was allowed still is; works wants isolation.
	far := w.b.NS(t, "far")
	web4, web6 := w.b.Addrs(t, "web", "blue")
	open(t, far, nil, web4, web6)
	w.b.MustCLI(t, "network", "disallow", "blue", "red")
	w.works(t)
	w.b.MustGet(t, "peer", "www:80")
}

// addresses are those of a device of the host that last: an IPv6 address of its own comes with the
// first port.
func (w *site) addresses(t *testing.T, device string) string {
	t.Helper()
	var all []string
	for line := range strings.Lines(w.Host.MustRun(t, "ip", "-o", "addr", "show", "dev", device, "scope", "global")) {
		all = append(all, strings.Fields(line)[3])
	}
	return strings.Join(all, " ")
}

// Needs root. Cleanup takes networks and sandboxes of bpfnet's own away, but not behind their back.
func TestOwnCleanup(t *testing.T) {
	w := &site{Lab: lab.New(t, lab.Opts{})}
	before := w.sysctls(t)
	w.b = w.StartBpfnet(t, nil)
	w.b.MustCLI(t, "network", "create", "--ipv6", "blue")
	w.sandbox(t, "web", "blue", "-p", "8080:80")
	pid := w.b.Sandbox(t, "web").PID
	held := w.b.Belongings(t)
	got := w.outcome(t, "cleanup")
	assert.Equal(t, 1, got.code)
	w.b.Stop(t)
	got = w.outcome(t, "cleanup")
	assert.Equal(t, 1, got.code, "a sandbox runs")
	assert.Contains(t, got.errors, "web")
	assert.Contains(t, got.errors, "--force")
	assert.Equal(t, held, w.b.Belongings(t))
	w.Client.MustGet(t, at(lab.Host4, 8080))

	w.b.MustCLI(t, "cleanup", "--force")
	assert.False(t, alive(pid))
	assert.Empty(t, w.b.Belongings(t))
	w.clean(t, before)
	assert.NotContains(t, w.Host.MustRun(t, "ip", "-br", "link"), "bpfnet0")
	w.b.MustCLI(t, "cleanup") // again is no error

	w.b.Start(t) // as on a new machine
	assert.Empty(t, w.b.Snapshot(t).Sandboxes)
	assert.Len(t, w.b.Snapshot(t).Networks, 1)
	w.b.MustCLI(t, "run", "--rm", "--", "true")
}
