// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"time"
)

// progress tells how much of a run is done, and when it may end. Groups count by how long they are estimated
// to take.
type progress struct {
	takes        []time.Duration // of groups
	labs         []time.Duration // a part of takes
	group        int             // that runs
	steps, taken int             // of the group that runs, once it is built
	start        time.Time
	now          func() time.Time
}

func newProgress(groups []Group, o Options) *progress {
	p := &progress{start: time.Now(), now: time.Now}
	for _, g := range groups {
		p.takes = append(p.takes, max(g.takes(o), time.Second)) // a group without an estimate counts a little
		p.labs = append(p.labs, g.Labs)
	}
	return p
}

// enter is called before the labs of a group are built, begin when they stand.
func (p *progress) enter(group int) { p.group, p.steps, p.taken = group, 0, 0 }
func (p *progress) begin(steps int) { p.steps, p.taken = steps, 0 }

func (p *progress) step() { p.taken++ }

// String is "[2 of 7, 43 %, 3m20s left]".
func (p *progress) String() string {
	var all, done time.Duration
	for i, takes := range p.takes {
		all += takes
		switch {
		case i < p.group:
			done += takes
		case i == p.group && p.steps > 0:
			labs := p.labs[i]
			done += labs + time.Duration(float64(takes-labs)*float64(p.taken)/float64(p.steps))
		}
	}
	share := float64(done) / float64(all)
	s := fmt.Sprintf("[%d of %d, %.0f %%", p.group+1, len(p.takes), 100*share)
	if share > 0 {
		left := float64(p.now().Sub(p.start)) * (1 - share) / share
		s += fmt.Sprintf(", %v left", time.Duration(left).Round(time.Second))
	}
	return s + "]"
}
