// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/internal/lab"
)

var endpointPoints = []point{
	{10, []string{DockerIPTables, Bpfnet}},
	{100, []string{DockerIPTables, Bpfnet}},
	{1000, []string{DockerIPTables, Bpfnet}},
}

// endpointNetworks is over how many networks the endpoints are spread.
const endpointNetworks = 10

// realEndpoints is up to how many are containers.
const realEndpoints = 100

func endpointsGroup() Group {
	return scaledEndpoints(endpointPoints, endpointNetworks, realEndpoints, "crr")
}

// scaledEndpoints asks a neighbour while there are others, spread over networks; up to real of them are
// containers.
func scaledEndpoints(points []point, networks, real int, metrics ...string) Group {
	return scaleGroup("endpoints", 2*time.Minute, 6*time.Second, points, func(t testing.TB, o Options, mode string, at int) []Probe {
		note := fmt.Sprintf("on %d networks; all are containers", networks)
		if at > real {
			note = fmt.Sprintf("on %d networks; %d are containers, the others bare namespaces with an interface in each network but the default one",
				networks, 2+(at-2)%(networks-1))
			if mode == Bpfnet {
				note += ", as sandboxes of bpfnet's own"
			}
		}
		s := newSpot(t, mode, spotOpts{before: func(s *site) {
			if at > real {
				s.addBareEndpoints(t, at-2, networks)
			} else {
				s.addContainers(t, at-2, networks)
			}
		}})
		stands := func() error { return s.hasEndpoints(at) }
		waitUntil(t, patience, stands)
		return s.scaled(t, o, Key{Scenario: "endpoints", At: at}, "container-container", note, stands, metrics...)
	})
}

// addContainers runs n containers, spread over the networks.
func (s *site) addContainers(t testing.TB, n, over int) {
	t.Helper()
	networks := []string{"bridge"}
	for i := range over - 1 {
		s.dockerNetwork(t, i)
		networks = append(networks, otherName(i))
	}
	parallel(t, n, func(i int) error {
		_, err := s.docker.Run(slices.Concat([]string{"run", "-d", "--network", networks[i%len(networks)]}, sleep)...)
		return err
	})
}

// addBareEndpoints makes n endpoints: namespaces with an interface in each network but the default one,
// and containers on that for the rest.
func (s *site) addBareEndpoints(t testing.TB, n, over int) {
	t.Helper()
	each := over - 1
	for i := range each {
		if s.mode == Bpfnet {
			w := otherWire(i)
			s.bpfnet.MustCLI(t, "network", "create", "--subnet", w.subnet, otherName(i))
		} else {
			s.dockerNetwork(t, i)
		}
	}
	if s.mode == Bpfnet {
		run := []string{"run", "-d"}
		for i := range each {
			run = append(run, "--network", otherName(i))
		}
		run = append(run, "--", "sleep", "1000000")
		parallel(t, n/each, func(int) error {
			_, err := s.bpfnet.CLI(run...)
			return err
		})
	} else {
		for i := range n / each {
			s.addBare(t, i, each)
		}
	}
	for range n % each {
		s.docker.MustRun(t, slices.Concat([]string{"run", "-d"}, sleep)...)
	}
}

// addBare makes the i-th bare namespace, as the Engine makes a container's: a veth pair into each network.
func (s *site) addBare(t testing.TB, i, networks int) {
	t.Helper()
	ns := s.lab.NewNS(t, fmt.Sprintf("bare%d", i))
	var host, inside strings.Builder
	for net := range networks {
		w := otherWire(net)
		fmt.Fprintf(&host, "link add bare%dx%d type veth peer name eth%d netns %s\nlink set bare%dx%d master %s up\n",
			i, net, net, ns.Name, i, net, w.bridge)
		fmt.Fprintf(&inside, "addr add %s dev eth%d\nlink set eth%d up\n", w.host(i+2), net, net)
	}
	feed(t, s.lab.Host, host.String(), "ip", "-batch", "-")
	feed(t, ns, inside.String(), "ip", "-batch", "-")
}

// hasEndpoints counts them where the mode has them.
func (s *site) hasEndpoints(want int) error {
	if s.mode == Bpfnet {
		st, err := s.standing()
		if err != nil {
			return err
		}
		return errors.Join(counted("endpoints", st.Containers, want), counted("entries of map links", st.entries("links"), want))
	}
	ports, err := bridgePorts(s.lab.Host)
	if err != nil {
		return err
	}
	return counted("ports of bridges", ports, want)
}

// bridgePorts counts the interfaces that are ports of some bridge.
func bridgePorts(n *lab.NS) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := n.Run(ctx, "ip", "-o", "link", "show", "type", "veth")
	return strings.Count(out, " master "), err
}
