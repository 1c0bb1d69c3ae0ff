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
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxConnections is what clients may hold open at once; a command holds one, for as long as it runs.
	maxConnections = 512
	// maxGuests is the same for those who may only read, so that they keep nobody else out.
	maxGuests = 64
)

// peer is who has connected, as the kernel knew it then.
type peer struct {
	pid     int
	uid     uint32
	groups  []uint32
	pidns   string   // as in /proc/PID/ns/pid; empty where the process cannot be seen
	process *os.File // a pidfd; nil before Linux 6.5, where the number alone tells who it is
	gone    bool     // it had ended already: somebody else goes on with its connection
}

type peerKey struct{}

// peerOf asks the kernel who has connected.
func peerOf(c *net.UnixConn) (p peer, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return p, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			return
		}
		p.pid, p.uid, p.groups = int(cred.Pid), cred.Uid, append(peerGroups(fd), cred.Gid)
		switch pidfd, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); {
		case err == nil:
			p.process = os.NewFile(uintptr(pidfd), "peer")
		case !errors.Is(err, unix.ENOPROTOOPT):
			p.gone = true
		}
	})
	if err = errors.Join(err, cerr); err != nil {
		return p, err
	}
	p.pidns, _ = os.Readlink(pidNamespace(strconv.Itoa(p.pid)))
	// Looked at last: as long as it lives the number is its own, so what was read was of it.
	p.gone = p.gone || p.ended()
	return p, nil
}

// ended reports whether the process has, as far as the kernel tells.
func (p peer) ended() bool {
	if p.process == nil {
		return false
	}
	raw, err := p.process.SyscallConn()
	if err != nil {
		return true
	}
	over := true
	_ = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		for err == unix.EINTR {
			n, err = unix.Poll(fds, 0)
		}
		over = err != nil || n > 0
	})
	return over
}

func (p peer) close() {
	if p.process != nil {
		p.process.Close()
	}
}

// withPeer notes who has connected.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	v, ok := c.(*visit)
	if !ok {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, v.peer)
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

// PeerPID is the ID of the process that made the request, as the kernel knows it when it connected; 0 if that is unknown,
// or if the process has ended and the number may be another's.
func PeerPID(ctx context.Context) int {
	p, ok := ctx.Value(peerKey{}).(peer)
	if !ok || p.gone || p.ended() {
		return 0
	}
	return p.pid
}

// rights say who may have the daemon do something: root and the socket's group, from the daemon's own PID namespace. A
// container that has the socket in one of its mounts has another.
type rights struct {
	group uint32
	pidns string
}

// rightsAt are those of a socket in this process.
func rightsAt(l net.Listener) (rights, error) {
	info, err := os.Stat(l.Addr().String())
	if err != nil {
		return rights{}, err
	}
	pidns, err := os.Readlink(pidNamespace("self"))
	return rights{info.Sys().(*syscall.Stat_t).Gid, pidns}, err
}

// check says why somebody may not ask.
func (r rights) check(p peer) error {
	switch {
	case p.gone:
		return errors.New("the process that has connected is no more, and another one goes on with its connection")
	case p.pidns != r.pidns:
		return errors.New("who asks is in another PID namespace than the daemon: containers change nothing")
	case p.uid != 0 && int(p.uid) != os.Getuid() && !slices.Contains(p.groups, r.group):
		return fmt.Errorf("user %d is neither root nor in the socket's group %d", p.uid, r.group)
	}
	return nil
}

// guard refuses verbs of those who may not ask. What only reads is for everybody whom the socket's mode lets in.
func (r rights) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method != http.MethodGet && req.Method != http.MethodHead {
			err := errors.New("the kernel does not say who asks")
			if p, ok := req.Context().Value(peerKey{}).(peer); ok {
				err = r.check(p)
			}
			if err != nil {
				write(w, http.StatusForbidden, failure{Error: err.Error()})
				return
			}
		}
		next.ServeHTTP(w, req)
	})
}

// door lets so many connections in at once, and closes others: those of who may ask, and, apart from them, of who may not.
type door struct {
	net.Listener
	rights
	members, guests atomic.Int64
}

func (d *door) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		u, ok := c.(*net.UnixConn)
		if !ok {
			return c, nil
		}
		p, err := peerOf(u)
		if err != nil {
			c.Close()
			continue
		}
		inside, most := &d.members, int64(maxConnections)
		if d.check(p) != nil {
			inside, most = &d.guests, maxGuests
		}
		v := &visit{UnixConn: u, peer: p, inside: inside}
		if inside.Add(1) > most {
			v.Close()
			continue
		}
		return v, nil
	}
}

// visit is a connection with who made it.
type visit struct {
	*net.UnixConn
	peer   peer
	inside *atomic.Int64
	once   sync.Once
}

func (v *visit) Close() error {
	v.once.Do(func() {
		v.inside.Add(-1)
		v.peer.close()
	})
	return v.UnixConn.Close()
}
