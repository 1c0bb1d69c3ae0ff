// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bench"
)

// result writes a result with two records, the second of the given rate.
func result(t *testing.T, name string, quick bool, rate float64) string {
	t.Helper()
	r := bench.Report{Header: bench.Header{Started: time.Date(2026, 11, 3, 4, 5, 6, 0, time.UTC), Quick: quick}}
	for mode, v := range map[string]float64{bench.Host: 1000, bench.Bpfnet: rate} {
		samples := []float64{v, v * 1.01}
		r.Records = append(r.Records, bench.Record{
			Key:   bench.Key{Scenario: "published", Mode: mode, Family: 4, Metric: "rr"},
			Group: "published", Unit: "1/s", N: 2, Samples: samples, Spread: bench.SpreadOf(samples),
		})
	}
	path := filepath.Join(t.TempDir(), name)
	f, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, r.Write(f))
	require.NoError(t, f.Close())
	return path
}

func TestRead(t *testing.T) {
	good := result(t, "good.jsonl", false, 900)
	quick := result(t, "quick.jsonl", true, 800)
	broken := filepath.Join(t.TempDir(), "broken.jsonl")
	require.NoError(t, os.WriteFile(broken, []byte("{}\n"), 0o644))
	docs := t.TempDir()
	readme, merged := filepath.Join(docs, "README.md"), filepath.Join(docs, "merged.jsonl")
	require.NoError(t, os.WriteFile(readme, []byte("## First command\n"), 0o644))
	for _, tt := range []struct {
		name   string
		args   []string
		status int
		out    []string // in standard output; of a failure, in standard error
	}{
		{"table", []string{good}, 0, []string{"published\n", "900", "remote → published rr ÷ host ", "not measured in this run"}},
		{"table", []string{"--quote", good, quick}, 0, []string{"0.800 (0.800–0.800)  NO\n"}},
		{"table", []string{"--quote", broken, quick}, 1, []string{"bpfnet-bench table: --quote: " + broken + ":1: no header"}},
		{"table", []string{"/nonexistent"}, 1, []string{"bpfnet-bench table: read report: open /nonexistent"}},
		{"table", []string{"--help"}, 0, []string{"usage: bpfnet-bench table", "-quote"}},
		{"table", nil, 2, []string{"bpfnet-bench table: want 1 arguments, not 0: usage: bpfnet-bench table"}},
		{"table", []string{"--cow", good}, 2, []string{"-cow"}},
		{"compare", []string{good, good}, 0, []string{"The runs agree: 2 ratios compared"}},
		{"compare", []string{good, broken}, 1, []string{broken + ":1"}},
		{"merge", []string{good, good, merged}, 0, []string{merged + " has 2 records, 2 of them of " + good}},
		{"merge", []string{good, quick, merged}, 1, []string{"quick differs"}},
		{"page", []string{quick, docs, readme}, 1, []string{quick + " is of a quick run"}},
		{"page", []string{good, docs, good}, 1, []string{good + ": no place"}},
		{"page", []string{good, docs, readme}, 0, []string{"performance.md and a section of " + readme + " are made anew, from 2 records"}},
	} {
		var out, errs bytes.Buffer
		assert.Equal(t, tt.status, read(tt.name, tt.args, &out, &errs), "%s %q", tt.name, tt.args)
		told := out.String()
		if tt.status != 0 {
			told = errs.String()
		}
		for _, want := range tt.out {
			assert.Contains(t, told, want, "%s %q", tt.name, tt.args)
		}
	}
	assert.FileExists(t, filepath.Join(docs, "performance.md"))
	text, err := os.ReadFile(readme)
	require.NoError(t, err)
	assert.Contains(t, string(text), "of what a server on the host reaches | 0.900 |")
	assert.FileExists(t, filepath.Join(docs, "performance", "full.jsonl"))

	var out, errs bytes.Buffer
	assert.Equal(t, 1, read("compare", []string{good, quick}, &out, &errs))
	assert.Contains(t, out.String(), "The runs do not agree")
	assert.Empty(t, errs.String())
}
