// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/sandbox"
)

// The files of a sandbox's directory that it sees instead of the host's, by their names there.
var mounted = map[string]string{"hosts": "/etc/hosts", "resolv.conf": "/etc/resolv.conf", "hostname": "/etc/hostname"}

// writeFiles writes the files of a sandbox that is about to run, but for its hosts, which needs addresses.
func (m *Manager) writeFiles(b *box) error {
	m.mu.Lock()
	rec := b.rec
	m.mu.Unlock()
	if err := os.MkdirAll(m.dir(b), 0o755); err != nil {
		return err
	}
	if ownsNames(rec.Mode) || len(rec.DNS) > 0 {
		host, err := sandbox.HostResolv()
		if err != nil {
			return err
		}
		if err := sandbox.Rewrite(m.file(b, "resolv.conf"), sandbox.Resolv(host, rec.DNS)); err != nil {
			return err
		}
	}
	if rec.Hostname != "" && rec.Mode != api.ModeContainer {
		return sandbox.Rewrite(m.file(b, "hostname"), []byte(rec.Hostname+"\n"))
	}
	return nil
}

// removeFiles removes what only a sandbox that runs needs. The log stays.
func (m *Manager) removeFiles(b *box) error {
	m.hosting.Lock()
	defer m.hosting.Unlock()
	var errs []error
	for name := range mounted {
		errs = append(errs, removeFile(m.file(b, name)))
	}
	return join(append(errs, m.removeExit(b))...)
}

// removeExit removes the exit code that a runner has left, once it is known.
func (m *Manager) removeExit(b *box) error { return removeFile(m.file(b, "exit")) }

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (m *Manager) file(b *box, name string) string { return filepath.Join(m.dir(b), name) }

// ownsNames reports whether a sandbox of that mode has a hosts file of its own.
func ownsNames(mode string) bool { return mode == "" || mode == api.ModeNone }

// files are those that a sandbox sees instead of the host's: its own, or those of the one whose namespace
// it shares. A host that lacks one of them has nothing to mount over.
func (m *Manager) files(b *box) map[string]string {
	m.mu.Lock()
	for b.rec.Mode == api.ModeContainer && m.boxes[b.rec.JoinID] != nil {
		b = m.boxes[b.rec.JoinID]
	}
	m.mu.Unlock()
	out := make(map[string]string)
	for name, target := range mounted {
		if _, err := os.Stat(m.file(b, name)); err != nil {
			continue
		}
		if _, err := os.Lstat(target); err == nil {
			out[target] = m.file(b, name)
		}
	}
	return out
}

// hostsJob is a hosts file that is to be written.
type hostsJob struct {
	box  *box
	path string
	own  sandbox.HostsFile // without neighbours
	key  string            // of the neighbourhood
}

// neighbourhood is what the hosts files of all sandboxes have in common that are in the same networks.
type neighbourhood struct {
	entries []sandbox.HostsEntry
	names   map[string]bool // in lower case
	text    []byte          // behind what every file begins with
}

// writeHosts brings the hosts files of all sandboxes in these networks up to date, and that of own, which
// may be nil. On the default network a sandbox has no name for others. A sandbox's process may have seen
// to it that its file cannot be written (chattr +i): that is not the failure of others.
func (m *Manager) writeHosts(networks []*network, own *box) error {
	m.hosting.Lock()
	defer m.hosting.Unlock()
	jobs, common := m.hostsJobs(networks, own)
	begin := len(sandbox.Hosts(sandbox.HostsFile{}))
	for _, n := range common {
		n.names = make(map[string]bool)
		for _, e := range n.entries {
			for _, name := range e.Names {
				n.names[strings.ToLower(name)] = true
			}
		}
		n.text = sandbox.Hosts(sandbox.HostsFile{Neighbours: n.entries})[begin:]
	}
	var errs []error
	for _, j := range jobs {
		text, n := sandbox.Hosts(j.own), common[j.key]
		if n.names[strings.ToLower(j.own.Hostname)] {
			j.own.Neighbours = n.entries // which its own name goes before
			text = sandbox.Hosts(j.own)
		} else {
			text = append(text, n.text...)
		}
		// A directory that is missing is that of a sandbox which has just been removed.
		err := sandbox.Rewrite(j.path, text)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
		case j.box != own && errors.Is(err, fs.ErrPermission):
			m.o.Log.Warn("write a sandbox's hosts file", "sandbox", j.box.id, "err", err)
		default:
			errs = append(errs, fmt.Errorf("hosts file: %w", err))
		}
	}
	return join(errs...)
}

// hostsJobs are the files that writeHosts has to write, and what is to stand in them.
func (m *Manager) hostsJobs(networks []*network, own *box) ([]hostsJob, map[string]*neighbourhood) {
	m.mu.Lock()
	defer m.mu.Unlock()
	boxes := make(map[*box]bool)
	if own != nil {
		boxes[own] = true
	}
	for _, n := range networks {
		for _, e := range n.endpoints {
			if b := m.boxes[e.SandboxID]; e.live && b != nil && n.Name != DefaultNetwork {
				boxes[b] = true
			}
		}
	}
	jobs := make([]hostsJob, 0, len(boxes))
	common := make(map[string]*neighbourhood)
	for b := range boxes {
		j := hostsJob{box: b, path: m.file(b, "hosts"), own: sandbox.HostsFile{Hostname: b.rec.Hostname}}
		var in []*network
		for _, e := range b.endpoints {
			j.own.Addrs = append(j.own.Addrs, e.Addrs...)
			if e.net.Name != DefaultNetwork {
				in = append(in, e.net)
			}
		}
		slices.SortFunc(in, func(a, b *network) int { return strings.Compare(a.ID, b.ID) })
		for _, n := range in {
			j.key += n.ID
		}
		if common[j.key] == nil {
			common[j.key] = &neighbourhood{entries: m.hostsEntries(in)}
		}
		jobs = append(jobs, j)
	}
	return jobs, common
}

// hostsEntries are the names that are known in these networks. The caller holds m.mu.
func (m *Manager) hostsEntries(networks []*network) []sandbox.HostsEntry {
	var out []sandbox.HostsEntry
	for _, n := range networks {
		for _, e := range n.endpoints {
			if !e.live {
				continue
			}
			names := e.names(m.boxName(e.SandboxID))
			for _, a := range e.Addrs {
				out = append(out, sandbox.HostsEntry{Addr: a, Names: names})
			}
		}
	}
	return out
}

// removeDir removes a sandbox's files.
func (m *Manager) removeDir(b *box) error {
	m.hosting.Lock() // nobody writes its hosts file meanwhile
	defer m.hosting.Unlock()
	return os.RemoveAll(m.dir(b))
}
