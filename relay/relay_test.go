// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/reserve"
)

func TestMain(m *testing.M) { lab.Main(m) }

const soon = 5 * time.Second

// freeKey is a port of [::1] that is free, held by a socket as the daemon binds them.
func freeKey(t *testing.T, proto policy.Proto) (Key, int) {
	t.Helper()
	ports, number, err := reserve.FreePort(proto, []netip.Addr{netip.IPv6Loopback()}, 0, 0, nil)
	require.NoError(t, err)
	defer ports[0].Close()
	fd, err := ports[0].Dup()
	require.NoError(t, err)
	return Key{Proto: proto, Host: netip.AddrPortFrom(netip.IPv6Loopback(), number)}, fd
}

// relayTo relays a new port to a target.
func relayTo(t *testing.T, l Limits, proto policy.Proto, target net.Addr) (*Relay, Key) {
	t.Helper()
	r := New(l)
	t.Cleanup(r.Close)
	key, fd := freeKey(t, proto)
	require.NoError(t, r.Add(Port{key, netip.MustParseAddrPort(target.String())}, fd))
	return r, key
}

// tcpServer serves each connection in a goroutine of its own.
func tcpServer(t *testing.T, serve func(*net.TCPConn)) net.Addr {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		work.Wait()
	})
	return l.Addr()
}

func dialTCP(t *testing.T, key Key) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", key.Host.String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(soon)))
	return c.(*net.TCPConn)
}

// refused requires that a connection is reset, at once or when it has just begun.
func refused(t *testing.T, key Key) {
	t.Helper()
	c, err := net.Dial("tcp", key.Host.String())
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(soon))
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	require.True(t, isReset(err), "%v", err)
}

func echoTCP(c *net.TCPConn) { _, _ = io.Copy(c, c) }

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// Each side may finish before the other: what the other still says arrives.
func TestHalfClose(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	target := tcpServer(t, func(c *net.TCPConn) {
		got, err := io.ReadAll(c) // until the client has finished
		if err == nil {
			_, _ = c.Write(got)
		}
	})
	r, key := relayTo(t, Limits{}, policy.TCP, target)
	c := dialTCP(t, key)
	_, err := c.Write(data)
	require.NoError(t, err)
	require.NoError(t, c.CloseWrite())
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))

	target = tcpServer(t, func(c *net.TCPConn) {
		_ = c.CloseWrite() // the server first
		_, _ = io.Copy(io.Discard, c)
	})
	r.Lead(Port{key, netip.MustParseAddrPort(target.String())})
	c = dialTCP(t, key)
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	_, err = c.Write(data)
	require.NoError(t, err)
	require.NoError(t, c.CloseWrite())
	lab.Eventually(t, soon, "no client is left", func() bool { return r.Active() == 0 })
}

// A connection that one side breaks off is broken for the other, not finished.
func TestReset(t *testing.T) {
	seen := make(chan error, 1)
	target := tcpServer(t, func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, c)
		seen <- err
	})
	r, key := relayTo(t, Limits{}, policy.TCP, target)
	c := dialTCP(t, key)
	_, err := c.Write([]byte("x"))
	require.NoError(t, err)
	lab.Eventually(t, soon, "the connection is carried", func() bool { return r.Active() == 1 })
	reset(c)
	require.True(t, isReset(<-seen))

	target = tcpServer(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		reset(c)
	})
	r.Lead(Port{key, netip.MustParseAddrPort(target.String())})
	c = dialTCP(t, key)
	_, err = c.Write([]byte("x"))
	require.NoError(t, err)
	_, err = c.Read(make([]byte, 1))
	require.True(t, isReset(err), "%v", err)

	// Nobody listens: refused, as far as the relay can still say so.
	r.Lead(Port{key, netip.MustParseAddrPort("127.0.0.1:1")})
	refused(t, key)
	lab.Eventually(t, soon, "it is counted", func() bool { return r.Counters()[key].Failed == 1 })
}

// What is removed or leads elsewhere ends at once; what is led elsewhere goes there.
func TestLeadAndRemove(t *testing.T) {
	named := func(name string) net.Addr {
		return tcpServer(t, func(c *net.TCPConn) {
			_, _ = c.Write([]byte(name))
			echoTCP(c)
		})
	}
	r, key := relayTo(t, Limits{}, policy.TCP, named("one"))
	hear := func(c *net.TCPConn) string {
		b := make([]byte, 3)
		_, err := io.ReadFull(c, b)
		require.NoError(t, err)
		return string(b)
	}
	first := dialTCP(t, key)
	require.Equal(t, "one", hear(first))
	second := netip.MustParseAddrPort(named("two").String())
	r.Lead(Port{key, second})
	_, err := first.Read(make([]byte, 1))
	require.True(t, isReset(err), "%v", err)
	next := dialTCP(t, key)
	require.Equal(t, "two", hear(next))
	r.Lead(Port{key, second}) // nothing new
	_, err = next.Write([]byte("abc"))
	require.NoError(t, err)
	require.Equal(t, "abc", hear(next))

	r.Remove(key)
	_, err = next.Read(make([]byte, 1))
	require.True(t, isReset(err), "%v", err)
	hold, err := reserve.Hold(policy.TCP, key.Host)
	require.NoError(t, err, "the port is free")
	hold.Close()
	require.Empty(t, r.Ports())
	r.Remove(key)
}

// Beyond the limit clients are refused and counted, and places become free again.
func TestLimits(t *testing.T) {
	r, key := relayTo(t, Limits{PerPort: 2}, policy.TCP, tcpServer(t, echoTCP))
	a, b := dialTCP(t, key), dialTCP(t, key)
	lab.Eventually(t, soon, "both are carried", func() bool { return r.Active() == 2 })
	refused(t, key)
	require.Equal(t, Counters{Clients: 2, Active: 2, Dropped: 1}, r.Counters()[key])
	a.Close()
	lab.Eventually(t, soon, "a place is free", func() bool { return r.Active() == 1 })
	for _, c := range []*net.TCPConn{b, dialTCP(t, key)} {
		_, err := c.Write([]byte("hello"))
		require.NoError(t, err)
		_, err = io.ReadFull(c, make([]byte, 5))
		require.NoError(t, err)
	}
}

// udpServer answers each datagram with who sent it, and it.
func udpServer(t *testing.T) net.Addr {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, maxDatagram)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(append([]byte(from.String()+" "), b[:n]...), from)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c.LocalAddr()
}

func dialUDP(t *testing.T, key Key) net.Conn {
	t.Helper()
	c, err := net.Dial("udp", key.Host.String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(soon)))
	return c
}

// exchangeUDP returns what the server saw as the sender.
func exchangeUDP(t *testing.T, c net.Conn, data []byte) string {
	t.Helper()
	_, err := c.Write(data)
	require.NoError(t, err)
	b := make([]byte, maxDatagram)
	n, err := c.Read(b)
	require.NoError(t, err)
	from, got, _ := bytes.Cut(b[:n], []byte(" "))
	require.True(t, bytes.Equal(data, got))
	return string(from)
}

func TestUDP(t *testing.T) {
	const idle = 300 * time.Millisecond
	r, key := relayTo(t, Limits{PerPort: 2, Idle: idle, Unanswered: idle}, policy.UDP, udpServer(t))
	a, b := dialUDP(t, key), dialUDP(t, key)
	one, two := exchangeUDP(t, a, []byte("hello")), exchangeUDP(t, b, nil)
	require.NotEqual(t, one, two, "each client has a socket of its own")
	require.Equal(t, one, exchangeUDP(t, a, bytes.Repeat([]byte("x"), 60000)), "and keeps it")

	c := dialUDP(t, key) // one too many
	_, err := c.Write([]byte("hello"))
	require.NoError(t, err)
	lab.Eventually(t, soon, "it is counted", func() bool { return r.Counters()[key].Dropped == 1 })
	lab.Eventually(t, soon, "silent clients are forgotten", func() bool { return r.Active() == 0 })
	exchangeUDP(t, c, []byte("hello"))

	// The next datagram reaches the successor.
	r.Lead(Port{key, netip.MustParseAddrPort(udpServer(t).String())})
	exchangeUDP(t, c, []byte("hello"))

	// Nobody listens, then somebody does.
	gone, err := net.ListenPacket("udp4", "127.0.0.1:0")
	require.NoError(t, err)
	target := netip.MustParseAddrPort(gone.LocalAddr().String())
	gone.Close()
	r.Lead(Port{key, target})
	_, err = c.Write([]byte("hello"))
	require.NoError(t, err)
	again, err := net.ListenPacket("udp4", target.String())
	require.NoError(t, err)
	defer again.Close()
	require.NoError(t, again.SetDeadline(time.Now().Add(soon)))
	lab.Eventually(t, soon, "the client goes on", func() bool {
		_, err := c.Write([]byte("hello"))
		require.NoError(t, err)
		_ = again.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, _, err = again.ReadFrom(make([]byte, 10))
		return err == nil
	})
}

func TestSCTPIsRefused(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	r := New(Limits{})
	err = r.Add(Port{Key{Proto: policy.SCTP, Host: netip.MustParseAddrPort("[::1]:1")}, netip.MustParseAddrPort("127.0.0.1:1")}, fd)
	require.ErrorContains(t, err, "only tcp and udp")
	require.ErrorIs(t, unix.Close(fd), unix.EBADF, "the socket is closed")
}

// serveRelay is a relay behind its socket, in this process.
func serveRelay(t *testing.T, dir, version string) (*Relay, <-chan error) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, SocketName), Net: "unix"})
	require.NoError(t, err)
	r := New(Limits{})
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { done <- Serve(ctx, r, l, version) }()
	t.Cleanup(func() {
		cancel()
		r.Close()
	})
	return r, done
}

// A keeper makes the relay serve what it is told, and another finds that as it is.
func TestKeeper(t *testing.T) {
	dir := t.TempDir()
	st, err := Ask(dir)
	require.NoError(t, err)
	require.Nil(t, st)

	r, done := serveRelay(t, dir, "1")
	k := NewKeeper(KeeperOptions{Dir: dir, Version: "1"})
	first := tcpServer(t, echoTCP)
	key, fd := freeKey(t, policy.TCP)
	unix.Close(fd)
	busy, err := net.Listen("tcp6", "[::1]:0")
	require.NoError(t, err)
	defer busy.Close()
	taken := Key{Proto: policy.TCP, Host: netip.MustParseAddrPort(busy.Addr().String())}
	to := netip.MustParseAddrPort(first.String())
	want := map[Key]netip.AddrPort{key: to, taken: to}

	served, failed, err := k.Apply(want, false)
	require.NoError(t, err)
	require.Equal(t, map[Key]bool{key: true}, served)
	require.ErrorIs(t, failed[taken], unix.EADDRINUSE)
	require.True(t, k.Has(key))
	c := dialTCP(t, key)
	_, err = c.Write([]byte("a"))
	require.NoError(t, err)
	_, err = c.Read(make([]byte, 1))
	require.NoError(t, err)

	// What failed is tried again only when it is asked for.
	busy.Close()
	served, _, err = k.Apply(want, false)
	require.NoError(t, err)
	require.Len(t, served, 1)
	served, failed, err = k.Apply(want, true)
	require.NoError(t, err)
	require.Len(t, served, 2)
	require.Empty(t, failed)
	k.Close()

	// The next keeper: connections live.
	k = NewKeeper(KeeperOptions{Dir: dir, Version: "1"})
	require.True(t, k.Has(taken))
	delete(want, taken)
	served, _, err = k.Apply(want, false)
	require.NoError(t, err)
	require.Equal(t, map[Key]bool{key: true}, served)
	_, err = c.Write([]byte("b"))
	require.NoError(t, err)
	_, err = c.Read(make([]byte, 1))
	require.NoError(t, err)
	st, err = Ask(dir)
	require.NoError(t, err)
	require.Equal(t, []PortState{{Port{key, to}, Counters{Clients: 1, Active: 1}}}, st.Ports)

	// Nothing is left to serve: it ends.
	_, _, err = k.Apply(nil, false)
	require.NoError(t, err)
	require.NoError(t, <-done)
	require.False(t, k.Has(key))
	k.Close()
	_ = r
}

// A relay that gives its sockets to another takes no more clients, and ends when the last has gone.
func TestRetire(t *testing.T) {
	dir := t.TempDir()
	_, done := serveRelay(t, dir, "1")
	k := NewKeeper(KeeperOptions{Dir: dir, Version: "1"})
	defer k.Close()
	key, fd := freeKey(t, policy.TCP)
	unix.Close(fd)
	to := netip.MustParseAddrPort(tcpServer(t, echoTCP).String())
	_, _, err := k.Apply(map[Key]netip.AddrPort{key: to}, false)
	require.NoError(t, err)
	old := dialTCP(t, key)
	_, err = old.Write([]byte("a"))
	require.NoError(t, err)
	_, err = old.Read(make([]byte, 1))
	require.NoError(t, err)

	conn, err := dial(dir)
	require.NoError(t, err)
	defer conn.Close()
	a, fds, err := exchange(conn, request{Op: opTake, Ports: []Port{{Key: key}}}, nil, soon)
	require.NoError(t, err)
	require.Len(t, fds, 1)
	require.Equal(t, []Port{{key, to}}, a.Ports)
	successor := New(Limits{})
	defer successor.Close()
	require.NoError(t, successor.Add(a.Ports[0], fds[0]))
	_, _, err = exchange(conn, request{Op: opRetire}, nil, soon)
	require.NoError(t, err)

	young := dialTCP(t, key)
	for _, c := range []*net.TCPConn{old, young} {
		_, err = c.Write([]byte("b"))
		require.NoError(t, err)
		_, err = c.Read(make([]byte, 1))
		require.NoError(t, err)
	}
	require.Equal(t, 1, successor.Active())
	old.Close()
	require.NoError(t, <-done)
	_, err = young.Write([]byte("c"))
	require.NoError(t, err)
	_, err = young.Read(make([]byte, 1))
	require.NoError(t, err)
}

// Nothing that comes in over the socket ends the relay.
func TestBadRequests(t *testing.T) {
	dir := t.TempDir()
	_, _ = serveRelay(t, dir, "1")
	for _, raw := range []string{"", "GET / HTTP/1.1\r\n\r\n", "\xff\xff\xff\xff", "\x00\x00\x00\x02{]", "\x00\x00\x00\x02[]"} {
		c, err := dial(dir)
		require.NoError(t, err)
		_, err = c.Write([]byte(raw))
		require.NoError(t, err)
		require.NoError(t, c.CloseWrite())
		_ = c.SetReadDeadline(time.Now().Add(soon))
		_, err = io.ReadAll(c)
		require.True(t, err == nil || isReset(err), "%v", err)
		c.Close()
	}
	c, err := dial(dir)
	require.NoError(t, err)
	defer c.Close()
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	for _, q := range []request{{Op: "dance"}, {Op: opAdd, Ports: make([]Port, 2)}, {Op: opAdd, Ports: make([]Port, 1)}} {
		a, _, err := exchange(c, q, []int{fd}, soon)
		require.NoError(t, err)
		require.NotEmpty(t, a.Error)
	}
	st, err := Ask(dir)
	require.NoError(t, err)
	require.Empty(t, st.Ports)
}
