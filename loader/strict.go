// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
)

const strictPrefix = "strict_"

// IsStrict reports whether a program is one of strict mode.
func IsStrict(program string) bool { return strings.HasPrefix(program, strictPrefix) }

// Strict are the programs on the cgroup that the engine's containers run below. They are loaded on
// demand, and what is pinned of them goes on without a daemon, as everything else does.
type Strict struct {
	l     *Loader
	c     *ebpf.Collection
	spec  *ebpf.CollectionSpec
	dir   string
	inode uint64 // of the cgroup that they are on; 0: none yet
}

// LoadStrict loads the programs of strict mode for a cgroup2 directory, which is made if it is not
// there: the engine makes its own no sooner than its first container.
func (l *Loader) LoadStrict(dir string) (*Strict, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the cgroup of strict mode: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || uint32(st.Type) != unix.CGROUP2_SUPER_MAGIC {
		return nil, fmt.Errorf("strict mode: %s is no cgroup2 directory; name the one that the engine's containers run below (its --cgroup-parent)", dir)
	}
	spec, err := bpf.LoadStrict()
	if err != nil {
		return nil, fmt.Errorf("read the strict object: %w", err)
	}
	l.shareSizes(spec)
	c, err := l.load(spec, shelf{programsDir(l.opts.BPFFS), bpf.StrictDigest()})
	if err != nil {
		return nil, err
	}
	return &Strict{l: l, c: c, spec: spec, dir: dir}, nil
}

// Sources is the map of who may use which address where.
func (s *Strict) Sources() *ebpf.Map { return s.c.Maps["strict_sources"] }

// Attach puts the programs on the cgroup. It is idempotent, and follows a cgroup that was removed and
// made again.
func (s *Strict) Attach() error {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return fmt.Errorf("make the cgroup of strict mode: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(s.dir, &st); err != nil {
		return fmt.Errorf("cgroup %s: %w", s.dir, err)
	}
	if st.Ino == s.inode {
		return nil
	}
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	for name, prog := range s.c.Programs {
		if err := s.l.forgetOther(pinName(name, 0), st.Ino); err != nil {
			return err
		}
		err := s.l.attachLink(pinName(name, 0), prog, func() (link.Link, error) {
			return link.AttachCgroup(link.CgroupOptions{Path: s.dir, Attach: s.spec.Programs[name].AttachType, Program: prog})
		})
		if err != nil {
			return fmt.Errorf("cgroup %s: %w", s.dir, err)
		}
	}
	s.inode = st.Ino
	return nil
}

// Forget has the next Attach look at every program: some were lost.
func (s *Strict) Forget() { s.inode = 0 }

// forgetOther unpins a link that is on another cgroup than the one of that inode.
func (l *Loader) forgetOther(name string, inode uint64) error {
	path := filepath.Join(linksDir(l.opts.BPFFS), name)
	k, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil // attachLink says what is wrong with it
	}
	defer k.Close()
	info, err := k.Info()
	if err == nil {
		if cg := info.Cgroup(); cg != nil && cg.CgroupId == inode {
			return nil
		}
	}
	if have, ok := l.links[name]; ok {
		have.Close()
		delete(l.links, name)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the pin of another cgroup: %w", err)
	}
	return nil
}

// Close closes file descriptors; what is pinned stays.
func (s *Strict) Close() { s.c.Close() }

// DetachStrict takes the programs off that an earlier daemon has put on a cgroup.
func (l *Loader) DetachStrict() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	list, err := pinned(l.opts.BPFFS)
	errs := []error{err}
	for _, a := range list {
		if !IsStrict(a.Program) {
			continue
		}
		if err := os.Remove(filepath.Join(linksDir(l.opts.BPFFS), pinName(a.Program, 0))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("leave strict mode: %w", err))
		}
	}
	return errors.Join(errs...)
}
