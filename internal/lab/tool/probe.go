// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// probeOrder is one probe to make. The lab package has the same fields in its Probe.
type probeOrder struct {
	ID    string `json:"id"`
	Proto string `json:"proto"` // tcp, udp, icmp, sctp
	To    string `json:"to"`    // address and port; the port means nothing for icmp
}

// probeResult is what has become of it. The lab package has the same fields in its ProbeResult.
type probeResult struct {
	ID    string   `json:"id"`
	State string   `json:"state"` // answered, refused, silent; error: it could not be sent
	Tags  []string `json:"tags"`  // one for each try
	Tries int      `json:"tries"`
	Error string   `json:"error,omitempty"`
}

// probe makes the probes that stand as a JSON list on standard input, all at the same time, and
// prints a list of what has become of them. A probe that is not answered is made again, with another
// tag, and with twice the time.
func probe(_ context.Context, args []string) error {
	f := newFlags("probe")
	timeout := f.Duration("timeout", 400*time.Millisecond, "of the first try; each further one has twice that of the last")
	tries := f.Int("tries", 3, "until a probe counts as lost")
	if err := f.Parse(args); err != nil {
		return err
	}
	var orders []probeOrder
	if err := json.NewDecoder(os.Stdin).Decode(&orders); err != nil {
		return err
	}
	p := &prober{raw: map[string]*raw{}, waiting: map[string]chan struct{}{}}
	for _, proto := range []string{"icmp", "sctp"} {
		for _, family := range []string{"4", "6"} {
			r, err := openRaw(proto, family)
			if err != nil {
				return err
			}
			p.raw[proto+family] = r
			go r.read(p.arrived)
		}
	}
	results := make([]probeResult, len(orders))
	var all sync.WaitGroup
	for i, o := range orders {
		to, err := netip.ParseAddrPort(o.To)
		if err != nil {
			return fmt.Errorf("probe %s: %w", o.ID, err)
		}
		all.Go(func() {
			r := probeResult{ID: o.ID}
			wait := *timeout
			for r.Tries < *tries && r.State != stateAnswered {
				r.Tries++
				tag := newTag()
				r.Tags = append(r.Tags, tag)
				var err error
				began := time.Now()
				r.State, err = p.try(o.Proto, to, tag, wait)
				r.Error = ""
				if err != nil {
					r.Error = err.Error()
				}
				if r.State != stateAnswered && r.Tries < *tries {
					time.Sleep(wait - time.Since(began)) // a refusal comes at once: give the next try another moment
				}
				wait *= 2
			}
			results[i] = r
		})
	}
	all.Wait()
	return printJSON(results)
}

const (
	stateAnswered = "answered"
	stateRefused  = "refused"
	stateSilent   = "silent"
	stateError    = "error"
)

func newTag() string {
	var b [tagSize / 2]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

type prober struct {
	raw map[string]*raw // by protocol and family

	mu      sync.Mutex
	waiting map[string]chan struct{} // by tag
}

// arrived wakes the probe whose answer has come.
func (p *prober) arrived(r rawPacket) {
	if r.echo != echoReply && r.chunk != sctpInitAck {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.waiting[r.tag]; c != nil {
		close(c)
		delete(p.waiting, r.tag)
	}
}

func (p *prober) try(proto string, to netip.AddrPort, tag string, wait time.Duration) (string, error) {
	var err error
	switch proto {
	case "tcp":
		err = p.tcp(to, tag, wait)
	case "udp":
		err = p.udp(to, tag, wait)
	default:
		err = p.packet(proto, to, tag, wait)
	}
	var timeout net.Error
	switch {
	case err == nil:
		return stateAnswered, nil
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return stateSilent, nil
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET),
		errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return stateRefused, err
	}
	return stateError, err
}

func (p *prober) tcp(to netip.AddrPort, tag string, wait time.Duration) error {
	c, err := net.DialTimeout("tcp", to.String(), wait)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(wait))
	if _, err := fmt.Fprintln(c, tag); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("%w: %w", unix.ECONNRESET, err) // closed without an answer: a proxy, which could not go on
		}
		return err
	}
	return isEcho(line, tag)
}

func (p *prober) udp(to netip.AddrPort, tag string, wait time.Duration) error {
	c, err := net.Dial("udp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte(tag)); err != nil {
		return err
	}
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	return isEcho(string(buf[:n]), tag)
}

func isEcho(got, tag string) error {
	if strings.TrimSpace(got) != tag {
		return fmt.Errorf("answer %q to %q", got, tag)
	}
	return nil
}

func (p *prober) packet(proto string, to netip.AddrPort, tag string, wait time.Duration) error {
	family := "6"
	if to.Addr().Is4() {
		family = "4"
	}
	r := p.raw[proto+family]
	if r == nil {
		return fmt.Errorf("protocol %q: unknown", proto)
	}
	var random [4]byte
	_, _ = rand.Read(random[:])
	id := binary.BigEndian.Uint16(random[:])
	b := echoPacket(r.four, id, tag)
	if proto == "sctp" {
		b = sctpPacket(sctpInit, 32768+id/4, to.Port(), 0, tag)
	}
	answered := make(chan struct{})
	p.mu.Lock()
	p.waiting[tag] = answered
	p.mu.Unlock()
	if err := r.send(netip.Addr{}, to.Addr(), b); err != nil {
		return err
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-answered:
		return nil
	case <-timer.C:
		return os.ErrDeadlineExceeded
	}
}
