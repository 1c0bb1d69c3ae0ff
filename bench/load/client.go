// SPDX-License-Identifier: Apache-2.0

package load

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// grace is how long a client may take beyond what it was to measure.
const grace = 3 * time.Second

// closed is the error of a server that ends a connection too early.
func closed(err unix.Errno) error {
	if err != 0 {
		return err
	}
	return io.ErrUnexpectedEOF
}

// run is what a client does in a while: exchanges until a time, and how many.
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
			b[0] = once
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
