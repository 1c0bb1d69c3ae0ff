// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/doctor"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/store"
)

// handover looks at who goes on with Docker's networks.
func (a *App) handover(ctx context.Context) (doctor.Handover, error) {
	// Without networks of Docker's nothing need be looked at, nor be there to look with.
	s, err := api.ReadSnapshot(a.paths.State)
	if errors.Is(err, api.ErrNoSnapshot) {
		return doctor.Handover{}, nil
	}
	if err != nil {
		return doctor.Handover{}, err
	}
	docker := false
	for _, n := range s.Networks {
		docker = docker || n.Source == string(policy.SourceDocker)
	}
	if !docker {
		return doctor.Handover{}, nil
	}
	f, err := a.gatherEngine(ctx)
	if err != nil {
		return doctor.Handover{}, err
	}
	return f.Handover(), nil
}

// forDocker takes out of the changes what an Engine needs that goes on: forwarding, with all that the
// kernel and the daemon have changed with it. kept says for which families there was such a thing.
func forDocker(changes []store.Change, to doctor.Handover) (back []store.Change, kept doctor.Handover) {
	ours := func(path string) bool {
		for _, c := range changes {
			if c.Path == path && !c.Side {
				return true
			}
		}
		return false
	}
	kept.V4 = to.V4 && ours("net/ipv4/ip_forward")
	kept.V6 = to.V6 && ours("net/ipv6/conf/all/forwarding")
	for _, c := range changes {
		switch {
		case kept.V4 && (c.Path == "net/ipv4/ip_forward" || c.Side && strings.HasPrefix(c.Path, "net/ipv4/")):
		case kept.V6 && (c.Path == "net/ipv6/conf/all/forwarding" || c.Side && strings.HasPrefix(c.Path, "net/ipv6/") || filepath.Base(c.Path) == "accept_ra"):
		default:
			back = append(back, c)
		}
	}
	return back, kept
}

// handFlows has netfilter know the flows that the programs forward.
func handFlows(bpffs string) (int, error) {
	m, err := maps.Open(bpffs)
	if errors.Is(err, maps.ErrNotLoaded) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer m.Close()
	list, err := m.Live()
	if err != nil {
		return 0, err
	}
	return netdev.Track(list)
}

// closeForward does what an Engine does that turns forwarding on: the host forwards for nobody else.
func closeForward(ctx context.Context, to doctor.Handover) error {
	for _, x := range []struct {
		wanted bool
		tool   string
	}{{to.V4, "iptables"}, {to.V6, "ip6tables"}} {
		if !x.wanted {
			continue
		}
		path := findTool(x.tool)
		if path == "" {
			return fmt.Errorf("close the FORWARD chain: %s is not there", x.tool)
		}
		ctx, cancel := context.WithTimeout(ctx, commandTimeout)
		out, err := exec.CommandContext(ctx, path, "-w", "-P", "FORWARD", "DROP").CombinedOutput()
		cancel()
		if err != nil {
			return fmt.Errorf("close the FORWARD chain: %s: %w: %s", x.tool, err, oneLine(strings.TrimSpace(string(out))))
		}
	}
	return nil
}
