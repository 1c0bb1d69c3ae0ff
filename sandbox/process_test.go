// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// sleeper starts a process that runs until it is killed. It is waited for with the test.
func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "infinity")
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

// untilDone fails the test when the process that is watched does not end.
func untilDone(t *testing.T, w *Watch) {
	t.Helper()
	select {
	case <-w.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the end was not noticed")
	}
}

func TestIdentity(t *testing.T) {
	cmd := sleeper(t)
	id, err := Identify(cmd.Process.Pid)
	require.NoError(t, err)
	again, err := Identify(cmd.Process.Pid)
	require.NoError(t, err)
	assert.Equal(t, id, again)
	assert.True(t, id.Alive())
	for name, other := range map[string]ID{
		"its number used again":    {id.PID, id.StartTime - 1, id.BootID},
		"the machine's last start": {id.PID, id.StartTime, "00000000-0000-0000-0000-000000000000"},
		"no process":               {0, id.StartTime, id.BootID},
		"a group":                  {-id.PID, id.StartTime, id.BootID},
		"zero":                     {},
	} {
		assert.False(t, other.Alive(), name)
		_, err := Open(other)
		assert.ErrorIs(t, err, ErrGone, name)
	}
	_, err = Identify(0)
	assert.ErrorIs(t, err, ErrGone)

	// Ended, but not waited for: the number is still taken.
	w, err := Open(id)
	require.NoError(t, err)
	defer w.Close()
	require.NoError(t, cmd.Process.Kill())
	untilDone(t, w)
	assert.False(t, id.Alive())
	_, err = Open(id)
	assert.ErrorIs(t, err, ErrGone)
	_ = cmd.Wait()
	assert.False(t, id.Alive())
	_, err = Identify(id.PID)
	assert.EqualError(t, err, fmt.Sprintf("identify process %d: process has ended", id.PID))
}

// Names may contain what ends a name.
func TestIdentifyOddName(t *testing.T) {
	path := filepath.Join(t.TempDir(), ") R 1 1 1")
	sleep, err := exec.LookPath("sleep")
	require.NoError(t, err)
	require.NoError(t, os.Symlink(sleep, path))
	plain := sleeper(t)
	cmd := exec.Command(path, "infinity")
	require.NoError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	a, err := Identify(plain.Process.Pid)
	require.NoError(t, err)
	b, err := Identify(cmd.Process.Pid)
	require.NoError(t, err)
	assert.InDelta(t, a.StartTime, b.StartTime, 1000, "started at about the same time")
}

func TestWatch(t *testing.T) {
	cmd := sleeper(t)
	id, err := Identify(cmd.Process.Pid)
	require.NoError(t, err)
	w, err := Open(id)
	require.NoError(t, err)
	defer w.Close()
	other, err := Open(id)
	require.NoError(t, err)
	require.NoError(t, other.Signal(0), "only looks")
	require.NoError(t, other.Close())
	select {
	case <-w.Done():
		t.Fatal("still runs")
	case <-other.Done():
		t.Fatal("closed before the end")
	default:
	}
	require.NoError(t, w.Signal(unix.SIGTERM))
	untilDone(t, w)
	_ = cmd.Wait()
	assert.ErrorIs(t, w.Signal(unix.SIGTERM), ErrGone)
	require.Error(t, other.Signal(0))
	select {
	case <-other.Done():
		t.Fatal("says something after Close")
	default:
	}
}

// Watching takes no thread: a daemon has one for each sandbox.
func TestManyWatches(t *testing.T) {
	cmd := sleeper(t)
	id, err := Identify(cmd.Process.Pid)
	require.NoError(t, err)
	threads := func() int {
		all, err := filepath.Glob("/proc/self/task/*")
		require.NoError(t, err)
		return len(all)
	}
	before := threads()
	var watches []*Watch
	for range 300 {
		w, err := Open(id)
		require.NoError(t, err)
		defer w.Close()
		watches = append(watches, w)
	}
	assert.Less(t, threads(), before+50)
	require.NoError(t, cmd.Process.Kill())
	for _, w := range watches {
		untilDone(t, w)
	}
}

// A process's end is that of its last thread, not of its first.
func TestWatchHeadless(t *testing.T) {
	cmd := asRole(t, role{Headless: true})
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	lab.Eventually(t, 10*time.Second, "first thread ends", func() bool {
		stat, err := procStat(fmt.Sprint(cmd.Process.Pid))
		return err == nil && stat[0] == "Z"
	})
	id, err := Identify(cmd.Process.Pid)
	require.NoError(t, err)
	assert.True(t, id.Alive())
	w, err := Open(id)
	require.NoError(t, err)
	defer w.Close()
	select {
	case <-w.Done():
		t.Fatal("another thread runs")
	default:
	}
	require.NoError(t, in.Close())
	untilDone(t, w)
	assert.False(t, id.Alive())
}
