// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRewrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	require.NoError(t, Rewrite(path, []byte("first\n")), "made")
	inode := func() uint64 {
		st, err := os.Stat(path)
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o644), st.Mode())
		return st.Sys().(*syscall.Stat_t).Ino
	}
	first := inode()
	reader, err := os.Open(path)
	require.NoError(t, err)
	defer reader.Close()
	for _, text := range []string{"a longer one\n", "short\n", "", "again\n"} {
		require.NoError(t, Rewrite(path, []byte(text)))
		assert.Equal(t, text, readFile(t, path))
		assert.Equal(t, first, inode())
		var buf [100]byte
		n, _ := reader.ReadAt(buf[:], 0)
		assert.Equal(t, text, string(buf[:n]), "who has it open sees it, too")
	}

	past := time.Unix(1, 0)
	require.NoError(t, os.Chtimes(path, past, past))
	require.NoError(t, Rewrite(path, []byte("again\n")))
	st, err := os.Stat(path)
	require.NoError(t, err)
	assert.Equal(t, past, st.ModTime(), "equal: not touched")

	require.Error(t, Rewrite(t.TempDir(), nil))
	require.ErrorIs(t, Rewrite(path+"/x", nil), syscall.ENOTDIR)
}

// A sandbox's process can make its files as long as it likes.
func TestRewriteHuge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	writeFile(t, path, "old\n")
	require.NoError(t, os.Truncate(path, 1<<30))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	require.NoError(t, Rewrite(path, []byte("new\n")))
	runtime.ReadMemStats(&after)
	assert.Equal(t, "new\n", readFile(t, path))
	assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(64<<20))
}

func TestExitFile(t *testing.T) {
	dir := t.TempDir()
	_, ok, err := ReadExit(dir)
	require.NoError(t, err)
	assert.False(t, ok, "none yet")
	for _, want := range []int{0, 7, 137} {
		require.NoError(t, WriteExit(dir, want))
		got, ok, err := ReadExit(dir)
		require.NoError(t, err)
		assert.True(t, ok)
		assert.Equal(t, want, got)
	}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, entries, 1)

	writeFile(t, filepath.Join(dir, "exit"), "")
	_, ok, err = ReadExit(dir)
	require.NoError(t, err)
	assert.False(t, ok, "never reached the disk")
	writeFile(t, filepath.Join(dir, "exit"), "x\n")
	_, ok, err = ReadExit(dir)
	require.ErrorContains(t, err, "read exit code of "+dir)
	assert.False(t, ok)

	require.ErrorIs(t, WriteExit(filepath.Join(dir, "none"), 1), os.ErrNotExist)
	_, ok, err = ReadExit(filepath.Join(dir, "none"))
	require.NoError(t, err)
	assert.False(t, ok)
}
