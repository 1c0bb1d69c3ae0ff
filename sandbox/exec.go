// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Target is a running sandbox that a command is to join.
type Target struct {
	PID       int
	StartTime uint64 // see ID; 0: whatever process has that number
	Cgroup    string // empty: stay in the caller's
}

// Exec replaces this process by a program inside of a running sandbox: in its network, mount and UTS
// namespaces and in its cgroup. It returns only to say why not: [ErrGone] when the sandbox's process
// is not that one any more, [ErrNotFound] and [ErrNotExecutable] for the program. The calling
// goroutine must not go on with anything but reporting the error: its thread may be in the sandbox.
func Exec(target Target, path string, args, env []string, dir string) error {
	runtime.LockOSThread()
	fd, err := openProcess(target.PID, target.StartTime)
	if err != nil {
		return fmt.Errorf("join process %d: %w", target.PID, err)
	}
	defer unix.Close(fd)
	var procs *os.File
	if target.Cgroup != "" {
		// A path of the host's, so before the sandbox's view of it.
		if procs, err = os.OpenFile(filepath.Join(target.Cgroup, "cgroup.procs"), os.O_WRONLY, 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
		defer procs.Close()
	}
	// A thread that shares its working directory with others cannot change its mount namespace: setns(2).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("join process %d: %w", target.PID, err)
	}
	if err := unix.Setns(fd, unix.CLONE_NEWNS|unix.CLONE_NEWUTS|unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("join namespaces of process %d: %w", target.PID, gone(err))
	}
	if err := checkDir(dir); err != nil {
		return err
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("working directory %q: %w", dir, err)
	}
	if procs != nil {
		if _, err := procs.WriteString("0"); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return execError(path, syscall.Exec(path, args, environ(env)))
}
