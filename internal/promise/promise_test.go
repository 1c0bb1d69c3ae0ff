// SPDX-License-Identifier: Apache-2.0

package promise_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/promise"
)

func TestKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "figures.jsonl")
	t.Setenv(promise.File, path)
	t.Setenv("BPFNET_FULL", "1")
	t.Run("in a subtest", func(t *testing.T) {
		promise.Kept(t, promise.Soak, "Bytes arrive.", "%d of %d", 7, 7)
	})
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	require.Len(t, lines, 1)
	var got promise.Record
	require.NoError(t, json.Unmarshal([]byte(lines[0]), &got))
	require.Equal(t, promise.Record{
		Area: promise.Soak, Promise: "Bytes arrive.", Test: "promise.TestKept", Figure: "7 of 7", Full: true,
	}, got)
}
