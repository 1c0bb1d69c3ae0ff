// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/bench/load"
)

// trafficScenarios are the ways of traffic.
var trafficScenarios = []string{"container-container", "published", "egress", "host-published", "hairpin"}

// meter is a way to measure a path.
type meter struct {
	metric, unit string
	client       load.Client
	turns        bool // with the same in other modes
	full         bool // for modes of the full cross only: bpfnet, docker-iptables and the limits
	more         []Output
	values       func(r load.Result) []float64 // of more
}

// moved is what a window must have moved at the least: for proofs.
type moved struct {
	packets uint64 // one way
	flows   uint64
}

var meters = []meter{
	{metric: "rr", unit: "1/s", client: load.Client{Kind: load.RR}, turns: true},
	{metric: "crr", unit: "1/s", client: load.Client{Kind: load.CRR}, turns: true},
	{metric: "stream1", unit: "bit/s", client: load.Client{Kind: load.Stream, Flows: 1}},
	{metric: "stream4", unit: "bit/s", client: load.Client{Kind: load.Stream, Flows: 4}},
	{
		metric: "udp", unit: "1/s", client: load.Client{Kind: load.UDP}, full: true,
		more:   []Output{{"udp-loss", "ratio"}},
		values: func(r load.Result) []float64 { return []float64{r.Loss} },
	},
	{
		metric: "latency-p50", unit: "ns", client: load.Client{Kind: load.Latency}, full: true,
		more: []Output{{"latency-p90", "ns"}, {"latency-p99", "ns"}, {"latency-p999", "ns"}},
		values: func(r load.Result) []float64 {
			return []float64{float64(r.Latency.P90), float64(r.Latency.P99), float64(r.Latency.P999)}
		},
	},
}

// measure takes one window of a path.
func (m meter) measure(ctx context.Context, p path, window time.Duration) (Sample, moved, error) {
	c := m.client
	c.Window = window
	if c.Kind != load.Stream {
		c.Warmup = warmup
	}
	if s := seatOf(ctx); s != nil {
		c.Turns = s.take(window, starting)
	}
	r, err := p.window(ctx, c)
	if err != nil {
		return Sample{}, moved{}, err
	}
	if c.Kind == load.Latency && r.Latency == nil {
		return Sample{}, moved{}, errors.New("the generator told no latencies")
	}
	s := Sample{Value: r.Rate, CPU: r.CPU()}
	if m.values != nil {
		s.More = m.values(r)
	}
	through := moved{packets: r.Units, flows: 1}
	switch c.Kind {
	case load.CRR:
		through.flows = r.Units
	case load.Stream:
		through.packets = r.Units / 8 / largestPacket
	case load.Latency:
		s.Value = float64(r.Latency.P50)
	}
	return s, through, nil
}

// starting is how long a generator takes to start, with others beside it.
const starting = 150 * time.Millisecond

// warmup is what of a window does not count: caches are warm from the round before.
const warmup = 100 * time.Millisecond

// warmWindow is that of samples that do not count; the generator's own warm-up comes before.
const warmWindow = 50 * time.Millisecond

// largestPacket is what a stream's packets have at the most on their way: segments are cut at the end.
const largestPacket = 64 << 10

// trafficGroup measures one way of traffic in all modes.
func trafficGroup(scenario string) Group {
	modes := []string{limitOf[scenario], DockerIPTables, DockerProxy, NFTables, Bpfnet}
	if scenario == "host-published" {
		modes = slices.Insert(modes, 3, ProxyPinned)
	}
	return Group{
		Name:      scenario,
		Scenarios: []string{scenario},
		Modes:     modes,
		Warm:      true,
		Quick:     scenario != "hairpin",
		Labs:      45 * time.Second,
		Round:     25 * time.Second,
		Build: func(t testing.TB, o Options) []Probe {
			var sites []*site
			for _, mode := range modes {
				if o.Wants(mode) && (!o.Quick || quickMode(scenario, mode)) {
					o.Step("%s: build the lab of mode %s", scenario, mode)
					sites = append(sites, newSite(t, mode))
				}
			}
			var probes []Probe
			families := []int{4, 6}
			if o.Quick {
				families = families[:1]
			}
			for _, family := range families {
				reached := make([]error, len(sites))
				for i, s := range sites {
					p := s.path(scenario, family)
					p.serve(t)
					reached[i] = p.settle(t)
				}
				for _, m := range meters {
					for i, s := range sites {
						if (!m.full || !slices.Contains([]string{DockerProxy, ProxyPinned, NFTables}, s.mode)) && (!o.Quick || m.quick(scenario)) {
							p := s.path(scenario, family).probe(m, o, reached[i])
							if family == 6 && !reachNeeds(p.Key) {
								p.Rounds = 1
							}
							probes = append(probes, p)
						}
					}
				}
			}
			return probes
		},
	}
}

// quickMode and quick say what of a scenario a quick run measures: what the targets speak of.
func quickMode(scenario, mode string) bool {
	return mode != NFTables && (mode != DockerProxy || scenario == "host-published")
}

func (m meter) quick(scenario string) bool {
	return m.metric == "rr" || m.metric == "crr" || m.metric == "stream1" && scenario == "container-container"
}

// settle waits until the path serves. Docker's own modes may not serve what the host or a neighbour dials by
// the host's addresses: the error says how it shows. All else must.
func (p path) settle(t testing.TB) error {
	t.Helper()
	patience := 10 * time.Second
	docker := slices.Contains([]string{DockerIPTables, DockerProxy, ProxyPinned, NFTables}, p.mode) &&
		(p.scenario == "host-published" || p.scenario == "hairpin")
	if docker {
		patience = 4 * time.Second
	}
	var err error
	for end := time.Now().Add(patience); ; {
		if err = p.reach(t.Context()); err == nil {
			return nil
		}
		if t.Context().Err() != nil || time.Now().After(end) {
			break
		}
	}
	if !docker {
		t.Fatalf("%s, mode %s: nobody answers at %s: %v", p.scenario, p.mode, p.target(loadPort), err)
	}
	return err
}

// probe measures the path with m, and proves the way.
func (p path) probe(m meter, o Options, unreached error) Probe {
	probe := Probe{
		Key:  Key{Scenario: p.scenario, Mode: p.mode, Family: p.family, Metric: m.metric},
		Unit: m.unit, Turns: m.turns,
		More: m.more,
	}
	if unreached != nil {
		probe.Note = "not served by this mode: " + cause(unreached)
		return probe
	}
	if p.proxied() {
		probe.Note = proxyNote[p.mode]
	}
	probe.Measure = func(ctx context.Context) (Sample, error) {
		before, err := p.counters()
		if err != nil {
			return Sample{}, err
		}
		window := o.Window
		if warming(ctx) {
			window = min(window, warmWindow)
		}
		s, through, err := m.measure(ctx, p, window)
		if err != nil {
			return Sample{}, err
		}
		after, err := p.counters()
		if err != nil {
			return Sample{}, err
		}
		return s, p.prove(after.since(before), through)
	}
	return probe
}

// cause is what the generator said, without the command line that has names of this run in it.
func cause(err error) string {
	s := strings.TrimSpace(err.Error())
	if _, said, found := strings.Cut(s, "worker "+load.RR+": "); found {
		return said
	}
	return s[strings.LastIndexByte(s, '\n')+1:]
}
