// SPDX-License-Identifier: Apache-2.0

package load

import (
	"cmp"
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

// Turns are short slices of time that clients take in a circle, so that what the machine does beside them, which
// changes within a tenth of a second, hits all alike. The zero value has one client work on its own.
type Turns struct {
	Start  int64 // of the circle's first slice, in nanoseconds of the monotonic clock: [Clock]
	Of     int   // clients in the circle
	Turn   int   // of this one, from 0
	Slices int   // that count; one more comes before and warms up
	Slice  time.Duration
}

// NewTurns are as many turns as make up a window: the first tenth of each does not count.
func NewTurns(start int64, of, turn int, slice, window time.Duration) Turns {
	slice = cmp.Or(slice, defaultSlice)
	counts := slice - slice/10
	return Turns{Start: start, Of: of, Turn: turn, Slices: int((cmp.Or(window, defaultWindow) + counts - 1) / counts), Slice: slice}
}

// Clock is the monotonic clock in nanoseconds, the same in all processes of a machine.
func Clock() int64 { return now() }

// takes is how long the whole circle takes from a moment on.
func (t Turns) takes(from int64) time.Duration {
	return max(0, time.Duration(t.Start-from)) + time.Duration((t.Slices+2)*t.Of)*t.Slice
}

// rest sleeps to a time of the monotonic clock. It leaves the thread's share of the runtime to others.
func rest(until int64) error {
	ts := unix.NsecToTimespec(until)
	for {
		err := unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &ts, nil)
		if err != unix.EINTR {
			return err
		}
	}
}

// Measure has f work to the end of each of its slices; f returns what it has done since it was called, and may begin
// more often than it is counted. Who comes late begins with the circle's next round. The result is of the slices that
// count, together.
func (t Turns) Measure(f func(until int64) (units uint64, err error)) (Result, error) {
	var r Result
	settles := t.Slice / 10 // caches are those of the one before
	var took, idled time.Duration
	round := time.Duration(t.Of) * t.Slice
	begin := t.Start + int64(t.Turn)*int64(t.Slice)
	for late := now() - begin; late > 0; late -= int64(round) {
		begin += int64(round)
	}
	for slice := -1; slice < t.Slices; slice++ {
		if err := rest(begin); err != nil {
			return r, err
		}
		end := begin + int64(t.Slice)
		if _, err := f(begin + int64(settles)); err != nil {
			return r, err
		}
		idle0, err := idle()
		if err != nil {
			return r, err
		}
		start := now()
		units, err := f(end)
		if err != nil {
			return r, err
		}
		seconds := time.Duration(now() - start)
		idle1, err := idle()
		if err != nil {
			return r, err
		}
		if slice >= 0 {
			r.Units += units
			took += seconds
			idled += idle1 - idle0
		}
		begin += int64(round)
	}
	r.take(took, idled)
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
