// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killWait is how long processes may take to die of SIGKILL: one that waits for a disk ends after that.
const killWait = 10 * time.Second

// makeCgroup makes the cgroup's directory and reports whether it was missing.
func makeCgroup(dir string) (made bool, err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return false, fmt.Errorf("make cgroup: %w", err)
	}
	err = os.Mkdir(dir, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("make cgroup: %w", err)
	}
	return true, nil
}

// KillCgroup ends all processes in a cgroup and below it, and returns when they are gone. A cgroup
// that does not exist is no error.
func KillCgroup(dir string) error {
	events, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	defer events.Close()
	err = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	kill := func() error { return nil }
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		// Linux before 5.14: what forks between reading and killing is found in the next round.
		kill = func() error { return killProcs(dir) }
	} else if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return waitEmpty(events, dir, kill)
}

// waitEmpty waits until a cgroup has no processes. Step is called before each wait.
func waitEmpty(events *os.File, dir string, step func() error) error {
	deadline := time.Now().Add(killWait)
	for {
		empty, err := unpopulated(events)
		if empty || err != nil {
			return err
		}
		if err := step(); err != nil {
			return err
		}
		// The file reports a change since it was last read by POLLPRI.
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("kill cgroup %s: processes are left after %v", dir, killWait)
		}
		fds := []unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return fmt.Errorf("kill cgroup %s: %w", dir, err)
		}
	}
}

func unpopulated(events *os.File) (bool, error) {
	var buf [256]byte // the file has two short lines
	n, err := unix.Pread(int(events.Fd()), buf[:], 0)
	if err == unix.ENODEV { // removed by somebody else
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read %s: %w", events.Name(), err)
	}
	return bytes.Contains(buf[:n], []byte("populated 0")), nil
}

// killProcs sends SIGKILL to each process in a cgroup and below it.
func killProcs(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return ignoreGone(err)
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return ignoreGone(err)
		}
		for pid := range bytes.FieldsSeq(b) {
			n, err := strconv.Atoi(string(pid))
			if err != nil || n <= 0 { // 0: a process of another PID namespace
				continue
			}
			if err := unix.Kill(n, unix.SIGKILL); err != nil && err != unix.ESRCH {
				return fmt.Errorf("kill process %d: %w", n, err)
			}
		}
		return nil
	})
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// RemoveCgroup removes a cgroup and those below it. None of them may have processes. One that does
// not exist is no error.
func RemoveCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if err := ignoreGone(err); err != nil {
			return fmt.Errorf("remove cgroup: %w", err)
		}
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := RemoveCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && ignoreGone(err) != nil {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}
