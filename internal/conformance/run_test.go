// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Settings of the run, by environment.
const (
	envFull   = "BPFNET_CONFORMANCE"        // "full": every cell, not a tenth
	envSeed   = "BPFNET_CONFORMANCE_SEED"   // of the tenth; a number
	envReport = "BPFNET_CONFORMANCE_REPORT" // directory for conformance.md, conformance.json and summary
	envOutput = "BPFNET_CONFORMANCE_OUTPUT" // "3": progress and differences go to file descriptor 3
)

// Needs root and a Docker Engine. The same questions to three data paths; the answers of the third must
// be those of one of the other two, or of a departure.
func TestConformance(t *testing.T) {
	lab.NeedRoot(t)
	list, err := Departures()
	require.NoError(t, err)
	say := t.Logf
	if os.Getenv(envOutput) == "3" {
		out := os.NewFile(3, "output")
		say = func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(signals) })
	goOn := func(t *testing.T) {
		select {
		case sig := <-signals:
			t.Fatalf("%v: taking the lab down", sig)
		default:
		}
	}

	cells, full := Cells(), os.Getenv(envFull) == "full"
	if !full {
		seed := rand.Uint64()
		if text := os.Getenv(envSeed); text != "" {
			seed, err = strconv.ParseUint(text, 10, 64)
			require.NoError(t, err, envSeed)
		}
		cells = Sample(cells, seed)
		say("%d cells of seed %d; again by %s=%d", len(cells), seed, envSeed, seed)
	}

	outcomes := make([][]Outcome, len(modes))
	open := 0 // differences once isolation is off
	for i, m := range modes {
		outcomes[i] = make([]Outcome, len(cells))
		for w, world := range Worlds() {
			mine, places := cellsOf(cells, world)
			passed := t.Run(fmt.Sprintf("%s/%d", m.name, w), func(t *testing.T) {
				goOn(t)
				s := newSite(t, m, world)
				goOn(t)
				began := time.Now()
				for k, o := range s.ask(t, mine) {
					outcomes[i][places[k]] = o
				}
				say("%s: %d probes in %.1f s", m.name, len(mine), time.Since(began).Seconds())
				if m.bpfnet && w == 0 {
					open = s.openUp(t, cells, outcomes, list)
				}
			})
			if !passed {
				t.FailNow()
			}
		}
	}
	rows := rowsOf(cells, outcomes)
	sum, err := Compare(rows, list)
	require.NoError(t, err)
	for _, r := range rows {
		if r.Verdict == Differs {
			text := fmt.Sprintf("%s: docker-proxy: %v; none: %v; bpfnet: %v", r.Cell, r.Proxy, r.NoProxy, r.Bpfnet)
			if r.Departure != "" {
				text += "; not as departure " + r.Departure + " says"
			}
			say("%s", text)
		}
	}
	if dir := os.Getenv(envReport); dir != "" {
		text, err := json.MarshalIndent(rows, "", " ")
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "conformance.json"), append(text, '\n'), 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "conformance.md"), []byte(Report(rows, list, sum)), 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "summary"), []byte(sum.String()+"\n"), 0o644))
	}
	assert.Zero(t, sum.Differences, "cells differ; see above")
	assert.Positive(t, open, "with isolation switched off, no cell differs: the harness sees nothing")
	if full {
		share := 100 * sum.Delivered / sum.Cells
		say("%d %% of the cells are delivered in the reference; with isolation switched off, %d cells differ", share, open)
		for _, name := range sum.Unused {
			say("departure %s no longer occurs", name)
		}
		assert.Empty(t, sum.Unused, "departures that no longer occur")
		assert.GreaterOrEqual(t, sum.Cells, 400)
		assert.GreaterOrEqual(t, share, 45)
		return // the command shows the summary, last
	}
	say("%s", sum)
}

// cellsOf are the cells with one of some options, and where they stand in the list.
func cellsOf(cells []Cell, options []Option) (mine []Cell, places []int) {
	for i, c := range cells {
		if slices.ContainsFunc(options, func(o Option) bool { return o.Name == c.Option }) {
			mine, places = append(mine, c), append(places, i)
		}
	}
	return mine, places
}

func rowsOf(cells []Cell, outcomes [][]Outcome) []Row {
	rows := make([]Row, len(cells))
	for i, c := range cells {
		rows[i] = Row{Cell: c, Proxy: outcomes[0][i], NoProxy: outcomes[1][i], Bpfnet: outcomes[2][i]}
	}
	return rows
}

// openUp lets all networks talk and asks about other networks again: it returns how many cells differ then.
func (s *site) openUp(t *testing.T, cells []Cell, outcomes [][]Outcome, list []Departure) int {
	t.Helper()
	for _, o := range s.options {
		for _, name := range o.Networks() {
			s.b.MustCLI(t, "network", "allow", name, "net-other")
		}
	}
	var some []Cell
	partial := make([][]Outcome, len(outcomes))
	for i, c := range cells {
		if mine, _ := cellsOf([]Cell{c}, s.options); len(mine) > 0 && c.From == Other && (c.To == Container || c.To == Unpublished) {
			some = append(some, c)
			partial[0], partial[1] = append(partial[0], outcomes[0][i]), append(partial[1], outcomes[1][i])
		}
	}
	if len(some) == 0 {
		// The sample has none: one that is closed in the reference stands for them.
		some = []Cell{{From: Other, To: Unpublished, Proto: "tcp", Family: "v4", Option: "default"}}
		partial[0], partial[1] = []Outcome{{}}, []Outcome{{}}
	}
	partial[2] = s.ask(t, some)
	rows := rowsOf(some, partial)
	sum, err := Compare(rows, list)
	require.NoError(t, err)
	return sum.Differences
}

// sender is the namespace that a cell's probe leaves from.
func (s *site) sender(c Cell) *lab.NS {
	switch c.From {
	case Host:
		return s.Host
	case Self:
		return s.places[c.Option].server
	case Same:
		return s.places[c.Option].same
	case Other:
		return s.other
	}
	return s.outside[c.From]
}

// ask sends the probes of all cells, each sender all of its own at once, and tells what became of them.
func (s *site) ask(t *testing.T, cells []Cell) []Outcome {
	t.Helper()
	batches := map[*lab.NS][]lab.Probe{}
	for i, c := range cells {
		to, _ := s.target(c)
		require.True(t, to.Addr().IsValid(), "%s: no address", c)
		batches[s.sender(c)] = append(batches[s.sender(c)], lab.Probe{ID: strconv.Itoa(i), Proto: c.Proto, To: to})
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	results := map[string]lab.ProbeResult{}
	var failed error
	slots := make(chan struct{}, 10)
	for ns, probes := range batches {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			rs, err := ns.Probe(probes)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
			}
			for _, r := range rs {
				results[r.ID] = r
			}
		})
	}
	all.Wait()
	require.NoError(t, failed)

	seen := s.sightings(t, results)
	clients := map[*lab.NS]map[netip.Addr]bool{}
	for ns := range batches {
		clients[ns] = addresses(t, ns)
	}
	outcomes := make([]Outcome, len(cells))
	for i, c := range cells {
		r := results[strconv.Itoa(i)]
		_, name := s.target(c)
		outcomes[i] = s.outcome(c, r, name, seen, clients[s.sender(c)])
	}
	return outcomes
}

// sightings reads what the witnesses have seen, by their names. The kernel answers echo requests beside
// the witness: it is waited for until each answered probe has been seen by somebody.
func (s *site) sightings(t *testing.T, results map[string]lab.ProbeResult) map[string]map[string]lab.Sighting {
	t.Helper()
	seen := map[string]map[string]lab.Sighting{}
	complete := func() bool {
		everything := map[string]bool{}
		for name, w := range s.witnesses {
			list, err := w.Sightings()
			require.NoError(t, err)
			seen[name] = list
			for tag := range list {
				everything[tag] = true
			}
		}
		for _, r := range results {
			if r.Answered() && !everything[r.Tags[len(r.Tags)-1]] {
				return false
			}
		}
		return true
	}
	deadline := time.Now().Add(2 * time.Second) // whoever has not been seen by then was answered by a stranger
	lab.Eventually(t, time.Minute, "witnesses", func() bool { return complete() || time.Now().After(deadline) })
	return seen
}

// addresses are those of a namespace.
func addresses(t *testing.T, ns *lab.NS) map[netip.Addr]bool {
	t.Helper()
	var links []struct {
		AddrInfo []struct{ Local string } `json:"addr_info"`
	}
	require.NoError(t, json.Unmarshal([]byte(ns.MustRun(t, "ip", "-json", "addr")), &links))
	out := map[netip.Addr]bool{}
	for _, l := range links {
		for _, a := range l.AddrInfo {
			if parsed, err := netip.ParseAddr(a.Local); err == nil {
				out[parsed] = true
			}
		}
	}
	return out
}

func (s *site) outcome(c Cell, r lab.ProbeResult, witness string, seen map[string]map[string]lab.Sighting, client map[netip.Addr]bool) Outcome {
	if r.Answered() {
		tag := r.Tags[len(r.Tags)-1]
		if sight, ok := seen[witness][tag]; ok {
			return Outcome{Delivered: true, Source: s.symbol(c, sight.Src, client), TTL: sight.TTL}
		}
		for name, list := range seen {
			if _, ok := list[tag]; ok {
				return Outcome{Note: "answered by " + name}
			}
		}
		return Outcome{Note: "answered by nobody known"}
	}
	note := r.State
	if r.Error != "" && r.State != "refused" {
		note += ": " + r.Error
	}
	for _, tag := range r.Tags {
		if sight, ok := seen[witness][tag]; ok {
			return Outcome{Note: note + "; the server saw " + s.symbol(c, sight.Src, client)}
		}
	}
	return Outcome{Note: note}
}

// symbol names an address by what it is, so that runs compare.
func (s *site) symbol(c Cell, a netip.Addr, client map[netip.Addr]bool) string {
	for _, n := range s.places[c.Option].networks {
		if a == n.gateway[0] || a == n.gateway[1] {
			return "gateway"
		}
	}
	switch own := s.gate; {
	case a.IsLoopback():
		return "loopback"
	case s.names[a] != "":
		return s.names[a]
	case client[a]:
		return "client"
	case a == own[0] || a == own[1]:
		return "client's gateway"
	case a.IsLinkLocalUnicast():
		return "link-local"
	}
	return strings.ReplaceAll(a.String(), " ", "")
}
