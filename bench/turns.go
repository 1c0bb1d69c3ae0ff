// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/bpfnet/bpfnet/bench/load"
)

// What a shared machine does beside a measurement changes its rates by a tenth within a tenth of a second. Windows of a
// second, one after another, meet different machines; slices of some milliseconds in turn meet the same.

// circle is probes of different modes, or at different points of a scale, that take turns within one window.
type circle struct {
	mu     sync.Mutex
	open   int        // who has neither sat down nor left
	sat    int        // who has sat down
	begins chan int64 // to each of them: when all were there
}

func newCircle(members int) *circle {
	return &circle{open: members, begins: make(chan int64, members)}
}

// seat is a probe's place in a circle.
type seat struct {
	circle *circle
	taken  bool
}

// take waits until all others are ready too, or will not be, and returns the turns of the one that calls. lead is how
// long it takes to begin.
func (s *seat) take(window, lead time.Duration) load.Turns {
	c := s.circle
	c.mu.Lock()
	turn := c.sat
	c.sat++
	s.taken = true
	c.leave()
	c.mu.Unlock()
	start := <-c.begins
	return load.NewTurns(start+int64(c.sat)*int64(lead), c.sat, turn, 0, window)
}

// end gives up a seat that was not taken.
func (s *seat) end() {
	s.circle.mu.Lock()
	defer s.circle.mu.Unlock()
	if !s.taken {
		s.taken = true
		s.circle.leave()
	}
}

// leave begins, with the last one that was waited for.
func (c *circle) leave() {
	c.open--
	if c.open > 0 {
		return
	}
	start := load.Clock()
	for range c.sat {
		c.begins <- start
	}
}

type seatKey struct{}

// seatOf is the place of who measures with this context; nil: it measures alone.
func seatOf(ctx context.Context) *seat {
	s, _ := ctx.Value(seatKey{}).(*seat)
	return s
}

// inTurns takes a window of probes, all at once where they can take turns. The results are in the probes' order.
func inTurns(ctx context.Context, probes []Probe) ([]Sample, []error) {
	all, errs := make([]Sample, len(probes)), make([]error, len(probes))
	if len(probes) == 1 {
		all[0], errs[0] = probes[0].sample(ctx)
	}
	if len(probes) < 2 {
		return all, errs
	}
	c := newCircle(len(probes))
	var wg sync.WaitGroup
	for i, p := range probes {
		s := &seat{circle: c}
		wg.Go(func() {
			defer s.end()
			all[i], errs[i] = p.sample(context.WithValue(ctx, seatKey{}, s))
		})
	}
	wg.Wait()
	return all, errs
}

// sets are the indices of the probes that are measured together: those that take turns at the same, and each other on
// its own. They are in the order of their first.
func sets(probes []Probe) [][]int {
	type same struct {
		scenario, metric string
		family           int
	}
	var all [][]int
	at := map[same]int{}
	for i, p := range probes {
		k := same{p.Key.Scenario, p.Key.Metric, p.Key.Family}
		set, known := at[k]
		if known && p.Turns {
			all[set] = append(all[set], i)
			continue
		}
		if p.Turns {
			at[k] = len(all)
		}
		all = append(all, []int{i})
	}
	return all
}

// titleOf is what is measured together, in words: "published v4 rr, bpfnet and 4 others in turn".
func titleOf(probes []Probe) string {
	if len(probes) == 1 {
		return probes[0].Key.String()
	}
	var modes []string
	for _, p := range probes {
		m := p.Key.Mode
		if p.Key.At != 0 {
			m += fmt.Sprintf(" at %d", p.Key.At)
		}
		modes = append(modes, m)
	}
	k := probes[0].Key
	k.At, k.Mode = 0, strings.Join(slices.Compact(modes), ", ")
	return k.String() + " in turn"
}
