// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// address is a socket address as the kernel wants it.
type address struct {
	raw [unix.SizeofSockaddrInet6]byte
	n   uintptr
}

func (a *address) family() int { return int(binary.NativeEndian.Uint16(a.raw[:])) }

func addressOf(ap netip.AddrPort) address {
	var a address
	ip := ap.Addr()
	binary.BigEndian.PutUint16(a.raw[2:], ap.Port())
	if ip.Unmap().Is4() {
		binary.NativeEndian.PutUint16(a.raw[:], unix.AF_INET)
		four := ip.Unmap().As4()
		copy(a.raw[4:], four[:])
		a.n = unix.SizeofSockaddrInet4
		return a
	}
	binary.NativeEndian.PutUint16(a.raw[:], unix.AF_INET6)
	sixteen := ip.As16()
	copy(a.raw[8:], sixteen[:])
	a.n = unix.SizeofSockaddrInet6
	return a
}

//go:nosplit
func socket(family, kind int) (int, unix.Errno) {
	fd, _, err := unix.RawSyscall(unix.SYS_SOCKET, uintptr(family), uintptr(kind|unix.SOCK_CLOEXEC), 0)
	return int(fd), err
}

//go:nosplit
func bind(fd int, a *address) unix.Errno {
	_, _, err := unix.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&a.raw)), a.n)
	return err
}

//go:nosplit
func connect(fd int, a *address) unix.Errno {
	for {
		_, _, err := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&a.raw)), a.n)
		if err == unix.EISCONN {
			return 0 // it came to be while we were interrupted
		}
		if err != unix.EINTR {
			return err
		}
	}
}

//go:nosplit
func setInt(fd, level, option int, value int32) unix.Errno {
	_, _, err := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	return err
}

// Ports that connections of clients come from: the kernel's own range, 32768 to 60999. Masqueraded
// connections need as many outer ports, which are the others of the host. IP_LOCAL_PORT_RANGE (Linux 6.3)
// lets connect go through them one by one, where it takes every second of the namespace's range.
const (
	ipLocalPortRange = 51
	clientPorts      = int32((60999-1<<16)<<16 | 32768) // the last in the upper half, the first in the lower
)

// dialer makes the sockets of a client.
type dialer struct {
	to     address
	name   string // of to, for errors
	kind   int    // SOCK_STREAM or SOCK_DGRAM
	from   address
	bind   bool
	device string
}

func newDialer(to netip.AddrPort, from netip.Addr, kind int, device string) (*dialer, error) {
	d := &dialer{to: addressOf(to), name: to.String(), kind: kind, device: device}
	if from.IsValid() {
		d.from, d.bind = addressOf(netip.AddrPortFrom(from, 0)), true
		if d.from.family() != d.to.family() {
			return nil, fmt.Errorf("--bind %s and --to %s are of different families", from, to)
		}
	}
	return d, nil
}

// dial connects. In crr it is part of the loop.
func (d *dialer) dial() (int, error) {
	fd, err := socket(d.to.family(), d.kind)
	if err != 0 {
		return -1, fmt.Errorf("make a socket: %w", err)
	}
	setInt(fd, unix.IPPROTO_IP, ipLocalPortRange, clientPorts) // older kernels: the namespace's range, see Sysctls
	if d.device != "" {
		if err := unix.BindToDevice(fd, d.device); err != nil {
			closeFD(fd)
			return -1, fmt.Errorf("bind to device %s: %w", d.device, err)
		}
	}
	if d.bind {
		setInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		if err := bind(fd, &d.from); err != 0 {
			closeFD(fd)
			return -1, fmt.Errorf("bind a client of %s: %w", d.name, err)
		}
	}
	if err := connect(fd, &d.to); err != 0 {
		closeFD(fd)
		return -1, fmt.Errorf("connect to %s: %w", d.name, err)
	}
	if d.kind == unix.SOCK_STREAM {
		setInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	return fd, nil
}

// listen makes a server's socket.
func listen(at netip.AddrPort, kind int) (int, error) {
	a := addressOf(at)
	fd, err := socket(a.family(), kind)
	if err != 0 {
		return -1, fmt.Errorf("make a socket: %w", err)
	}
	if kind == unix.SOCK_STREAM { // of datagrams, another's server would take some
		setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		setInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // for what is accepted too
	}
	if a.family() == unix.AF_INET6 {
		setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err := bind(fd, &a); err != 0 {
		closeFD(fd)
		return -1, fmt.Errorf("listen at %s: %w", at, err)
	}
	if kind == unix.SOCK_STREAM {
		if err := unix.Listen(fd, 4096); err != nil {
			closeFD(fd)
			return -1, fmt.Errorf("listen at %s: %w", at, err)
		}
	}
	return fd, nil
}
