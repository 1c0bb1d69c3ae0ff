// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// shortly is a run of few and short windows.
var shortly = Options{Rounds: 1, Window: 50 * time.Millisecond, Log: io.Discard}

// measureRR makes the servers of a path and measures it with the first meter: rr.
func measureRR(t *testing.T, p path) error {
	t.Helper()
	p.serve(t)
	require.NoError(t, p.settle(t))
	_, err := p.probe(meters[0], shortly, nil).Measure(t.Context())
	return err
}

// Needs root and a Docker Engine. Traffic flows in all cases, and is refused as a measurement where it
// takes another path than the mode's.
func TestWrongPathFails(t *testing.T) {
	t.Run("docker-proxy in between", func(t *testing.T) {
		s := newSite(t, DockerProxy)
		require.NoError(t, measureRR(t, s.path("host-published", 4)), "the mode's own path")
		s.mode = DockerIPTables // as if the Engine had been asked for no proxy and had one all the same
		err := measureRR(t, s.path("host-published", 4))
		require.ErrorContains(t, err, "did not take the path of mode docker-iptables in scenario host-published")
		require.ErrorContains(t, err, proxyCPU)
	})
	t.Run("bpfnet's programs are gone", func(t *testing.T) {
		s := newSite(t, Bpfnet)
		p := s.path("container-container", 4)
		require.NoError(t, measureRR(t, p), "the mode's own path")
		s.bpfnet.Kill()
		require.NoError(t, os.RemoveAll(filepath.Join(s.lab.BPFFS, "links"))) // detaches
		err := measureRR(t, p)
		require.ErrorContains(t, err, "did not take the path of mode bpfnet in scenario container-container")
		require.ErrorContains(t, err, redirected)
	})
}

// Needs root. A path that takes a millisecond longer is slower by that.
func TestSlowPathShows(t *testing.T) {
	const delay = time.Millisecond
	group := Group{
		Name: "slow", Scenarios: []string{"hairpin"}, Warm: true,
		Build: func(t testing.TB, o Options) []Probe {
			fast, slow := newSite(t, Loopback), newSite(t, Loopback)
			slow.delay = delay
			var probes []Probe
			for mode, s := range map[string]*site{Loopback: fast, Bpfnet: slow} {
				p := s.path("hairpin", 4)
				p.serve(t)
				require.NoError(t, p.settle(t))
				probe := p.probe(meters[0], o, nil)
				probe.Key.Mode = mode
				probes = append(probes, probe)
			}
			return probes
		},
	}
	lab.NeedRoot(t)
	o := shortly
	o.Rounds, o.Window = 3, 100*time.Millisecond
	got := map[string]float64{}
	require.NoError(t, Run(t.Context(), new(lab.Session), []Group{group}, o, func(r Record) error {
		assert.Equal(t, 3, r.N)
		got[r.Mode] = r.Median
		return nil
	}))
	longer := time.Duration(float64(time.Second) * (1/got[Bpfnet] - 1/got[Loopback]))
	assert.GreaterOrEqual(t, longer, delay-delay/20)
	assert.Less(t, longer, 5*delay) // however busy the machine is
}

// A round takes one sample of each probe in turn, after one that does not count; probes with several
// outputs make a record of each, and those that a mode cannot serve one without samples.
func TestRunInterleaves(t *testing.T) {
	var order []string
	probe := func(mode string, more ...Output) Probe {
		return Probe{
			Key: Key{Scenario: "s", Mode: mode, Metric: "m"}, Unit: "1/s", More: more,
			Measure: func(context.Context) (Sample, error) {
				order = append(order, mode)
				return Sample{Value: float64(len(order)), More: make([]float64, len(more))}, nil
			},
		}
	}
	unserved := probe(NFTables)
	unserved.Measure, unserved.Note = nil, "not served by this mode: refused"
	g := Group{Name: "g", Scenarios: []string{"s"}, Warm: true, Build: func(testing.TB, Options) []Probe {
		return []Probe{probe(Host), probe(Loopback), unserved, probe(Bpfnet, Output{"other", "ratio"})}
	}}
	var progress strings.Builder
	o := Options{Rounds: 2, Modes: []string{Host, NFTables, Bpfnet}, Log: io.Discard, Progress: &progress}
	report := Report{Header: Header{Started: time.Unix(1, 0)}}
	require.NoError(t, Run(t.Context(), new(lab.Session), []Group{g}, o, func(r Record) error {
		report.Records = append(report.Records, r)
		return nil
	}))
	assert.Equal(t, []string{Host, Bpfnet, Host, Bpfnet, Host, Bpfnet}, order)
	require.Len(t, report.Records, 4)
	assert.Equal(t, []float64{3, 5}, report.Records[0].Samples)
	assert.Zero(t, report.Records[1].N)
	assert.Equal(t, "other", report.Records[3].Metric)
	assert.Contains(t, progress.String(), "[1 of 1, 67 %")

	var lines strings.Builder
	require.NoError(t, report.Write(&lines))
	_, err := Read(strings.NewReader(lines.String()), "run")
	require.NoError(t, err, "a reader takes what a run writes")

}

// What fails is named and makes no record. The rest of its group, and of the run, is measured.
func TestFailuresAreNamedAndTheRestIsMeasured(t *testing.T) {
	failed := errors.New("no way")
	probe := func(scenario, mode string, fails int) Probe {
		taken := 0
		return Probe{Key: Key{Scenario: scenario, Mode: mode, Metric: "m"}, Unit: "1/s",
			Measure: func(context.Context) (Sample, error) {
				taken++
				require.True(t, fails == 0 || taken <= fails, "measured after it has failed")
				if taken == fails {
					return Sample{}, failed
				}
				return Sample{Value: 1}, nil
			}}
	}
	group := func(name string, build func(t testing.TB) []Probe) Group {
		return Group{Name: name, Scenarios: []string{name}, Build: func(t testing.TB, _ Options) []Probe { return build(t) }}
	}
	groups := []Group{
		group("torn", func(testing.TB) []Probe { return []Probe{probe("torn", Host, 2), probe("torn", Bpfnet, 0)} }),
		group("unbuilt", func(t testing.TB) []Probe { t.Fatal("no lab"); return nil }),
		group("whole", func(testing.TB) []Probe { return []Probe{probe("whole", Bpfnet, 0)} }),
	}
	var written []string
	o := Options{Rounds: 3, Log: io.Discard}
	err := Run(t.Context(), new(lab.Session), groups, o, func(r Record) error {
		require.Equal(t, 3, r.N)
		written = append(written, r.Key.String())
		return nil
	})
	assert.Equal(t, []string{"torn m, bpfnet", "whole m, bpfnet"}, written)
	require.ErrorIs(t, err, failed)
	require.ErrorContains(t, err, "torn: torn m, host: no way")
	require.ErrorContains(t, err, "unbuilt: no lab")

	full := errors.New("disk full")
	err = Run(t.Context(), new(lab.Session), groups[2:], o, func(Record) error { return full })
	require.ErrorIs(t, err, full)
}

func TestUnknownNamesAreRefused(t *testing.T) {
	groups := Groups()
	require.NoError(t, Options{}.Check(groups))
	require.NoError(t, Options{Scenarios: []string{"egress"}, Modes: []string{Bpfnet}}.Check(groups))
	require.ErrorContains(t, Options{Scenarios: []string{"egres"}}.Check(groups), `unknown scenario "egres": want some of container-container, `)
	require.ErrorContains(t, Options{Modes: []string{"iptables"}}.Check(groups), `unknown mode "iptables": want some of host, `)
	require.ErrorContains(t, Options{Scenarios: []string{"egress"}, Modes: []string{Loopback}}.Check(groups), "none of the scenarios egress")
}
