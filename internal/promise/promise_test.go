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

func TestPage(t *testing.T) {
	root := t.TempDir()
	src := func(body string) {
		require.NoError(t, os.MkdirAll(filepath.Join(root, "shop"), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(root, "shop", "a_test.go"), []byte("package shop\n"+body), 0o644))
	}
	src(`func TestOpen(t *testing.T) { t.Run("x", func(t *testing.T) { promise.Kept(t, promise.Cost, "It " + "opens.", "%d s", 2) }) }`)
	calls, err := promise.Calls(root)
	require.NoError(t, err)
	require.Equal(t, []promise.Call{{Area: promise.Cost, Promise: "It opens.", Test: "shop.TestOpen", Dir: "shop"}}, calls)

	_, err = promise.Page(calls, nil)
	require.ErrorContains(t, err, `shop.TestOpen: no figure is recorded for "It opens."`)

	record := func(figure string) promise.Record {
		return promise.Record{Area: promise.Cost, Promise: "It opens.", Test: "shop.TestOpen", Figure: figure}
	}
	gone := promise.Record{Area: promise.Cost, Promise: "It closes.", Test: "shop.TestClose", Figure: "1 s"}
	merged := promise.Merge(calls, []promise.Record{record("2 s"), gone}, []promise.Record{record("3 s")})
	require.Equal(t, []promise.Record{record("3 s")}, merged)
	page, err := promise.Page(calls, merged)
	require.NoError(t, err)
	require.Contains(t, page, "## Cost\n\n| promise | test | last figure |\n|---|---|---|\n| It opens. | `shop.TestOpen` | 3 s (a part) |\n")

	for body, want := range map[string]string{
		`func help(t *testing.T) { promise.Kept(t, promise.Cost, "It opens.", "x") }`:      "in the test function itself",
		`func TestOpen(t *testing.T) { promise.Kept(t, promise.Price, "It opens.", "x") }`: "none of this package's constants",
		`func TestOpen(t *testing.T) { promise.Kept(t, promise.Cost, text, "x") }`:         "no constant string",
	} {
		src(body)
		_, err := promise.Calls(root)
		require.ErrorContains(t, err, want)
	}
}
