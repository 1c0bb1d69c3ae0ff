// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
)

// Two runs agree in a ratio if the ranges of its rounds overlap, or if the medians' ratios differ by no
// more than grain: less than that moves with the addresses at which a boot, or a lab, puts things.
// Two sets of five rounds of the very same thing are disjoint by chance in 2 of 252 cases; that is why
// all that is not a line of the Reach table may disagree in one of twenty ratios.
const (
	grain   = 0.03
	byTheBy = 0.05
)

// Difference is a ratio in two runs.
type Difference struct {
	What  string
	Reach bool // a line of the Reach table
	A, B  Ratio
}

// Agree applies the rule above.
func (d Difference) Agree() bool {
	if d.A.Min <= d.B.Max && d.B.Min <= d.A.Max {
		return true
	}
	return math.Abs(d.A.Value-d.B.Value) <= grain*min(d.A.Value, d.B.Value)
}

// Comparison is what two reports have in common.
type Comparison struct{ Ratios []Difference }

// Compare pairs the ratios of two reports: the lines of the Reach table, and every mode to the limit
// and to the Engine's iptables rules.
func Compare(a, b Report) Comparison {
	var out Comparison
	lineB := make(map[string]Reached)
	for _, l := range Reach(b) {
		lineB[l.What] = l
	}
	for _, l := range Reach(a) {
		if o := lineB[l.What]; l.Ratio.Value > 0 && o.Ratio.Value > 0 {
			out.Ratios = append(out.Ratios, Difference{What: l.What, Reach: true, A: l.Ratio, B: o.Ratio})
		}
	}
	other := ratiosOf(b)
	for _, r := range ratiosOf(a) {
		i := slices.IndexFunc(other, func(o Difference) bool { return o.What == r.What })
		if i >= 0 {
			out.Ratios = append(out.Ratios, Difference{What: r.What, A: r.A, B: other[i].A})
		}
	}
	return out
}

// ratiosOf are the ratios of a report outside the Reach table, with only A set.
func ratiosOf(r Report) []Difference {
	var out []Difference
	for _, scenario := range r.Scenarios() {
		for _, line := range r.cells(scenario) {
			for _, base := range line {
				if base.Mode != limitOf[scenario] && base.Mode != DockerIPTables {
					continue
				}
				for _, rec := range line {
					if ratio, ok := RatioOf(rec, base); ok && rec.Mode != base.Mode {
						out = append(out, Difference{What: rec.Key.String() + " ÷ " + base.Mode, A: ratio})
					}
				}
			}
		}
	}
	return out
}

// Differing are the ratios in which the runs do not agree, and whether the runs agree nevertheless.
func (c Comparison) Differing() (differ []Difference, agree bool) {
	others, othersDiffer, reach := 0, 0, 0
	for _, d := range c.Ratios {
		if !d.Reach {
			others++
		}
		if d.Agree() {
			continue
		}
		differ = append(differ, d)
		if d.Reach {
			reach++
		} else {
			othersDiffer++
		}
	}
	return differ, reach == 0 && float64(othersDiffer) <= byTheBy*float64(others)
}

// Write writes what differs, and the verdict. It returns whether the runs agree.
func (c Comparison) Write(w io.Writer) (bool, error) {
	differ, agree := c.Differing()
	reach := 0
	for _, d := range c.Ratios {
		if d.Reach {
			reach++
		}
	}
	if len(differ) > 0 {
		tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(tab, "differs\tfirst run\tsecond run\tReach")
		for _, d := range differ {
			mark := "–"
			if d.Reach {
				mark = "yes"
			}
			fmt.Fprintf(tab, "%s\t%s\t%s\t%s\n", d.What, d.A, d.B, mark)
		}
		if err := tab.Flush(); err != nil {
			return false, err
		}
		fmt.Fprintln(w)
	}
	verdict := "The runs agree"
	if !agree {
		verdict = "The runs do not agree"
	}
	_, err := fmt.Fprintf(w, `%s: %d ratios compared, %d of them of the Reach table; %d differ.
A ratio agrees if the ranges of its rounds overlap, or if the two differ by at most %g %%. The runs agree if every
ratio of the Reach table does, and of the others at least %g %%.
`, verdict, len(c.Ratios), reach, len(differ), 100*grain, 100*(1-byTheBy))
	return agree, err
}
