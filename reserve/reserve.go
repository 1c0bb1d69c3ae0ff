// SPDX-License-Identifier: Apache-2.0

// Package reserve holds host ports for sandboxes: a published port is a bound socket, so that
// programs of the host get "address in use" for it, and bpfnet gets that from them. It knows
// sockets, and no networks.
package reserve

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// Port is a host port that is held until Close.
type Port struct {
	Proto policy.Proto
	Host  netip.AddrPort

	fd   int // negative: this kernel has nothing that could be held
	once sync.Once
	err  error
}

// Close gives the port back. Nothing is left of it in the kernel, not even TIME_WAIT.
func (p *Port) Close() error {
	p.once.Do(func() {
		if p.fd >= 0 {
			p.err = unix.Close(p.fd)
		}
	})
	return p.err
}

// Dup is another descriptor of the port's socket, for somebody who serves by it: the port is held as
// long as one of them is open. It fails with ErrNothing where there is nothing to hold.
func (p *Port) Dup() (int, error) {
	if p.fd < 0 {
		return -1, ErrNothing
	}
	return unix.FcntlInt(uintptr(p.fd), unix.F_DUPFD_CLOEXEC, 0)
}

// ErrNothing says that the kernel does not have the protocol or the family.
var ErrNothing = errors.New("this kernel has no such sockets")

// Hold takes a port of the calling thread's network namespace, if necessary from connections that
// a former server has closed. 0.0.0.0 and :: stand for all addresses of their own family.
//
// The socket is bound and does not listen: a TCP packet that comes to the host's stack in spite of
// the data path gets a reset, a UDP packet vanishes. Nobody else can bind the port, whatever
// options they set, but for a gap in Linux (fastreuseport): after a program with SO_REUSEPORT has
// taken the same TCP port on an address that is not held, it gets all addresses too. Packets go to
// the sandbox all the same.
//
// The error is a *[TakenError] if somebody has the port. Where the kernel does not know SCTP or
// IPv6, nobody can have it, and there is nothing to hold.
func Hold(proto policy.Proto, host netip.AddrPort) (*Port, error) {
	host = netip.AddrPortFrom(host.Addr().Unmap(), host.Port())
	p, err := hold(proto, host, unix.Bind)
	if !errors.Is(err, unix.EADDRINUSE) {
		return p, err
	}
	list := rivals(proto, host)
	if proto == policy.TCP && len(list) > 0 {
		p, err = hold(proto, host, bindOverClosed)
		if errors.Is(err, unix.EADDRINUSE) && endClosed(list) {
			p, err = hold(proto, host, bindOverClosed)
		}
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, takenBy(proto, host, list)
	}
	return p, err
}

// hold is Hold with one way to bind, and no look at who else there is: that a port is taken is a
// plain EADDRINUSE.
func hold(proto policy.Proto, host netip.AddrPort, bind func(int, unix.Sockaddr) error) (*Port, error) {
	addr := host.Addr()
	switch {
	case !addr.IsValid():
		return nil, fmt.Errorf("host port %d/%s: has no address", host.Port(), proto)
	case host.Port() == 0:
		return nil, fmt.Errorf("host port %s/%s: is no port; choose one from 1 to 65535", host, proto)
	case addr.Is6() && addr.IsLinkLocalUnicast():
		return nil, fmt.Errorf("host address %s: is of one link only; publish on another, or with :: on all", addr)
	}
	fd, err := bound(proto, host, bind)
	switch {
	case err == nil:
		return &Port{Proto: proto, Host: host, fd: fd}, nil
	case errors.Is(err, errNoSuchSocket):
		return &Port{Proto: proto, Host: host, fd: -1}, nil
	case errors.Is(err, unix.EADDRNOTAVAIL):
		all := netip.IPv4Unspecified()
		if addr.Is6() {
			all = netip.IPv6Unspecified()
		}
		return nil, fmt.Errorf("host address %s: is none of this host's; publish on one that is, or with %s on all", addr, all)
	}
	return nil, fmt.Errorf("hold host port %s/%s: %w", host, proto, err)
}

// errNoSuchSocket says that the kernel does not have the protocol or the family.
var errNoSuchSocket = errors.New("no such socket")

// bound makes a socket and binds it with bind. On an error there is no socket.
func bound(proto policy.Proto, host netip.AddrPort, bind func(int, unix.Sockaddr) error) (int, error) {
	kind := unix.SOCK_STREAM
	if proto == policy.UDP {
		kind = unix.SOCK_DGRAM
	}
	family, to := sockaddr(host)
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, int(proto))
	switch {
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		return -1, errNoSuchSocket
	case err != nil:
		return -1, err
	}
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil && proto == policy.UDP {
		err = discardAll(fd) // nobody reads
	}
	if err == nil {
		err = bind(fd, to)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func sockaddr(host netip.AddrPort) (family int, to unix.Sockaddr) {
	if host.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(host.Port()), Addr: host.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(host.Port()), Addr: host.Addr().As16()}
}

// bindOverClosed binds a TCP socket to a port that connections of a former server still have, most
// of all in TIME_WAIT, with which a plain bind collides. As every server does, it needs
// SO_REUSEADDR for that. But with that option two sockets get on well as long as neither listens,
// and the second may even listen: the port would be anybody's. Nor is it enough to clear the option
// after bind: before Linux 6.8 the kernel remembers by port (fastreuse) that all who have bound it
// had the option, and then lets in who has it too, with no look at the sockets there are.
//
// So the socket listens for a moment. Nobody shares with a listener: if there is one already this
// fails, and else the kernel forgets fastreuse, for all of the port's life. Then the option is
// cleared, which keeps the others out from here on, and shutdown makes the listener a merely bound
// socket again. What comes in between is discarded rather than accepted.
// (inet_csk_get_port, inet_bind_conflict and inet_csk_update_fastreuse in Linux' inet_connection_sock.c)
func bindOverClosed(fd int, to unix.Sockaddr) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, to); err != nil {
		return err
	}
	if err := discardAll(fd); err != nil {
		return err
	}
	if err := unix.Listen(fd, 0); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0); err != nil {
		return err
	}
	return unix.Shutdown(fd, unix.SHUT_RDWR)
}

// discardAll has the kernel throw away what arrives for the socket.
func discardAll(fd int) error {
	nothing := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}} // keep 0 bytes
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(nothing)), Filter: &nothing[0]})
}
