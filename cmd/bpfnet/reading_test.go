// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/maps"
)

// fakeCounters derives counts from slots, so that a wrong slot shows.
type fakeCounters struct {
	denied []maps.Denied
	drops  []maps.Drop
	fates  []maps.Fate
	fill   []maps.Fill
	err    error

	busiest    maps.Busiest
	flows      []maps.Flow
	masquerade maps.Masquerade
}

func (c fakeCounters) Drops() ([]maps.Drop, error)    { return c.drops, c.err }
func (c fakeCounters) Fates() ([]maps.Fate, error)    { return c.fates, c.err }
func (c fakeCounters) Fill() ([]maps.Fill, error)     { return c.fill, c.err }
func (c fakeCounters) Denied() ([]maps.Denied, error) { return c.denied, c.err }
func (c fakeCounters) Close()                         {}

func (c fakeCounters) Masquerade() (maps.Masquerade, error) { return c.masquerade, c.err }

func (c fakeCounters) EachFlow(each func(*maps.Flow) error) error {
	for i := range c.flows {
		if err := each(&c.flows[i]); err != nil {
			return err
		}
	}
	return c.err
}

func (c fakeCounters) BusiestDestination(float64) (maps.Busiest, error) { return c.busiest, c.err }

func (c fakeCounters) EndpointStats(slot uint16) (maps.EndpointCount, error) {
	n := uint64(slot)
	return maps.EndpointCount{RxPackets: n, RxBytes: 1500 * n, TxPackets: 10 * n, TxBytes: 1e6 * n, DropPackets: n % 2, DropBytes: 60 * (n % 2)}, c.err
}

func (c fakeCounters) PortStats(slot uint16) (maps.PortCount, error) {
	n := uint64(slot)
	return maps.PortCount{Connections: n, RxPackets: 2 * n, RxBytes: 200 * n, TxPackets: 3 * n, TxBytes: 3000 * n, NotReady: n % 2}, c.err
}

// sampleSnapshot is a host with two networks, of whose three endpoints one is not ready.
func sampleSnapshot() *api.Snapshot {
	return &api.Snapshot{
		Version: "1.2.3", PID: 4711, Started: now.Add(-3 * time.Hour), Written: now.Add(-5 * time.Minute), Attach: "tcx",
		Networks: []api.Network{
			{Slot: 1, ID: "n1", Name: "backend", Source: "docker", Bridge: "br-be", Subnets: []string{"172.19.0.0/16"}, Internal: true},
			{Slot: 2, ID: "n2", Name: "bridge", Source: "docker", Bridge: "docker0", Subnets: []string{"172.17.0.0/16"}},
		},
		Endpoints: []api.Endpoint{
			{Slot: 7, ID: "e1", Name: "db", Network: "backend", Addresses: []string{"172.19.0.2"}, Ready: true},
			{Slot: 8, ID: "e2", Name: "web", Network: "backend", Addresses: []string{"172.19.0.3", "fd00::3"}, Ready: true},
			{Slot: 9, ID: "e3", Name: "web", Network: "bridge", Addresses: []string{"172.17.0.2"}, Why: "its interface is not there yet"},
		},
		Ports: []api.Port{
			{Slot: 3, Proto: "tcp", Host: "0.0.0.0:8080", Target: "172.17.0.2:80", Endpoint: "e3", Container: "web", Network: "bridge"},
			{Slot: 4, Proto: "udp", Host: "[::]:53", Target: "172.17.0.2:53", Endpoint: "e3", Container: "web", Network: "bridge"},
		},
		Allowed: []api.Pair{{A: "backend", B: "bridge"}},
		Attachments: []api.Attachment{
			{Program: "from_uplink", Device: "eth0", Hook: "ingress"},
			{Program: "connect4", Device: "/sys/fs/cgroup", Hook: "cgroup"},
		},
		Sources: []api.Source{
			{Name: "docker", Connected: true, Detail: "20.10.24", LastSync: now.Add(-12 * time.Second)},
			{Name: "netlink", Connected: true, LastSync: now.Add(-time.Second)},
		},
	}
}

// readable is a world that a daemon has served.
func readable(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.counters = fakeCounters{
		fates: []maps.Fate{
			{Fate: "container", Hook: "container", Packets: 700, Bytes: 1e6},
			{Fate: "container", Hook: "uplink", Packets: 200, Bytes: 5e5},
			{Fate: "uplink", Hook: "container", Packets: 50, Bytes: 4e4},
			{Fate: "stack", Hook: "uplink", Packets: 30, Bytes: 3000},
			{Fate: "bridge", Hook: "container", Packets: 20, Bytes: 1200},
		},
		drops: []maps.Drop{
			{Reason: "isolated", Hook: "container", Packets: 2, Bytes: 168},
			{Reason: "direct_access", Hook: "uplink", Packets: 5, Bytes: 300},
		},
		fill: []maps.Fill{{Map: "flows4", Entries: 131, Max: 262144}, {Map: "ports", Entries: 2, Max: 16384}},
	}
	w.write(sampleSnapshot())
	return w
}

func (w *world) write(s *api.Snapshot) {
	w.t.Helper()
	require.NoError(w.t, os.MkdirAll(w.state(), 0o755))
	require.NoError(w.t, api.WriteSnapshot(w.state(), s))
}

func TestStatsAndStatusOutput(t *testing.T) {
	for name, args := range map[string][]string{
		"stats.txt":           {"stats"},
		"stats.json":          {"stats", "-o", "json"},
		"stats-container.txt": {"stats", "web"},
		"stats-network.json":  {"stats", "backend", "--output=json"},
		"status.txt":          {"status"},
		"status.json":         {"status", "-o", "json"},
	} {
		t.Run(name, func(t *testing.T) {
			golden(t, filepath.Join("testdata", name), readable(t).must(args...))
		})
	}
	t.Run("status-running.txt", func(t *testing.T) {
		w := readable(t)
		defer w.serve(&handler{pid: 4711})()
		golden(t, "testdata/status-running.txt", w.must("status"))
	})
	t.Run("empty", func(t *testing.T) {
		w := newWorld(t)
		w.write(&api.Snapshot{Version: "1", Attach: "clsact", Written: now})
		golden(t, "testdata/stats-empty.txt", w.must("stats"))
		golden(t, "testdata/stats-empty.json", w.must("stats", "-o", "json"))
		golden(t, "testdata/status-empty.txt", w.must("status"))
		golden(t, "testdata/status-empty.json", w.must("status", "-o", "json"))
	})
}

// The totals are the sums of what is listed, and the share is of what was not dropped.
func TestTotalsAgreeWithTheirParts(t *testing.T) {
	w := readable(t)
	var stats Stats
	require.NoError(t, json.Unmarshal([]byte(w.must("stats", "-o", "json")), &stats))
	var status Status
	require.NoError(t, json.Unmarshal([]byte(w.must("status", "-o", "json")), &status))
	assert.Equal(t, *stats.Totals, status.Totals)
	assert.Equal(t, Totals{
		Redirected: Volume{950, 1540000}, Stack: Volume{30, 3000}, Bridge: Volume{20, 1200}, Dropped: Volume{7, 468},
	}, status.Totals)
	assert.InDelta(t, 0.95, status.FastPath, 1e-9)
	sum := make(map[string]uint64)
	for _, c := range stats.Containers {
		sum[c.Network] += c.RxBytes
	}
	for _, n := range stats.Networks {
		assert.Equal(t, sum[n.Name], n.RxBytes, n.Name)
	}
}

// From 80 % on, what fills up is warned of, and what happens then.
func TestStatusWarns(t *testing.T) {
	w := readable(t)
	w.counters.fill = []maps.Fill{
		{Map: "flows4", Entries: 80, Max: 100}, {Map: "flows6", Entries: 79, Max: 100}, {Map: "syns4", Entries: 65536, Max: 65536},
		{Map: "frags", Entries: 7000, Max: 8192}, {Map: "port_slots", Entries: 16383, Max: 16383},
	}
	w.counters.busiest = maps.Busiest{Proto: "tcp", To: netip.MustParseAddrPort("203.0.113.9:443"), Ports: 30000, Max: 36281}
	out := w.must("status")
	want := []string{
		"flows4: 80.0 % taken (80 of 100); from there on timeouts are shortened, and new flows find no room (flow_table_full); raise --flows",
		"syns4: 100.0 % taken (65536 of 65536); from there on connections that their clients have not confirmed push out the oldest of them: a flood?",
		"frags: 85.4 % taken (7000 of 8192); from there on fragments push out the oldest, whose datagrams are lost (fragment_not_found): a flood?",
		"port_slots: 100.0 % taken (16383 of 16383); from there on what comes on top is not served",
		"masquerade ports towards tcp 203.0.113.9:443: 82.7 % taken (30000 of 36281); from there on new flows to it are refused (snat_exhausted)",
	}
	for _, text := range want {
		assert.Regexp(t, `(?m)^Warning: +`+regexp.QuoteMeta(text)+`$`, out)
	}
	assert.Equal(t, len(want), strings.Count(out, "Warning:"))
	var s Status
	require.NoError(t, json.Unmarshal([]byte(w.must("status", "-o", "json")), &s))
	assert.Equal(t, want, s.Warnings)
	assert.Equal(t, &w.counters.busiest, s.Busiest)
}

func TestStatusTellsForeignDaemon(t *testing.T) {
	w := readable(t)
	defer w.serve(&handler{pid: 1})()
	var s Status
	require.NoError(t, json.Unmarshal([]byte(w.must("status", "-o", "json")), &s))
	assert.False(t, s.Daemon.Running)
	assert.Contains(t, s.Daemon.Error, "process 1 listens on "+w.socket())
	assert.Contains(t, w.must("status"), "unknown: process 1 listens")
}

func TestUnknownName(t *testing.T) {
	w := readable(t)
	assert.Equal(t, `bpfnet: stats: "wab": no such network or container; the nearest names are web, db, backend`, w.fails(1, "stats", "wab"))
	w.write(&api.Snapshot{})
	assert.Equal(t, `bpfnet: stats: "wab": no such network or container; none is known yet`, w.fails(1, "stats", "wab"))
}

func TestNothingToRead(t *testing.T) {
	for _, verb := range []string{"stats", "status"} {
		w := newWorld(t)
		assert.Equal(t, "bpfnet: "+verb+": state "+w.state()+
			`: no daemon has run there; start one with "bpfnet daemon", or name its directory with --state`, w.fails(1, verb))
		assert.NoDirExists(t, w.state(), "readers make nothing")

		w = readable(t)
		w.openErr = fmt.Errorf("open maps below %s: %w", w.bpffs(), maps.ErrNotLoaded)
		assert.Equal(t, "bpfnet: "+verb+": open maps below "+w.bpffs()+
			`: nothing is loaded; start the daemon with "bpfnet daemon", or name its pins with --bpffs`, w.fails(1, verb))
		w.openErr = fmt.Errorf("open maps: %w", fs.ErrPermission)
		assert.Equal(t, "bpfnet: "+verb+": open maps: permission denied; run this as root", w.fails(1, verb))

		w = readable(t)
		w.counters.err = fmt.Errorf("read drops: %w", fs.ErrInvalid)
		assert.Equal(t, "bpfnet: "+verb+": read drops: invalid argument", w.fails(1, verb))

		path := filepath.Join(w.state(), api.SnapshotName)
		require.NoError(t, os.WriteFile(path, []byte("{"), 0o600))
		assert.Equal(t, "bpfnet: "+verb+": read snapshot "+path+
			": unexpected end of JSON input; the daemon writes it anew: restart it", w.fails(1, verb))
	}
}
