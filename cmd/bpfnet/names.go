// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// Which source has made a thing, as the snapshot says it.
const (
	sourceDocker = string(policy.SourceDocker)
	sourceOwn    = string(policy.SourceStore)
)

// idLength is how much of an ID is shown, as Docker shows it.
const idLength = 12

func shortID(id string) string { return id[:min(idLength, len(id))] }

// named is something that a word of the command line may mean.
type named struct {
	source, name, id string
}

// find returns the index of what word means: a name, plain or with its source before it
// (docker/web), a full ID, or the beginning of just one. It fails with api.UnknownError.
func find(what, word string, all []named) (int, error) {
	var byName, byPrefix []int
	for i, n := range all {
		switch {
		case word == "":
		case n.id == word:
			return i, nil
		case n.name == word, n.qualified() == word:
			byName = append(byName, i)
		case strings.HasPrefix(n.id, word):
			byPrefix = append(byPrefix, i)
		}
	}
	switch {
	case len(byName) == 1:
		return byName[0], nil
	case len(byName) > 1:
		var list []string
		for _, i := range byName {
			list = append(list, all[i].qualified())
		}
		slices.Sort(list)
		return 0, fmt.Errorf("%s %q: there are several of that name; say %s", what, word, strings.Join(list, " or "))
	case len(byPrefix) == 1:
		return byPrefix[0], nil
	case len(byPrefix) > 1:
		return 0, fmt.Errorf("%s %q: %d IDs begin so; write more of it", what, word, len(byPrefix))
	}
	var plain []string
	for _, n := range all {
		plain = append(plain, n.name)
	}
	slices.Sort(plain)
	return 0, &api.UnknownError{What: what, Name: word, Nearest: netdev.Nearest(word, plain)}
}

func (n named) qualified() string { return policy.Qualify(policy.Source(n.source), n.name) }
