// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/bench/load"
)

// Restart is the daemon's restart below traffic.
const Restart = "restart"

// restartGroup restarts the daemon of a host that is full.
func restartGroup() Group {
	g := restartOf(1000, 500_000, flowRoom)
	g.Labs, g.Round = 45*time.Second, 9*time.Second
	return g
}

// restartOf asks a published port over UDP, one datagram at a time, while the daemon restarts and while it
// does not. A datagram that is lost ends the client, which fails the probe.
func restartOf(endpoints, flows, room int) Group {
	key := func(metric string) Key { return Key{Scenario: Restart, Mode: Bpfnet, Metric: metric, At: endpoints} }
	return Group{
		Name: Restart, Scenarios: []string{Restart}, Modes: []string{Bpfnet},
		Build: func(t testing.TB, o Options) []Probe {
			o.Step("%s: build the lab with %d endpoints and %d flows", Restart, endpoints, flows)
			s := newSpot(t, Bpfnet, spotOpts{
				udp: true, daemon: []string{"--flows", strconv.Itoa(room), "--timeout", "udp-new=24h"},
				before: func(s *site) { s.addBareEndpoints(t, endpoints-2, min(endpointNetworks, endpoints/2)) },
			})
			waitUntil(t, patience, func() error { return s.hasEndpoints(endpoints) })
			p := s.path("published", 4)
			p.serve(t)
			p.openFlows(t, flows)
			stands := func() error { return errors.Join(s.hasEndpoints(endpoints), s.hasFlows(flows)) }
			if err := errors.Join(stands(), p.settle(t)); err != nil {
				t.Fatal(err)
			}
			asked := fmt.Sprintf("of requests over UDP to a published port, one at a time, none of which was lost; %d flows", flows)
			return []Probe{
				{Key: key("p99-quiet"), Unit: "ns", Note: asked, Measure: func(ctx context.Context) (Sample, error) {
					r, err := p.window(ctx, asking(time.Second))
					return Sample{Value: p99(r)}, err
				}},
				{Key: key("p99"), Unit: "ns", Note: asked, More: []Output{{"reconciled", "s"}},
					Measure: func(ctx context.Context) (Sample, error) {
						r, took, err := p.restarted(ctx, t)
						return Sample{Value: p99(r), More: []float64{took.Seconds()}}, errors.Join(err, stands())
					}},
			}
		},
	}
}

// p99 is in nanoseconds; 0 where the client has failed.
func p99(r load.Result) float64 {
	if r.Latency == nil {
		return 0
	}
	return float64(r.Latency.P99)
}

func asking(window time.Duration) load.Client {
	return load.Client{Kind: load.Latency, Proto: "udp", Window: window}
}

// restartWindow is how long the client asks at the least: the restart is to lie in it.
const restartWindow = 6 * time.Second

// restarted takes a window in which the daemon restarts, and how long that took: from its start until it has
// said that all that it knows is served.
func (p path) restarted(ctx context.Context, t testing.TB) (load.Result, time.Duration, error) {
	type outcome struct {
		r   load.Result
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		r, err := p.window(ctx, asking(restartWindow))
		done <- outcome{r, err}
	}()
	select { // the client warms up
	case <-ctx.Done():
	case <-time.After(restartWindow / 12):
	}
	p.bpfnet.Stop(t)
	begin := time.Now()
	p.bpfnet.Start(t)
	took := time.Since(begin)
	select {
	case o := <-done:
		return o.r, took, errors.Join(o.err, fmt.Errorf("the restart took %v, longer than the client asked", took))
	default:
	}
	o := <-done
	return o.r, took, o.err
}
