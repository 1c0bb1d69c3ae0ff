// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Name is that under which this program is the relay: [Main].
const Name = "bpfnet-relay"

// cgroupName is the relay's cgroup, outside of the daemon's: what ends the daemon's unit does not end
// the relay.
const cgroupName = Name

// listenerFD is where the relay has its socket, listening already.
const listenerFD = 3

// start starts this program as the relay and connects to it. The caller holds k.mu.
func (k *Keeper) start() error {
	path := filepath.Join(k.o.Dir, SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("relay's socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("relay's socket: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("relay's socket: %w", err)
	}
	f, err := l.File()
	if err != nil {
		return fmt.Errorf("relay's socket: %w", err)
	}
	defer f.Close()
	cmd := exec.Cmd{
		Path: "/proc/self/exe", Args: []string{Name, k.o.Dir, k.o.Version}, Dir: "/",
		Env:         []string{"GOGC=50"},
		ExtraFiles:  []*os.File{f},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	cgroup, err := openCgroup(k.o.Cgroup)
	if err != nil {
		k.o.Log.Warn("give the relay a cgroup of its own; it ends with the daemon's service", "err", err)
	} else {
		defer cgroup.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(cgroup.Fd())
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the relay: %w", err)
	}
	go func() { _ = cmd.Wait() }() // it may live longer than this process
	f.Close()
	l.Close() // so that the relay's end ends the connection
	conn, err := dial(k.o.Dir)
	if err == nil && conn == nil {
		err = errors.New("it ended at once")
	}
	if err == nil {
		err = k.take(conn)
	}
	if err == nil {
		_, err = k.ask(request{Op: opAsk}, nil)
	}
	if err != nil {
		return fmt.Errorf("start the relay: %w", err)
	}
	k.o.Log.Info("started the relay", "pid", cmd.Process.Pid)
	return nil
}

func openCgroup(root string) (*os.File, error) {
	if root == "" {
		return nil, errors.New("no cgroup2")
	}
	dir := filepath.Join(root, cgroupName)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return os.Open(dir)
}

// endCgroup ends what is in the relay's cgroup and removes it.
func endCgroup(root string) error {
	if root == "" {
		return nil
	}
	dir := filepath.Join(root, cgroupName)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		// Linux 5.14.
		if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil {
			return fmt.Errorf("end the relay: %w", err)
		}
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end the relay: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Main is the relay's process: bpfnet-relay DIR VERSION, its socket being descriptor 3. It ends when it
// is told to over that, or with ctx. DIR is for readers of ps only.
func Main(ctx context.Context, args []string) int {
	if len(args) != 2 {
		fmt.Fprintf(os.Stderr, "%s: want a directory and a version; this is for \"bpfnet daemon\"\n", Name)
		return 1
	}
	unix.CloseOnExec(listenerFD)
	_ = os.WriteFile("/proc/self/comm", []byte(Name), 0) // for ps; else it is "exe"
	confine()
	f := os.NewFile(listenerFD, SocketName)
	l, err := net.FileListener(f)
	f.Close()
	unixListener, ok := l.(*net.UnixListener)
	if err != nil || !ok {
		fmt.Fprintf(os.Stderr, "%s: descriptor %d is no listening socket: %v\n", Name, listenerFD, err)
		return 1
	}
	unixListener.SetUnlinkOnClose(false)
	debug.FreeOSMemory()
	r := New(Limits{})
	if err := Serve(ctx, r, unixListener, args[1]); err != nil {
		return 1
	}
	return 0
}

// confine gives up what a process that only carries bytes does not need: all capabilities, and the ways
// to get them back. Where that is not to be had, it goes on with them.
func confine() {
	_, _, _ = syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_, _, _ = syscall.AllThreadsSyscall(unix.SYS_CAPSET,
		uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0)
}
