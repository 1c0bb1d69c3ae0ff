// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// crowd starts processes in a cgroup and below it, one of which starts others all the time, and
// returns their identities as far as they stay.
func crowd(t *testing.T, dir string) []ID {
	t.Helper()
	var ids []ID
	for _, sub := range []string{"", "a", "a/b", "c"} {
		for _, script := range []string{"trap '' TERM INT HUP; echo; while :; do sleep 1000; done", "echo; while :; do /bin/true & wait; done"} {
			out, w := pipe(t)
			c := shell(script)
			c.Cgroup, c.Stdout = filepath.Join(dir, sub), w
			p := begin(t, c)
			w.Close()
			out.next()
			id, err := Identify(p.PID())
			require.NoError(t, err)
			ids = append(ids, id)
		}
	}
	return ids
}

func TestKillCgroup(t *testing.T) {
	dir := testCgroup(t)
	ids := crowd(t, dir)
	require.ErrorIs(t, RemoveCgroup(dir), unix.EBUSY)
	for _, id := range ids {
		require.True(t, id.Alive())
	}
	require.NoError(t, KillCgroup(dir))
	for _, id := range ids {
		assert.False(t, id.Alive(), "gone when KillCgroup returns")
	}
	require.NoError(t, KillCgroup(dir), "empty")
	require.NoError(t, RemoveCgroup(dir))
	assert.NoDirExists(t, dir)
	require.NoError(t, RemoveCgroup(dir), "missing")
	require.NoError(t, KillCgroup(dir), "missing")
}

// As on a kernel without cgroup.kill.
func TestKillCgroupByProcess(t *testing.T) {
	dir := testCgroup(t)
	ids := crowd(t, dir)
	events, err := os.Open(filepath.Join(dir, "cgroup.events"))
	require.NoError(t, err)
	defer events.Close()
	require.NoError(t, waitEmpty(events, dir, func() error { return killProcs(dir) }))
	for _, id := range ids {
		assert.False(t, id.Alive())
	}
	require.NoError(t, RemoveCgroup(dir))
}

// It can be removed while somebody waits for its end, or removes it as well.
func TestCgroupRemovedMeanwhile(t *testing.T) {
	dir := testCgroup(t)
	require.NoError(t, os.Mkdir(dir, 0o755))
	events, err := os.Open(filepath.Join(dir, "cgroup.events"))
	require.NoError(t, err)
	defer events.Close()
	require.NoError(t, RemoveCgroup(dir))
	require.NoError(t, waitEmpty(events, dir, func() error { return fmt.Errorf("asked to kill") }))
	require.NoError(t, killProcs(dir))
}
