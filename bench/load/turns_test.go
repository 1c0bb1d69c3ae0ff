// SPDX-License-Identifier: Apache-2.0

package load

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Each works in slices of its own and in no other's, and a tenth of each, like the whole first, does not count.
func TestTurns(t *testing.T) {
	const of, slice = 3, 2 * time.Millisecond
	for _, start := range []int64{now() + int64(10*time.Millisecond), now() - int64(time.Second)} { // in time, and late
		for turn := range of {
			turns := NewTurns(start, of, turn, slice, 9*time.Millisecond)
			require.Equal(t, 5, turns.Slices)
			var untils []int64
			r, err := turns.Measure(func(until int64) (uint64, error) {
				assert.GreaterOrEqual(t, now(), start)
				untils = append(untils, until)
				for now() < until {
				}
				return uint64(len(untils)), nil
			})
			require.NoError(t, err)
			require.Len(t, untils, 2*(5+1))
			assert.EqualValues(t, 4+6+8+10+12, r.Units)
			begin := untils[0] - int64(slice/10)
			assert.Zero(t, (begin-start-int64(turn)*int64(slice))%(of*int64(slice)))
			for i := range turns.Slices + 1 {
				assert.Equal(t, begin+int64(slice/10), untils[2*i])
				assert.Equal(t, begin+int64(slice), untils[2*i+1])
				begin += of * int64(slice)
			}
		}
	}
}

// Needs root. Clients of their own processes share a server's time.
func TestClientsInTurn(t *testing.T) {
	ns := host(t)
	startServer(t, ns, "127.0.0.1:7000")
	const of = 2
	results := make(chan Result, of)
	start := Clock() + int64(300*time.Millisecond)
	for turn := range of {
		go func() {
			r, err := run(t, ns, Client{Kind: RR, To: "127.0.0.1:7000", CPU: 0, Window: 90 * time.Millisecond, Turns: Turns{Start: start, Of: of, Turn: turn}})
			assert.NoError(t, err)
			results <- r
		}()
	}
	for range of {
		r := <-results
		assert.Positive(t, r.Units)
	}
	assert.Greater(t, Clock()-start, int64(of*100*time.Millisecond), "one after another")

	for _, c := range []Client{
		{Kind: RR, Turns: Turns{Of: 2, Turn: 2}}, {Kind: CRR, Turns: Turns{Of: 1, Turn: -1}}, {Kind: RR, Turns: Turns{Of: 1, Slice: time.Microsecond}},
	} {
		c.To = "127.0.0.1:7000"
		_, err := run(t, ns, c)
		require.ErrorContains(t, err, "want turns from 0")
	}
}

// Needs root. A server ends who says nothing for a second; a turn may come later.
func TestTurnComesLate(t *testing.T) {
	ns := host(t)
	startServer(t, ns, "127.0.0.1:7000")
	r, err := run(t, ns, Client{Kind: RR, To: "127.0.0.1:7000", CPU: 0, Window: 20 * time.Millisecond,
		Turns: Turns{Start: Clock() + int64(3*time.Second), Of: 2, Turn: 1}})
	require.NoError(t, err)
	require.Positive(t, r.Units)
}
