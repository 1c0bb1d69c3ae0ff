// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// crowdSize is how many endpoints a host has: every container and every sandbox is on all networks of
// its kind.
type crowdSize struct {
	Networks   int // of the Engine, and as many of bpfnet's own
	Containers int
	Sandboxes  int
	Connects   int // a window
}

func (s crowdSize) endpoints() int { return s.Networks * (s.Containers + s.Sandboxes) }

// crowd is a host with many endpoints, and one container more that comes and goes on the networks.
type crowd struct {
	crowdSize
	lab    *lab.Lab
	d      *lab.Docker
	b      *lab.Bpfnet
	target string
	ups    <-chan lab.LinkUp
	next   int // network to connect to
}

// crowdGroup measures what the daemon does while 1,000 endpoints are there: 100 of containers, the
// others of bpfnet's own sandboxes, which are made ten times as fast.
func crowdGroup() Group {
	return crowdGroupOf(crowdSize{Networks: 10, Containers: 10, Sandboxes: 90, Connects: 100})
}

func crowdGroupOf(size crowdSize) Group {
	return Group{
		Name:      "crowd",
		Labs:      time.Minute,
		Round:     30 * time.Second,
		Scenarios: []string{Ready, Reconcile},
		Modes:     []string{Bpfnet},
		Build: func(t testing.TB, _ Options) []Probe {
			c := newCrowd(t, size)
			key := func(scenario, metric string) Key {
				return Key{Scenario: scenario, Mode: Bpfnet, Metric: metric, At: size.endpoints()}
			}
			return []Probe{
				{
					Key: key(Ready, "p50"), Unit: "s", More: []Output{{"p99", "s"}},
					Note: fmt.Sprintf("of %d connects a round; from the interface being up until packets of it pass, 0 where that was before", size.Connects),
					Measure: func(ctx context.Context) (Sample, error) {
						took, err := c.connects(ctx)
						if err != nil {
							return Sample{}, err
						}
						return Sample{Value: quantile(took, 0.5), More: []float64{quantile(took, 0.99)}}, nil
					},
				},
				{
					Key: key(Reconcile, "fresh"), Unit: "s", Note: "exec to READY=1; programs are loaded and maps filled anew, links are those of the run before",
					Measure: func(context.Context) (Sample, error) { return c.restart(t, true) },
				},
				{
					Key: key(Reconcile, "restart"), Unit: "s", Note: "exec to READY=1; programs and maps of the run before are kept",
					Measure: func(context.Context) (Sample, error) { return c.restart(t, false) },
				},
			}
		},
	}
}

// quantile of a set of durations, in seconds.
func quantile(took []time.Duration, q float64) float64 {
	sorted := slices.Sorted(slices.Values(took))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)].Seconds()
}

func newCrowd(t testing.TB, size crowdSize) *crowd {
	c := &crowd{crowdSize: size, lab: lab.New(t, lab.Opts{Plain: true}), target: "target"}
	c.d = c.lab.StartDocker(t, lab.DockerOpts{})
	c.b = c.lab.StartBpfnet(t, c.d)
	var own []string
	for i := range size.Networks {
		c.d.MustRun(t, "network", "create", "--subnet", fmt.Sprintf("10.50.%d.0/24", i), c.network(i))
		name := fmt.Sprintf("o%d", i)
		c.b.MustCLI(t, "network", "create", "--subnet", fmt.Sprintf("10.60.%d.0/24", i), name)
		own = append(own, "--network", name)
	}
	for i := range size.Containers {
		name := fmt.Sprintf("c%d", i)
		c.d.MustRun(t, "create", "--name", name, "--network", c.network(0), lab.Image, "sleep", "100000")
		for j := 1; j < size.Networks; j++ {
			if err := c.connect(t.Context(), "connect", c.network(j), name); err != nil {
				t.Fatal(err)
			}
		}
		c.d.MustRun(t, "start", name)
	}
	for i := range size.Sandboxes {
		c.b.MustCLI(t, slices.Concat([]string{"run", "-d", "--name", fmt.Sprintf("s%d", i)}, own, []string{"--", "sleep", "100000"})...)
	}
	c.d.MustRun(t, "run", "-d", "--name", c.target, "--network", "none", lab.Image, "sleep", "100000")
	c.d.MustRun(t, "network", "disconnect", "none", c.target)
	lab.Eventually(t, 30*time.Second, "all endpoints are READY", func() bool { return c.ready(t) == size.endpoints() })
	c.ups = c.d.NS(t, c.target).LinkUps(t)
	return c
}

func (c *crowd) network(i int) string { return fmt.Sprintf("n%d", i) }

// ready counts the endpoints that take packets.
func (c *crowd) ready(t testing.TB) (n int) {
	for _, e := range c.b.Snapshot(t).Endpoints {
		if e.Ready {
			n++
		}
	}
	return n
}

func (c *crowd) connect(ctx context.Context, verb, network, container string) error {
	return c.d.Post(ctx, "/networks/"+network+"/"+verb, map[string]any{"Container": container, "Force": verb == "disconnect"})
}

// connects takes one window: the target is connected to one network after another. A time is that from
// the moment when its interface is up until packets of it pass; 0 where they would have passed before.
func (c *crowd) connects(ctx context.Context) ([]time.Duration, error) {
	m, err := maps.Open(c.lab.BPFFS)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	var took []time.Duration
	for range c.Connects {
		network := c.network(c.next % c.Networks)
		c.next++
		one, err := c.connectOnce(ctx, m, network)
		if err != nil {
			return nil, fmt.Errorf("connect to %s: %w", network, err)
		}
		took = append(took, one)
	}
	return took, nil
}

const (
	// readyPoll is how often the maps are looked at: the grain of what is measured.
	readyPoll = 200 * time.Microsecond
	// readyWait is when an endpoint counts as forgotten.
	readyWait = 10 * time.Second
)

func (c *crowd) connectOnce(ctx context.Context, m *maps.Maps, network string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	connected := make(chan error, 1)
	go func() { connected <- c.connect(ctx, "connect", network, c.target) }()
	var up lab.LinkUp
	select {
	case up = <-c.ups:
	case <-ctx.Done():
		return 0, errors.Join(errors.New("its interface never came up"), <-connected)
	}
	if err := until(ctx, m, up.Peer, true); err != nil {
		return 0, fmt.Errorf("never READY: %w", err)
	}
	took := time.Since(up.At)
	if took < readyPoll { // the first look
		took = 0
	}
	if err := <-connected; err != nil {
		return 0, err
	}
	if err := c.connect(ctx, "disconnect", network, c.target); err != nil {
		return 0, err
	}
	if err := until(ctx, m, up.Peer, false); err != nil {
		return 0, fmt.Errorf("READY for ever: %w", err)
	}
	return took, nil
}

// until waits until the endpoint behind an interface is READY, or is not.
func until(ctx context.Context, m *maps.Maps, ifindex int, want bool) error {
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		if is, err := m.Ready(ifindex); err != nil || is == want {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// restart measures a start of the daemon, until it has said that all it knows is served, and checks that.
func (c *crowd) restart(t testing.TB, fresh bool) (Sample, error) {
	c.b.Stop(t)
	if fresh {
		for _, dir := range []string{"programs", "maps"} {
			if err := os.RemoveAll(filepath.Join(c.lab.BPFFS, dir)); err != nil {
				return Sample{}, err
			}
		}
	}
	start := time.Now()
	c.b.Start(t)
	took := time.Since(start)
	if n := c.ready(t); n != c.endpoints() {
		return Sample{}, fmt.Errorf("READY=1 was said with %d endpoints of %d READY", n, c.endpoints())
	}
	return Sample{Value: took.Seconds()}, nil
}
