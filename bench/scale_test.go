// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// measured takes one short round of a group, and returns what it is about.
func measured(t *testing.T, g Group) map[Key]Record {
	t.Helper()
	out := map[Key]Record{}
	o := Options{Rounds: 1, Window: 20 * time.Millisecond, Log: io.Discard}
	run := newProgress([]Group{g}, o)
	g.Warm = false
	require.NoError(t, runGroup(t.Context(), t, g, o, run, func(r Record) error {
		require.NotContains(t, out, r.Key)
		require.Contains(t, g.Scenarios, r.Scenario)
		require.Contains(t, g.Modes, r.Mode)
		require.Len(t, r.Samples, 1, r.Key)
		require.Positive(t, r.Median, r.Key)
		out[r.Key] = r
		return nil
	}))
	return out
}

func keysOf(scenario string, family int, metric string, points []point) []Key {
	var keys []Key
	for _, p := range points {
		for _, m := range p.modes {
			keys = append(keys, Key{Scenario: scenario, Mode: m, Family: family, Metric: metric, At: p.at})
		}
	}
	return keys
}

// Needs root. Every way to make many of something is taken, with few.
func TestScaling(t *testing.T) {
	lab.NeedRoot(t)
	for _, test := range []struct {
		scenario string
		points   []point
		group    func(points []point) Group
	}{
		{"ports", []point{{4, []string{DockerIPTables, DockerProxy, NFTables, Bpfnet}}},
			func(p []point) Group { return scaledPorts(p, 2, "crr") }},
		{"networks", []point{{3, []string{DockerIPTables}}}, // bpfnet's are among "endpoints"
			func(p []point) Group { return scaledNetworks(p, "crr") }},
		{"endpoints", []point{{6, []string{DockerIPTables, Bpfnet}}},
			func(p []point) Group { return scaledEndpoints(p, 3, 4, "crr") }},
		{"flows", []point{{300, []string{DockerIPTables, Bpfnet}}},
			func(p []point) Group { return scaledFlows(p, 5000, "crr") }},
	} {
		t.Run(test.scenario, func(t *testing.T) {
			t.Parallel()
			records := measured(t, test.group(test.points))
			for _, k := range keysOf(test.scenario, 4, "crr", test.points) {
				require.Contains(t, records, k)
				require.Equal(t, "1/s", records[k].Unit)
			}
		})
	}
}

// Needs root. Who counts sees one that is missing.
func TestScalingCounts(t *testing.T) {
	lab.NeedRoot(t)
	for _, mode := range []string{DockerIPTables, Bpfnet} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			s := newSpot(t, mode, spotOpts{})
			for what, f := range map[string]struct {
				count func(int) error
				is    int
			}{"ports": {s.publishes, 1}, "networks": {s.hasNetworks, 1}, "endpoints": {s.hasEndpoints, 2}} {
				waitUntil(t, patience, func() error { return f.count(f.is) })
				require.Error(t, f.count(f.is+1), what)
			}
			require.NoError(t, s.hasFlows(0))
			require.Error(t, s.hasFlows(1000))
		})
	}
}

// Needs root.
func TestCost(t *testing.T) {
	lab.NeedRoot(t)
	t.Run("host-only", func(t *testing.T) {
		t.Parallel()
		records := measured(t, hostOnlyGroup())
		for _, family := range []int{4, 6} {
			points := []point{{0, []string{Host, Bpfnet}}}
			for _, k := range append(keysOf("host-only", family, "rr", points), keysOf("host-only", family, "crr", points)...) {
				require.Contains(t, records, k)
			}
			spent := records[Key{Scenario: "host-only", Mode: Bpfnet, Family: family, Metric: "bpf-packet"}]
			require.Equal(t, "ns", spent.Unit)
			require.Less(t, spent.Median, 1e6)
		}
	})
	t.Run("memory", func(t *testing.T) {
		t.Parallel()
		records := measured(t, memoryOf(nil, 10))
		value := func(mode, metric string) float64 {
			r, ok := records[Key{Scenario: "memory", Mode: mode, Metric: metric}]
			require.True(t, ok, metric)
			require.Equal(t, "bytes", r.Unit)
			return r.Median
		}
		// Two keys and two values at the least, which bpf/lib/types.h has the sizes of.
		require.GreaterOrEqual(t, value(Bpfnet, "flow"), 2.*(16+64))
		require.Greater(t, value(Bpfnet, "flow6"), value(Bpfnet, "flow"))
		require.Greater(t, value(Bpfnet, "endpoint"), 40.)
		require.Greater(t, value(Bpfnet, "port"), 44.)
		self, err := memoryOfProcess(os.Getpid(), "Rss")
		require.NoError(t, err)
		require.Greater(t, self.Value, 1e6)
		require.Greater(t, value(DockerProxy, "port-rss"), value(DockerProxy, "port"))
	})
}

const twoNetworks = `*filter
:FORWARD DROP [0:0]
-A FORWARD -o br-one -j DOCKER
-A FORWARD -o docker0 -j DOCKER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
COMMIT
*nat
-A POSTROUTING -s 10.1.0.0/24 ! -o br-one -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
`

func TestMoreRules(t *testing.T) {
	added := func(got string) []string {
		var more []string
		for line := range strings.Lines(got) {
			if !strings.Contains(twoNetworks, line) {
				more = append(more, strings.TrimSpace(line))
			}
		}
		return more
	}
	got, err := morePorts(twoNetworks, 8080, 80, []uint16{7001, 7002})
	require.NoError(t, err)
	require.Equal(t, []string{
		"-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 7001 -j ACCEPT",
		"-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 7002 -j ACCEPT",
		"-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 7001 -j MASQUERADE",
		"-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 7002 -j MASQUERADE",
		"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 7001 -j DNAT --to-destination 172.17.0.2:7001",
		"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 7002 -j DNAT --to-destination 172.17.0.2:7002",
	}, added(got))
	require.Less(t, strings.Index(got, "--dport 7002 -j DNAT"), strings.Index(got, "--dport 8080 -j DNAT"), "the measured port is not the last")

	got, err = moreNetworks(twoNetworks, wire{"br-one", "10.1.0.0/24"}, []wire{{"br-two", "10.2.0.0/24"}})
	require.NoError(t, err)
	require.Equal(t, []string{"-A FORWARD -o br-two -j DOCKER", "-A POSTROUTING -s 10.2.0.0/24 ! -o br-two -j MASQUERADE"}, added(got))

	_, err = morePorts(twoNetworks, 81, 82, []uint16{7001})
	require.ErrorContains(t, err, "nothing to multiply")
}
