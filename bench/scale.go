// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// The scaling groups ask what one exchange costs while more and more of something else is there. Each
// point of a scale is a lab of its own, so that all points of all modes stand side by side and are
// measured in turn. What is asked is on the default bridge, whose rules an Engine writes first and which
// therefore comes last in every chain.

// point is a number on a scale, and the modes that are measured there.
type point struct {
	at    int
	modes []string
}

// firstOther is the first of the ports that are published beside the measured one.
const firstOther = 20000

// sleep is what a container is that nobody asks.
var sleep = []string{lab.Image, "sleep", "1000000"}

// spotOpts are the ways in which the labs of scaling groups differ.
type spotOpts struct {
	before func(s *site) // what is made before the measured containers
	daemon []string      // arguments of bpfnet
	port   int           // that the server publishes; 0: loadPort. Servers of the host have those of servers
	udp    bool          // for UDP too
}

// newEngine builds the lab of a mode with an Engine and nobody in it. Mode host is without any rule, as
// mode bpfnet, and without bpfnet.
func newEngine(t testing.TB, mode string, daemon ...string) *site {
	t.Helper()
	s := &site{mode: mode, addrs: map[int]netip.Addr{}, servers: map[string]bool{}}
	s.lab = lab.New(t, lab.Opts{Plain: true, BridgeNetfilter: true})
	for _, n := range []*lab.NS{s.lab.Client, s.lab.Host} {
		ready(t, n)
	}
	s.docker = s.lab.StartDocker(t, lab.DockerOpts{
		IPTables: mode == DockerIPTables || mode == DockerProxy,
		Proxy:    mode == DockerProxy,
	})
	if mode == Bpfnet {
		s.bpfnet = s.lab.StartBpfnet(t, s.docker, daemon...)
	}
	return s
}

// newSpot adds a server and a client on the default bridge, with IPv4 only. The server's port is published
// last.
func newSpot(t testing.TB, mode string, o spotOpts) *site {
	t.Helper()
	s := newEngine(t, mode, o.daemon...)
	s.docker.MustRun(t, slices.Concat([]string{"run", "-d", "--name", "client"}, sleep)...)
	if o.before != nil {
		o.before(s)
	}
	port := publish(cmp.Or(o.port, loadPort), 1)
	args := []string{"run", "-d", "--name", "server", "-p", port}
	if o.udp {
		args = append(args, "-p", port+"/udp")
	}
	s.docker.MustRun(t, slices.Concat(args, sleep)...)
	s.server, s.client = s.docker.NS(t, "server"), s.docker.NS(t, "client")
	ready(t, s.server)
	ready(t, s.client)
	s.addrs[4], _ = s.docker.Addrs(t, "server", "bridge")
	return s
}

// publish is the argument of "docker run -p" for n ports, the same inside and outside.
func publish(first, n int) string {
	r := strconv.Itoa(first)
	if n > 1 {
		r += "-" + strconv.Itoa(first+n-1)
	}
	return netip.IPv4Unspecified().String() + ":" + r + ":" + r
}

// scaled are the probes of a way of traffic at a point of a scale. Stands is asked before each window
// whether what the point is about is there.
func (s *site) scaled(t testing.TB, o Options, key Key, way, note string, stands func() error, metrics ...string) []Probe {
	t.Helper()
	if err := stands(); err != nil {
		t.Fatalf("%s at %d, mode %s: %v", key.Scenario, key.At, s.mode, err)
	}
	p := s.path(way, 4)
	p.serve(t)
	if err := p.settle(t); err != nil {
		t.Fatalf("%s at %d, mode %s: nobody answers at %s: %v", key.Scenario, key.At, s.mode, p.target(loadPort), err)
	}
	var probes []Probe
	for _, m := range meters {
		if !slices.Contains(metrics, m.metric) {
			continue
		}
		probe := p.probe(m, o, nil)
		take := probe.Measure
		probe.Measure = func(ctx context.Context) (Sample, error) {
			if err := stands(); err != nil {
				return Sample{}, err
			}
			return take(ctx)
		}
		probe.Key.Scenario, probe.Key.At, probe.Note = key.Scenario, key.At, note
		probes = append(probes, probe)
	}
	return probes
}

// standing is what "bpfnet status" says about how many there are of something.
type standing struct {
	Networks, Containers, Ports int
	Maps                        []struct {
		Map     string
		Entries int
	}
}

func (s *site) standing() (standing, error) {
	var st standing
	out, err := s.bpfnet.CLI("status", "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &st)
	}
	return st, err
}

// entries is how full a map of bpfnet is.
func (st standing) entries(name string) int {
	for _, m := range st.Maps {
		if m.Map == name {
			return m.Entries
		}
	}
	return -1
}

// counted fails unless there are as many as were to be made.
func counted(what string, got, want int) error {
	if got != want {
		return fmt.Errorf("%d %s are there, want %d", got, what, want)
	}
	return nil
}

// waitUntil waits for a state that somebody else brings about.
func waitUntil(t testing.TB, limit time.Duration, stands func() error) {
	t.Helper()
	if err := within(limit, stands); err != nil {
		t.Fatal(err)
	}
}

// within waits for a state, and returns what was missing at the end.
func within(limit time.Duration, stands func() error) error {
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := stands()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not within %v: %w", limit, err)
		}
	}
}

// feed runs a program in a namespace with in as its input.
func feed(t testing.TB, n *lab.NS, in, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := n.Command(ctx, name, args...)
	cmd.Stdin = strings.NewReader(in)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out[:min(len(out), 2000)])
	}
}

// savedRules is what iptables-save says in the host's namespace.
func (s *site) savedRules(t testing.TB) string {
	t.Helper()
	return s.lab.Host.MustRun(t, "iptables-save")
}

// restoreRules loads rules in place of all that there are.
func (s *site) restoreRules(t testing.TB, rules string) {
	t.Helper()
	feed(t, s.lab.Host, rules, "iptables-restore")
}

// ruleCount is how many rules of the host have these words.
func (s *site) ruleCount(words ...string) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := s.lab.Host.Run(ctx, "iptables-save")
	n := 0
	for line := range strings.Lines(out) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	return n, err
}

// parallel calls f for 0 to n-1, four at a time, and ends with the first error.
func parallel(t testing.TB, n int, f func(i int) error) {
	t.Helper()
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		next  int
		first error
	)
	take := func() (int, bool) {
		mu.Lock()
		defer mu.Unlock()
		next++
		return next - 1, next <= n && first == nil && t.Context().Err() == nil
	}
	for range 4 {
		wg.Go(func() {
			for i, ok := take(); ok; i, ok = take() {
				if err := f(i); err != nil {
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	if first == nil {
		first = t.Context().Err()
	}
	if first != nil {
		t.Fatal(first)
	}
}

// processesIn are the processes of a namespace with that name, which is at most 15 bytes long.
func processesIn(n *lab.NS, name string) ([]int, error) {
	want, err := os.Stat(n.Path)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		comm, err := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
		if err != nil || strings.TrimSpace(string(comm)) != name {
			continue
		}
		is, err := os.Stat(filepath.Join("/proc", e.Name(), "ns/net"))
		if err == nil && os.SameFile(want, is) {
			all = append(all, pid)
		}
	}
	return all, nil
}

// patience is how long a state that was made may take to show.
const patience = 30 * time.Second

// scaleGroup measures a scale, all modes at a point beside each other.
func scaleGroup(scenario string, labs, round time.Duration, points []point, build func(t testing.TB, o Options, mode string, at int) []Probe) Group {
	g := Group{Name: scenario, Scenarios: []string{scenario}, Warm: true, Labs: labs, Round: round}
	for _, p := range points {
		for _, m := range p.modes {
			if !slices.Contains(g.Modes, m) {
				g.Modes = append(g.Modes, m)
			}
		}
	}
	g.Build = func(t testing.TB, o Options) []Probe {
		var probes []Probe
		for _, p := range points {
			for _, mode := range p.modes {
				if !o.Wants(mode) {
					continue
				}
				o.Step("%s: build the lab of mode %s at %d", scenario, mode, p.at)
				probes = append(probes, build(t, o, mode, p.at)...)
			}
		}
		return probes
	}
	return g
}
