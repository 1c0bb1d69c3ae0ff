// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestCells(t *testing.T) {
	cells := Cells()
	assert.GreaterOrEqual(t, len(cells), 400)
	t.Logf("%d cells", len(cells))
	seen := map[Cell]bool{}
	values := map[string]bool{}
	for _, c := range cells {
		assert.False(t, seen[c], c)
		seen[c] = true
		for _, v := range []string{c.From, c.To + ".", c.Proto, c.Family, c.Option + "!"} {
			values[v] = true
		}
	}
	assert.Len(t, values, len(Froms)+len(Tos)+len(Protos)+len(Families)+len(Options), "every value occurs")
	for _, r := range reasons {
		used := false
		each(func(c Cell) { used = used || LeftOut(c) == r.text })
		assert.True(t, used, "nothing is left out because %s", r.text)
	}
}

func TestSample(t *testing.T) {
	cells := Cells()
	for seed := range uint64(50) {
		sample := Sample(cells, seed)
		require.Equal(t, sample, Sample(cells, seed), "one seed, one sample")
		require.GreaterOrEqual(t, len(sample), len(cells)/10)
		require.Less(t, len(sample), len(cells)/9)
		have := map[string]bool{}
		for _, c := range sample {
			for _, v := range []string{c.From, c.To + ".", c.Proto, c.Family, c.Option + "!"} {
				have[v] = true
			}
		}
		require.Len(t, have, len(Froms)+len(Tos)+len(Protos)+len(Families)+len(Options), "seed %d: every value occurs", seed)
	}
	assert.NotEqual(t, Sample(cells, 1), Sample(cells, 2))
	// Rare values are found, however few cells there are.
	few := append([]Cell{}, cells[0])
	for range 200 {
		few = append(few, cells[0])
	}
	few = append(few, cells[len(cells)-1])
	assert.Contains(t, Sample(few, 1), cells[len(cells)-1])
}

// The committed report is of this matrix and of these departures.
func TestReportIsOfThisMatrix(t *testing.T) {
	text, err := os.ReadFile("../../docs/generated/conformance.md")
	require.NoError(t, err)
	list, err := Departures()
	require.NoError(t, err)
	for _, d := range list {
		assert.Contains(t, string(text), "| "+d.Name+" |", "make conformance")
		assert.Contains(t, string(text), d.Reason, "make conformance")
	}
	last := strings.Split(strings.TrimSpace(string(text)), "\n")
	sum := Summary{}
	n, err := fmt.Sscanf(last[len(last)-1], "conformance: %d cells, %d explained, %d differences",
		&sum.Cells, &sum.Explained, &sum.Differences)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	assert.Equal(t, len(Cells()), sum.Cells, "make conformance")
	assert.Zero(t, sum.Differences)
}
