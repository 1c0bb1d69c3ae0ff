// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

func programsDir(bpffs string) string { return filepath.Join(bpffs, "programs") }

// shelf keeps loaded programs pinned, so that the next daemon of the same build need not have the
// kernel verify them again: that is the longest part of a start. A program's pin is named for it and
// for its object, so that no other build takes it for its own.
type shelf struct {
	dir    string
	object string // digest of the object that the programs are from
}

func (s shelf) path(program string) string { return filepath.Join(s.dir, program+"-"+s.object) }

// take returns the program as an earlier daemon loaded it; nil if there is none that works on the
// maps that this one has.
func (s shelf) take(spec *ebpf.ProgramSpec, have map[string]*ebpf.Map, pinned map[string]*ebpf.MapSpec) *ebpf.Program {
	if s == (shelf{}) {
		return nil
	}
	p, err := ebpf.LoadPinnedProgram(s.path(spec.Name), nil)
	if err != nil {
		return nil
	}
	if !uses(p, spec, have, pinned) {
		p.Close()
		return nil
	}
	return p
}

// uses reports whether p works on those of the maps that others see. A map that no other program and
// no daemon looks at, such as scratch space, it may have for itself.
func uses(p *ebpf.Program, spec *ebpf.ProgramSpec, have map[string]*ebpf.Map, specs map[string]*ebpf.MapSpec) bool {
	info, err := p.Info()
	if err != nil || p.Type() != spec.Type {
		return false
	}
	ids, ok := info.MapIDs()
	if !ok {
		return false
	}
	for _, ins := range spec.Instructions {
		name := ins.Reference()
		if !ins.IsLoadFromMap() || name == "" || specs[name] == nil || specs[name].Pinning != ebpf.PinByName {
			continue
		}
		m := have[name]
		if m == nil {
			return false
		}
		info, err := m.Info()
		if err != nil {
			return false
		}
		if id, ok := info.ID(); !ok || !slices.Contains(ids, id) {
			return false
		}
	}
	return true
}

// put pins a program that was loaded, in place of one of the same name.
func (s shelf) put(name string, p *ebpf.Program) error {
	if s == (shelf{}) {
		return nil
	}
	path := s.path(name)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("replace pinned program %s: %w", name, err)
	}
	c, err := p.Clone() // a pin is the file descriptor's for good, and this one is our caller's
	if err != nil {
		return fmt.Errorf("pin program %s: %w", name, err)
	}
	defer c.Close()
	if err := c.Pin(path); err != nil {
		return fmt.Errorf("pin program %s: %w", name, err)
	}
	return nil
}

// clearBuilds removes the programs of other builds.
func clearBuilds(dir string, keep ...shelf) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list pinned programs: %w", err)
	}
	var errs []error
	for _, e := range entries {
		ours := slices.ContainsFunc(keep, func(s shelf) bool { return strings.HasSuffix(e.Name(), "-"+s.object) })
		if ours {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove the program of another version: %w", err))
		}
	}
	return errors.Join(errs...)
}
