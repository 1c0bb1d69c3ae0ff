// SPDX-License-Identifier: Apache-2.0

package reserve

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// TakenError says who has a port.
type TakenError struct {
	PID     int    // 0: not found out
	Process string // its name, as ps shows it
	// Closing says that no process has it, but connections that wait for their peer to close them.
	Closing bool
	Proto   policy.Proto
	Host    netip.AddrPort // what was asked for, not what the process has bound
}

func (e *TakenError) Error() string {
	host := fmt.Sprintf("host port %s/%s", e.Host, e.Proto)
	switch {
	case e.PID != 0:
		return fmt.Sprintf("%s: in use by %s (pid %d); stop that, or publish another port", host, e.Process, e.PID)
	case e.Closing:
		return host + ": in use by closing connections; try again in a minute, or publish another port"
	}
	return host + ": in use by another process; stop that, or publish another port"
}

// Unwrap returns EADDRINUSE.
func (e *TakenError) Unwrap() error { return unix.EADDRINUSE }

// The states of TCP sockets that matter here, as proc_net_tcp(5) has them.
const (
	finWait2 = 5
	timeWait = 6
	listen   = 10
)

// socket is a line of /proc/net/tcp and its like.
type socket struct {
	family        int
	local, remote netip.AddrPort
	state         uint8
	inode         uint64 // 0: no process has it any more
}

// Holder names the process that has a port, in the network namespace of the calling thread; 0 if that is not
// found out.
func Holder(proto policy.Proto, host netip.AddrPort) (pid int, process string) {
	e := takenBy(proto, host, rivals(proto, host))
	return e.PID, e.Process
}

// takenBy says who has a port, given its rivals.
func takenBy(proto policy.Proto, host netip.AddrPort, list []socket) *TakenError {
	e := &TakenError{Proto: proto, Host: host}
	live := slices.DeleteFunc(slices.Clone(list), func(s socket) bool { return s.inode == 0 })
	for _, s := range live {
		if e.PID, e.Process = processOf(s.inode); e.PID != 0 {
			return e
		}
	}
	e.Closing = len(list) > 0 && len(live) == 0
	return e
}

// rivals returns the sockets of the calling thread's network namespace that the port cannot be
// shared with, the likeliest first: listeners, other sockets of processes, closed connections. The
// kernel does not list TCP sockets that are bound and neither listen nor are connected.
func rivals(proto policy.Proto, host netip.AddrPort) []socket {
	var table string
	switch proto {
	case policy.TCP:
		table = "tcp"
	case policy.UDP:
		table = "udp"
	default:
		return nil
	}
	var list []socket
	for _, t := range []struct {
		name   string
		family int
	}{{table, unix.AF_INET}, {table + "6", unix.AF_INET6}} {
		for _, s := range sockets("/proc/thread-self/net/"+t.name, t.family) {
			if s.local.Port() == host.Port() && collide(host.Addr(), s.local.Addr()) {
				list = append(list, s)
			}
		}
	}
	rank := func(s socket) int {
		switch {
		case s.inode == 0:
			return 3
		case proto == policy.TCP && s.state != listen:
			return 2
		case s.local.Addr().Unmap().Is4() != host.Addr().Is4():
			return 1 // on ::, and perhaps for IPv6 only
		}
		return 0
	}
	slices.SortStableFunc(list, func(a, b socket) int { return rank(a) - rank(b) })
	return list
}

// collide reports whether one port cannot be bound on both addresses. A socket on :: may be one
// for both families.
func collide(host, other netip.Addr) bool {
	other = other.Unmap()
	if host.Is4() != other.Is4() {
		return host.Is4() && other.IsUnspecified()
	}
	return host == other || host.IsUnspecified() || other.IsUnspecified()
}

// sockets reads a table of sockets: proc_net_tcp(5). What cannot be read is left out.
func sockets(path string, family int) []socket {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var list []socket
	lines := bufio.NewScanner(f)
	lines.Scan() // the headings
	for lines.Scan() {
		// slot, local, remote, state, queues, timer, retransmits, user, timeout, inode
		v := strings.Fields(lines.Text())
		if len(v) < 10 {
			continue
		}
		local, ok1 := procAddr(v[1])
		remote, ok2 := procAddr(v[2])
		state, err1 := strconv.ParseUint(v[3], 16, 8)
		inode, err2 := strconv.ParseUint(v[9], 10, 64)
		if ok1 && ok2 && err1 == nil && err2 == nil {
			list = append(list, socket{family, local, remote, uint8(state), inode})
		}
	}
	return list
}

// procAddr reads "0100007F:1F90", which is 127.0.0.1:8080: words of the host's byte order.
func procAddr(text string) (netip.AddrPort, bool) {
	addr, port, _ := strings.Cut(text, ":")
	b, err := hex.DecodeString(addr)
	n, err2 := strconv.ParseUint(port, 16, 16)
	if err != nil || err2 != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(n)), true
}

// processOf returns the process that has a socket open, of several the one with the lowest number,
// or 0.
func processOf(inode uint64) (pid int, name string) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, ""
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	want := fmt.Sprintf("socket:[%d]", inode)
	for _, pid := range pids {
		if hasOpen(pid, want) {
			return pid, nameOf(pid)
		}
	}
	return 0, ""
}

func hasOpen(pid int, want string) bool {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false // it is gone, or none of our business
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		target, err := os.Readlink(dir + "/" + e.Name())
		return err == nil && target == want
	})
}

// nameOf is a process's name on one line: processes choose their names themselves.
func nameOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "a process"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.TrimSuffix(string(b), "\n"))
}
