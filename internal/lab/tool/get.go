// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// reply is what get prints. The lab package has the same fields in its Reply.
type reply struct {
	Text  string `json:"text,omitempty"`  // the first line or datagram that came back
	Local string `json:"local,omitempty"` // getsockname
	Peer  string `json:"peer,omitempty"`  // getpeername; not for --unconnected
	From  string `json:"from,omitempty"`  // --unconnected: where recvfrom says it came from
	RTT   int64  `json:"rtt_us"`          // from before connect to the answer, in microseconds
	Error string `json:"error,omitempty"`
	Errno string `json:"errno,omitempty"` // the symbol: ECONNREFUSED
	Stage string `json:"stage,omitempty"` // what failed: resolve, bind, connect, send, receive
}

// get uses the socket calls themselves, blocking: what is under test is how they behave.
func get(ctx context.Context, args []string) error {
	f := newFlags("get")
	network := f.String("network", "tcp", "tcp, tcp4, tcp6, udp, udp4 or udp6")
	timeout := f.Duration("timeout", 3*time.Second, "for each of connect and receive")
	bind := f.String("bind", "", "source `ADDRESS:PORT`")
	device := f.String("device", "", "bind the socket to it (SO_BINDTODEVICE)")
	mapped := f.Bool("mapped", false, "reach an IPv4 address through an IPv6 socket, as Java does")
	unconnected := f.Bool("unconnected", false, "UDP: sendto and recvfrom, no connect")
	send := f.String("send", "hello", "`text` to send; TCP sends none before the server has spoken")
	repeat := f.Int("repeat", 1, "exchanges on one socket; the last is printed")
	to, err := target(f, args)
	if err != nil {
		return err
	}
	r := reply{}
	err = func() error {
		dst, err := resolve(ctx, *network, to)
		if err != nil {
			r.Stage = "resolve"
			return err
		}
		s, err := openSocket(*network, dst, *mapped, *timeout)
		if err != nil {
			r.Stage = "socket"
			return err
		}
		defer s.close()
		if *device != "" {
			if err := unix.BindToDevice(s.fd, *device); err != nil {
				r.Stage = "socket"
				return os.NewSyscallError("setsockopt", err)
			}
		}
		return s.exchange(&r, dst, *bind, *unconnected, *send, *repeat)
	}()
	if err != nil {
		r.Error = err.Error()
		var errno unix.Errno
		if errors.As(err, &errno) {
			r.Errno = unix.ErrnoName(errno)
		}
	}
	if printErr := printJSON(r); printErr != nil {
		return printErr
	}
	return err
}

// resolve looks a host name up as any program does: /etc/hosts, then DNS.
func resolve(ctx context.Context, network, hostPort string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddrPort(hostPort); err == nil {
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil // a lookup would lose the zone
	}
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil {
		return netip.AddrPort{}, err
	}
	number, err := net.DefaultResolver.LookupPort(ctx, network, port)
	if err != nil {
		return netip.AddrPort{}, err
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip"+family(network), host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(addrs[0].Unmap(), uint16(number)), nil
}

// family is the last letter of a network's name, 4 or 6, or nothing.
func family(network string) string { return strings.TrimLeft(network, "tcpud") }

type socket struct {
	fd     int
	stream bool
	ipv6   bool
}

func openSocket(network string, dst netip.AddrPort, mapped bool, timeout time.Duration) (*socket, error) {
	s := &socket{fd: -1, stream: strings.HasPrefix(network, "tcp"), ipv6: mapped || dst.Addr().Is6()}
	domain, kind := unix.AF_INET, unix.SOCK_DGRAM
	if s.ipv6 {
		domain = unix.AF_INET6
	}
	if s.stream {
		kind = unix.SOCK_STREAM
	}
	var err error
	if s.fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv), // connect's too
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
	)
	if s.ipv6 {
		err = errors.Join(err, unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0))
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *socket) close() { unix.Close(s.fd) }

func (s *socket) sockaddr(a netip.AddrPort) unix.Sockaddr {
	if s.ipv6 {
		six := &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
		if i, err := net.InterfaceByName(a.Addr().Zone()); err == nil { // fe80::1%eth0
			six.ZoneId = uint32(i.Index)
		}
		return six
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// name writes a socket address. Mapped ones stay as the kernel gives them: they are
// what a Java program sees.
func name(a unix.Sockaddr) string {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port)).String()
	}
	return fmt.Sprint(a)
}

// again repeats a call that a signal has interrupted; the run time uses signals.
func again(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

func (s *socket) exchange(r *reply, dst netip.AddrPort, bind string, unconnected bool, text string, repeat int) error {
	if bind != "" {
		src, err := netip.ParseAddrPort(bind)
		if err == nil {
			err = unix.Bind(s.fd, s.sockaddr(src))
		}
		if err != nil {
			r.Stage = "bind"
			return os.NewSyscallError("bind", err)
		}
	}
	start := time.Now()
	if !unconnected {
		if err := s.connect(dst); err != nil {
			r.Stage = "connect"
			return os.NewSyscallError("connect", err)
		}
		if peer, err := unix.Getpeername(s.fd); err == nil {
			r.Peer = name(peer)
		}
	}
	buf := make([]byte, 1<<16)
	for i := range repeat {
		if !s.stream || i > 0 {
			message := []byte(text)
			if s.stream {
				message = append(message, '\n')
			}
			err := again(func() error {
				if unconnected {
					return unix.Sendto(s.fd, message, 0, s.sockaddr(dst))
				}
				_, err := unix.Write(s.fd, message)
				return err
			})
			if err != nil {
				r.Stage = "send"
				return os.NewSyscallError("send", err)
			}
		}
		var n int
		var from unix.Sockaddr
		err := again(func() (err error) {
			n, from, err = unix.Recvfrom(s.fd, buf, 0)
			return err
		})
		if local, nameErr := unix.Getsockname(s.fd); nameErr == nil {
			r.Local = name(local)
		}
		if err == nil && n == 0 && s.stream {
			err = errors.New("the server closed the connection without a word")
		}
		if err != nil {
			r.Stage = "receive"
			return os.NewSyscallError("recvfrom", err)
		}
		r.Text = strings.TrimSuffix(string(buf[:n]), "\n")
		if unconnected {
			r.From = name(from)
		}
	}
	r.RTT = time.Since(start).Microseconds()
	return nil
}

// connect waits for a connection that a signal has interrupted: calling connect again
// would say EALREADY.
func (s *socket) connect(dst netip.AddrPort) error {
	err := unix.Connect(s.fd, s.sockaddr(dst))
	if err == unix.EINPROGRESS { // the time of SO_SNDTIMEO is over
		return unix.ETIMEDOUT
	}
	if err != unix.EINTR {
		return err
	}
	tv, err := unix.GetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO)
	if err != nil {
		return err
	}
	var n int
	err = again(func() (err error) {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}, int(tv.Sec*1000+tv.Usec/1000))
		return err
	})
	if err == nil && n == 0 {
		err = unix.ETIMEDOUT
	}
	if err != nil {
		return err
	}
	code, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	return err
}
