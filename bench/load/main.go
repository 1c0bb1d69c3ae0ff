// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const usage = `usage: bpfnet-bench worker serve --addr HOST:PORT [flags]
       bpfnet-bench worker rr|crr|latency|udp|stream --to HOST:PORT [flags]
-h behind a command lists its flags
`

// Main is "bpfnet-bench worker": one end of an exchange. It returns the exit status.
func Main(args []string) int {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	quiet()
	var err error
	switch args[0] {
	case "serve":
		err = serverMain(args[1:])
	case Stream:
		err = streamMain(args[1:])
	case RR, CRR, Latency, UDP:
		err = clientMain(args[0], args[1:])
	default:
		fmt.Fprintf(os.Stderr, "bpfnet-bench worker: no command %q\n%s", args[0], usage)
		return 2
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(os.Stderr, "bpfnet-bench worker %s: %v\n", args[0], err)
		return 1
	}
	return 0
}

func parse(f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	return nil
}

func serverMain(args []string) error {
	f := flag.NewFlagSet("serve", flag.ContinueOnError)
	addr := f.String("addr", "", "address and `HOST:PORT` to listen at")
	proto := f.String("proto", "both", "tcp, udp or both")
	s := &server{}
	f.IntVar(&s.cpu, "cpu", -1, "CPU to run on; -1: any")
	f.DurationVar(&s.delay, "delay", 0, "wait before each answer, to be a slow path")
	if err := parse(f, args); err != nil {
		return err
	}
	var err error
	if s.addr, err = netip.ParseAddrPort(*addr); err != nil {
		return fmt.Errorf("--addr: %w", err)
	}
	switch *proto {
	case "tcp", "udp", "both":
	default:
		return fmt.Errorf("--proto %q: want tcp, udp or both", *proto)
	}
	return s.serve(*proto != "udp", *proto != "tcp")
}

func clientMain(kind string, args []string) error {
	f := flag.NewFlagSet(kind, flag.ContinueOnError)
	to := f.String("to", "", "`HOST:PORT` of the server")
	proto := f.String("proto", "tcp", "tcp or udp")
	var o options
	if kind == UDP {
		f.IntVar(&o.size, "size", 64, "bytes of a datagram")
	}
	if kind == Latency {
		f.Float64Var(&o.rate, "rate", 0, "exchanges offered a second; 0: the next one when the last is over")
	}
	from := f.String("bind", "", "source `address`")
	device := f.String("device", "", "`interface` to send from")
	cpu := f.Int("cpu", -1, "CPU to run on; -1: any")
	f.DurationVar(&o.warmup, "warmup", defaultWarmup, "what is not measured first")
	f.DurationVar(&o.window, "window", defaultWindow, "what is measured")
	grace := f.Duration("grace", defaultGrace, "how much longer it may take")
	if kind == RR || kind == CRR {
		f.Int64Var(&o.turns.Start, "start", 0, "nanoseconds of the monotonic clock at which a circle of clients begins")
		f.IntVar(&o.turns.Of, "of", 0, "clients that take turns; 0: none but this one")
		f.IntVar(&o.turns.Turn, "turn", 0, "of this client, from 0")
		f.DurationVar(&o.turns.Slice, "slice", defaultSlice, "of a turn")
	}
	if err := parse(f, args); err != nil {
		return err
	}
	switch {
	case o.warmup < 0 || o.window <= 0:
		return fmt.Errorf("--warmup %v --window %v: want a window, and no less than no warm-up", o.warmup, o.window)
	case kind == UDP && (o.size < 1 || o.size > maxDatagram):
		return fmt.Errorf("--size %d: want 1 to %d", o.size, maxDatagram)
	case o.turns.Of < 0 || o.turns.Turn < 0 || o.turns.Of > 0 && (o.turns.Turn >= o.turns.Of || o.turns.Slice < minSlice):
		return fmt.Errorf("--turn %d --of %d --slice %v: want turns from 0, of as many, and at least %v", o.turns.Turn, o.turns.Of, o.turns.Slice, minSlice)
	case o.rate < 0 || o.rate > 1e9:
		return fmt.Errorf("--rate %g: want 0 to 1e9", o.rate)
	}
	takes := o.warmup + o.window
	if o.turns.Of > 0 {
		o.turns = NewTurns(o.turns.Start, o.turns.Of, o.turns.Turn, o.turns.Slice, o.window)
		takes = o.turns.takes(now())
	}
	server, err := netip.ParseAddrPort(*to)
	if err != nil {
		return fmt.Errorf("--to: %w", err)
	}
	var source netip.Addr
	if *from != "" {
		if source, err = netip.ParseAddr(*from); err != nil {
			return fmt.Errorf("--bind: %w", err)
		}
	}
	socketKind := unix.SOCK_STREAM
	switch {
	case kind == UDP, *proto == "udp" && kind != CRR:
		socketKind = unix.SOCK_DGRAM
	case *proto != "tcp":
		return fmt.Errorf("--proto %q: %s does not have that", *proto, kind)
	}
	d, err := newDialer(server, source, socketKind, *device)
	if err != nil {
		return err
	}

	var connected atomic.Bool
	type outcome struct {
		Result
		err error
	}
	done := make(chan outcome, 1)
	go func() { // this goroutine's thread ends with it
		var r outcome
		if r.err = pin(*cpu); r.err == nil {
			r.Result, r.err = client(kind, d, o, &connected)
		}
		done <- r
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return r.err
		}
		return json.NewEncoder(os.Stdout).Encode(r.Result)
	case <-time.After(takes + *grace):
		if !connected.Load() {
			return fmt.Errorf("connect to %s: no answer within %v", d.name, *grace)
		}
		return fmt.Errorf("%s stopped to answer", d.name)
	}
}

// options are those of a client beyond its socket.
type options struct {
	warmup, window time.Duration
	size           int
	rate           float64
	turns          Turns
}

// measure takes a window of f, in one piece or in turns.
func (o options) measure(f loop) (Result, error) {
	if o.turns.Of > 0 {
		return o.turns.Measure(f)
	}
	return measure(f, o.warmup, o.window)
}

func client(kind string, d *dialer, o options, connected *atomic.Bool) (Result, error) {
	fd, err := d.dial() // also where a refused port shows
	if err != nil {
		return Result{}, err
	}
	connected.Store(true)
	if kind == CRR {
		closeFD(fd)
		return o.measure(crr(d))
	}
	defer closeFD(fd)
	switch kind {
	case UDP:
		return measureDatagrams(&datagrams{fd: fd, to: d.name, b: make([]byte, o.size)}, o.warmup, o.window)
	case Latency:
		h := newHistogram()
		if o.warmup > 0 {
			if _, err := latency(fd, d.name, o.rate, h)(now() + int64(o.warmup)); err != nil {
				return Result{}, err
			}
			h.Reset()
		}
		r, err := measure(latency(fd, d.name, o.rate, h), 0, o.window)
		r.Offered, r.Latency = o.rate, percentiles(h)
		return r, err
	}
	f := rr(fd, d.name)
	if o.turns.Of > 0 { // the server takes nobody for long who says nothing
		if _, err := f(0); err != nil {
			return Result{}, err
		}
	}
	return o.measure(f)
}
