// SPDX-License-Identifier: Apache-2.0

// Package sandbox is the process side of a sandbox: the namespaces that a process is started in, the
// files that it sees instead of the host's, the cgroup that holds it, its life and its end, and the
// text of its hosts and resolv.conf. It knows nothing of interfaces and addresses being made, of
// networks, or of what is stored.
//
// A sandbox's process is one of the host's own root file system. Nothing that is made for it has a
// name outside: the network namespace lives by its processes, and so does the mount namespace with all
// that is mounted in it.
package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Thread is an operating system's thread that leaves the host's namespaces and that a sandbox's
// process is started from. It runs no other goroutine, ever: when it is closed it ends.
type Thread struct {
	tid   int
	calls chan func()
	ended chan struct{}
	kept  *keeper // after Start, of the files that are mounted
}

// NewThread starts a thread in the namespaces of the process.
func NewThread() *Thread {
	t := &Thread{calls: make(chan func()), ended: make(chan struct{})}
	ready := make(chan struct{})
	go t.run(ready)
	<-ready
	return t
}

// run is the thread's life. The goroutine ends locked, so the run time ends the thread with it.
func (t *Thread) run(ready chan struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// The main thread stands for the process in /proc, and never ends. While this goroutine holds
		// it, another one cannot get it.
		go t.run(ready)
		<-ready
		runtime.UnlockOSThread()
		return
	}
	defer close(t.ended)
	t.tid = unix.Gettid()
	close(ready)
	for call := range t.calls {
		call()
	}
}

// do runs f on the thread.
func (t *Thread) do(f func() error) error {
	result := make(chan error, 1)
	t.calls <- func() { result <- f() }
	return <-result
}

// TID is the thread's number in /proc/PID/task.
func (t *Thread) TID() int { return t.tid }

// Close ends the thread. What it has started lives on, with the files that are mounted there at that
// moment. The namespaces that no process is in vanish.
func (t *Thread) Close() {
	if t.kept != nil {
		t.kept.close()
	}
	close(t.calls)
	<-t.ended
}

// NewNetNS gives the thread a network namespace of its own, with nothing but lo, which is down.
func (t *Thread) NewNetNS() error {
	return t.do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		return nil
	})
}

// JoinNetNS moves the thread into the network namespace of a process. It fails with [ErrGone] when
// that has ended.
func (t *Thread) JoinNetNS(pid int) error {
	return t.do(func() error {
		fd, err := pidfdOpen(pid)
		if err != nil {
			return fmt.Errorf("join network namespace of process %d: %w", pid, err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("join network namespace of process %d: %w", pid, gone(err))
		}
		return nil
	})
}

// gone turns the kernel's "no such process" into ErrGone.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return ErrGone
	}
	return err
}
