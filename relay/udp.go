// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxDatagram is the largest that UDP can carry.
const maxDatagram = 1 << 16

// buffer is in use only while there is a datagram in it: a socket that waits has none.
type buffer struct {
	data    [maxDatagram]byte
	control [64]byte
}

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// udpClient is who sends, and to which of the host's addresses.
type udpClient struct {
	from netip.AddrPort
	at   netip.Addr
}

type udpSession struct {
	conn     *net.UDPConn
	last     atomic.Int64 // when a packet passed: time.Duration since the relay began, which no set clock changes
	answered atomic.Bool
}

// udpPort is a served UDP port.
type udpPort struct {
	*served
	conn *net.UDPConn

	lock     sync.Mutex
	sessions map[udpClient]*udpSession
}

func (s *served) serveUDP() error {
	if err := receiveAll(s.fd); err != nil {
		return err
	}
	// Answers come from the address that was asked.
	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1); err != nil {
		return err
	}
	f, err := s.dup()
	if err != nil {
		return err
	}
	defer f.Close()
	pc, err := net.FilePacketConn(f)
	if err != nil {
		return err
	}
	conn, ok := pc.(*net.UDPConn)
	if !ok {
		pc.Close()
		return errors.New("is no UDP socket")
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		conn.Close()
		return err
	}
	u := &udpPort{served: s, conn: conn, sessions: make(map[udpClient]*udpSession)}
	done := make(chan struct{})
	// Those that are there still answer by the socket.
	s.stop = sync.OnceFunc(func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		<-done
	})
	s.close = func() { conn.Close() }
	go func() {
		defer close(done)
		u.receive(raw)
	}()
	return nil
}

// receive passes clients' datagrams on until the port is stopped.
func (u *udpPort) receive(raw syscall.RawConn) {
	for {
		err := raw.Read(func(fd uintptr) bool {
			b := buffers.Get().(*buffer)
			defer buffers.Put(b)
			n, nc, _, from, err := unix.Recvmsg(int(fd), b.data[:], b.control[:], unix.MSG_DONTWAIT)
			if err != nil {
				return !errors.Is(err, unix.EAGAIN)
			}
			if c, ok := clientOf(from, b.control[:nc]); ok {
				u.pass(c, b.data[:n])
			}
			return true
		})
		if err != nil {
			return
		}
	}
}

// clientOf reads who sent a datagram, and to which address.
func clientOf(from unix.Sockaddr, control []byte) (udpClient, bool) {
	sa, ok := from.(*unix.SockaddrInet6)
	if !ok {
		return udpClient{}, false
	}
	addr := netip.AddrFrom16(sa.Addr)
	if addr.IsLinkLocalUnicast() {
		if dev, err := net.InterfaceByIndex(int(sa.ZoneId)); err == nil {
			addr = addr.WithZone(dev.Name)
		}
	}
	list, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return udpClient{}, false
	}
	for _, m := range list {
		if m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= 16 {
			return udpClient{netip.AddrPortFrom(addr, uint16(sa.Port)), netip.AddrFrom16([16]byte(m.Data))}, true
		}
	}
	return udpClient{}, false
}

// pass sends a client's datagram to the target, by a socket of its own.
func (u *udpPort) pass(c udpClient, data []byte) {
	u.lock.Lock()
	s := u.sessions[c]
	u.lock.Unlock()
	if s == nil {
		if s = u.open(c); s == nil {
			return
		}
	}
	s.last.Store(int64(time.Since(u.r.begun)))
	// That nobody listens there may change: the client is not told, as by docker-proxy.
	if _, err := s.conn.Write(data); errors.Is(err, net.ErrClosed) {
		if s = u.open(c); s != nil { // the port has been led elsewhere
			_, _ = s.conn.Write(data)
		}
	}
}

func (u *udpPort) open(c udpClient) *udpSession {
	s := &udpSession{}
	ready := make(chan struct{})
	leave, ok := u.enter(func() {
		<-ready
		if s.conn != nil {
			s.conn.Close()
		}
	})
	if !ok {
		return nil
	}
	conn, err := net.Dial("udp", u.target.Load().String())
	if err != nil {
		close(ready)
		leave()
		u.failed.Add(1)
		return nil
	}
	s.conn = conn.(*net.UDPConn)
	close(ready)
	u.lock.Lock()
	u.sessions[c] = s
	u.lock.Unlock()
	u.r.work.Go(func() {
		defer leave()
		u.answer(c, s)
		u.lock.Lock()
		if u.sessions[c] == s {
			delete(u.sessions, c)
		}
		u.lock.Unlock()
		s.conn.Close()
	})
	return s
}

// answer sends the target's datagrams back until the client has been silent for long.
func (u *udpPort) answer(c udpClient, s *udpSession) {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return
	}
	control := sourceControl(c)
	s.last.Store(int64(time.Since(u.r.begun)))
	for {
		idle := u.r.limits.Unanswered
		if s.answered.Load() {
			idle = u.r.limits.Idle
		}
		end := u.r.begun.Add(time.Duration(s.last.Load()) + idle)
		if !end.After(time.Now()) {
			return
		}
		_ = s.conn.SetReadDeadline(end)
		var broken error
		err := raw.Read(func(fd uintptr) bool {
			b := buffers.Get().(*buffer)
			defer buffers.Put(b)
			n, err := unix.Read(int(fd), b.data[:])
			switch {
			case errors.Is(err, unix.EAGAIN):
				return false
			case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EINTR):
				return true // it may listen later
			case err != nil:
				broken = err
				return true
			}
			s.answered.Store(true)
			s.last.Store(int64(time.Since(u.r.begun)))
			_, _, _ = u.conn.WriteMsgUDPAddrPort(b.data[:n], control, c.from)
			return true
		})
		if broken != nil || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
	}
}

// sourceControl makes answers come from the address that the client has asked.
func sourceControl(c udpClient) []byte {
	info := unix.Inet6Pktinfo{Addr: c.at.As16()}
	if zone := c.from.Addr().Zone(); zone != "" && c.at.IsLinkLocalUnicast() {
		if dev, err := net.InterfaceByName(zone); err == nil {
			info.Ifindex = uint32(dev.Index)
		}
	}
	return unix.PktInfo6(&info)
}
