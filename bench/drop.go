// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// Drop is what a CPU drops of unwanted packets.
const Drop = "drop"

// The values that an XDP program returns (enum xdp_action).
const (
	xdpDrop = 1
	xdpTX   = 3
)

// unwanted is where the packets come from that are dropped, unwantedNet what is denied.
var (
	unwanted    = netip.MustParseAddr("192.0.2.66")
	unwantedNet = netip.MustParsePrefix("192.0.2.64/27")
)

// dropModes are who drops, the limit first.
var dropModes = []string{XDPDrop, RawDrop, NetdevDrop, Bpfnet}

// dropGroup drops packets from a denied network at a host's uplink.
func dropGroup() Group {
	return Group{
		Name: Drop, Scenarios: []string{Drop}, Modes: dropModes, Warm: true, Labs: 5 * time.Second, Round: 3 * time.Second,
		Build: func(t testing.TB, o Options) []Probe {
			var probes []Probe
			for _, mode := range dropModes {
				if o.Wants(mode) {
					probes = append(probes, newDropper(t, mode).probe(o))
				}
			}
			return probes
		},
	}
}

// dropper is a host whose uplink drops.
type dropper struct {
	mode   string
	lab    *lab.Lab
	bpfnet *lab.Bpfnet
	maker  frameMaker
}

func newDropper(t testing.TB, mode string) *dropper {
	d := &dropper{mode: mode, lab: lab.New(t, lab.Opts{Plain: true})}
	host := d.lab.Host
	takesFrames(t, d.lab)
	var err error
	switch mode {
	case XDPDrop:
		var limit *ebpf.Program
		if limit, err = returning(xdpDrop); err != nil {
			break
		}
		t.Cleanup(func() { limit.Close() })
		index := host.Ifindex(t, lab.HostIf)
		err = host.Do(func() error {
			l, err := link.AttachXDP(link.XDPOptions{Program: limit, Interface: index, Flags: link.XDPDriverMode})
			if err == nil {
				t.Cleanup(func() { l.Close() })
			}
			return err
		})
	case RawDrop:
		host.MustRun(t, "iptables", "-t", "raw", "-A", "PREROUTING", "-i", lab.HostIf, "-s", unwantedNet.String(), "-j", "DROP")
	case NetdevDrop:
		feed(t, host, fmt.Sprintf(`table netdev bench {
	chain in {
		type filter hook ingress device %s priority -500; policy accept;
		ip saddr %s counter drop
	}
}`, lab.HostIf, unwantedNet), "nft", "-f", "-")
	}
	if mode == Bpfnet {
		d.bpfnet = d.lab.StartBpfnet(t, nil, "--shield")
		d.bpfnet.MustCLI(t, "deny", "add", unwantedNet.String())
	}
	if err == nil {
		d.maker.program, err = returning(xdpTX)
	}
	if err != nil {
		t.Fatalf("%s, mode %s: %v", Drop, mode, err)
	}
	t.Cleanup(func() { d.maker.program.Close() })
	d.maker.in = d.lab.Client.Ifindex(t, lab.ClientIf)
	d.maker.frame = packet.TCP(netip.AddrPortFrom(unwanted, 40000), netip.AddrPortFrom(lab.Host4, loadPort), packet.Flags("S"),
		packet.MAC(d.lab.Client.MAC(t, lab.ClientIf), host.MAC(t, lab.HostIf)))
	return d
}

// takesFrames has the uplink of the host take frames of XDP. A veth does where its other end has NAPI: by a
// program, or by this.
func takesFrames(t testing.TB, l *lab.Lab) {
	t.Helper()
	l.Host.MustRun(t, "ethtool", "-K", lab.HostIf, "gro", "on")
}

// returning is an XDP program that does nothing else.
func returning(action int64) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bench_drop", Type: ebpf.XDP, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, int32(action)), asm.Return()},
	})
}

func (d *dropper) probe(o Options) Probe {
	return Probe{
		Key: Key{Scenario: Drop, Mode: d.mode, Family: 4, Metric: "drops"}, Unit: "1/s",
		Note: "one network denied; frames made by the kernel's XDP test run on the CPU that drops them, which is part of the time",
		Measure: func(ctx context.Context) (Sample, error) {
			window := o.Window
			if warming(ctx) {
				window = min(window, warmWindow)
			}
			before, err := d.dropped(ctx)
			if err != nil {
				return Sample{}, err
			}
			sent, took, err := d.send(ctx, window)
			if err != nil {
				return Sample{}, err
			}
			after, err := d.dropped(ctx)
			if err != nil {
				return Sample{}, err
			}
			n := after - before
			if float64(n) < 0.99*float64(sent) {
				return Sample{}, fmt.Errorf("%d of %d packets were dropped by mode %s", n, sent, d.mode)
			}
			return Sample{Value: float64(n) / took.Seconds(), CPU: float64(took) / float64(n)}, nil
		},
	}
}

// burst is how many frames are made at a time.
const burst = 1 << 16

// send makes frames for a window, on the working CPU.
func (d *dropper) send(ctx context.Context, window time.Duration) (sent uint64, took time.Duration, err error) {
	err = d.lab.Client.Do(func() error {
		runtime.LockOSThread() // and let the thread end with the goroutine, pinned as it is
		var work unix.CPUSet
		work.Set(WorkCPU())
		if err := unix.SchedSetaffinity(0, &work); err != nil {
			return err
		}
		for begin := time.Now(); took < window && ctx.Err() == nil; took = time.Since(begin) {
			if err := d.maker.make(burst); err != nil {
				return err
			}
			sent += burst
		}
		return nil
	})
	return sent, took, err
}

// frameMaker makes frames by the kernel's test run of an XDP program, which sends them out by an interface.
type frameMaker struct {
	program *ebpf.Program
	frame   []byte
	in      int // index of the interface, in the caller's namespace
}

// make makes at least n frames: a signal in between makes it more.
func (m frameMaker) make(n int) error {
	// struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
	var md [24]byte
	binary.NativeEndian.PutUint32(md[4:], uint32(len(m.frame)))
	binary.NativeEndian.PutUint32(md[12:], uint32(m.in))
	_, err := m.program.Run(&ebpf.RunOptions{Data: m.frame, Context: md[:], Repeat: uint32(n), Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES})
	if err != nil {
		return fmt.Errorf("make frames: %w", err)
	}
	return nil
}

// dropped is how many packets have been dropped by the means of the mode.
func (d *dropper) dropped(ctx context.Context) (uint64, error) {
	var n uint64
	switch d.mode {
	case XDPDrop:
		out, err := d.lab.Host.Run(ctx, "ethtool", "-S", lab.HostIf)
		if err != nil {
			return 0, err
		}
		return n, scanAfter(out, "rx_queue_0_xdp_drops:", &n)
	case RawDrop:
		out, err := d.lab.Host.Run(ctx, "iptables-save", "-c", "-t", "raw")
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, "-j DROP") {
				return n, scanAfter(line, "[", &n)
			}
		}
	case Bpfnet:
		out, err := d.bpfnet.CLI("shield", "-o", "json")
		if err != nil {
			return 0, err
		}
		var shown struct {
			Denied []struct {
				Prefix  netip.Prefix
				Packets uint64
			}
		}
		err = json.Unmarshal([]byte(out), &shown)
		for _, denied := range shown.Denied {
			if denied.Prefix == unwantedNet {
				return denied.Packets, err
			}
		}
	case NetdevDrop:
		out, err := d.lab.Host.Run(ctx, "nft", "list", "table", "netdev", "bench")
		if err != nil {
			return 0, err
		}
		return n, scanAfter(out, "counter packets", &n)
	}
	return 0, fmt.Errorf("mode %s does not say what it has dropped", d.mode)
}

// scanAfter reads the number behind a word.
func scanAfter(text, word string, n *uint64) error {
	_, rest, found := strings.Cut(text, word)
	if !found {
		return fmt.Errorf("no %q in %q", word, text)
	}
	_, err := fmt.Sscan(strings.TrimSpace(rest), n)
	return err
}
