// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Options narrow and lengthen a run.
type Options struct {
	Rounds int // of every group that does not say less itself; at least 5 where it counts
	// Window is how long one sample of traffic takes, after its warm-up. 0: 700 ms, the generator's own.
	Window time.Duration
	// Scenarios and Modes are those to measure; empty: all.
	Scenarios, Modes []string
	Quick            bool      // measure what the targets speak of
	Progress         io.Writer // a line a step
	Log              io.Writer // what labs have to say
}

// Wants reports whether a mode is to be measured.
func (o Options) Wants(mode string) bool { return len(o.Modes) == 0 || slices.Contains(o.Modes, mode) }

// WantsScenario reports whether a scenario is to be measured.
func (o Options) WantsScenario(scenario string) bool {
	return len(o.Scenarios) == 0 || slices.Contains(o.Scenarios, scenario)
}

// Step tells what is done now.
func (o Options) Step(format string, args ...any) {
	if o.Progress != nil {
		fmt.Fprintf(o.Progress, format+"\n", args...)
	}
}

// Probe is one thing to be measured, in a lab that stands.
type Probe struct {
	Key  Key
	Unit string
	Note string
	// Measure takes one window. It proves that the traffic took the mode's path, and fails if not. Where
	// the mode cannot do it at all, it is nil, and Note says why.
	Measure func(ctx context.Context) (Sample, error)
	// Turns has the probe measure in turn with those of other modes that measure the same. Measure then asks for its
	// seat: see [seatOf].
	Turns bool
	// Rounds, where the probe cannot afford those of the group; 0: as the group.
	Rounds int
	// More are other things that the same window measures. They make records of their own.
	More []Output
}

// Output is one of several things that a window measures.
type Output struct{ Metric, Unit string }

// Group is what is measured side by side.
type Group struct {
	Name string
	// Rounds, where the group cannot afford those of the run; 0: as the run.
	Rounds int
	// Scenarios that it has, and modes; no modes: all.
	Scenarios, Modes []string
	// Warm has every probe measure once before the rounds begin: traffic, whose first window finds cold
	// caches and neighbours to be resolved. It may be a short window: see [warming].
	Warm bool
	// Quick groups are what a quick run consists of. It measures others only where their scenarios are named.
	Quick bool
	// Labs and Round are about how long the labs and one round of all modes take on two CPUs, with windows of
	// the usual length: for estimates.
	Labs, Round time.Duration
	// Build makes the labs, which end with t, and returns the probes in the order of a round.
	Build func(t testing.TB, o Options) []Probe
}

// wanted reports whether anything of the group is to be measured.
func (g Group) wanted(o Options) bool {
	if o.Quick && !g.Quick && len(o.Scenarios) == 0 {
		return false
	}
	return slices.ContainsFunc(g.Scenarios, o.WantsScenario) && (len(g.Modes) == 0 || slices.ContainsFunc(g.Modes, o.Wants))
}

// takes is about how long the group takes. Where modes or metrics are left out, it takes less.
func (g Group) takes(o Options) time.Duration {
	rounds := g.rounds(o)
	if g.Warm {
		rounds++
	}
	return g.Labs + time.Duration(rounds)*g.Round
}

func (g Group) rounds(o Options) int {
	if g.Rounds != 0 {
		return min(o.Rounds, g.Rounds)
	}
	return o.Rounds
}

// Estimate is about how long a run takes at the most.
func Estimate(groups []Group, o Options) (sum time.Duration) {
	for _, g := range groups {
		if g.wanted(o) {
			sum += g.takes(o)
		}
	}
	return sum
}

// Check names the first scenario or mode of the options that no group has.
func (o Options) Check(groups []Group) error {
	var scenarios []string
	for _, g := range groups {
		scenarios = append(scenarios, g.Scenarios...)
	}
	for _, s := range o.Scenarios {
		if !slices.Contains(scenarios, s) {
			return fmt.Errorf("unknown scenario %q: want some of %s", s, strings.Join(scenarios, ", "))
		}
	}
	for _, m := range o.Modes {
		if !slices.Contains(Modes, m) {
			return fmt.Errorf("unknown mode %q: want some of %s", m, strings.Join(Modes, ", "))
		}
	}
	if !slices.ContainsFunc(groups, func(g Group) bool { return g.wanted(o) }) {
		return fmt.Errorf("none of the scenarios %s has any of the modes %s",
			strings.Join(o.Scenarios, ", "), strings.Join(o.Modes, ", "))
	}
	return nil
}

// Run measures the groups one after another and calls done with each record, at the end of its group. A
// probe that fails makes no record, and a group that fails none at all; the rest is measured all the same,
// and the error names what failed. Run ends with ctx, and with the first error of done.
func Run(ctx context.Context, s *lab.Session, groups []Group, o Options, done func(Record) error) error {
	var wanted []Group
	for _, g := range groups {
		if g.wanted(o) {
			wanted = append(wanted, g)
		}
	}
	run := newProgress(wanted, o)
	var unwritten error
	written := 0
	write := func(r Record) error {
		written++
		unwritten = done(r)
		return unwritten
	}
	var failures []error
	for i, g := range wanted {
		run.enter(i)
		var err error
		failed := s.Do(ctx, o.Log, func(t testing.TB) { err = runGroup(ctx, t, g, o, run, write) })
		if ctx.Err() != nil {
			return context.Cause(ctx) // whatever else went wrong is of it
		}
		if err == nil {
			err = failed
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", g.Name, err)
			failures = append(failures, err)
			o.Step("%s failed: %v", run, err)
		}
		if unwritten != nil {
			break
		}
	}
	if written == 0 && len(failures) == 0 {
		return errors.New("nothing was measured: a quick run leaves out what was asked for; leave out --quick")
	}
	return errors.Join(failures...)
}

func runGroup(ctx context.Context, t testing.TB, g Group, o Options, run *progress, done func(Record) error) error {
	rounds := g.rounds(o)
	inner := o
	inner.Progress = writer(func(line []byte) (int, error) {
		o.Step("%s %s", run, strings.TrimSpace(string(line)))
		return len(line), nil
	})
	probes := g.Build(t, inner)
	probes = slices.DeleteFunc(probes, func(p Probe) bool { // of who does not narrow them itself
		return !o.Wants(p.Key.Mode) || !o.WantsScenario(p.Key.Scenario)
	})
	together := sets(probes)
	samples := make([][]Sample, len(probes))
	failures := make([]error, len(probes))
	first := 0
	if g.Warm {
		first = -1
	}
	run.begin((rounds - first) * len(probes))
	for round := first; round < rounds; round++ {
		title, ctx := fmt.Sprintf("round %d of %d", round+1, rounds), ctx
		if round < 0 {
			title, ctx = "warm up", context.WithValue(ctx, warmKey{}, true)
		}
		for _, set := range together {
			var now []Probe
			var at []int
			for _, i := range set {
				if p := probes[i]; p.Measure != nil && failures[i] == nil && (p.Rounds == 0 || round < p.Rounds) {
					now, at = append(now, p), append(at, i)
				}
			}
			if len(now) > 0 {
				o.Step("%s %s: %s", run, title, titleOf(now))
			}
			taken, errs := inTurns(ctx, now)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			for j, i := range at {
				if errs[j] != nil {
					failures[i] = errs[j]
					o.Step("%s failed: %v", run, errs[j])
				} else if round >= 0 {
					samples[i] = append(samples[i], taken[j])
				}
			}
			for range set {
				run.step()
			}
		}
	}
	for i, p := range probes {
		if failures[i] != nil {
			continue
		}
		for _, r := range records(g, p, samples[i]) {
			if err := done(r); err != nil {
				return err
			}
		}
	}
	return errors.Join(failures...)
}

// sample takes one window.
func (p Probe) sample(ctx context.Context) (Sample, error) {
	s, err := p.Measure(ctx)
	if err == nil && len(s.More) != len(p.More) {
		err = fmt.Errorf("%d more values, want %d", len(s.More), len(p.More))
	}
	if err != nil {
		return s, fmt.Errorf("%s: %w", p.Key, err)
	}
	return s, nil
}

type warmKey struct{}

// warming reports whether a probe's sample is one that does not count.
func warming(ctx context.Context) bool { return ctx.Value(warmKey{}) != nil }

// records are those of a probe: one, and one for each of its other outputs.
func records(g Group, p Probe, samples []Sample) []Record {
	r := Record{Key: p.Key, Group: g.Name, Unit: p.Unit, Note: p.Note, N: len(samples)}
	var cpu []float64
	for _, s := range samples {
		r.Samples = append(r.Samples, s.Value)
		if s.CPU > 0 {
			cpu = append(cpu, s.CPU)
		}
	}
	if len(cpu) > 0 {
		c := SpreadOf(cpu)
		r.CPU = &c
	}
	all := []Record{r}
	for i, out := range p.More {
		more := r
		more.Metric, more.Unit, more.Samples, more.CPU = out.Metric, out.Unit, nil, nil
		for _, s := range samples {
			more.Samples = append(more.Samples, s.More[i])
		}
		all = append(all, more)
	}
	if len(samples) > 0 {
		for i := range all {
			all[i].Spread = SpreadOf(all[i].Samples)
		}
	}
	return all
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

type writer func([]byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }
