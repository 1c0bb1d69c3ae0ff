// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// Needs root. The engine is not there when the daemon starts, starts late, restarts with and without
// its containers, dies and comes back: the daemon goes on, and so do the flows of containers that do.
func TestAcceptEngine(t *testing.T) {
	w := &site{Lab: lab.New(t, lab.Opts{})}
	w.d = w.StartDocker(t, lab.DockerOpts{ExtraArgs: []string{"--live-restore"}})
	w.networks(t)
	w.d.Stop(t)
	w.b = w.StartBpfnet(t, w.d) // ready without it
	connected := func() bool {
		s, err := api.ReadSnapshot(w.b.State)
		require.NoError(t, err)
		for _, source := range s.Sources {
			if source.Name == "docker" {
				return source.Connected
			}
		}
		return false
	}
	require.False(t, connected())
	w.d.Start(t)
	for _, c := range []struct{ name, network string }{{"web", "blue"}, {"peer", "blue"}, {"far", "red"}} {
		w.serve(t, c.name, c.network, map[bool][]string{true: {"-p", "8080:80", "-p", "8080:80/udp"}}[c.name == "web"]...)
	}
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	for _, name := range []string{"web", "peer", "far"} {
		w.ready(t, name)
	}
	require.True(t, connected())
	w.works(t)

	tr := begin(t, w)
	w.d.Restart(t)
	tr.flow(t)
	w.works(t)
	w.d.Kill(t)
	tr.flow(t)
	w.b.Restart(t) // from what it remembers
	tr.flow(t)
	pid := w.b.PID()
	w.d.Start(t)
	tr.flow(t)
	w.idle(t, "late", "blue")
	w.works(t)
	tr.end(t, true)
	require.Equal(t, pid, w.b.PID())
	require.True(t, w.b.PID() > 0 && processExists(w.b.PID()), "the daemon ended")
	promise.Kept(t, promise.Lifecycle,
		"An Engine that is not there, starts late, restarts or dies stops no traffic of containers that run, and what it starts afterwards is served.",
		"%d streams and %d pings lost nothing", len(tr.streams), len(tr.pings))
}

// Needs root. What the daemon costs when nothing happens.
func TestAcceptQuiet(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	endpoints := count(100)
	for i := range endpoints {
		w.d.MustRun(t, "run", "-d", "--network", "blue", "-p", fmt.Sprintf("%d:80", 22000+i), lab.Image, "sleep", "100000")
	}
	// Bridges and neighbours have news of new ports for some seconds.
	lab.Eventually(t, time.Minute, "all endpoints are ready, and nothing happens any more", func() bool {
		s, err := api.ReadSnapshot(w.b.State)
		require.NoError(t, err)
		if time.Since(s.Written) < 5*time.Second {
			return false
		}
		ready := 0
		for _, e := range s.Endpoints {
			if e.Ready {
				ready++
			}
		}
		return ready == endpoints
	})
	pid := w.b.PID()
	resident := lab.ResidentKiB(t, pid)
	// All that happens once a minute may fall into the ten seconds of the short run.
	const budget = time.Minute * 2 / 1000
	wall := max(10*time.Second, time.Duration(count(60))*time.Second)
	// A window in which nothing happens is the measurement itself.
	before, start := cpuTicks(t, pid), time.Now()
	<-time.NewTimer(wall).C
	ticks, elapsed := cpuTicks(t, pid)-before, time.Since(start)
	t.Logf("%d endpoints: %d KiB resident, %d ticks of 10 ms in %v", endpoints, resident, ticks, elapsed)
	require.Less(t, resident, 40*1024)
	const tick = 10 * time.Millisecond // USER_HZ is 100; each of two counters may be one too many
	require.LessOrEqual(t, time.Duration(ticks)*tick, budget+2*tick)
}

func processExists(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return err == nil
}

// cpuTicks is the time that a process has used, in units of 10 ms.
func cpuTicks(t *testing.T, pid int) int {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	require.NoError(t, err)
	// Fields 14 and 15, proc_pid_stat(5); the command in parentheses may hold spaces.
	fields := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	user, err := strconv.Atoi(fields[11])
	require.NoError(t, err)
	system, err := strconv.Atoi(fields[12])
	require.NoError(t, err)
	return user + system
}

// Needs root. Where bpfnet turned forwarding on, it is on for containers only.
func TestAcceptTransit(t *testing.T) {
	const transit = "transit/to_uplink"
	for _, c := range []struct {
		name   string
		before bool // the host forwarded before
		args   []string
		passes bool
	}{
		{"dropped", false, nil, false},
		{"no drop", false, []string{"--ip-forward-no-drop"}, true},
		{"forwarded before", true, nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := &site{Lab: lab.New(t, lab.Opts{Forwarding: c.before})}
			// What decides is bpfnet, not the host's own policy.
			w.Host.MustRun(t, "iptables", "-P", "FORWARD", "ACCEPT")
			w.Host.MustRun(t, "ip6tables", "-P", "FORWARD", "ACCEPT")
			w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
			w.b = w.StartBpfnet(t, nil, append([]string{"--docker", "off"}, c.args...)...)
			m := w.maps(t)
			for _, to := range []string{at(lab.Client24, 7000), at(lab.Client26, 7000)} {
				for _, network := range []string{"tcp", "udp"} {
					before := readCounters(t, m)
					r, err := w.Client.Get("--network", network, "--timeout", "300ms", to)
					if c.passes {
						require.NoError(t, err)
						require.Contains(t, []string{lab.Client4.String(), lab.Client6.String()}, clientSeen(t, r).String())
						require.Empty(t, since(t, m, before).drops())
						continue
					}
					require.Error(t, err, "%+v", r)
					require.NotZero(t, since(t, m, before)[transit])
				}
			}
			// The host's own traffic is not transit.
			w.Host.MustGet(t, at(lab.Client24, 7000))
			w.Host.MustGet(t, at(lab.Client26, 7000))
		})
	}
}
