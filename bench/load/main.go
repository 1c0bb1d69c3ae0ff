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
       bpfnet-bench worker rr|crr --to HOST:PORT [flags]
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
	case RR, CRR:
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
	from := f.String("bind", "", "source `address`")
	device := f.String("device", "", "`interface` to send from")
	cpu := f.Int("cpu", -1, "CPU to run on; -1: any")
	warmup := f.Duration("warmup", 200*time.Millisecond, "what is not measured first")
	window := f.Duration("window", 700*time.Millisecond, "what is measured")
	if err := parse(f, args); err != nil {
		return err
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
	case *proto == "udp" && kind != CRR:
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
		var o outcome
		if o.err = pin(*cpu); o.err == nil {
			o.Result, o.err = client(kind, d, *warmup, *window, &connected)
		}
		done <- o
	}()
	select {
	case o := <-done:
		if o.err != nil {
			return o.err
		}
		return json.NewEncoder(os.Stdout).Encode(o.Result)
	case <-time.After(*warmup + *window + grace):
		if !connected.Load() {
			return fmt.Errorf("connect to %s: no answer within %v", d.name, grace)
		}
		return fmt.Errorf("%s stopped to answer", d.name)
	}
}

func client(kind string, d *dialer, warmup, window time.Duration, connected *atomic.Bool) (Result, error) {
	fd, err := d.dial() // also where a refused port shows
	if err != nil {
		return Result{}, err
	}
	connected.Store(true)
	if kind == CRR {
		closeFD(fd)
		return measure(crr(d), warmup, window)
	}
	defer closeFD(fd)
	return measure(rr(fd, d.name), warmup, window)
}
