// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// defaultGrace is how long a client may take beyond what it was to measure.
const defaultGrace = 2 * time.Second

// closed is the error of a server that ends a connection too early.
func closed(err unix.Errno) error {
	if err != 0 {
		return err
	}
	return io.ErrUnexpectedEOF
}

// loop is what a client does in a while: exchanges until a time, and how many.
type loop func(until int64) (units uint64, err error)

// measure lets f warm up and then takes a window of it.
func measure(f loop, warmup, window time.Duration) (Result, error) {
	var r Result
	if warmup > 0 {
		if _, err := f(now() + int64(warmup)); err != nil {
			return r, err
		}
	}
	idle0, err := idle()
	if err != nil {
		return r, err
	}
	start := now()
	r.Units, err = f(start + int64(window))
	seconds := time.Duration(now() - start)
	if err != nil {
		return r, err
	}
	idle1, err := idle()
	if err != nil {
		return r, err
	}
	r.take(seconds, idle1-idle0)
	return r, nil
}

// rr is exchanges of one byte on a connected socket. The clock is read after every 16th.
func rr(fd int, to string) loop {
	b := [1]byte{again}
	return func(until int64) (units uint64, err error) {
		for {
			for range 16 {
				if n, err := write(fd, &b[0], 1); n != 1 {
					return units, fmt.Errorf("send to %s: %w", to, closed(err))
				}
				if n, err := read(fd, &b[0], 1); n != 1 {
					return units, fmt.Errorf("receive from %s: %w", to, closed(err))
				}
				units++
			}
			if now() >= until {
				return units, nil
			}
		}
	}
}

// crr is connections of one exchange each. The server closes first, so that the client's port is free
// when the client has closed too.
func crr(d *dialer) loop {
	var b [1]byte
	return func(until int64) (units uint64, err error) {
		for {
			fd, err := d.dial()
			if err != nil {
				if errors.Is(err, unix.EADDRNOTAVAIL) {
					err = fmt.Errorf("%w (no port is free: does the server close first, and are load.Sysctls set?)", err)
				}
				return units, err
			}
			b[0] = Once
			if n, err := write(fd, &b[0], 1); n != 1 {
				return units, fmt.Errorf("send to %s: %w", d.name, closed(err))
			}
			if n, err := read(fd, &b[0], 1); n != 1 {
				return units, fmt.Errorf("receive from %s: %w", d.name, closed(err))
			}
			if n, err := read(fd, &b[0], 1); n != 0 {
				return units, fmt.Errorf("wait for %s to close: %w", d.name, closed(err))
			}
			closeFD(fd)
			units++
			if now() >= until {
				return units, nil
			}
		}
	}
}

// datagrams is datagrams of a size, sent as fast as they go. Units are those that the server has counted,
// and the window lasts until it has said so.
type datagrams struct {
	fd    int
	to    string
	b     []byte
	query uint64 // the last
}

// send sends until a time.
func (d *datagrams) send(until int64) (sent uint64, err error) {
	d.b[0] = count
	for {
		for range 16 {
			// A full queue of a device is a loss like any other.
			if _, err := write(d.fd, &d.b[0], uintptr(len(d.b))); err != 0 && err != unix.ENOBUFS {
				return sent, fmt.Errorf("send to %s: %w", d.to, err)
			}
			sent++
		}
		if now() >= until {
			return sent, nil
		}
	}
}

// counted asks the server how many have come. The question follows what was sent before, so that
// nothing of that is still under way when it is answered.
func (d *datagrams) counted() (uint64, error) {
	d.query++
	var q, a [totalSize]byte
	q[0] = total
	binary.BigEndian.PutUint64(q[1:], d.query)
	for range 10 { // of either, some may be lost
		if _, err := write(d.fd, &q[0], querySize); err != 0 && err != unix.ENOBUFS {
			return 0, fmt.Errorf("send to %s: %w", d.to, err)
		}
		for {
			n, err := read(d.fd, &a[0], totalSize)
			if err == unix.EAGAIN {
				break
			}
			if err != 0 {
				return 0, fmt.Errorf("receive from %s: %w", d.to, err)
			}
			if n == totalSize && [querySize]byte(a[:]) == [querySize]byte(q[:]) {
				return binary.BigEndian.Uint64(a[querySize:]), nil
			}
		}
	}
	return 0, fmt.Errorf("%s does not answer how many datagrams came", d.to)
}

// measureDatagrams is measure for datagrams.
func measureDatagrams(d *datagrams, warmup, window time.Duration) (Result, error) {
	var r Result
	timeout := unix.NsecToTimeval(int64(200 * time.Millisecond))
	if err := unix.SetsockoptTimeval(d.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return r, fmt.Errorf("set a timeout: %w", err)
	}
	if _, err := d.counted(); err != nil { // is there a server?
		return r, err
	}
	if warmup > 0 {
		if _, err := d.send(now() + int64(warmup)); err != nil {
			return r, err
		}
	}
	before, err := d.counted()
	if err != nil {
		return r, err
	}
	idle0, err := idle()
	if err != nil {
		return r, err
	}
	start := now()
	if r.Sent, err = d.send(start + int64(window)); err != nil {
		return r, err
	}
	r.SendRate = float64(r.Sent) / time.Duration(now()-start).Seconds()
	after, err := d.counted()
	if err != nil {
		return r, err
	}
	took := time.Duration(now() - start)
	idle1, err := idle()
	if err != nil {
		return r, err
	}
	r.Units = after - before
	r.Loss = 1 - float64(r.Units)/float64(r.Sent)
	r.take(took, idle1-idle0)
	return r, nil
}
