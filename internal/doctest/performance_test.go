// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bench"
)

// docs/performance.md, its plots and its table, and the README's figures, are what the committed result makes of them.
func TestPerformance(t *testing.T) {
	docs := filepath.Join(root, "docs")
	report, err := bench.ReadFile(filepath.Join(docs, "performance/full.jsonl"))
	if errors.Is(err, fs.ErrNotExist) {
		assert.NoFileExists(t, filepath.Join(docs, "performance.md"), "a page without its result")
		t.Skip("no result is committed: make bench writes docs/performance/full.jsonl")
	}
	require.NoError(t, err)
	readme := filepath.Join(root, "README.md")
	text, err := os.ReadFile(readme)
	require.NoError(t, err)
	section, err := report.InReadme(string(text))
	require.NoError(t, err)
	if *update {
		require.NoError(t, bench.WriteFiles(report, docs))
		require.NoError(t, os.WriteFile(readme, []byte(section), 0o644))
		return
	}
	assert.Equal(t, section, string(text), "%s has other figures than the result: make performance", readme)
	files, err := bench.Files(report)
	require.NoError(t, err)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		path := filepath.Join(docs, name)
		have, err := os.ReadFile(path)
		if assert.NoError(t, err, "make performance writes it") {
			assert.Equal(t, string(files[name]), string(have), "%s is stale: make performance", path)
		}
	}
	there, err := filepath.Glob(filepath.Join(docs, "performance", "*"))
	require.NoError(t, err)
	for _, path := range there {
		assert.Contains(t, files, "performance/"+filepath.Base(path), "%s is not made from the result", path)
	}
}
