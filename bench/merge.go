// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"slices"
)

// Merge puts the groups of another run in place of the report's own, each record with its run. Groups stay
// whole, so that whatever was interleaved is compared with what it was interleaved with. It fails where the
// machine was another, where the other run was quick, and where it measured less of a group.
func (r Report) Merge(later Report) (Report, error) {
	a, b := r.Header, later.Header
	for _, same := range []struct{ what, a, b string }{
		{"kernel", a.Kernel, b.Kernel}, {"CPU", a.CPU, b.CPU}, {"CPUs", fmt.Sprint(a.CPUs), fmt.Sprint(b.CPUs)},
		{"pinning", a.Pinning, b.Pinning}, {"rounds", fmt.Sprint(a.Rounds), fmt.Sprint(b.Rounds)},
		{"quick", fmt.Sprint(a.Quick), fmt.Sprint(b.Quick)},
	} {
		if same.a != same.b {
			return Report{}, fmt.Errorf("merge: %s differs: %q and %q", same.what, same.a, same.b)
		}
	}
	measured := make(map[string][]Key)
	for _, rec := range later.Records {
		measured[rec.Group] = append(measured[rec.Group], rec.Key)
	}
	out := Report{Header: a}
	for _, rec := range r.Records {
		keys := measured[rec.Group]
		if keys == nil {
			out.Records = append(out.Records, rec)
		} else if !slices.Contains(keys, rec.Key) {
			return Report{}, fmt.Errorf("merge: %s is not in the later run, which measured others of group %s: measure the whole group", rec.Key, rec.Group)
		}
	}
	for _, rec := range later.Records {
		if rec.Run == nil {
			rec.Run = &Origin{Started: b.Started, Version: b.Version}
		}
		out.Records = append(out.Records, rec)
	}
	return out, nil
}
