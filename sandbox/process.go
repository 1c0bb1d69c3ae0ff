// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrGone says that a process has ended. Its number may be another's by now.
var ErrGone = errors.New("process has ended")

// ID names a process for good: a number alone is used again.
type ID struct {
	PID       int
	StartTime uint64 // clock ticks from the machine's start to the process's: field 22 of proc_pid_stat(5)
	BootID    string // of the machine's start: random(4)
}

var bootID = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
})

// Identify reads a process's identity. It fails with [ErrGone] when there is no such process.
func Identify(pid int) (ID, error) {
	start, err := startTime(pid)
	if err != nil {
		return ID{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	boot, err := bootID()
	if err != nil {
		return ID{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return ID{PID: pid, StartTime: start, BootID: boot}, nil
}

func startTime(pid int) (uint64, error) {
	stat, err := procStat(strconv.Itoa(pid))
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(stat[statStartTime], 10, 64)
}

// Fields of /proc/PID/stat, from the state on, which is field 3: the name before it may contain anything.
const (
	statForeground = 8 - 3
	statStartTime  = 22 - 3
)

func procStat(pid string) ([]string, error) {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) <= statStartTime {
		return nil, fmt.Errorf("/proc/%s/stat has too few fields", pid)
	}
	return fields, nil
}

// Alive reports whether the process runs. One that has ended but was not waited for does not.
func (id ID) Alive() bool {
	fd, err := openID(id)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

func pidfdOpen(pid int) (int, error) {
	if pid <= 0 {
		return 0, ErrGone
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return 0, gone(err)
	}
	return fd, nil
}

func openID(id ID) (int, error) {
	boot, err := bootID()
	if err != nil {
		return 0, err
	}
	if id.BootID != boot {
		return 0, ErrGone
	}
	return openProcess(id.PID, id.StartTime)
}

// openProcess opens the process with that number if it started then and still runs.
func openProcess(pid int, start uint64) (int, error) {
	fd, err := pidfdOpen(pid)
	if err != nil {
		return 0, err
	}
	got, err := startTime(pid)
	if err == nil && start != 0 && got != start {
		err = ErrGone
	}
	// Looked at last: while it runs the number is its own, so what was read was of it.
	if err == nil && ended(fd) {
		err = ErrGone
	}
	if err != nil {
		unix.Close(fd)
		return 0, err
	}
	return fd, nil
}

// ended reports whether all threads of a pidfd's process have ended.
func ended(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		return err == nil && n > 0
	}
}

// Watch holds a process: it can be waited for and signalled, whoever its parent is, and cannot be
// mistaken for another.
type Watch struct {
	file *os.File // a pidfd in the run time's poller
	done chan struct{}
	over chan struct{}
}

// Open begins to watch a process. It fails with [ErrGone] when that has ended.
func Open(id ID) (*Watch, error) {
	fd, err := openID(id)
	if err != nil {
		return nil, fmt.Errorf("watch process %d: %w", id.PID, err)
	}
	w := &Watch{file: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{}), over: make(chan struct{})}
	conn, err := w.file.SyscallConn()
	if err != nil {
		w.file.Close()
		return nil, fmt.Errorf("watch process %d: %w", id.PID, err)
	}
	go w.wait(conn)
	return w, nil
}

func (w *Watch) wait(conn syscall.RawConn) {
	defer close(w.over)
	if err := conn.Read(func(fd uintptr) bool { return ended(int(fd)) }); err == nil {
		close(w.done)
	}
}

// Done is closed when the process has ended.
func (w *Watch) Done() <-chan struct{} { return w.done }

// Signal sends a signal. It fails with [ErrGone] when the process has ended.
func (w *Watch) Signal(sig syscall.Signal) error {
	conn, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = conn.Control(func(fd uintptr) { sendErr = gone(unix.PidfdSendSignal(int(fd), sig, nil, 0)) })
	return errors.Join(err, sendErr)
}

// Close ends watching. The process goes on, and Done says nothing any more.
func (w *Watch) Close() error {
	err := w.file.Close()
	<-w.over
	return err
}
