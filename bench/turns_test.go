// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bench/load"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// Those that measure the same take turns, each its own, from one moment on; one that fails before leaves its turn to the
// others; the rest measures alone.
func TestProbesTakeTurns(t *testing.T) {
	var mu sync.Mutex
	turns := map[string][]load.Turns{}
	take := func(key Key, inTurn bool, fails error) Probe {
		return Probe{Key: key, Unit: "1/s", Turns: inTurn, Measure: func(ctx context.Context) (Sample, error) {
			if fails != nil {
				return Sample{}, fails
			}
			var mine load.Turns
			s := seatOf(ctx)
			if s != nil {
				mine = s.take(90*time.Millisecond, time.Second)
			}
			mu.Lock()
			defer mu.Unlock()
			turns[key.String()] = append(turns[key.String()], mine)
			return Sample{Value: 1}, nil
		}}
	}
	rr := func(mode string, at int) Key { return Key{Scenario: "s", Metric: "rr", Mode: mode, At: at} }
	broken := errors.New("no path")
	g := Group{Name: "g", Scenarios: []string{"s"}, Build: func(testing.TB, Options) []Probe {
		return []Probe{
			take(rr(Host, 1), true, nil), take(rr(Bpfnet, 1), true, nil), take(rr(NFTables, 1), true, broken),
			take(Key{Scenario: "s", Metric: "stream1", Mode: Host}, false, nil),
			take(Key{Scenario: "s", Metric: "crr", Mode: Host}, true, nil),
			take(rr(Bpfnet, 10), true, nil),
			take(Key{Scenario: "s", Metric: "stream1", Mode: Bpfnet}, false, nil),
		}
	}}
	err := Run(t.Context(), new(lab.Session), []Group{g}, Options{Rounds: 2, Log: io.Discard}, func(r Record) error {
		require.Equal(t, 2, r.N)
		return nil
	})
	require.ErrorIs(t, err, broken)
	for round := range 2 {
		var seen []int
		var start int64
		for _, k := range []Key{rr(Host, 1), rr(Bpfnet, 1), rr(Bpfnet, 10)} {
			require.Len(t, turns[k.String()], 2, k)
			got := turns[k.String()][round]
			assert.Equal(t, 3, got.Of)
			assert.Equal(t, 5, got.Slices)
			if start == 0 {
				start = got.Start
			}
			assert.Equal(t, start, got.Start)
			seen = append(seen, got.Turn)
		}
		assert.ElementsMatch(t, []int{0, 1, 2}, seen)
	}
	assert.Equal(t, make([]load.Turns, 2), turns["s crr, host"], "alone")
	assert.Equal(t, make([]load.Turns, 2), turns["s stream1, host"])
}
