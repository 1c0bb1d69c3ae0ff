// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bench/load"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// Flood is a published port below a flood of SYNs.
const Flood = "syn-flood"

// floodRate is how many SYNs a second are offered.
const floodRate = 80_000

// floodRamp is how long a flood lasts before a window, so that what it fills is full.
const floodRamp = 3 * time.Second

// floodWindow is longer than others: below a flood, connections wait for what was lost to be sent again.
const floodWindow = 2 * time.Second

// floodNet is where the SYNs pretend to come from: for benchmarks, RFC 2544. What answers them goes back to the
// client's host, which throws it away.
var floodNet = netip.MustParsePrefix("198.18.0.0/16")

func floodGroup() Group { return floodOf(floodRate, floodRamp) }

// floodOf asks a published port with a flood and, in a lab of its own, without.
func floodOf(rate int, ramp time.Duration) Group {
	modes := []string{DockerIPTables, Bpfnet}
	return Group{
		Name: Flood, Scenarios: []string{Flood}, Modes: modes, Labs: 20 * time.Second, Round: 2 * (ramp + 6*time.Second),
		Build: func(t testing.TB, o Options) []Probe {
			var probes []Probe
			for _, flooded := range []bool{false, true} {
				for _, mode := range modes {
					if !o.Wants(mode) {
						continue
					}
					o.Step("%s: build a lab of mode %s", Flood, mode)
					p := newFlooded(t, mode)
					key := Key{Scenario: Flood, Mode: mode, Family: 4, Metric: "crr-quiet"}
					note := "what comes from outside is received on the CPU of client and server"
					measure := p.crr
					if flooded {
						key.Metric, key.At = "crr", rate
						note += "; the flood is made on another"
						measure = p.newFlood(t, rate, ramp).crr
					}
					probe := Probe{Key: key, Unit: "1/s", Note: note, Measure: func(ctx context.Context) (Sample, error) {
						return measure(ctx, cmp.Or(o.Window, floodWindow))
					}}
					probes = append(probes, probe)
				}
			}
			return probes
		},
	}
}

// newFlooded builds a lab with a published port that can be flooded.
func newFlooded(t testing.TB, mode string) path {
	t.Helper()
	s := newSpot(t, mode, spotOpts{})
	s.steer(t)
	s.lab.Host.AddRoute(t, floodNet, lab.Client4)
	p := s.path("published", 4)
	p.serve(t)
	if err := p.settle(t); err != nil {
		t.Fatalf("%s, mode %s: nobody answers: %v", Flood, mode, err)
	}
	return p
}

// steer has the working CPU receive what comes in by the uplink, whichever sends it, as a card with one queue does.
func (s *site) steer(t testing.TB) {
	t.Helper()
	s.lab.Host.MustRun(t, "unshare", "-m", "sh", "-c", fmt.Sprintf("mount -t sysfs sysfs /sys && echo %x >/sys/class/net/%s/queues/rx-0/rps_cpus",
		1<<WorkCPU(), lab.HostIf))
}

// crr is a window of connections, each of which may take long.
func (p path) crr(ctx context.Context, window time.Duration) (Sample, error) {
	r, err := p.window(ctx, load.Client{Kind: load.CRR, Window: window, Grace: 30 * time.Second})
	return Sample{Value: r.Rate, CPU: r.CPU()}, err
}

// synFlood is SYNs along a path.
type synFlood struct {
	path
	frame []byte
	out   int // index of the client's interface
	rate  int // a second
	ramp  time.Duration
}

func (p path) newFlood(t testing.TB, rate int, ramp time.Duration) *synFlood {
	t.Helper()
	frame := packet.TCP(netip.AddrPortFrom(floodNet.Addr(), 0), netip.AddrPortFrom(p.to, loadPort),
		packet.ID(0xffff), packet.Seq(0xffffffff, 0), packet.MAC(p.from.MAC(t, lab.ClientIf), p.lab.Host.MAC(t, lab.HostIf)))
	return &synFlood{path: p, frame: frame, out: p.from.Ifindex(t, lab.ClientIf), rate: rate, ramp: ramp}
}

// crr is a window of connections after the flood has lasted for its ramp, and while it lasts.
func (f *synFlood) crr(ctx context.Context, window time.Duration) (Sample, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	flooded := make(chan error, 1)
	go func() { flooded <- f.run(ctx) }()
	select {
	case err := <-flooded:
		return Sample{}, fmt.Errorf("the flood ended early: %w", err)
	case <-time.After(f.ramp):
	}
	s, err := f.path.crr(ctx, window)
	cancel()
	return s, errors.Join(err, <-flooded)
}

// run sends SYNs from random sources until ctx ends. It fails where it could not send as many as it was to.
func (f *synFlood) run(ctx context.Context) error {
	return f.from.Do(func() error {
		// Before all else on its CPU, so that the rate is kept.
		runtime.LockOSThread()
		if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0); err != nil {
			return fmt.Errorf("priority of the flood: %w", err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("socket of the flood: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return fmt.Errorf("socket of the flood: %w", err)
		}
		to := &unix.SockaddrLinklayer{Ifindex: f.out}
		pause := unix.NsecToTimespec(int64(500 * time.Microsecond))
		begin, sent := time.Now(), 0
		for ctx.Err() == nil {
			if due := int(time.Since(begin).Seconds() * float64(f.rate)); sent >= due {
				if err := unix.ClockNanosleep(unix.CLOCK_MONOTONIC, 0, &pause, nil); err != nil && !errors.Is(err, unix.EINTR) {
					return fmt.Errorf("wait: %w", err)
				}
				continue
			}
			for range 16 {
				randomSource(f.frame)
				if err := unix.Sendto(fd, f.frame, 0, to); err != nil && !errors.Is(err, unix.ENOBUFS) {
					return fmt.Errorf("send a SYN: %w", err)
				}
				sent++
			}
		}
		if offered := float64(f.rate) * time.Since(begin).Seconds(); float64(sent) < 0.95*offered {
			return fmt.Errorf("only %d SYNs of %.0f could be sent", sent, offered)
		}
		return nil
	})
}

// Where what changes stands in a frame of TCP over IPv4.
const (
	ipID     = 14 + 4
	sourceLo = 14 + 14 // of the address
	tcpPort  = 14 + 20
	seqHi    = tcpPort + 4
	seqLo    = tcpPort + 6
)

// randomSource gives a SYN another address and port: the lower half of the address, and all of the port. With each
// goes a field of the same checksum that takes what it adds: a number and its complement add nothing. So a frame
// must have one where the other has its complement.
func randomSource(frame []byte) {
	r := rand.Uint32()
	host, port := uint16(r), uint16(r>>16)
	binary.BigEndian.PutUint16(frame[sourceLo:], host)
	binary.BigEndian.PutUint16(frame[ipID:], ^host)
	binary.BigEndian.PutUint16(frame[seqLo:], ^host)
	binary.BigEndian.PutUint16(frame[tcpPort:], port)
	binary.BigEndian.PutUint16(frame[seqHi:], ^port)
}
