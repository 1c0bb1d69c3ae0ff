// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/promise"
)

// docs/reliability.md is what the tests' promises and their recorded figures make of it, without a figure that nobody promises.
func TestReliability(t *testing.T) {
	calls, err := promise.Calls(root)
	require.NoError(t, err)
	records, err := promise.ReadRecords(filepath.Join(root, "docs/reliability/figures.jsonl"))
	require.NoError(t, err)
	assert.Equal(t, promise.Merge(calls, records, nil), records, "figures.jsonl is not in order, or has figures of tests that are gone")
	page, err := promise.Page(calls, records)
	require.NoError(t, err)
	assert.Equal(t, page, read(t, "docs/reliability.md"), "make reliability writes it")
}
