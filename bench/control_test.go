// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

// measureAll takes one sample of each probe of a group.
func measureAll(t *testing.T, g Group) map[Key]Sample {
	t.Helper()
	out := make(map[Key]Sample)
	for _, p := range g.Build(t, Options{}) {
		s, err := p.Measure(t.Context())
		require.NoError(t, err, "%s", p.Key)
		require.NotContains(t, out, p.Key)
		require.Contains(t, g.Scenarios, p.Key.Scenario)
		out[p.Key] = s
		t.Logf("%s: %.4g %s", p.Key, s.Value, p.Unit)
	}
	return out
}

// Needs root and a Docker Engine. That all endpoints are there after each start, and that each connect
// became READY, the group itself checks.
func TestCrowd(t *testing.T) {
	size := crowdSize{Networks: 2, Containers: 1, Sandboxes: 1, Connects: 4}
	if n := os.Getenv("CROWD"); n != "" {
		_, err := fmt.Sscan(n, &size.Connects)
		require.NoError(t, err)
		size.Networks, size.Containers, size.Sandboxes = 10, 10, 90
	}
	got := measureAll(t, crowdGroupOf(size))
	at := func(scenario, metric string) float64 {
		s, ok := got[Key{Scenario: scenario, Mode: Bpfnet, Metric: metric, At: size.endpoints()}]
		require.True(t, ok, "%s %s", scenario, metric)
		return s.Value
	}
	require.LessOrEqual(t, at(Ready, "p50"), at(Ready, "p99"))
	require.Greater(t, at(Reconcile, "fresh"), at(Reconcile, "restart"), "loading programs costs a second")
}
