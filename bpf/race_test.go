// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// cpu runs programs in the host's namespace, on one CPU.
type cpu struct{ work chan func() }

func (h *host) onCPU(t *testing.T, number int) *cpu {
	t.Helper()
	var ns netns.NsHandle
	var err error
	h.do(func() { ns, err = netns.Get() })
	require.NoError(t, err)
	c := &cpu{work: make(chan func())}
	ready, done := make(chan error, 1), make(chan struct{})
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		defer close(done)
		defer ns.Close()
		set := unix.CPUSet{}
		set.Set(number)
		err := unix.SchedSetaffinity(0, &set)
		if err == nil {
			err = netns.Set(ns)
		}
		ready <- err
		for f := range c.work {
			f()
		}
	}()
	t.Cleanup(func() {
		close(c.work)
		<-done
	})
	require.NoError(t, <-ready)
	return c
}

// together has two CPUs do something at the same moment, count times: what each does is made before, and
// between is called after both are done.
func together(cpus [2]*cpu, count int, each func(i, cpu int) func() error, between func(i int) error) error {
	for i := range count {
		var gate atomic.Int32
		var wait sync.WaitGroup
		var errs [2]error
		for n, c := range cpus {
			do := each(i, n)
			wait.Add(1)
			c.work <- func() {
				defer wait.Done()
				gate.Add(1)
				for gate.Load() < 2 {
				}
				errs[n] = do()
			}
		}
		wait.Wait()
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
		if err := between(i); err != nil {
			return fmt.Errorf("round %d: %w", i, err)
		}
	}
	return nil
}

// runOn runs a program over a frame that comes by an endpoint's interface, on the calling CPU.
func (h *host) runOn(program *ebpf.Program, slot int, frame []byte) (uint32, error) {
	return program.Run(&ebpf.RunOptions{
		Data: frame, DataOut: make([]byte, len(frame)+64), Context: skb{Ifindex: uint32(h.links[slot])},
	})
}

// Two CPUs open flows of two containers towards one destination, where one masquerade port is left: free, or
// held by a flow that was reset, which each may take over.
func TestTakeSameTuple(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	const rounds = 1000
	h := newHost(t, 1<<13)
	h.setSNAT(snatFirst, 1)
	cpus := [2]*cpu{h.onCPU(t, 0), h.onCPU(t, 1)}
	slots := [2]int{alice, bob}
	program := h.program("from_container")
	var raced int
	forFamilies(t, func(t *testing.T, f family) {
		for _, held := range []bool{false, true} {
			t.Run(map[bool]string{false: "free", true: "held by a finished flow"}[held], func(t *testing.T) {
				h.t = t
				h.reset()
				packetTo := func(slot, round int, flags string) []byte {
					return packet.TCP(at(f.addr(slot), 40000), at(f.client2, uint16(1000+round)), toGateway(slot), packet.Flags(flags))
				}
				if held {
					for i := range rounds {
						for _, flags := range []string{"S", "R"} {
							require.EqualValues(t, actRedirect, h.from(carol, packetTo(carol, i, flags)).action)
						}
					}
				}
				var got [2]uint32
				var wins [2]int
				err := together(cpus, rounds, func(i, n int) func() error {
					frame := packetTo(slots[n], i, "S")
					return func() (err error) {
						got[n], err = h.runOn(program, slots[n], frame)
						return err
					}
				}, func(int) error {
					for n := range got {
						if got[n] == actRedirect {
							wins[n]++
						}
					}
					if got != [2]uint32{actRedirect, actShot} && got != [2]uint32{actShot, actRedirect} {
						return fmt.Errorf("the CPUs' actions are %v: want one redirect and one drop", got)
					}
					return nil
				})
				require.NoError(t, err)
				require.Equal(t, 2*rounds, h.entries(f), "both directions of the winners' flows")
				require.EqualValues(t, 2*rounds, h.gauge()[f.index()])
				require.NotZero(t, wins[0], "never the first: they did not race")
				require.NotZero(t, wins[1], "never the second: they did not race")
				raced += rounds
			})
		}
	})
	promise.Kept(t, promise.Masquerade, "Where two CPUs take one outer port for two containers at the same moment, exactly one gets it.",
		"%d of %d races", raced, 4*rounds)
}

// While one CPU expires flows without pause, as under the highest pressure, packets of a flow go by on the
// other: it is never expired, though its timeout is the shortest there is and the clocks' grain is a second.
func TestExpireAgainstRefresh(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	const ticks = 3
	h := newHost(t, 1024)
	h.setConfig(func(c *bpf.DatapathConfig) { c.Timeouts.UdpNew, c.Timeouts.Udp = 1, 1 })
	cpus := [2]*cpu{h.onCPU(t, 0), h.onCPU(t, 1)}
	program, expire := h.program("from_container"), h.program("expire")
	var packetsSent, allSweeps int
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		frame := packet.UDP(at(f.addr(alice), 40000), at(f.client2, 53), toGateway(alice))
		h.from(alice, frame)
		full := h.config().MaxFlows[f.index()]
		gauge := bpf.DatapathFlowGauge{}
		gauge.Entries[f.index()] = int64(full)
		h.put("flow_gauge", uint32(0), gauge)

		end := h.now() + ticks + 1
		var sent, sweeps int
		var stop atomic.Bool
		err := together(cpus, 1, func(_, n int) func() error {
			if n == 1 {
				return func() error {
					for !stop.Load() {
						if _, err := expire.Run(&ebpf.RunOptions{Context: make([]byte, 16)}); err != nil {
							return err
						}
						sweeps++
					}
					return nil
				}
			}
			return func() error {
				defer stop.Store(true)
				for h.now() < end {
					if got, err := h.runOn(program, alice, frame); err != nil || got != actRedirect {
						return fmt.Errorf("packet %d: action %d, %w", sent, got, err)
					}
					sent++
				}
				return nil
			}
		}, func(int) error { return nil })
		require.NoError(t, err)
		var packets uint64
		for _, seen := range h.flowSeen(f) {
			packets = max(packets, seen[0])
		}
		require.EqualValues(t, sent+1, packets, "the flow of the first packet has counted all: it was opened once")
		packetsSent, allSweeps = packetsSent+sent, allSweeps+sweeps
	})
	promise.Kept(t, promise.Masquerade, "A flow with traffic is never expired, however short its timeout and however full the table.",
		"%d packets of two flows through %d sweeps", packetsSent, allSweeps)
}
