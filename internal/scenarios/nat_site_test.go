// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// The link behind client2, which is a router here: what lies beyond it is two hops from the host.
var (
	router4, router6 = netip.MustParseAddr("203.0.113.65"), netip.MustParseAddr("2001:db8:5::1")
	far4, far6       = netip.MustParseAddr("203.0.113.66"), netip.MustParseAddr("2001:db8:5::2")
	nowhere4         = netip.MustParseAddr("203.0.113.67") // the router has no way there, and says so
	nowhere6         = netip.MustParseAddr("2001:db8:6::1")
)

const (
	echoPort  = 9000 // of web's echo server and of far's, TCP and UDP; published as such
	bridgeMTU = 1500
)

// natSite is a host with containers web and peer on blue, and a machine behind a router:
//
//	web, peer ── host ── client2 ── far
type natSite struct {
	*site
	far, web, peer *lab.NS
	web4, web6     netip.Addr
	peer4, peer6   netip.Addr
}

func newNATSite(t *testing.T, daemon ...string) *natSite {
	w := &natSite{site: newOwnSite(t, daemon...)}
	w.far = w.NewNS(t, "far")
	lab.Join(t,
		lab.End{NS: w.Client2, If: "eth1", Addrs: []netip.Prefix{netip.PrefixFrom(router4, 26), netip.PrefixFrom(router6, 64)}},
		lab.End{NS: w.far, If: "eth0", Addrs: []netip.Prefix{netip.PrefixFrom(far4, 26), netip.PrefixFrom(far6, 64)}})
	for via, all := range map[netip.Addr]string{router4: "0.0.0.0/0", router6: "::/0"} {
		w.far.AddRoute(t, netip.MustParsePrefix(all), via)
	}
	w.Client2.Sysctl(t, "net.ipv4.ip_forward", "1")
	w.Client2.Sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	for _, a := range []netip.Addr{nowhere4, nowhere6} {
		w.Client2.MustRun(t, "ip", "route", "add", "unreachable", a.String())
	}
	w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp", "-p", "9000:9000", "-p", "9000:9000/udp", "-p", "9001:9001/udp", "-p", "9100:9100")
	w.sandbox(t, "peer", "blue")
	w.web, w.peer = w.b.NS(t, "web"), w.b.NS(t, "peer")
	w.web4, w.web6 = w.b.Addrs(t, "web", "blue")
	w.peer4, w.peer6 = w.b.Addrs(t, "peer", "blue")
	for _, n := range []*lab.NS{w.Host, w.Client, w.Client2, w.far, w.web, w.peer} {
		// Every error counts here; the kernel sends one a second.
		n.Sysctl(t, "net.ipv4.icmp_ratemask", "0")
		n.Sysctl(t, "net.ipv6.icmp.ratelimit", "0")
	}
	echoTCP(t, w.web, echoPort)
	echoTCP(t, w.far, echoPort)
	echoUDP(t, w.web, echoPort, unix.IP_PMTUDISC_WANT) // with the don't-fragment bit, as usual
	echoUDP(t, w.far, echoPort, unix.IP_PMTUDISC_DONT)
	return w
}

// echoUDP is a server that sends every datagram back, in fragments where need be. Discovery is what
// its socket does about path MTUs.
func echoUDP(t *testing.T, n *lab.NS, port, discovery int) {
	t.Helper()
	var c net.PacketConn
	require.NoError(t, n.Do(func() (err error) {
		c, err = net.ListenPacket("udp", ":"+strconv.Itoa(port))
		return err
	}))
	raw, err := c.(*net.UDPConn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, discovery),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, discovery))
	}))
	require.NoError(t, err)
	var wait sync.WaitGroup
	wait.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			size, from, err := c.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.WriteTo(buf[:size], from)
			}
		}
	})
	t.Cleanup(func() { c.Close(); wait.Wait() })
}

// echoTCP is a server that sends back what it gets, and closes its side after the client has.
func echoTCP(t *testing.T, n *lab.NS, port int) {
	t.Helper()
	var l net.Listener
	require.NoError(t, n.Do(func() (err error) {
		l, err = net.Listen("tcp", ":"+strconv.Itoa(port))
		return err
	}))
	var wait sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wait.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wait.Go(func() {
				_, _ = io.Copy(c, c)
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wait.Wait()
	})
}

// stream sends so many bytes through an echo server, closes its side, and wants all of them back and
// then the other side's end.
func stream(t *testing.T, from *lab.NS, to netip.AddrPort, size int) {
	t.Helper()
	c, err := dial(from, "tcp", "", to.String())
	require.NoError(t, err, "to %v", to)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(30*time.Second)))
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i * 31 >> 3)
	}
	var wait sync.WaitGroup
	var sent error
	wait.Go(func() {
		_, sent = c.Write(data)
		sent = errors.Join(sent, c.(*net.TCPConn).CloseWrite())
	})
	got, err := io.ReadAll(c)
	if err != nil {
		c.Close() // ends the writer
	}
	wait.Wait()
	require.NoError(t, err, "to %v: %d bytes of %d came back", to, len(got), size)
	require.NoError(t, sent)
	require.True(t, bytes.Equal(data, got), "to %v: %d bytes of %d came back", to, len(got), size)
}

// echoing opens a connection to an echo server for the rest of the test. It returns what says something there,
// and fails unless just that comes back.
func echoing(t *testing.T, from *lab.NS, to netip.AddrPort) (say func(t *testing.T, text string)) {
	t.Helper()
	c, err := dial(from, "tcp", "", to.String())
	require.NoError(t, err, "to %v", to)
	t.Cleanup(func() { c.Close() })
	return func(t *testing.T, text string) {
		t.Helper()
		require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		_, err := c.Write([]byte(text))
		require.NoError(t, err, "to %v", to)
		got := make([]byte, len(text))
		_, err = io.ReadFull(c, got)
		require.NoError(t, err, "to %v", to)
		require.Equal(t, text, string(got))
	}
}

// socket is a plain socket of the kernel, in whatever namespace it was opened.
type socket struct {
	fd int
	v6 bool
}

// openSocket opens a socket that waits for two seconds at most.
func openSocket(t *testing.T, n *lab.NS, v6 bool, typ, proto int) *socket {
	t.Helper()
	s := &socket{v6: v6}
	domain := unix.AF_INET
	if v6 {
		domain = unix.AF_INET6
	}
	require.NoError(t, n.Do(func() (err error) {
		s.fd, err = unix.Socket(domain, typ|unix.SOCK_CLOEXEC, proto)
		return err
	}))
	t.Cleanup(func() { unix.Close(s.fd) })
	wait := unix.Timeval{Sec: 2}
	require.NoError(t, unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait))
	require.NoError(t, unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait))
	return s
}

// openUDP opens a connected one.
func openUDP(t *testing.T, n *lab.NS, to netip.AddrPort) *socket {
	t.Helper()
	s := openSocket(t, n, to.Addr().Is6(), unix.SOCK_DGRAM, 0)
	require.NoError(t, unix.Connect(s.fd, sockaddr(to)))
	return s
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// set sets an option of the family's own level.
func (s *socket) set(t *testing.T, opt4, opt6, value int) {
	t.Helper()
	level, opt := unix.IPPROTO_IP, opt4
	if s.v6 {
		level, opt = unix.IPPROTO_IPV6, opt6
	}
	require.NoError(t, unix.SetsockoptInt(s.fd, level, opt, value))
}

func (s *socket) send(data []byte) error { return unix.Send(s.fd, data, 0) }

// receive returns the next datagram, or an error after two seconds.
func (s *socket) receive() ([]byte, error) {
	buf := make([]byte, 1<<16)
	n, _, err := unix.Recvfrom(s.fd, buf, 0)
	return buf[:max(n, 0)], err
}

// exchange sends a datagram through an echo server.
func (s *socket) exchange(data []byte) error {
	if err := s.send(data); err != nil {
		return err
	}
	got, err := s.receive()
	if err == nil && !bytes.Equal(data, got) {
		return errors.New("what came back is not what was sent")
	}
	return err
}

// pathMTU is what the kernel has learned about a connected socket's path.
func (s *socket) pathMTU(t *testing.T) int {
	t.Helper()
	level, opt := unix.IPPROTO_IP, unix.IP_MTU
	if s.v6 {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	mtu, err := unix.GetsockoptInt(s.fd, level, opt)
	require.NoError(t, err)
	return mtu
}

// icmpError is an ICMP error as the kernel hands it to the socket whose packet it quotes.
type icmpError struct {
	typ, code uint8
	from      netip.Addr // who says so
}

// nextError waits for the socket's next error. The kernel has then matched the quoted packet,
// addresses and ports, with the socket.
func (s *socket) nextError(t *testing.T) icmpError {
	t.Helper()
	var found icmpError
	oob := make([]byte, 512)
	lab.Eventually(t, 2*time.Second, "an ICMP error reaches the socket", func() bool {
		_, n, _, _, err := unix.Recvmsg(s.fd, make([]byte, 2048), oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return false
		}
		messages, err := unix.ParseSocketControlMessage(oob[:n])
		require.NoError(t, err)
		for _, m := range messages {
			// struct sock_extended_err, and behind it the offender's address
			switch {
			case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR && len(m.Data) >= 24:
				found = icmpError{m.Data[5], m.Data[6], netip.AddrFrom4([4]byte(m.Data[20:24]))}
				return m.Data[4] == 2 // SO_EE_ORIGIN_ICMP
			case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR && len(m.Data) >= 40:
				found = icmpError{m.Data[5], m.Data[6], netip.AddrFrom16([16]byte(m.Data[24:40]))}
				return m.Data[4] == 3 // SO_EE_ORIGIN_ICMP6
			}
		}
		return false
	})
	return found
}

// hop is what a datagram with that TTL meets.
func hop(t *testing.T, from *lab.NS, to netip.AddrPort, ttl int) icmpError {
	t.Helper()
	s := openUDP(t, from, to)
	s.set(t, unix.IP_RECVERR, unix.IPV6_RECVERR, 1)
	s.set(t, unix.IP_TTL, unix.IPV6_UNICAST_HOPS, ttl)
	require.NoError(t, s.send([]byte("how far?")))
	return s.nextError(t)
}

// numbered is a datagram of that size that says what it is.
func numbered(size int) []byte {
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i * 7)
	}
	if size >= 4 {
		binary.BigEndian.PutUint32(data, uint32(size))
	}
	return data
}

// setMTU sets the MTU of an interface, until the test ends.
func setMTU(t *testing.T, n *lab.NS, ifname string, mtu int) {
	t.Helper()
	old := n.Link(t, ifname).Attrs().MTU
	n.MustRun(t, "ip", "link", "set", ifname, "mtu", strconv.Itoa(mtu))
	t.Cleanup(func() { n.MustRun(t, "ip", "link", "set", ifname, "mtu", strconv.Itoa(old)) })
}

// offload switches segmentation offloads of an interface, both ways.
func offload(t *testing.T, n *lab.NS, ifname string, on bool) {
	t.Helper()
	state := map[bool]string{true: "on", false: "off"}[on]
	n.MustRun(t, "ethtool", "-K", ifname, "tso", state, "gso", state, "gro", state)
}
