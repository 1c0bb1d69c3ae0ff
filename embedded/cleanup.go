// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/sandbox"
	"github.com/bpfnet/bpfnet/store"
)

// Cleanup removes what bpfnet made for networks and sandboxes of its own: links, cgroups, files and their
// records. No daemon may run. It refuses while sandboxes run, unless it is forced to end them. It may be
// called again.
func Cleanup(s *store.Store, d *netdev.Devices, dir, cgroup string, force bool) error {
	own, err := s.Own()
	if err != nil {
		return err
	}
	if err := endAll(own, cgroup, force); err != nil {
		return err
	}
	var errs []error
	links, err := d.OwnLinks()
	errs = append(errs, err)
	for _, l := range links {
		errs = append(errs, d.DeleteLink(l.Name))
	}
	errs = append(errs, sandbox.KillCgroup(filepath.Join(cgroup, cgroupDir)), sandbox.RemoveCgroup(filepath.Join(cgroup, cgroupDir)))
	errs = append(errs, os.RemoveAll(dir))
	if err := join(errs...); err != nil {
		return err
	}
	batch := store.Batch{DeleteReleases: own.Releases}
	for _, n := range own.Networks {
		batch.DeleteNetworks = append(batch.DeleteNetworks, n.ID)
	}
	for _, b := range own.Sandboxes {
		batch.DeleteSandboxes = append(batch.DeleteSandboxes, b.ID)
	}
	for _, e := range own.Endpoints {
		batch.DeleteEndpoints = append(batch.DeleteEndpoints, e.ID)
	}
	return s.Write(batch)
}

// endAll ends the sandboxes that run, or names them.
func endAll(own store.Own, cgroup string, force bool) error {
	var running []*process
	var names []string
	defer func() {
		for _, p := range running {
			p.close()
		}
	}()
	for _, b := range own.Sandboxes {
		id := b.Main
		if id == (store.Process{}) {
			id = b.Runner // which is about to start it, if there is one
		}
		if p, err := open(id); err == nil {
			running = append(running, p)
			names = append(names, b.Name)
		}
	}
	if len(names) > 0 && !force {
		slices.Sort(names)
		return fmt.Errorf("sandboxes run: %s; stop them first, or use --force to end them", joinNames(names))
	}
	for _, p := range running {
		if err := p.kill(); err != nil {
			return err
		}
	}
	if err := sandbox.KillCgroup(filepath.Join(cgroup, cgroupDir)); err != nil {
		return err
	}
	for _, p := range running {
		<-p.done()
	}
	return nil
}
