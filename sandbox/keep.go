// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// keeper keeps files mounted. When a file of the host's is replaced by another of the same name, as
// editors and DHCP clients do, the kernel takes away what is mounted over the old one, in all mount
// namespaces; the sandbox would see the host's file from then on.
type keeper struct {
	thread *Thread
	files  map[string]string // target → source
	table  *os.File          // of the thread's mounts, which wakes a poll when it changes: proc_pid_mounts(5)
	over   chan struct{}     // closed when run has ended

	mu     sync.Mutex
	made   *os.File // inotify(7) on the targets' directories, while one of them is missing
	closed bool
}

// keepFiles begins to keep files that are mounted in the thread's mount namespace.
func keepFiles(t *Thread, files map[string]string) (*keeper, error) {
	path := fmt.Sprintf("/proc/self/task/%d/mounts", t.tid)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("watch mounts: %w", err)
	}
	k := &keeper{thread: t, files: files, table: os.NewFile(uintptr(fd), path), over: make(chan struct{})}
	conn, err := k.table.SyscallConn()
	if err != nil {
		k.table.Close()
		return nil, fmt.Errorf("watch mounts: %w", err)
	}
	go k.run(conn)
	return k, nil
}

func (k *keeper) close() {
	k.mu.Lock()
	k.closed = true
	if k.made != nil {
		k.made.Close()
	}
	k.mu.Unlock()
	k.table.Close() // waits for the reader
	<-k.over
}

// run looks at the files first, and then each time that the table changes.
func (k *keeper) run(conn syscall.RawConn) {
	defer close(k.over)
	_ = conn.Read(func(uintptr) bool {
		for !k.mountAgain() {
			if !k.awaitMade() {
				return true
			}
		}
		return false
	})
}

// mountAgain mounts what is not mounted any more. It reports whether that is all; a target that is
// missing can only be mounted over when it is made.
func (k *keeper) mountAgain() bool {
	all := true
	_ = k.thread.do(func() error {
		for target, source := range k.files {
			settle(filepath.Dir(target))
			want, err := os.Stat(source)
			if err != nil {
				continue
			}
			have, err := os.Lstat(target)
			if errors.Is(err, fs.ErrNotExist) {
				all = false
			} else if err == nil && !os.SameFile(have, want) {
				_ = mountFile(source, target)
			}
		}
		return nil
	})
	return all
}

// settle returns when a rename or removal in a directory that was under way is done. The kernel drops
// the mount in the midst of it, when the old file still has the name but cannot be mounted over any
// more. It holds the directory's lock then, which reading takes as well.
func settle(dir string) {
	f, err := os.Open(dir)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = f.Readdirnames(1)
}

// awaitMade waits until something is made in the directory of a target, unless it is too late to
// wait for that. It reports whether to go on.
//
// Only then is there an inotify: closing one takes milliseconds (the kernel waits for all readers
// of its marks), which every short command would pay.
func (k *keeper) awaitMade() bool {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return false
	}
	made := os.NewFile(uintptr(fd), "inotify")
	defer made.Close()
	for target := range k.files {
		// The directory may be gone, too. A second watch on one is the first.
		_, _ = unix.InotifyAddWatch(fd, filepath.Dir(target), unix.IN_CREATE|unix.IN_MOVED_TO)
	}
	if k.mountAgain() { // made before the watch
		return true
	}
	if !k.await(made) {
		return false
	}
	var events [4 << 10]byte
	_, err = made.Read(events[:])
	return k.await(nil) && err == nil
}

// await lets close end the reading of a file, unless it has been called.
func (k *keeper) await(made *os.File) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.made = made
	return !k.closed
}
