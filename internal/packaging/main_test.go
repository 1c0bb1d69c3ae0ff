// SPDX-License-Identifier: Apache-2.0

// Package packaging tries what is handed to an operator: the binary, the unit, "make install" and the Debian package.
package packaging

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/netdev"
)

// loadIn is the environment variable that has this program load bpfnet's programs, with the pins in that directory, and
// end.
const loadIn = "BPFNET_TEST_LOAD_IN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(loadIn); dir != "" {
		l, err := loader.Load(loader.Options{Paths: loader.Paths{BPFFS: dir}, Flows: 1024, Classifier: netdev.Clsact{}})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		l.Close()
		os.Exit(0)
	}
	lab.Main(m)
}

const (
	root = "../.."
	unit = root + "/packaging/bpfnet.service"
)

func abs(t *testing.T, path string) string {
	t.Helper()
	path, err := filepath.Abs(path)
	require.NoError(t, err)
	return path
}

func read(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(raw)
}

func groupOf(info os.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Gid }
