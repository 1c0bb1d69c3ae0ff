// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/maps"
)

// sampleFlows are flows of the sample snapshot's containers.
func sampleFlows() []maps.Flow {
	at := netip.MustParseAddrPort
	flows := []maps.Flow{
		{Proto: protoTCP, From: at("203.0.113.9:40000"), To: at("192.0.2.1:8080"), SentTo: at("172.17.0.2:80"), Hook: "uplink", Target: 9, Port: 3,
			State: maps.FlowEstablished, Fast: true, Sent: maps.Traffic{Packets: 10, Bytes: 1000}, Answered: maps.Traffic{Packets: 20, Bytes: 20_000}, Age: 90 * time.Second, Idle: time.Second},
		{Proto: protoTCP, From: at("172.19.0.3:50000"), To: at("172.19.0.2:5432"), Hook: "container", Opener: 8, Target: 7,
			State: maps.FlowClosed, Fast: true, Sent: maps.Traffic{Packets: 7, Bytes: 700}, Answered: maps.Traffic{Packets: 5, Bytes: 500}, Age: 3 * time.Hour, Idle: 40 * time.Second},
		{Proto: protoUDP, From: at("172.17.0.2:50001"), To: at("198.51.100.7:53"), SentFrom: at("192.0.2.1:1031"), Hook: "container", Opener: 9, Masqueraded: true,
			State: maps.FlowUnanswered, Fast: true, Sent: maps.Traffic{Packets: 1, Bytes: 70}, Age: 5 * time.Second, Idle: 5 * time.Second},
		{Proto: protoICMPv6, From: at("[fd00::3]:77"), To: at("[fd00::1]:0"), Hook: "container", Opener: 8,
			State: maps.FlowOneSided, Sent: maps.Traffic{Packets: 3, Bytes: 354}, Age: 72 * time.Hour, Idle: 10 * time.Minute},
	}
	for i := range flows {
		f := &flows[i]
		if !f.SentFrom.IsValid() {
			f.SentFrom = f.From
		}
		if !f.SentTo.IsValid() {
			f.SentTo = f.To
		}
	}
	return flows
}

func withFlows(t *testing.T) *world {
	w := readable(t)
	w.counters.flows = sampleFlows()
	return w
}

func TestFlowsOutput(t *testing.T) {
	for name, args := range map[string][]string{
		"flows.txt":        {"flows"},
		"flows.json":       {"flows", "-o", "json"},
		"flows-bytes.txt":  {"flows", "--sort", "bytes", "--limit", "2"},
		"flows-by.txt":     {"flows", "--by", "container"},
		"flows-by.json":    {"flows", "--by", "network", "-o", "json"},
		"flows-filter.txt": {"flows", "--container", "db"},
	} {
		t.Run(name, func(t *testing.T) { golden(t, filepath.Join("testdata", name), withFlows(t).must(args...)) })
	}
	t.Run("none", func(t *testing.T) {
		w := readable(t)
		require.Equal(t, "PROTO   STATE   PATH   FROM   TO   TRANSLATED   NETWORK   PACKETS   BYTES   AGE   IDLE\n", w.must("flows"))
		require.Equal(t, "[]\n", w.must("flows", "-o", "json"))
		require.Equal(t, "[]\n", w.must("flows", "--by", "state", "-o", "json"))
	})
}

// Each filter leaves those that it says, and they add up.
func TestFlowsFilters(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string // which of the sample flows
	}{
		{nil, "0123"},
		{[]string{"--container", "web"}, "0123"},
		{[]string{"--container", "db"}, "1"},
		{[]string{"--network", "bridge"}, "02"},
		{[]string{"--network", "backend"}, "13"},
		{[]string{"--proto", "tcp"}, "01"},
		{[]string{"--proto", "icmp6"}, "3"},
		{[]string{"--proto", "89"}, ""},
		{[]string{"--proto", "6"}, "01"},
		{[]string{"--proto", "17"}, "2"},
		{[]string{"--proto", "58"}, "3"},
		{[]string{"--port", "80"}, "0"},
		{[]string{"--port", "8080"}, "0"},
		{[]string{"--port", "1031"}, "2"},
		{[]string{"--port", "77"}, ""}, // an identifier
		{[]string{"--address", "192.0.2.1"}, "02"},
		{[]string{"--address", "198.51.100.0/24"}, "2"},
		{[]string{"--address", "fd00::/16"}, "3"},
		{[]string{"--flow-state", "closed"}, "1"},
		{[]string{"--path", "stack"}, "3"},
		{[]string{"--path", "fast", "--proto", "udp"}, "2"},
		{[]string{"--sort", "bytes"}, "0132"},
		{[]string{"--sort", "packets"}, "0132"},
		{[]string{"--sort", "age"}, "3102"},
		{[]string{"--sort", "idle"}, "3120"},
		{[]string{"--sort", "idle", "--limit", "1"}, "3"},
		{[]string{"--limit", "2"}, "01"},
	} {
		w := withFlows(t)
		var lines []FlowLine
		require.NoError(t, json.Unmarshal([]byte(w.must(append([]string{"flows", "-o", "json"}, c.args...)...)), &lines))
		got := ""
		for _, l := range lines {
			for i, f := range w.counters.flows {
				if f.From.Addr() == l.From.Addr && f.From.Port() == l.From.Port {
					got += fmt.Sprint(i)
				}
			}
		}
		assert.Equal(t, c.want, got, c.args)
	}
}

func TestFlowsBadInput(t *testing.T) {
	for _, c := range []struct {
		status int
		args   []string
		want   string
	}{
		{statusError, []string{"--container", "we"}, `container "we": no such container; the nearest names are web, db`},
		{statusError, []string{"--network", "brigde"}, `network "brigde": no such network; the nearest names are bridge, backend`},
		{statusUsage, []string{"--proto", "tpc"}, `--proto "tpc": want one of icmp, icmp6, sctp, tcp, udp`},
		{statusUsage, []string{"--proto", "256"}, `--proto "256": want one of`},
		{statusUsage, []string{"--flow-state", "open"}, `--flow-state "open": want one of opening, established,`},
		{statusUsage, []string{"--path", "slow"}, `--path "slow": want one of fast, stack`},
		{statusUsage, []string{"--port", "0"}, `--port 0: want a port from 1 to 65535`},
		{statusUsage, []string{"--address", "10.0.0"}, `--address "10.0.0": want an address or a prefix`},
		{statusUsage, []string{"--sort", "size"}, `--sort "size": want one of age, bytes, idle, packets`},
		{statusUsage, []string{"--by", "name"}, `--by "name": want one of container,`},
		{statusUsage, []string{"--limit", "-1"}, `--limit -1: want a number of flows, or 0`},
		{statusUsage, []string{"-f", "--sort", "age"}, `--sort: not with -f`},
		{statusUsage, []string{"-f", "--limit", "2"}, `--limit: not with -f`},
		{statusUsage, []string{"--by", "state", "--sort", "age"}, `--sort: not with --by`},
		{statusUsage, []string{"extra"}, `unexpected argument "extra"`},
	} {
		assert.Contains(t, withFlows(t).fails(c.status, append([]string{"flows"}, c.args...)...), c.want)
	}
}

func TestFlowGroupsLeftOut(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(withFlows(t).must("flows", "--by", "proto", "--limit", "1")), "\n")
	require.Len(t, lines, 3)
	require.Regexp(t, "^tcp +2 ", lines[1])
	require.Equal(t, "and 2 more", lines[2])
	require.NotContains(t, withFlows(t).must("flows", "--by", "proto", "--limit", "3"), "more")
	require.NotContains(t, withFlows(t).must("flows", "--by", "proto", "--limit", "1", "-o", "json"), "more")
}

// A list that somebody interrupts ends, and is no success.
func TestFlowsInterrupted(t *testing.T) {
	for _, args := range [][]string{{"flows"}, {"flows", "--sort", "age", "-o", "json"}, {"flows", "--by", "state"}} {
		w := withFlows(t)
		ctx, cancel := context.WithCancel(t.Context())
		w.OpenCounters = func(string) (counters, error) { cancel(); return w.counters, nil }
		require.Equal(t, statusError, w.Run(ctx, append(w.flags(), args...)), args)
		require.Equal(t, "bpfnet: flows: interrupted\n", w.errs.String(), args)
		require.Empty(t, w.out.String(), args)
	}
}

// counted are counters that tell when they are closed.
type counted struct {
	fakeCounters
	open *int
}

func (c counted) Close() { *c.open-- }

// Who follows looks at the table that is there at the time, and goes on where there is none.
func TestFollowFlows(t *testing.T) {
	defer func(before *time.Location) { time.Local = before }(time.Local)
	time.Local = time.UTC
	synctest.Test(t, func(t *testing.T) {
		w := located(t)
		ctx, cancel := context.WithCancel(t.Context())
		all, gone := sampleFlows(), fmt.Errorf("open maps: %w", maps.ErrNotLoaded)
		rounds := []struct {
			flows    []maps.Flow
			open, in error
		}{
			{flows: all[:1]}, {open: gone}, {open: gone},
			{flows: all[:2], in: assert.AnError}, // behind these two
			{flows: all[1:3]},
			{open: gone},
		}
		round, open := 0, 0
		w.OpenCounters = func(bpffs string) (counters, error) {
			require.Equal(t, w.bpffs(), bpffs)
			require.Zero(t, open, "no earlier table is held")
			r := rounds[round]
			if round++; round == len(rounds) {
				cancel()
			}
			if r.open != nil {
				return nil, r.open
			}
			open++
			return counted{fakeCounters{flows: r.flows, err: r.in}, &open}, nil
		}
		require.NoError(t, w.followFlows(ctx, flowFilter{}, false))
		require.Zero(t, open)
		var told []string
		for line := range strings.Lines(w.out.String()) {
			told = append(told, strings.Join(strings.Fields(line)[1:5], " "))
		}
		require.Equal(t, []string{
			"EVENT PROTO NETWORK FROM",
			"opened tcp backend 172.19.0.3:50000", "closed tcp backend 172.19.0.3:50000", // of half a look
			"opened udp bridge 172.17.0.2:50001", "expired tcp bridge 203.0.113.9:40000",
		}, told)
		require.Equal(t, "bpfnet: open maps: nothing is loaded; start the daemon with \"bpfnet daemon\", or name its pins with --bpffs; trying again\n"+
			"bpfnet: "+assert.AnError.Error()+"; trying again\n", w.errs.String(), "each trouble is told once, and an interrupt is none")
	})
	w := withFlows(t)
	w.openErr = maps.ErrNotLoaded
	require.Contains(t, w.fails(statusError, "flows", "-f"), "nothing is loaded", "the first look is to succeed")
	require.Contains(t, w.fails(statusError, "flows", "-f", "--container", "we"), `container "we": no such container`)
}

// What has come, closed and gone between two looks is told once, in the order of time.
func TestChangedFlows(t *testing.T) {
	w := withFlows(t)
	names, known := newFlowNames(sampleSnapshot()), make(map[flowID]knownFlow)
	round := 0
	var filter flowFilter
	look := func(flows ...maps.Flow) (got []string) {
		t.Helper()
		round++
		lines, err := w.App.changedFlows(t.Context(), fakeCounters{flows: flows}, filter, names, known, round)
		require.NoError(t, err)
		for _, l := range lines {
			got = append(got, fmt.Sprintf("%s %s %s", l.Event, l.From.String(), l.Time.Sub(now)))
		}
		return got
	}
	all := sampleFlows()
	a, b := all[0], all[2]
	require.Empty(t, look(all[1], all[3]), "all is new at first")
	require.Len(t, known, 2)
	require.Equal(t, []string{"expired [fd00::3]:77 (web) 0s"}, look())
	require.Equal(t, []string{"opened 203.0.113.9:40000 -1m30s", "opened 172.17.0.2:50001 (web) -5s"}, look(a, b))
	require.Empty(t, look(b, a))
	closed := a
	closed.State, closed.Age, closed.Idle = maps.FlowClosed, 100*time.Second, 2*time.Second
	require.Equal(t, []string{"closed 203.0.113.9:40000 -2s", "expired 172.17.0.2:50001 (web) 0s"}, look(closed))
	closed.Age, closed.Idle = 101*time.Second, 3*time.Second
	require.Empty(t, look(closed), "it is told once")
	again := a
	again.Age, again.Idle = 0, 0
	require.Equal(t, []string{"opened 203.0.113.9:40000 0s"}, look(again), "the same tuple is used again")
	brief := all[1]
	require.Equal(t, []string{"opened 172.19.0.3:50000 (web) -3h0m0s", "closed 172.19.0.3:50000 (web) -40s"}, look(again, brief))
	require.Equal(t, []string{"expired 203.0.113.9:40000 0s"}, look(), "what had closed goes unsaid")
	require.Empty(t, known)

	// A flow is of the path that it was opened on.
	filter.path = "fast"
	other := b
	other.Fast = false
	require.Equal(t, []string{"opened 203.0.113.9:40000 -1m30s"}, look(a, other))
	a.Fast, other.Fast = false, true
	require.Empty(t, look(a, other))
	require.Equal(t, []string{"expired 203.0.113.9:40000 0s"}, look())
}

func TestPrintFlowEvent(t *testing.T) {
	names := newFlowNames(sampleSnapshot())
	l := names.line(&sampleFlows()[0])
	l.Event, l.Time = "closed", time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
	var out strings.Builder
	require.NoError(t, printFlowEvent(&out, l))
	require.Equal(t, "03:04:05  closed   tcp    bridge       203.0.113.9:40000 > 192.0.2.1:8080  to 172.17.0.2:80 (web)  fast, established, "+
		"10 / 20 packets, 1kB / 20kB in 90s\n", out.String())
}

// Who is gone keeps its name until another has its place.
func TestFlowNamesOutlive(t *testing.T) {
	snap := sampleSnapshot()
	names := newFlowNames(snap)
	snap.Endpoints = nil
	names.update(snap)
	require.Equal(t, "db", names.endpoint(7).Name)
	next := sampleSnapshot()
	next.Endpoints[0].Name = "db2"
	names.update(next)
	require.Equal(t, "db2", names.endpoint(7).Name)
	require.Empty(t, names.endpoint(0).Name)
}

// Rows line up by the widest of the first ones; later ones are written as they come.
func TestColumns(t *testing.T) {
	var out strings.Builder
	w := bufio.NewWriter(&out)
	c := newColumns(w, "A", "B")
	row := func(cells ...string) {
		for _, cell := range cells {
			c.cell(cell)
		}
		require.NoError(t, c.end())
	}
	for range columnsFrom - 1 {
		row("x", "y")
	}
	row("wide", "")
	require.NoError(t, w.Flush())
	require.True(t, strings.HasPrefix(out.String(), "A      B\nx      y\n"), "they are not kept back any longer")
	row("wider than that", "y")
	require.NoError(t, c.flush())
	require.NoError(t, w.Flush())
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	require.Len(t, lines, columnsFrom+2)
	require.Equal(t, []string{"wide   -", "wider than that   y"}, lines[columnsFrom:])
}

// A list is written as json.Marshal would.
func TestFlowJSON(t *testing.T) {
	snap := sampleSnapshot()
	snap.Endpoints[0].Name, snap.Endpoints[2].Network = "d\"b\\<é>\n", ""
	names := newFlowNames(snap)
	for _, f := range sampleFlows() {
		line := names.line(&f)
		want, err := json.Marshal(line)
		require.NoError(t, err)
		require.Equal(t, string(want), string(line.appendJSON(nil)))
	}
}

func TestBriefly(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 119 * time.Minute: "119m", 47 * time.Hour: "47h", 72 * time.Hour: "3d",
	} {
		assert.Equal(t, want, briefly(d))
	}
}
