// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

var networkPoints = []point{
	{1, []string{DockerIPTables, Bpfnet}},
	{100, []string{DockerIPTables, Bpfnet}},
	{500, []string{DockerIPTables, Bpfnet}},
}

func networksGroup() Group { return scaledNetworks(networkPoints, "crr") }

// scaledNetworks asks a neighbour on one network while there are others.
func scaledNetworks(points []point, metrics ...string) Group {
	return scaleGroup("networks", time.Minute, 6*time.Second, points, func(t testing.TB, o Options, mode string, at int) []Probe {
		var note string
		s := newSpot(t, mode, spotOpts{before: func(s *site) { note = s.addNetworks(t, at-1) }})
		stands := func() error { return s.hasNetworks(at) }
		waitUntil(t, patience, stands)
		return s.scaled(t, o, Key{Scenario: "networks", At: at}, "container-container", note, stands, metrics...)
	})
}

// otherWire is the i-th network beside the measured one. The Engine's own pools have about thirty.
func otherWire(i int) wire {
	return wire{fmt.Sprintf("br-bench%d", i), fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250)}
}

// host is the n-th address of the subnet, with its prefix length. The gateway has the first.
func (w wire) host(n int) string {
	return fmt.Sprintf("%s%d/24", strings.TrimSuffix(w.subnet, "0/24"), n)
}

func otherName(i int) string { return fmt.Sprintf("other%d", i) }

// addNetworks makes n networks beside the default one, without anybody in them, and says how. The network
// named "other0" is always a real one.
func (s *site) addNetworks(t testing.TB, n int) (note string) {
	t.Helper()
	if n == 0 {
		return ""
	}
	if s.mode == Bpfnet {
		s.dockerNetwork(t, 0)
		parallel(t, n-1, func(i int) error {
			w := otherWire(i + 1)
			_, err := s.bpfnet.CLI("network", "create", "--subnet", w.subnet, otherName(i+1))
			return err
		})
		return "the default network and one other are the Engine's, the rest bpfnet's own"
	}
	// The Engine takes almost a second for each.
	s.dockerNetwork(t, 0)
	if n == 1 {
		return ""
	}
	var others []wire
	var links strings.Builder
	for i := 1; i < n; i++ {
		w := otherWire(i)
		others = append(others, w)
		fmt.Fprintf(&links, "link add %s type bridge\naddr add %s dev %s\nlink set %s up\n", w.bridge, w.host(1), w.bridge, w.bridge)
	}
	feed(t, s.lab.Host, links.String(), "ip", "-batch", "-")
	rules, err := moreNetworks(s.savedRules(t), otherWire(0), others)
	if err != nil {
		t.Fatal(err)
	}
	s.restoreRules(t, rules)
	return "two networks are the Engine's; the bridges of the others were made by ip, their rules by iptables-restore, as the Engine writes them"
}

// dockerNetwork has the Engine make the i-th other network.
func (s *site) dockerNetwork(t testing.TB, i int) {
	t.Helper()
	w := otherWire(i)
	s.docker.MustRun(t, "network", "create", "--subnet", w.subnet,
		"-o", "com.docker.network.bridge.name="+w.bridge, otherName(i))
}

// hasNetworks counts the networks where the mode has them.
func (s *site) hasNetworks(want int) error {
	if s.mode == Bpfnet {
		st, err := s.standing()
		if err != nil {
			return err
		}
		return errors.Join(counted("networks", st.Networks, want), counted("entries of map subnets", st.entries("subnets"), want))
	}
	var errs []error
	for _, words := range [][]string{
		{"-A DOCKER-ISOLATION-STAGE-1 -i "}, {"-A DOCKER-ISOLATION-STAGE-2 -o "},
		{"-A FORWARD -o ", "-j DOCKER"}, {"-A POSTROUTING -s ", "! -o "},
	} {
		n, err := s.ruleCount(words...)
		errs = append(errs, err, counted(fmt.Sprintf("rules %q", slices.Concat(words)), n, want))
	}
	return errors.Join(errs...)
}
