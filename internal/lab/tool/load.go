// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// summary is what stream prints. The lab package has the same fields in its Summary.
type summary struct {
	Sent     int64   `json:"sent"`
	Received int64   `json:"received"`
	Lost     int64   `json:"lost"`    // sent, and not come back within the grace period
	Corrupt  int64   `json:"corrupt"` // came back out of order (TCP), twice or changed
	Resets   int64   `json:"resets"`  // ends of the connection that were not asked for
	MaxGap   float64 `json:"max_gap_ms"`
	View     string  `json:"view,omitempty"` // TCP: what the server said first
	Error    string  `json:"error,omitempty"`
}

// stream sends numbered messages to a "serve", and checks each echo, until SIGTERM or
// the end of --duration. It succeeds if nothing was lost, corrupt or reset.
func stream(ctx context.Context, args []string) error {
	f := newFlags("stream")
	network := f.String("network", "tcp", "tcp, tcp4, tcp6, udp, udp4 or udp6")
	interval := f.Duration("interval", 10*time.Millisecond, "between messages")
	duration := f.Duration("duration", time.Minute, "at most")
	size := f.Int("size", 0, "of a message in bytes, filled up with what only its number tells; 0: no more than the number")
	grace := f.Duration("grace", 2*time.Second, "for the last echoes")
	timeout := f.Duration("timeout", 3*time.Second, "for connect")
	to, err := target(f, args)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout(*network, to, *timeout)
	if err != nil {
		return errors.Join(err, printJSON(summary{Error: err.Error()}))
	}
	defer c.Close()
	if u, ok := c.(*net.UDPConn); ok {
		roomy(u)
	}
	s := &streamer{conn: c, udp: strings.HasPrefix(*network, "udp"), size: *size, got: make(map[int64]bool)}
	in := bufio.NewReader(c)
	if !s.udp {
		_ = c.SetReadDeadline(time.Now().Add(*timeout))
		line, err := in.ReadString('\n')
		if err != nil {
			return errors.Join(err, printJSON(summary{Error: err.Error()}))
		}
		s.sum.View = strings.TrimSpace(line)
		_ = c.SetReadDeadline(time.Time{})
	}
	fmt.Fprintln(os.Stderr, "streaming")
	s.last = time.Now()
	received := make(chan struct{})
	go func() {
		defer close(received)
		s.receive(in)
	}()

	ctx, cancel := context.WithTimeout(ctx, *duration)
	defer cancel()
	ticker := time.NewTicker(*interval)
	defer ticker.Stop()
	sending := true
	for sending {
		select {
		case <-ctx.Done():
			sending = false
		case <-received: // the connection is gone
			sending = false
		case <-ticker.C:
			n := s.sent.Add(1)
			_ = c.SetWriteDeadline(time.Now().Add(*grace))
			if _, err := io.WriteString(c, s.message(n)); err != nil && !s.udp {
				s.sent.Add(-1)
				s.fail(err)
				sending = false
			}
		}
	}
	s.finish(received, *grace)
	if err := printJSON(s.sum); err != nil {
		return err
	}
	if s.sum.Lost+s.sum.Corrupt+s.sum.Resets > 0 {
		return errors.New("the stream was not whole")
	}
	return nil
}

type streamer struct {
	conn net.Conn
	udp  bool
	size int
	sent atomic.Int64

	mu     sync.Mutex
	sum    summary
	next   int64 // TCP: the last number that came back
	got    map[int64]bool
	last   time.Time // of the last echo
	ending bool
}

// receive checks echoes until the connection ends.
func (s *streamer) receive(in *bufio.Reader) {
	buf := make([]byte, 1<<16)
	for {
		var line string
		var err error
		if s.udp {
			var n int
			n, err = s.conn.Read(buf)
			line = string(buf[:n])
		} else {
			line, err = in.ReadString('\n')
		}
		if err != nil {
			// UDP: an ICMP error counts as loss, not as the end.
			if s.udp && errors.Is(err, syscall.ECONNREFUSED) {
				continue
			}
			s.fail(err)
			return
		}
		s.check(line)
		if s.whole() {
			return
		}
	}
}

// message is the n-th, with a new line at its end: its number, and its hash over and over.
func (s *streamer) message(n int64) string {
	m := fmt.Sprintf("%s%d", streamPrefix, n)
	if room := s.size - len(m) - 2; room > 0 {
		hash := fmt.Sprintf("%x", sha256.Sum256([]byte(m)))
		m += " " + strings.Repeat(hash, room/len(hash)+1)[:room]
	}
	return m + "\n"
}

func (s *streamer) check(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.sum.MaxGap = max(s.sum.MaxGap, float64(now.Sub(s.last).Microseconds())/1000)
	s.last = now
	number, _, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(line, streamPrefix)), " ")
	n, err := strconv.ParseInt(number, 10, 64)
	switch {
	case err != nil, line != s.message(n), s.got[n], n > s.sent.Load(), !s.udp && n != s.next+1:
		s.sum.Corrupt++
	default:
		s.got[n] = true
		s.next = n
		s.sum.Received++
	}
}

// whole reports whether the stream is ending and all echoes have come.
func (s *streamer) whole() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ending && s.sum.Received >= s.sent.Load()
}

// fail notes the end of the connection, which is only an error before it was closed.
func (s *streamer) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) && s.ending {
		return
	}
	if s.sum.Error == "" {
		s.sum.Error = err.Error()
		s.sum.Resets++
	}
}

// finish waits for outstanding echoes and completes the summary.
func (s *streamer) finish(received <-chan struct{}, grace time.Duration) {
	s.mu.Lock()
	s.ending = true
	outstanding := s.sum.Received < s.sent.Load()
	s.mu.Unlock()
	if outstanding {
		_ = s.conn.SetReadDeadline(time.Now().Add(grace))
	} else {
		_ = s.conn.SetReadDeadline(time.Now())
	}
	<-received
	s.sum.Sent = s.sent.Load()
	s.sum.Lost = s.sum.Sent - s.sum.Received
	// What was still missing at the end is a gap as well.
	if s.sum.Lost > 0 {
		s.sum.MaxGap = max(s.sum.MaxGap, float64(time.Since(s.last).Microseconds())/1000)
	}
}

// floodConnect connects and closes with a number of workers until the time is over, and
// prints how that went. It fails only if no connection succeeded.
func floodConnect(ctx context.Context, args []string) error {
	f := newFlags("flood-connect")
	network := f.String("network", "tcp", "tcp, tcp4 or tcp6")
	duration := f.Duration("duration", time.Second, "at most 10 min")
	workers := f.Int("workers", 1, "at most 64")
	limit := f.Int64("max", 0, "end after `N` connections; 0: no limit")
	end := f.String("close", "rst", "rst or fin; fin leaves ports in TIME_WAIT")
	timeout := f.Duration("timeout", time.Second, "for each connect")
	to, err := target(f, args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, min(*duration, 10*time.Minute))
	defer cancel()
	var result struct {
		OK     int64            `json:"ok"`
		Failed int64            `json:"failed"`
		Errors map[string]int64 `json:"errors"` // by the text of the errno
	}
	result.Errors = map[string]int64{}
	var mu sync.Mutex
	var started atomic.Int64
	var all sync.WaitGroup
	for range min(max(*workers, 1), 64) {
		all.Go(func() {
			for ctx.Err() == nil && (*limit == 0 || started.Add(1) <= *limit) {
				c, err := net.DialTimeout(*network, to, *timeout)
				if err == nil {
					if *end == "rst" {
						_ = c.(*net.TCPConn).SetLinger(0)
					}
					c.Close()
				}
				mu.Lock()
				if err == nil {
					result.OK++
				} else {
					result.Failed++
					result.Errors[cause(err)]++
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	if err := printJSON(result); err != nil {
		return err
	}
	if result.OK == 0 {
		return errors.New("no connection succeeded")
	}
	return nil
}

// cause is an error without the addresses, so that equal ones can be counted.
func cause(err error) string {
	var errno syscall.Errno
	var timeout net.Error
	switch {
	case errors.As(err, &errno):
		return errno.Error()
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return err.Error()
}

// udpCount sends numbered datagrams to one address, and prints how many the kernel took.
func udpCount(ctx context.Context, args []string) error {
	f := newFlags("udp-count")
	network := f.String("network", "udp", "udp, udp4 or udp6")
	count := f.Int("count", 100, "datagrams, at most 1000000")
	size := f.Int("size", 64, "payload in bytes, at least 8")
	interval := f.Duration("interval", 0, "between datagrams; 0: full rate")
	to, err := target(f, args)
	if err != nil {
		return err
	}
	c, err := net.Dial(*network, to)
	if err != nil {
		return err
	}
	defer c.Close()
	var result struct {
		Sent   int64            `json:"sent"`
		Errors map[string]int64 `json:"errors"`
	}
	result.Errors = map[string]int64{}
	payload := make([]byte, max(*size, 8))
	var tick <-chan time.Time
	if *interval > 0 {
		ticker := time.NewTicker(*interval)
		defer ticker.Stop()
		tick = ticker.C
	}
	for i := range min(*count, 1_000_000) {
		if ctx.Err() != nil {
			break
		}
		if tick != nil && i > 0 {
			<-tick
		}
		copy(payload, fmt.Sprintf("%08d", i))
		if _, err := c.Write(payload); err != nil {
			result.Errors[cause(err)]++
			continue
		}
		result.Sent++
	}
	return printJSON(result)
}
