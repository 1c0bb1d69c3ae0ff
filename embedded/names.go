// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// validName is Docker's rule for names of containers and networks.
var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// validID is what newID makes.
var validID = regexp.MustCompile(`^[0-9a-f]{64}$`)

var validAlias = regexp.MustCompile(`^[a-zA-Z0-9_.-]+$`)

// checkName refuses a name that nothing can have. What is "network" or "sandbox".
func checkName(what, name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("%s %q: is no name; use two or more of a-z, A-Z, 0-9, _, . and -, a letter or digit first", what, name)
	}
	return nil
}

// checkAlias refuses what could not stand in a hosts file: RFC 1123 2.1, and the underscore as Docker does.
func checkAlias(alias string) error {
	if !validAlias.MatchString(alias) || len(alias) > 255 {
		return fmt.Errorf("alias %q: is no name of a host; use letters, digits, dots, - and _", alias)
	}
	return nil
}

// instead is the command that is meant when a name turns out to be Docker's.
type instead func(name string) string

func docker(verb string) instead {
	return func(name string) string { return "docker " + verb + " " + name }
}

// pick finds the one of that name or ID; failing that, those whose IDs begin so.
func pick[T any](name string, list []T, id, nameOf func(T) string) []T {
	var begin []T
	for _, v := range list {
		if nameOf(v) == name || id(v) == name {
			return []T{v}
		}
		if name != "" && strings.HasPrefix(id(v), name) {
			begin = append(begin, v)
		}
	}
	return begin
}

func ambiguous(what, name string, ids []string) error {
	slices.Sort(ids)
	return fmt.Errorf("%s %q: several IDs begin so: %s; write more of it", what, name, strings.Join(ids, ", "))
}

// findBox finds a sandbox. It fails with api.UnknownError, and names Docker's command where Docker has
// a container of that name.
func (m *Manager) findBox(name string, use instead) (*box, error) {
	m.mu.Lock()
	var list []*box
	var names []string
	for _, b := range m.boxes {
		if b.made {
			list = append(list, b)
			names = append(names, b.rec.Name)
		}
	}
	found := pick(name, list, func(b *box) string { return b.id }, func(b *box) string { return b.rec.Name })
	m.mu.Unlock()

	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		if c, ok := foreignContainer(m.o.Foreign(), name); ok {
			return nil, fmt.Errorf("sandbox %q: is a container of Docker; use %q", name, use(c.Name))
		}
		return nil, &api.UnknownError{What: "sandbox", Name: name, Nearest: netdev.Nearest(name, names)}
	}
	var ids []string
	for _, b := range found {
		ids = append(ids, short(b.id))
	}
	return nil, ambiguous("sandbox", name, ids)
}

// lockBox is findBox for a verb: others wait until the sandbox is unlocked.
func (m *Manager) lockBox(name string, use instead) (*box, error) {
	b, err := m.findBox(name, use)
	if err != nil {
		return nil, err
	}
	b.verb.Lock()
	m.mu.Lock()
	removed := b.removed
	m.mu.Unlock()
	if removed {
		b.verb.Unlock()
		return m.lockBox(name, use) // for the error, or for another one that has the name by now
	}
	return b, nil
}

// foreignContainer finds a container by its name or ID.
func foreignContainer(s policy.State, name string) (policy.Endpoint, bool) {
	i := slices.IndexFunc(s.Endpoints, func(e policy.Endpoint) bool {
		return e.Name == name || len(name) >= 12 && strings.HasPrefix(e.SandboxID, name)
	})
	if i < 0 {
		return policy.Endpoint{}, false
	}
	return s.Endpoints[i], true
}

func foreignNetwork(s policy.State, name string) (policy.Network, bool) {
	i := slices.IndexFunc(s.Networks, func(n policy.Network) bool {
		return n.Name == name || len(name) >= 12 && strings.HasPrefix(n.ID, name)
	})
	if i < 0 {
		return policy.Network{}, false
	}
	return s.Networks[i], true
}

// findNetwork finds a network by its name, which may have "bpfnet/" in front, its ID or the beginning of
// that. It fails as findBox does.
func (m *Manager) findNetwork(name string, use instead) (*network, error) {
	if name == "default" { // Docker's word
		name = DefaultNetwork
	}
	source, plain, qualified := strings.Cut(name, "/")
	if !qualified {
		plain = name
	} else if source == string(policy.SourceDocker) {
		return nil, fmt.Errorf("network %q: is a network of Docker; use %q", name, use(plain))
	}
	m.mu.Lock()
	var list []*network
	var names []string
	for _, n := range m.networks {
		if !n.leaving {
			list = append(list, n)
			names = append(names, n.Name)
		}
	}
	m.mu.Unlock()
	var found []*network
	if !qualified || source == string(policy.SourceStore) {
		found = pick(plain, list, func(n *network) string { return n.ID }, func(n *network) string { return n.Name })
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		if n, ok := foreignNetwork(m.o.Foreign(), name); ok {
			return nil, fmt.Errorf("network %q: is a network of Docker; use %q", name, use(n.Name))
		}
		if isMode(name) {
			return nil, fmt.Errorf("network %q: is a mode of bpfnet run --network, and no network", name)
		}
		return nil, &api.UnknownError{What: "network", Name: name, Nearest: netdev.Nearest(plain, names)}
	}
	var ids []string
	for _, n := range found {
		ids = append(ids, short(n.ID))
	}
	return nil, ambiguous("network", name, ids)
}

// Words for names that nobody chose. Each pair is easy to say and to tell from the others.
var (
	adjectives = strings.Fields(`able amber ample apt arctic basic blue bold brave brief bright brisk calm
		civil clean clear clever cosmic crisp deep dry eager early easy even exact fair fast fine firm fleet
		fond frank fresh gentle glad golden good grand green happy hardy honest humble ideal jolly keen kind
		large lasting level light lively loyal lucid lunar merry mild mint modest neat nimble noble open
		patient plain polar prime prompt proud pure quick quiet rapid ready rich rosy round royal sharp
		shiny silent silver simple smart smooth snug sober solar solid spare spry stable steady still stout
		sunny sure swift tidy trim true upbeat usual vast vivid warm wise witty young zesty`)
	nouns = strings.Fields(`acorn alder anchor anvil arch aspen badger barge basin beacon beaver birch bison
		bobbin brook cable canal canoe castle cedar chisel cliff clover comet copper coral crane creek dune
		eagle elm falcon fern ferry finch fjord forge garden geyser glacier grove gull harbor hare hawk heron
		hill ibex inlet island juniper kayak kestrel lagoon lantern larch ledge lever linden lynx maple marsh
		meadow mesa mill moose moss oak ocean orchard osprey otter owl pebble pier pine plover pond poplar
		prairie quarry quartz raft raven reef ridge river robin rook rudder sail salmon sparrow spruce stone
		stork summit swallow swan tern thistle timber trout tulip tundra valley walnut walrus willow wren`)
)

// inventName makes a name that is not taken. The caller holds m.mu.
func inventName(taken func(string) bool) string {
	for range 8 {
		name := adjectives[rand.IntN(len(adjectives))] + "_" + nouns[rand.IntN(len(nouns))]
		if !taken(name) {
			return name
		}
	}
	for {
		if name := fmt.Sprintf("sandbox_%06x", rand.IntN(1<<24)); !taken(name) {
			return name
		}
	}
}
