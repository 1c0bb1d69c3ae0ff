// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
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
	more         []Output
	full         bool // measured in the full cross only: see modesOf
	measure      func(ctx context.Context, p path, window time.Duration) (Sample, moved, error)
}

// moved is what a window must have moved at the least: for proofs.
type moved struct {
	packets uint64 // one way
	flows   uint64
}

var meters = []meter{
	{metric: "rr", unit: "1/s", measure: exchange(load.RR)},
	{metric: "crr", unit: "1/s", measure: exchange(load.CRR)},
}

func exchange(kind string) func(context.Context, path, time.Duration) (Sample, moved, error) {
	return func(ctx context.Context, p path, window time.Duration) (Sample, moved, error) {
		r, err := p.window(ctx, load.Client{Kind: kind, Window: window})
		if err != nil {
			return Sample{}, moved{}, err
		}
		m := moved{packets: r.Units, flows: 1}
		if kind == load.CRR {
			m.flows = r.Units
		}
		return Sample{Value: r.Rate, CPU: r.CPU()}, m, nil
	}
}

// trafficGroup measures one way of traffic in all modes.
func trafficGroup(scenario string) Group {
	modes := []string{limitOf[scenario], DockerIPTables, DockerProxy, Bpfnet}
	return Group{
		Name:      scenario,
		Scenarios: []string{scenario},
		Modes:     modes,
		Warm:      true,
		Build: func(t testing.TB, o Options) []Probe {
			var sites []*site
			for _, mode := range modes {
				if o.Wants(mode) {
					o.Step("%s: build the lab of mode %s", scenario, mode)
					sites = append(sites, newSite(t, mode))
				}
			}
			var probes []Probe
			for _, family := range []int{4, 6} {
				reached := make([]error, len(sites))
				for i, s := range sites {
					p := s.path(scenario, family)
					p.serve(t)
					reached[i] = p.settle(t)
				}
				for _, m := range meters {
					for i, s := range sites {
						if !m.full || s.mode != DockerProxy && s.mode != NFTables {
							probes = append(probes, s.path(scenario, family).probe(m, o, reached[i]))
						}
					}
				}
			}
			return probes
		},
	}
}

// settle waits until the path serves. Docker's own modes may not serve some: the error says how it
// shows. All others must.
func (p path) settle(t testing.TB) error {
	t.Helper()
	patience := 10 * time.Second
	docker := slices.Contains([]string{DockerIPTables, DockerProxy, NFTables}, p.mode)
	if docker {
		patience = 4 * time.Second
	}
	var err error
	for end := time.Now().Add(patience); ; {
		if err = p.reach(t.Context()); err == nil {
			return nil
		}
		if time.Now().After(end) {
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
		Unit: m.unit,
		More: m.more,
	}
	if unreached != nil {
		probe.Note = "not served by this mode: " + lastLine(unreached)
		return probe
	}
	probe.Measure = func(ctx context.Context) (Sample, error) {
		before, err := p.counters()
		if err != nil {
			return Sample{}, err
		}
		s, moved, err := m.measure(ctx, p, o.Window)
		if err != nil {
			return Sample{}, err
		}
		after, err := p.counters()
		if err != nil {
			return Sample{}, err
		}
		return s, p.prove(after.since(before), moved)
	}
	return probe
}

// lastLine is the last line of an error: of a command's, what it said itself.
func lastLine(err error) string {
	s := strings.TrimSpace(err.Error())
	return s[strings.LastIndexByte(s, '\n')+1:]
}
