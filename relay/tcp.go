// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// backlog is as many as the kernel allows (somaxconn).
	backlog = 1 << 15
	// acceptPause is for errors that pass: no descriptor or no memory is free.
	acceptPause = 100 * time.Millisecond
)

func (s *served) serveTCP() error {
	// Connections of a former server in TIME_WAIT do not keep anybody from listening.
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := receiveAll(s.fd); err != nil {
		return err
	}
	if err := unix.Listen(s.fd, backlog); err != nil {
		return err
	}
	f, err := s.dup()
	if err != nil {
		return err
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return err
	}
	done := make(chan struct{})
	s.stop = sync.OnceFunc(func() {
		l.Close()
		<-done
	})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			} else if err != nil {
				time.Sleep(acceptPause)
				continue
			}
			s.r.work.Go(func() { s.carry(c.(*net.TCPConn)) })
		}
	}()
	return nil
}

// reset ends a connection so that the peer sees it broken, not finished.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
}

// carry connects a client with the target until both have finished, or one has broken off.
func (s *served) carry(client *net.TCPConn) {
	var mu sync.Mutex
	conns := []*net.TCPConn{client}
	cut := func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			reset(c)
		}
		conns = nil
	}
	leave, ok := s.enter(cut)
	if !ok {
		reset(client)
		return
	}
	defer leave()
	d := net.Dialer{Timeout: s.r.limits.Dial}
	conn, err := d.Dial("tcp", s.target.Load().String())
	if err != nil {
		s.failed.Add(1)
		cut()
		return
	}
	target := conn.(*net.TCPConn)
	mu.Lock()
	if conns == nil { // cut off meanwhile
		mu.Unlock()
		reset(target)
		return
	}
	conns = append(conns, target)
	mu.Unlock()

	copied := make(chan error, 1)
	go func() { copied <- copyHalf(target, client, cut) }()
	err = copyHalf(client, target, cut)
	if errors.Join(err, <-copied) == nil {
		client.Close()
		target.Close()
	}
}

// copyHalf copies one direction to its end and passes the end on. An error breaks both directions off.
func copyHalf(to, from *net.TCPConn, cut func()) error {
	_, err := to.ReadFrom(from) // the kernel splices
	if err == nil {
		// The peer may have closed both directions already: then there is nobody to tell.
		if err = to.CloseWrite(); errors.Is(err, unix.ENOTCONN) {
			err = nil
		}
	}
	if err != nil {
		cut()
	}
	return err
}
