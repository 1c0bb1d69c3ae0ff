// SPDX-License-Identifier: Apache-2.0

package metrics

import "strings"

// counts are the counters of one thing; what each is, its names say.
type counts [6]uint64

func (c *counts) add(n counts) {
	for i := range c {
		c[i] += n[i]
	}
}

// since is what was counted after an earlier reading. A counter that is lower than before began anew.
func (c counts) since(before counts) counts {
	for i := range c {
		if c[i] >= before[i] {
			c[i] -= before[i]
		}
	}
	return c
}

// row is one thing with its counters.
type row struct {
	id     string
	labels []string
	n      counts
}

// fold keeps the number of series of one kind below a limit. Who has series of its own keeps them as
// long as it lives; the others are summed. These sums never fall while the daemon runs, whoever of the
// others goes: they add up what each has counted since the last look.
type fold struct {
	shown map[string]bool
	begun bool
	last  map[string]counts // of the others
	sums  map[string]*row   // of the others, by the labels that they keep
}

// bound returns at most limit rows, and one for each value that the first keep labels have among the
// others; and how many the others are. Rows with the same labels are added up.
func (f *fold) bound(rows []row, limit, keep int) (out []row, over int) {
	if f.shown == nil {
		f.shown, f.last, f.sums = make(map[string]bool), make(map[string]counts), make(map[string]*row)
	}
	alive, groups := make(map[string]bool, len(rows)), make(map[string]bool)
	for _, r := range rows {
		alive[r.id] = true
		groups[group(r, keep)] = true
	}
	for id := range f.shown {
		if !alive[id] {
			delete(f.shown, id)
		}
	}
	for id := range f.last {
		if !alive[id] {
			delete(f.last, id)
		}
	}
	if !f.begun { // what was counted before the first look was summed by nobody
		f.begun = true
		for i, r := range rows {
			if i >= limit {
				f.last[r.id] = r.n
			}
		}
	}
	for g := range f.sums {
		if !groups[g] { // its network is gone
			delete(f.sums, g)
		}
	}
	for _, r := range rows { // the limit was lowered
		if len(f.shown) > limit && f.shown[r.id] {
			delete(f.shown, r.id)
			f.last[r.id] = r.n // its past was shown under its own name
		}
	}
	at := make(map[string]int)
	for _, r := range rows {
		if !f.shown[r.id] && len(f.shown) < limit {
			f.shown[r.id] = true
			delete(f.last, r.id)
		}
		if !f.shown[r.id] {
			over++
			f.sum(r, keep)
			continue
		}
		key := strings.Join(r.labels, "\xff")
		if i, ok := at[key]; ok {
			out[i].n.add(r.n)
			continue
		}
		at[key] = len(out)
		out = append(out, r)
	}
	for _, r := range f.sums {
		out = append(out, row{labels: append([]string(nil), r.labels...), n: r.n})
	}
	return out, over
}

func group(r row, keep int) string { return strings.Join(r.labels[:keep], "\xff") }

// sum adds to the others what one of them has counted since the last look.
func (f *fold) sum(r row, keep int) {
	g := group(r, keep)
	s := f.sums[g]
	if s == nil {
		s = &row{labels: append([]string(nil), r.labels[:keep]...)}
		for range r.labels[keep:] {
			s.labels = append(s.labels, Other)
		}
		f.sums[g] = s
	}
	s.n.add(r.n.since(f.last[r.id]))
	f.last[r.id] = r.n
}
