// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// NS is a network namespace of a lab, or of a container in it.
type NS struct {
	Name string // of the namespace, unique on the machine; the container's for one of those
	Path string // of a file that setns accepts

	lab    *Lab
	cgroup *os.File // cgroup2 directory that commands run in; nil: that of the test
}

// newNS makes a named namespace with lo up and without duplicate address detection.
func (l *Lab) newNS(t testing.TB, name string, cgroup *os.File) *NS {
	t.Helper()
	n := &NS{Name: name, Path: filepath.Join("/var/run/netns", name), lab: l, cgroup: cgroup}
	t.Cleanup(func() {
		if err := netns.DeleteNamed(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("remove namespace %s: %v", name, err)
		}
	})
	err := onOwnThread(func() error {
		h, err := netns.NewNamed(name)
		if err != nil {
			return err
		}
		return h.Close()
	})
	if err != nil {
		t.Fatalf("make namespace %s: %v", name, err)
	}
	for _, key := range []string{"all", "default"} {
		n.Sysctl(t, "net.ipv6.conf."+key+".disable_ipv6", "0")
		n.Sysctl(t, "net.ipv6.conf."+key+".accept_dad", "0")
		n.Sysctl(t, "net.ipv6.conf."+key+".accept_ra", "0")
		n.Sysctl(t, "net.ipv4.conf."+key+".rp_filter", "0")
	}
	n.link(t, func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		return h.LinkSetUp(lo)
	})
	return n
}

// onOwnThread runs f on a thread whose network namespace f may change. The thread
// goes back to the old namespace, or is given up if it cannot.
func onOwnThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		err := errors.New("it ended its goroutine, as t.FailNow does")
		defer func() { result <- err }()
		runtime.LockOSThread()
		old, getErr := netns.Get()
		if getErr != nil {
			runtime.UnlockOSThread()
			err = getErr
			return
		}
		defer old.Close()
		failed := f()
		if back := netns.Set(old); back != nil {
			// Ending the goroutine without unlocking ends the thread.
			err = errors.Join(failed, fmt.Errorf("leave namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
		err = failed
	}()
	return <-result
}

// Do runs f on a thread that is in the namespace. Sockets that f opens stay there;
// goroutines that f starts, and what they open, do not.
// F should not call t.Fatal: it runs on a goroutine of its own, and Do then only fails.
func (n *NS) Do(f func() error) error {
	return onOwnThread(func() error {
		h, err := netns.GetFromPath(n.Path)
		if err != nil {
			return fmt.Errorf("open namespace %s: %w", n.Name, err)
		}
		defer h.Close()
		if err := netns.Set(h); err != nil {
			return fmt.Errorf("enter namespace %s: %w", n.Name, err)
		}
		return f()
	})
}

// Command prepares a program to be run in the namespace, in the caller's view of the
// file system, /sys and cgroup mounts included. Programs in the host's namespace run
// in the lab's cgroup, so that programs attached at [Lab.Cgroup] see them; the others
// do not. The program is killed when ctx ends.
func (n *NS) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return n.prepare(exec.CommandContext(ctx, "nsenter", n.argv(name, args)...))
}

// command is Command without a context.
func (n *NS) command(name string, args ...string) *exec.Cmd {
	return n.prepare(exec.Command("nsenter", n.argv(name, args)...))
}

func (n *NS) argv(name string, args []string) []string {
	return append([]string{"--net=" + n.Path, "--", name}, args...)
}

func (n *NS) prepare(cmd *exec.Cmd) *exec.Cmd {
	cmd.WaitDelay = 2 * time.Second // a grandchild that keeps the output open must not block Wait
	// A command's interrupt from the terminal is for the command alone: it takes the lab down in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: given != Programs{}}
	if n.cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(n.cgroup.Fd())
	}
	return cmd
}

// Run runs a program in the namespace, as [NS.Command] does, and returns its standard
// output without the last newline. The error, an *[exec.ExitError] inside, carries the
// command and what it wrote to its standard error.
func (n *NS) Run(ctx context.Context, name string, args ...string) (string, error) {
	return run(n.Command(ctx, name, args...))
}

// MustRun is Run for programs that must succeed within half a minute.
func (n *NS) MustRun(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := n.Run(ctx, name, args...)
	if err != nil {
		t.Fatalf("in %s: %v", n.Name, err)
	}
	return out
}

func run(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSuffix(stdout.String(), "\n"), err
}

// Sysctl sets a sysctl of the namespace: "net.ipv4.ip_forward". Only those below net
// belong to a namespace; others fail the test.
func (n *NS) Sysctl(t testing.TB, key, value string) {
	t.Helper()
	if !strings.HasPrefix(key, "net.") {
		t.Fatalf("sysctl %s belongs to the machine, not to namespace %s", key, n.Name)
	}
	path := sysctlPath(key)
	err := n.Do(func() error { return os.WriteFile(path, []byte(value), 0) })
	if err != nil {
		t.Fatalf("sysctl %s=%s in %s: %v", key, value, n.Name, err)
	}
}

// GetSysctl reads a sysctl of the namespace.
func (n *NS) GetSysctl(t testing.TB, key string) string {
	t.Helper()
	var value []byte
	err := n.Do(func() (err error) {
		value, err = os.ReadFile(sysctlPath(key))
		return err
	})
	if err != nil {
		t.Fatalf("sysctl %s in %s: %v", key, n.Name, err)
	}
	return strings.TrimSpace(string(value))
}

// link runs f with a netlink handle in the namespace.
func (n *NS) link(t testing.TB, f func(h *netlink.Handle) error) {
	t.Helper()
	err := n.Do(func() error {
		h, err := netlink.NewHandle(syscall.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return f(h)
	})
	if err != nil {
		t.Fatalf("in %s: %v", n.Name, err)
	}
}

// Link returns the interface of that name, which must exist.
func (n *NS) Link(t testing.TB, ifname string) netlink.Link {
	t.Helper()
	var link netlink.Link
	n.link(t, func(h *netlink.Handle) (err error) {
		if link, err = h.LinkByName(ifname); err != nil {
			err = fmt.Errorf("link %q: %w", ifname, err)
		}
		return err
	})
	return link
}

// MAC returns the hardware address of an interface.
func (n *NS) MAC(t testing.TB, ifname string) net.HardwareAddr {
	t.Helper()
	return n.Link(t, ifname).Attrs().HardwareAddr
}

// Ifindex returns the index of an interface.
func (n *NS) Ifindex(t testing.TB, ifname string) int {
	t.Helper()
	return n.Link(t, ifname).Attrs().Index
}

// ChecksumOffload switches transmit checksum offload of an interface. On a veth it is
// on from the start, and packets of local sockets cross it with a partial checksum;
// with it off they carry right ones from the first hop on.
func (n *NS) ChecksumOffload(t testing.TB, ifname string, on bool) {
	t.Helper()
	state := "off"
	if on {
		state = "on"
	}
	n.MustRun(t, "ethtool", "-K", ifname, "tx", state)
}

func sysctlPath(key string) string {
	return filepath.Join("/proc/sys", strings.ReplaceAll(key, ".", "/"))
}
