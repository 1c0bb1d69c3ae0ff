// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/sandbox"
	"github.com/bpfnet/bpfnet/store"
)

// Restore brings the kernel to what the store says, and the store to what has happened since it was
// written: networks get their bridges, running sandboxes are watched and their ports held again, those
// that have ended are buried, and what is in neither is removed. It is called once, before State is
// served for the first time.
//
// A bridge that cannot be made, a port that somebody else holds by now, a stray that cannot be removed:
// each is logged, and the rest is done. An error means that the store or the kernel cannot be asked.
func (m *Manager) Restore(context.Context) error {
	links, err := m.o.Devices.OwnLinks()
	if err != nil {
		return err
	}
	have := make(map[string]bool, len(links))
	for _, l := range links {
		have[l.Name] = true
	}
	rebooted := m.bridgesGone(have)
	m.restoreBridges()
	ports, err := m.bridgePorts()
	if err != nil {
		return err
	}

	var batch store.Batch
	var dead []*box
	for _, b := range m.sortedBoxes() {
		if b.rec.Runner == (store.Process{}) && len(b.endpoints) == 0 {
			continue // it did not run
		}
		if !m.adopt(b) {
			m.bury(b, rebooted, &batch)
			dead = append(dead, b)
			continue
		}
		m.loseEndpoints(b, have, &batch)
		m.replug(b, ports)
		m.restorePorts(b)
	}
	if err := m.dropStrays(&batch); err != nil {
		return err
	}
	if err := m.write(batch); err != nil {
		return err
	}
	for _, b := range dead {
		if err := m.removeFiles(b); err != nil {
			m.o.Log.Warn("remove files of a sandbox that has ended", "sandbox", b.id, "err", err)
		}
	}
	m.removeStrayLinks(links)
	m.removeStrayCgroups()
	m.removeStrayDirs()
	m.mu.Lock()
	all := make([]*network, 0, len(m.networks))
	for _, n := range m.networks {
		all = append(all, n)
	}
	m.changed()
	m.mu.Unlock()
	if err := m.writeHosts(all, nil); err != nil {
		m.o.Log.Warn("write hosts files", "err", err)
	}
	return nil
}

func (m *Manager) sortedBoxes() []*box {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]*box, 0, len(m.boxes))
	for _, b := range m.boxes {
		list = append(list, b)
	}
	slices.SortFunc(list, func(a, b *box) int { return a.rec.Created.Compare(b.rec.Created) })
	return list
}

// bridgesGone reports whether networks were made and none has its bridge: nobody removes them all but a
// restart of the host.
func (m *Manager) bridgesGone(have map[string]bool) bool {
	for _, n := range m.networks {
		if have[n.Bridge] {
			return false
		}
	}
	return len(m.networks) > 0
}

func (m *Manager) restoreBridges() {
	for _, n := range m.ownNetworks() {
		spec := n.bridge()
		spec.Adopt = true
		if _, err := m.o.Devices.EnsureBridge(spec); err != nil {
			m.o.Log.Error("make a network's bridge; its sandboxes have no network", "network", n.Name, "err", err)
		}
	}
}

// adopt takes over a run that an earlier daemon granted, and reports whether it still goes on: the
// sandbox's process runs, or its runner does and is about to start it.
func (m *Manager) adopt(b *box) bool {
	runner, err := open(b.rec.Runner)
	if err != nil {
		runner = nil
	}
	var main *process
	starting := b.rec.Main == (store.Process{})
	if !starting {
		if main, err = open(b.rec.Main); err != nil {
			// Its runner, if there is one, could not tell that it has ended: the daemon was away.
			runner.close()
			return false
		}
	} else if runner == nil {
		return false
	}
	m.mu.Lock()
	b.runner, b.main, b.starting, b.ended = runner, main, starting, make(chan struct{})
	m.mu.Unlock()
	for _, p := range []*process{runner, main} {
		if p != nil {
			m.follow(b, p)
		}
	}
	return true
}

// bury puts the end of a run into the batch.
func (m *Manager) bury(b *box, rebooted bool, batch *store.Batch) {
	rec := b.rec
	how := outcome{unstarted: rec.Main == (store.Process{})}
	if !how.unstarted {
		how = m.readOutcome(b)
		if how.code == nil {
			how.why = "its process ended while no daemon ran"
			if rebooted || !sameBoot(rec.Main.BootID) {
				how.why = "the host was restarted"
			}
		}
	}
	now := time.Now()
	if !how.unstarted {
		rec.Status, rec.Ended, rec.ExitCode, rec.Why = api.StatusExited, now, how.code, how.why
	}
	rec.Main, rec.Runner, rec.Published = store.Process{}, store.Process{}, nil
	if rec.AutoRemove {
		batch.DeleteSandboxes = append(batch.DeleteSandboxes, b.id)
	} else {
		batch.Sandboxes = append(batch.Sandboxes, rec)
	}
	m.recordLeave(batch, b.endpoints, now)
	m.mu.Lock()
	detach(b.endpoints)
	free(b.endpoints, now)
	b.rec, b.endpoints = rec, nil
	if rec.AutoRemove {
		b.removed = true
		delete(m.boxes, b.id)
	}
	m.mu.Unlock()
}

func sameBoot(id string) bool {
	self, err := sandbox.Identify(os.Getpid())
	return err == nil && self.BootID == id
}

// loseEndpoints takes endpoints from a running sandbox whose links somebody else has removed.
func (m *Manager) loseEndpoints(b *box, have map[string]bool, batch *store.Batch) {
	var lost, kept []*endpoint
	for _, e := range b.endpoints {
		if have[e.Link] {
			kept = append(kept, e)
		} else {
			lost = append(lost, e)
		}
	}
	if len(lost) == 0 {
		return
	}
	now := time.Now()
	m.recordLeave(batch, lost, now)
	m.mu.Lock()
	detach(lost)
	free(lost, now)
	rec := b.rec
	rec.Networks = slices.DeleteFunc(slices.Clone(rec.Networks), func(a store.Attach) bool {
		return slices.ContainsFunc(lost, func(e *endpoint) bool { return e.NetworkID == a.NetworkID })
	})
	b.rec, b.endpoints = rec, kept
	m.mu.Unlock()
	batch.Sandboxes = append(batch.Sandboxes, rec)
	for _, e := range lost {
		m.o.Log.Warn("an interface of a sandbox is gone", "sandbox", rec.Name, "link", e.Link, "network", e.net.Name)
	}
}

// bridgePorts says by name which bridge each link of ours is a port of.
func (m *Manager) bridgePorts() (map[string]string, error) {
	served := make(map[string]bool)
	for _, n := range m.ownNetworks() {
		served[n.Bridge] = true
	}
	devices, err := m.o.Devices.Snapshot(served, nil)
	if err != nil {
		return nil, err
	}
	ports := make(map[string]string, len(devices.Links))
	for _, l := range devices.Links {
		ports[l.Name] = l.Bridge
	}
	return ports, nil
}

// replug makes a sandbox's links ports of bridges again that were made anew.
func (m *Manager) replug(b *box, ports map[string]string) {
	for _, e := range b.endpoints {
		if ports[e.Link] == e.net.Bridge || b.main == nil {
			continue
		}
		ns, err := m.openNSOf(b)
		if err == nil {
			err = m.o.Devices.PlugIn(ns, e.veth(), e.net.Bridge)
			ns.Close()
		}
		if err != nil {
			m.o.Log.Error("plug a sandbox's interface in", "sandbox", b.rec.Name, "link", e.Link, "err", err)
		}
	}
}

// dropStrays puts records into the batch that belong to nothing.
func (m *Manager) dropStrays(batch *store.Batch) error {
	own, err := m.o.Store.Own()
	if err != nil {
		return err
	}
	now := time.Now()
	for _, e := range own.Endpoints {
		if m.networks[e.NetworkID] == nil || m.networks[e.NetworkID].endpoints[e.ID] == nil {
			batch.DeleteEndpoints = append(batch.DeleteEndpoints, e.ID)
		}
	}
	for _, r := range own.Releases {
		if m.networks[r.NetworkID] == nil || now.Sub(r.At) > rest {
			batch.DeleteReleases = append(batch.DeleteReleases, r)
		}
	}
	return nil
}

// removeStrayLinks removes links of ours that the model does not have.
func (m *Manager) removeStrayLinks(links []netdev.OwnLink) {
	known := make(map[string]bool)
	for _, n := range m.networks {
		known[n.Bridge] = true
		for _, e := range n.endpoints {
			known[e.Link] = true
		}
	}
	for _, l := range links {
		if known[l.Name] {
			continue
		}
		if err := m.o.Devices.DeleteLink(l.Name); err != nil {
			m.o.Log.Error("remove a stray link", "link", l.Name, "err", err)
		}
	}
}

// removeStrayCgroups ends what is left of sandboxes that do not run: a runner that was killed would have
// done so.
func (m *Manager) removeStrayCgroups() {
	root := filepath.Join(m.o.Cgroup, cgroupDir)
	for _, id := range listIDs(root) {
		if b := m.boxes[id]; b != nil && b.ended != nil {
			continue
		}
		dir := filepath.Join(root, id)
		if err := join(sandbox.KillCgroup(dir), sandbox.RemoveCgroup(dir)); err != nil {
			m.o.Log.Error("end what a sandbox left running", "sandbox", id, "err", err)
		}
	}
}

// removeStrayDirs removes files of sandboxes that are no more.
func (m *Manager) removeStrayDirs() {
	for _, id := range listIDs(m.o.Dir) {
		if m.boxes[id] != nil {
			continue
		}
		if err := os.RemoveAll(filepath.Join(m.o.Dir, id)); err != nil {
			m.o.Log.Error("remove a stray directory", "sandbox", id, "err", err)
		}
	}
}

// listIDs lists the directories in dir that are named as newID does.
func listIDs(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // not made yet
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && validID.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids
}
