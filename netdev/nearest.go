// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"cmp"
	"slices"
)

// nearestMax is how many names an error text can bear.
const nearestMax = 3

// Nearest returns at most three of have, the most similar to name first (Levenshtein distance,
// then alphabetical). It is made for error texts: names that share nothing are still better
// than none.
func Nearest(name string, have []string) []string {
	type scored struct {
		name string
		d    int
	}
	list := make([]scored, 0, len(have))
	for _, h := range have {
		list = append(list, scored{h, distance(name, h)})
	}
	slices.SortFunc(list, func(a, b scored) int {
		return cmp.Or(cmp.Compare(a.d, b.d), cmp.Compare(a.name, b.name))
	})
	var out []string
	for _, s := range list {
		if len(out) == nearestMax {
			break
		}
		if !slices.Contains(out, s.name) {
			out = append(out, s.name)
		}
	}
	return out
}

// distance is the Levenshtein distance in runes.
func distance(a, b string) int {
	s, t := []rune(a), []rune(b)
	row := make([]int, len(t)+1)
	for j := range row {
		row[j] = j
	}
	for i := range s {
		diag := row[0]
		row[0] = i + 1
		for j := range t {
			cost := 1
			if s[i] == t[j] {
				cost = 0
			}
			diag, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, diag+cost)
		}
	}
	return row[len(t)]
}
