// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// Networks of two sources may have one name: Docker asks nobody. Pairs are kept by qualified names, so
// that a network which somebody makes elsewhere is never let in by an old word for another.

// split takes a qualified name apart; source is empty for a plain one.
func split(name string) (source policy.Source, plain string) {
	if s, rest, ok := strings.Cut(name, "/"); ok {
		return policy.Source(s), rest
	}
	return "", name
}

// qualify finds the network that a name, qualified or not, stands for. It fails with
// api.UnknownError, or says which there are of that name.
func qualify(name string, networks []policy.Network) (string, error) {
	var plain, found []string
	for _, n := range networks {
		plain = append(plain, n.Name)
		if n.QualifiedName() == name || n.Name == name {
			found = append(found, n.QualifiedName())
		}
	}
	slices.Sort(plain)
	switch len(found) {
	case 0:
		return "", &api.UnknownError{What: "network", Name: name, Nearest: netdev.Nearest(name, plain)}
	case 1:
		return found[0], nil
	}
	slices.Sort(found)
	return "", fmt.Errorf("network %q: there are several of that name; say %s", name, strings.Join(found, " or "))
}

// shortName is how a network is shown: with its source only where there is another of its name.
func shortName(qualified string, networks []policy.Network) string {
	_, plain := split(qualified)
	for _, n := range networks {
		if n.Name == plain && n.QualifiedName() != qualified {
			return qualified
		}
	}
	return plain
}

// networks are those that allow and disallow know.
func (d *Daemon) networks() []policy.Network {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append(slices.Clone(d.engine.Networks), d.own.State().Networks...)
}

// pair takes the names that allow and disallow are given.
func pair(p api.Pair, networks []policy.Network) (a, b string, err error) {
	if a, err = qualify(p.A, networks); err != nil {
		return "", "", err
	}
	if b, err = qualify(p.B, networks); err != nil {
		return "", "", err
	}
	if a == b {
		return "", "", fmt.Errorf("network %q: is one network; name two", p.A)
	}
	return a, b, nil
}

// Allow lets two networks talk, both directions, from when it returns on.
func (d *Daemon) Allow(ctx context.Context, p api.Pair) (bool, error) {
	a, b, err := pair(p, d.networks())
	if err != nil {
		return false, err
	}
	changed, err := d.store.Allow(a, b)
	if err != nil {
		return false, err
	}
	return changed, d.Flush(ctx)
}

// Disallow takes Allow back; flows that it had made possible end. The names of networks that are gone
// will do.
func (d *Daemon) Disallow(ctx context.Context, p api.Pair) (bool, error) {
	pairs, err := d.store.Allowed()
	if err != nil {
		return false, err
	}
	// Of networks that are gone, the pairs are all that is known.
	networks := d.networks()
	for _, pair := range pairs {
		for _, name := range []string{pair.A, pair.B} {
			source, plain := split(name)
			if !slices.ContainsFunc(networks, func(n policy.Network) bool { return n.QualifiedName() == name }) {
				networks = append(networks, policy.Network{Name: plain, Source: source})
			}
		}
	}
	a, b, err := pair(p, networks)
	if err != nil {
		return false, err
	}
	changed, err := d.store.Disallow(a, b)
	if err != nil {
		return false, err
	}
	return changed, d.Flush(ctx)
}
