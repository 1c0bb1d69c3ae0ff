// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// measureAll takes one sample of each probe of a group.
func measureAll(t *testing.T, g Group) map[Key]float64 {
	t.Helper()
	out := make(map[Key]float64)
	for _, p := range g.Build(t, Options{}) {
		s, err := p.Measure(t.Context())
		require.NoError(t, err, "%s", p.Key)
		require.Contains(t, g.Scenarios, p.Key.Scenario)
		require.Len(t, s.More, len(p.More))
		for i, o := range append([]Output{{p.Key.Metric, p.Unit}}, p.More...) {
			key := p.Key
			key.Metric = o.Metric
			require.NotContains(t, out, key)
			out[key] = append([]float64{s.Value}, s.More...)[i]
			t.Logf("%s: %.4g %s", key, out[key], o.Unit)
		}
	}
	return out
}

// Needs root and a Docker Engine. That all endpoints are there after each start, and that each connect
// became READY, the group itself checks.
func TestCrowd(t *testing.T) {
	size := crowdSize{Networks: 2, Containers: 1, Sandboxes: 1, Connects: 4}
	got := measureAll(t, crowdGroupOf(size))
	at := func(scenario, metric string) float64 {
		v, ok := got[Key{Scenario: scenario, Mode: Bpfnet, Metric: metric, At: size.endpoints()}]
		require.True(t, ok, "%s %s", scenario, metric)
		return v
	}
	require.LessOrEqual(t, at(Ready, "p50"), at(Ready, "p99"))
	require.Greater(t, at(Reconcile, "fresh"), at(Reconcile, "restart"), "loading programs costs a second")
}

// Needs root and a Docker Engine. That so many ports are published, and that the last of them answers, the
// group itself checks.
func TestEngines(t *testing.T) {
	got := measureAll(t, enginesGroupOf([]int{5}, nil, time.Millisecond))
	for _, mode := range engineModes {
		start := got[Key{Scenario: RunPorts, Mode: mode, Metric: "start", At: 5}]
		require.Positive(t, start, mode)
		if mode != Engine {
			require.Greater(t, got[Key{Scenario: RunPorts, Mode: mode, Metric: "answers", At: 5}], start, mode)
		}
	}
	for _, mode := range append(engineModes, Sandboxes) {
		require.Positive(t, got[Key{Scenario: Churn, Mode: mode, Metric: "run-rm", At: 4}], mode)
	}

	// What does not start is no measurement.
	e := newDockerHost(t, Engine)
	e.d.MustRun(t, "create", "--name", published, lab.Image)
	_, err := e.run(t.Context(), t, 1, true)
	require.ErrorContains(t, err, "already in use")
	_, err = churn(t.Context(), time.Minute, 1, func(ctx context.Context) *exec.Cmd {
		return e.d.Command(ctx, "run", "--rm", lab.Image, "no-such-program")
	})
	require.ErrorContains(t, err, "no-such-program")
}
