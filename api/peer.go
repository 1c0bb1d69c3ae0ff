// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxConnections is what clients may hold open at once; a command holds one, for as long as it runs.
const maxConnections = 512

// peer is who has connected, as the kernel knew it then.
type peer struct {
	pid    int
	uid    uint32
	groups []uint32
	pidns  string // as in /proc/PID/ns/pid; empty where the process cannot be seen
}

type peerKey struct{}

// withPeer notes who has connected.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	_ = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return
		}
		p := peer{pid: int(cred.Pid), uid: cred.Uid, groups: append(peerGroups(fd), cred.Gid)}
		p.pidns, _ = os.Readlink(pidNamespace(strconv.Itoa(p.pid)))
		ctx = context.WithValue(ctx, peerKey{}, p)
	})
	return ctx
}

func pidNamespace(process string) string { return "/proc/" + process + "/ns/pid" }

// peerGroups are the supplementary groups of who has connected.
func peerGroups(fd uintptr) []uint32 {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4]
		case errno == unix.ERANGE && int(size/4) > len(groups):
			groups = make([]uint32, size/4)
		default:
			return nil
		}
	}
}

// WithPeerPID is for callers of a Handler that are no connection: tests.
func WithPeerPID(ctx context.Context, pid int) context.Context {
	return context.WithValue(ctx, peerKey{}, peer{pid: pid})
}

// PeerPID is the ID of the process that made the request, as the kernel knows it when it connected;
// 0 if that is unknown.
func PeerPID(ctx context.Context) int {
	p, _ := ctx.Value(peerKey{}).(peer)
	return p.pid
}

// mayAsk says whether who has connected may have the daemon do something: root and the socket's group, from the
// daemon's own PID namespace. A container that has the socket in one of its mounts has another.
func mayAsk(ctx context.Context, group uint32, pidns string) error {
	p, ok := ctx.Value(peerKey{}).(peer)
	switch {
	case !ok:
		return errors.New("the kernel does not say who asks")
	case p.pidns != pidns:
		return errors.New("who asks is in another PID namespace than the daemon: containers change nothing")
	case p.uid != 0 && int(p.uid) != os.Getuid() && !slices.Contains(p.groups, group):
		return fmt.Errorf("user %d is neither root nor in the socket's group %d", p.uid, group)
	}
	return nil
}

// guard refuses verbs of those who may not ask. What only reads is for everybody whom the socket's mode lets in.
func guard(next http.Handler, l net.Listener) (http.Handler, error) {
	info, err := os.Stat(l.Addr().String())
	if err != nil {
		return nil, err
	}
	pidns, err := os.Readlink(pidNamespace("self"))
	if err != nil {
		return nil, err
	}
	group := info.Sys().(*syscall.Stat_t).Gid
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			if err := mayAsk(r.Context(), group, pidns); err != nil {
				write(w, http.StatusForbidden, failure{Error: err.Error()})
				return
			}
		}
		next.ServeHTTP(w, r)
	}), nil
}

// limit closes connections beyond so many.
func limit(most int64) func(net.Conn, http.ConnState) {
	var open atomic.Int64
	return func(c net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			if open.Add(1) > most {
				c.Close()
			}
		case http.StateClosed, http.StateHijacked:
			open.Add(-1)
		}
	}
}
