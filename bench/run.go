// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"io"
	"testing"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Options narrow and lengthen a run.
type Options struct {
	Rounds int // of every group that does not say less itself; at least 5 where it counts
	// Scenarios and Modes are those to measure; empty: all.
	Scenarios, Modes []string
	Quick            bool
	Progress         io.Writer // a line a step
	Log              io.Writer // what labs have to say
}

// Probe is one thing to be measured, in a lab that stands.
type Probe struct {
	Key  Key
	Unit string
	Note string
	// Measure takes one window. It proves that the traffic took the mode's path, and fails if not.
	Measure func(ctx context.Context) (Sample, error)
}

// Group is what is measured side by side.
type Group struct {
	Name string
	// Rounds, where the group cannot afford those of the run; 0: as the run.
	Rounds int
	// Scenarios that it has.
	Scenarios []string
	// Build makes the labs, which end with t, and returns the probes in the order of a round.
	Build func(t testing.TB, o Options) []Probe
}

// Run measures the groups one after another and calls done with each record. It ends with ctx, and
// with the first probe that fails.
func Run(ctx context.Context, s *lab.Session, groups []Group, o Options, done func(Record) error) error {
	for _, g := range groups {
		var err error
		failed := s.Do(ctx, o.Log, func(t testing.TB) { err = runGroup(ctx, t, g, o, done) })
		if err == nil {
			err = failed
		}
		if err != nil {
			return fmt.Errorf("%s: %w", g.Name, err)
		}
	}
	return nil
}

func runGroup(ctx context.Context, t testing.TB, g Group, o Options, done func(Record) error) error {
	rounds := o.Rounds
	if g.Rounds != 0 {
		rounds = min(rounds, g.Rounds)
	}
	probes := g.Build(t, o)
	samples := make([][]Sample, len(probes))
	for round := range rounds {
		for i, p := range probes {
			fmt.Fprintf(o.Progress, "%s: round %d of %d: %s\n", g.Name, round+1, rounds, p.Key)
			s, err := p.Measure(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", p.Key, err)
			}
			samples[i] = append(samples[i], s)
		}
	}
	for i, p := range probes {
		if err := done(record(g, p, samples[i])); err != nil {
			return err
		}
	}
	return nil
}

func record(g Group, p Probe, samples []Sample) Record {
	r := Record{Key: p.Key, Group: g.Name, Unit: p.Unit, Note: p.Note, N: len(samples)}
	var cpu []float64
	for _, s := range samples {
		r.Samples = append(r.Samples, s.Value)
		if s.CPU > 0 {
			cpu = append(cpu, s.CPU)
		}
	}
	r.Spread = SpreadOf(r.Samples)
	if len(cpu) > 0 {
		c := SpreadOf(cpu)
		r.CPU = &c
	}
	return r
}

// String is the key in words: "published v4 rr, bpfnet".
func (k Key) String() string {
	s := k.Scenario
	if k.Family != 0 {
		s += fmt.Sprintf(" v%d", k.Family)
	}
	if k.At != 0 {
		s += fmt.Sprintf(" at %d", k.At)
	}
	return s + " " + k.Metric + ", " + k.Mode
}
