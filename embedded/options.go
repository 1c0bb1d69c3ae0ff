// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/policy"
)

// parseOptions reads a network's options as Docker's are read, but refuses what cannot be served: who
// asks is there to be told.
func parseOptions(given map[string]string, internal bool) (policy.Options, error) {
	for _, key := range slices.Sorted(maps.Keys(given)) {
		switch {
		case !slices.Contains(policy.KnownOptions, key):
			return policy.Options{}, fmt.Errorf("option %q: not known; there are %s", key, strings.Join(policy.KnownOptions, ", "))
		case given[key] == "":
			return policy.Options{}, fmt.Errorf("option %s: %q is no value", key, "")
		}
	}
	o, problems := policy.ParseOptions(given, internal)
	if len(problems) > 0 {
		return o, fmt.Errorf("option %s: %s", problems[0].Setting, problems[0].Text)
	}
	return o, nil
}
