// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The first byte says what is asked of a server.
const (
	again = 'r' // answer this byte and all that follow
	Once  = 'c' // answer this byte and close
	count = 'u' // a datagram to be counted, without an answer
	total = 't' // a datagram with a number of 8 bytes: answer it, and behind it how many were counted
)

const (
	querySize, totalSize = 9, 17
	maxDatagram          = 1400 // what fits into a packet of any path
)

// receiveBuffer is that of a UDP server: what one sender sends while the server, on the same CPU, waits
// for its turn must fit, or the loss is the scheduler's and not the path's.
const receiveBuffer = 32 << 20

// server answers until the process ends.
type server struct {
	addr  netip.AddrPort
	cpu   int
	delay time.Duration // before each answer: a path that is slow on purpose

	threads atomic.Int32
	// What the accepting thread is at: its connection, negative while it has none.
	serving  atomic.Int64
	accepted atomic.Uint64
}

// serve says ready and blocks until SIGTERM or the first error.
func (s *server) serve(tcp, udp bool) error {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGINT)
	failed := make(chan error, 2)
	start := func(kind int, f func(fd int) error) error {
		fd, err := listen(s.addr, kind)
		if err != nil {
			return err
		}
		s.threads.Add(1)
		pinned := make(chan error, 1)
		go func() {
			err := pin(s.cpu)
			pinned <- err
			if err == nil {
				failed <- f(fd)
			}
		}()
		return <-pinned
	}
	s.serving.Store(-1)
	if tcp {
		if err := start(unix.SOCK_STREAM, s.accept); err != nil {
			return err
		}
		go s.watch()
	}
	if udp {
		if err := start(unix.SOCK_DGRAM, s.datagrams); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	select {
	case <-ended:
		return nil
	case err := <-failed:
		return err
	}
}

// accept serves what ends with one answer itself, and starts a thread for any other connection.
func (s *server) accept(listener int) error {
	var b [1]byte
	for {
		r, _, err := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		switch err {
		case 0:
		case unix.EINTR, unix.ECONNABORTED:
			continue
		default:
			return fmt.Errorf("accept at %s: %w", s.addr, err)
		}
		fd := int(r)
		s.serving.Store(int64(fd))
		n, err := read(fd, &b[0], 1)
		s.serving.Store(-1)
		s.accepted.Add(1)
		if n != 1 || err != 0 {
			closeFD(fd)
			continue
		}
		if b[0] == again && s.threads.Load() < maxThreads-8 {
			s.threads.Add(1)
			go s.answer(fd)
			continue
		}
		s.wait()
		write(fd, &b[0], 1)
		closeFD(fd)
	}
}

// watch ends a connection that says nothing for a second and more: the accepting thread waits for it.
func (s *server) watch() {
	var at uint64
	var fd int64 = -1
	for range time.Tick(time.Second) {
		last, lastFD := at, fd
		fd, at = s.serving.Load(), s.accepted.Load()
		if fd >= 0 && fd == lastFD && at == last {
			unix.Shutdown(int(fd), unix.SHUT_RDWR)
		}
	}
}

// answer serves a connection whose first byte has been read.
func (s *server) answer(fd int) {
	defer s.threads.Add(-1)
	defer closeFD(fd)
	if pin(s.cpu) != nil { // succeeded for the thread that accepts
		return
	}
	b := [1]byte{again}
	for {
		s.wait()
		if n, err := write(fd, &b[0], 1); n != 1 || err != 0 {
			return
		}
		if n, err := read(fd, &b[0], 1); n != 1 || err != 0 {
			return
		}
	}
}

// wait is the delay.
//
//go:nosplit
func (s *server) wait() {
	if s.delay == 0 {
		return
	}
	ts := unix.Timespec{Sec: int64(s.delay / time.Second), Nsec: int64(s.delay % time.Second)}
	unix.RawSyscall6(unix.SYS_CLOCK_NANOSLEEP, unix.CLOCK_MONOTONIC, 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
}

// datagrams serves UDP.
func (s *server) datagrams(fd int) error {
	if setInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != 0 {
		setInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer) // as much as rmem_max lets it have
	}
	var (
		b       [maxDatagram]byte
		from    [unix.SizeofSockaddrInet6]byte
		fromLen uint32
		counted uint64
	)
	for {
		fromLen = uint32(len(from))
		r, _, err := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b)), uintptr(len(b)), 0,
			uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&fromLen)))
		switch err {
		case 0:
		case unix.EINTR, unix.ECONNREFUSED:
			continue
		default:
			return fmt.Errorf("receive at %s: %w", s.addr, err)
		}
		if r == 0 {
			continue
		}
		if b[0] == count {
			counted++
			continue
		}
		if b[0] == total && r == querySize {
			binary.BigEndian.PutUint64(b[querySize:], counted)
			r = totalSize
		}
		s.wait()
		unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b)), r, 0,
			uintptr(unsafe.Pointer(&from)), uintptr(fromLen))
	}
}
