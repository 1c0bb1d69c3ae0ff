// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/doctor"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// sockets lists the sockets of this namespace that keep others off a port, with their processes. Those
// that are bound and do not listen, as reservations of bpfnet's own, are in no list of the kernel's:
// the processes that make such are asked for each.
func (g *gatherer) sockets() {
	places := make(map[string][]int) // by inode, in the list
	var list []doctor.Socket
	for _, name := range []string{"tcp", "tcp6", "udp", "udp6"} {
		raw, err := os.ReadFile("/proc/self/net/" + name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		g.fail(err, "reservations")
		socks, inodes := doctor.ParseSockets(strings.TrimSuffix(name, "6"), string(raw))
		for i, s := range socks {
			places[inodes[i]] = append(places[inodes[i]], len(list))
			list = append(list, s)
		}
	}
	cookie, err := netdev.NetnsCookie()
	g.fail(err, "reservations")
	for _, pid := range pids() {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		p := doctor.Process{PID: pid, Name: processName(pid)}
		var bound []int
		for _, fd := range fds {
			to, err := os.Readlink(filepath.Join(dir, fd.Name()))
			inode, ok := strings.CutPrefix(to, "socket:[")
			if err != nil || !ok {
				continue
			}
			known := places[strings.TrimSuffix(inode, "]")]
			for _, i := range known {
				// Several can hold one socket; the Engine is the one that counts.
				if list[i].Process.PID == 0 || doctor.HoldsPorts(p) {
					list[i].Process = p
				}
			}
			if n, err := strconv.Atoi(fd.Name()); err == nil && len(known) == 0 && doctor.HoldsPorts(p) {
				bound = append(bound, n)
			}
		}
		asked, err := boundSockets(pid, bound, cookie)
		for _, s := range asked {
			s.Process = p
			list = append(list, s)
		}
		if err != nil {
			g.f.SocketsErr = fmt.Errorf("ask %s (process %d) for its sockets: %w", p.Name, pid, err)
		}
	}
	g.f.Sockets = list
}

// boundSockets asks for the addresses of another process's sockets, as far as they are bound in the
// namespace of that cookie and not connected. A process that has ended has none.
func boundSockets(pid int, fds []int, cookie uint64) ([]doctor.Socket, error) {
	if len(fds) == 0 {
		return nil, nil
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(pidfd)
	var out []doctor.Socket
	for _, fd := range fds {
		own, err := unix.PidfdGetfd(pidfd, fd, 0)
		if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
			continue // closed in between
		}
		if err != nil {
			return out, err
		}
		if s, ok := boundSocket(own, cookie); ok {
			out = append(out, s)
		}
		unix.Close(own)
	}
	return out, nil
}

func boundSocket(fd int, cookie uint64) (s doctor.Socket, ok bool) {
	proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil || proto != unix.IPPROTO_TCP && proto != unix.IPPROTO_UDP {
		return s, false
	}
	if c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil || c != cookie {
		return s, false
	}
	if _, err := unix.Getpeername(fd); err == nil {
		return s, false
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return s, false
	}
	s.Proto = policy.Proto(proto)
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		s.Addr = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		s.Addr = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return s, s.Addr.IsValid() && s.Addr.Port() != 0
}
