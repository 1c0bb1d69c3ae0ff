// SPDX-License-Identifier: Apache-2.0

package store

import (
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// small mounts a file system of 4 MiB in memory, in a mount namespace that only this test's thread is
// in; both are gone when the test ends. Needs root.
func small(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root")
	}
	dir := t.TempDir()
	runtime.LockOSThread() // for good: the thread ends with the test
	require.NoError(t, unix.Unshare(unix.CLONE_NEWNS))
	require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"))
	t.Cleanup(func() { assert.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

// fillUp takes all blocks of the file system but a few.
func fillUp(t *testing.T, path string, leave int) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	var fs unix.Statfs_t
	require.NoError(t, unix.Statfs(path, &fs))
	require.GreaterOrEqual(t, int(fs.Bavail), leave)
	require.NoError(t, unix.Fallocate(int(f.Fd()), 0, 0, (int64(fs.Bavail)-int64(leave))*fs.Bsize))
}

// Whatever is left of the disk, a change is done or fails as a whole, and the store goes on when there is
// space again.
func TestDiskFull(t *testing.T) {
	dir := small(t)
	ballast := filepath.Join(dir, "ballast")
	s := open(t, filepath.Join(dir, "state"))
	require.NoError(t, s.Write(Batch{Networks: several(network, 0, 1)}))
	failed := 0
	for leave := 0; ; leave++ {
		before := content(t, s)
		fillUp(t, ballast, leave)
		b := Batch{Endpoints: several(endpoint, leave*40, 40), DeleteNetworks: []string{network(0).ID}}
		err := s.Write(b)
		if err == nil {
			break
		}
		failed++
		require.ErrorIs(t, err, unix.ENOSPC)
		require.EqualError(t, err, "write state: state file "+s.path()+": the disk is full "+
			"(no space left on device): free space there and try again")
		require.Equal(t, before, content(t, s))
		if leave%2 == 0 {
			s = reopen(t, s)
			require.Equal(t, before, content(t, s))
		}
		require.NoError(t, os.Remove(ballast))
		require.NoError(t, s.Write(b))
		require.NoError(t, s.Write(Batch{Networks: several(network, 0, 1)}))
	}
	t.Logf("failed %d times", failed)
	assert.Greater(t, failed, 2)
	require.NoError(t, os.Remove(ballast))
	before := content(t, s)
	s = reopen(t, s)
	assert.Equal(t, before, content(t, s))
}

func TestDiskFullAtTheFirstStart(t *testing.T) {
	dir := small(t)
	ballast, state := filepath.Join(dir, "ballast"), filepath.Join(dir, "state")
	require.NoError(t, os.Mkdir(state, 0o755))
	failed := 0
	for leave := 0; ; leave++ {
		fillUp(t, ballast, leave)
		s, err := Open(state)
		if err == nil {
			require.NoError(t, s.Close())
			break
		}
		failed++
		require.ErrorIs(t, err, unix.ENOSPC)
		require.ErrorContains(t, err, "free space there and try again")
		require.ErrorContains(t, err, filepath.Join(state, FileName))
		left, err := os.ReadDir(state)
		require.NoError(t, err)
		require.Empty(t, left)
		require.NoError(t, os.Remove(ballast))
	}
	t.Logf("failed %d times", failed)
	assert.Positive(t, failed)
}

// writeSparse leaves holes where bbolt has not written yet.
func writeSparse(t *testing.T, path string, raw []byte) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	for page := range slices.Chunk(raw, os.Getpagesize()) {
		if slices.ContainsFunc(page, func(b byte) bool { return b != 0 }) {
			_, err = f.Write(page)
		} else {
			_, err = f.Seek(int64(len(page)), io.SeekCurrent)
		}
		require.NoError(t, err)
	}
	require.NoError(t, f.Truncate(int64(len(raw))))
}

func TestDiskFullAtTheMigration(t *testing.T) {
	dir := small(t)
	ballast := filepath.Join(dir, "ballast")
	old := schema1(t)
	failed := 0
	for leave := 0; ; leave++ {
		writeSparse(t, filepath.Join(dir, FileName), old)
		fillUp(t, ballast, leave)
		s, err := Open(dir)
		if err == nil {
			require.NoError(t, s.Close())
			break
		}
		failed++
		require.ErrorIs(t, err, unix.ENOSPC)
		require.NoError(t, os.Remove(ballast))
		s = open(t, dir)
		pairs, err := s.Allowed()
		require.NoError(t, err)
		require.Len(t, pairs, 3)
		require.Equal(t, "docker/a", pairs[0].A)
		require.NoError(t, s.Close())
	}
	t.Logf("failed %d times", failed)
	assert.Positive(t, failed)
}
