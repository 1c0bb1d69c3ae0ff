// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// Iperf3Args are the arguments of an iperf3 client that sends for the warm-up and at least a window. Both
// ends run on one CPU (negative: any). Its seconds are whole ones; [ParseIperf3] takes a window of them.
func Iperf3Args(to netip.AddrPort, from string, flows, cpu int, warmup, window time.Duration) []string {
	seconds := int(math.Ceil((warmup + window).Seconds()))
	args := []string{
		"-c", to.Addr().String(), "-p", strconv.Itoa(int(to.Port())), "-J",
		"-P", strconv.Itoa(flows), "-t", strconv.Itoa(seconds), "-i", "0.1", "--connect-timeout", "2000",
	}
	if cpu >= 0 {
		args = append(args, "-A", fmt.Sprintf("%d,%d", cpu, cpu))
	}
	if from != "" {
		args = append(args, "-B", from)
	}
	return args
}

// StreamServerArgs are the arguments of an iperf3 server. It serves one client at a time. Which CPU it
// runs on, the client says.
func StreamServerArgs(addr netip.AddrPort) []string {
	return []string{"-s", "-B", addr.Addr().String(), "-p", strconv.Itoa(int(addr.Port())), "--forceflush"}
}

// ParseIperf3 reads what an iperf3 client printed. Units are the bits that were sent after the warm-up,
// less the share of all that did not arrive before the end. CPU time is not in it: whole is what the
// caller's CPU time of the whole run must be multiplied by to be that of the window.
func ParseIperf3(out []byte, warmup time.Duration) (r Result, whole float64, err error) {
	var report struct {
		Error     string
		Intervals []struct {
			Sum struct {
				Start, Seconds float64
				Bytes          uint64
			}
		}
		End struct {
			SumSent struct {
				Bytes, Retransmits uint64
			} `json:"sum_sent"`
			SumReceived struct {
				Bytes uint64
			} `json:"sum_received"`
			Congestion string `json:"sender_tcp_congestion"`
		}
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return r, 0, fmt.Errorf("result of iperf3, %q: %w", out, err)
	}
	if report.Error != "" {
		return r, 0, fmt.Errorf("iperf3: %s", report.Error)
	}
	var sent uint64
	for _, i := range report.Intervals {
		// The ends of intervals are off by what a thread waits for its turn.
		if i.Sum.Start >= warmup.Seconds()-0.05 && i.Sum.Seconds > 0.02 {
			sent += i.Sum.Bytes
			r.Seconds += i.Sum.Seconds
		}
	}
	all := report.End.SumSent
	if sent == 0 || all.Bytes == 0 || report.End.SumReceived.Bytes == 0 {
		return r, 0, errors.New("iperf3: no bytes arrived after the warm-up")
	}
	arrived := min(1, float64(report.End.SumReceived.Bytes)/float64(all.Bytes))
	r.Units = uint64(8 * float64(sent) * arrived)
	r.Rate = float64(r.Units) / r.Seconds
	r.Retransmits, r.Congestion = all.Retransmits, report.End.Congestion
	return r, float64(sent) / float64(all.Bytes), nil
}

// streamMain runs an iperf3 client and says of it what other clients say.
func streamMain(args []string) error {
	f := flag.NewFlagSet(Stream, flag.ContinueOnError)
	to := f.String("to", "", "`HOST:PORT` of an iperf3 server")
	from := f.String("bind", "", "source `address`")
	flows := f.Int("flows", 1, "TCP connections at once")
	cpu := f.Int("cpu", -1, "CPU for both ends; -1: any")
	warmup := f.Duration("warmup", defaultWarmup, "what is not measured first")
	window := f.Duration("window", defaultWindow, "what is measured at least, in all a whole number of seconds")
	if err := parse(f, args); err != nil {
		return err
	}
	server, err := netip.ParseAddrPort(*to)
	if err != nil {
		return fmt.Errorf("--to: %w", err)
	}
	if *flows < 1 || *flows > 128 || *window <= 0 || *warmup < 0 {
		return fmt.Errorf("--flows %d --window %v --warmup %v: want 1 to 128 flows, and a window", *flows, *window, *warmup)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, *warmup+*window+time.Second+defaultGrace,
		fmt.Errorf("%s stopped to answer", server))
	defer cancel()
	idle0, err := idle()
	if err != nil {
		return err
	}
	start := now()
	cmd := exec.CommandContext(ctx, "iperf3", Iperf3Args(server, *from, *flows, *cpu, *warmup, *window)...)
	cmd.WaitDelay = time.Second
	out, failed := cmd.Output()
	idle1, err := idle()
	if err != nil {
		return err
	}
	var all Result
	all.take(time.Duration(now()-start), idle1-idle0)
	if errors.Is(failed, exec.ErrNotFound) {
		return fmt.Errorf("%w; install iperf3", failed)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if failed != nil && len(out) == 0 { // else it says itself what failed
		return fmt.Errorf("stream to %s: iperf3: %w", server, failed)
	}
	r, whole, err := ParseIperf3(out, *warmup)
	if err != nil {
		return fmt.Errorf("stream to %s: %w", server, err)
	}
	if failed != nil {
		return fmt.Errorf("stream to %s: iperf3: %w", server, failed)
	}
	r.CPUNs = int64(float64(all.CPUNs) * whole)
	return json.NewEncoder(os.Stdout).Encode(r)
}
