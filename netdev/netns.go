// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// threadNetNS is the network namespace of the thread that opens it.
const threadNetNS = "/proc/thread-self/ns/net"

// OpenNetNS opens a network namespace by its path (/proc/PID/ns/net, /run/netns/NAME). The namespace
// lives at least as long as the file is open.
func OpenNetNS(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open namespace %s: %w", path, bare(err))
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err == nil && kind == unix.CLONE_NEWNET {
		return f, nil
	}
	f.Close()
	return nil, fmt.Errorf("open namespace %s: is not a network namespace", path)
}

// inNetNS calls f on a thread that is in the namespace, and waits for it.
func inNetNS(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- enter(ns, f) }()
	return <-done
}

// enter is called on a goroutine that ends afterwards: a thread that cannot go back stays locked to
// it and ends with it.
func enter(ns *os.File, f func() error) error {
	runtime.LockOSThread()
	old, err := os.Open(threadNetNS)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace: %w", err)
	}
	defer old.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace: %w", err)
	}
	err = f()
	if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}

// inNetNSWithHandle is inNetNS with a netlink socket in the namespace for the time of the call.
func inNetNSWithHandle(ns *os.File, f func(*netlink.Handle) error) error {
	return inNetNS(ns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in the sandbox: %w", err)
		}
		defer h.Close()
		return f(h)
	})
}

// NetnsCookie returns the kernel's name for the calling thread's network namespace, which eBPF
// programs get from bpf_get_netns_cookie. It is never reused while the machine runs. It fails
// with unix.ENOPROTOOPT on kernels before 5.14.
func NetnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("read netns cookie: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("read netns cookie (needs Linux 5.14): %w", err)
	}
	return cookie, nil
}
