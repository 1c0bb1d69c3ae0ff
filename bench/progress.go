// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"time"
)

// progress tells how much of a run is done, and when it may end. Only the group that runs is known in
// its steps: those that follow are taken to be as long as those before.
type progress struct {
	groups, group int // how many, and which one runs
	steps, taken  int // of the group that runs, once it is built
	start, begun  time.Time
	now           func() time.Time
}

// begin is called when the labs of a group stand.
func (p *progress) begin(steps int) { p.steps, p.taken, p.begun = steps, 0, p.now() }

func (p *progress) step() { p.taken++ }

// String is "[2 of 7, 43 %, 3m20s left]".
func (p *progress) String() string {
	inGroup := 0.0
	if p.steps > 0 {
		inGroup = float64(p.taken) / float64(p.steps)
	}
	done := (float64(p.group) + inGroup) / float64(p.groups)
	s := fmt.Sprintf("[%d of %d, %.0f %%", p.group+1, p.groups, 100*done)
	if done > 0 && p.taken > 2 {
		elapsed := p.now().Sub(p.start)
		left := time.Duration(float64(elapsed) * (1 - done) / done)
		s += fmt.Sprintf(", %v left", left.Round(time.Second))
	}
	return s + "]"
}
