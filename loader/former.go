// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"

	"github.com/bpfnet/bpfnet/maps"
)

const configMap = "config"

// formerDir has the pins of settings in another version's shape, each named by its map's ID: programs that are
// attached may still go by them.
func formerDir(bpffs string) string { return filepath.Join(bpffs, "former") }

// carryConfig has the settings go on in the shape that spec wants: generations are counted from where they were,
// or a flow would look as if it had been judged by what is served now. What was pinned is kept for the programs that
// read it, and the ones of earlier starts are opened.
func (l *Loader) carryConfig(spec *ebpf.CollectionSpec) error {
	path := filepath.Join(maps.Dir(l.opts.BPFFS), configMap)
	have, err := openPin(path)
	if err != nil {
		return err
	}
	if have != nil {
		err := l.replaceConfig(spec.Maps[configMap], have, path)
		have.Close()
		if err != nil {
			return fmt.Errorf("carry the settings over: %w", err)
		}
	}
	dir := formerDir(l.opts.BPFFS)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list the settings of other versions: %w", err)
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue // left by a start that ended too soon
		}
		m, err := openPin(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		if m != nil { // nobody has removed it just now
			l.former = append(l.former, m)
		}
	}
	return nil
}

func (l *Loader) replaceConfig(want *ebpf.MapSpec, have *ebpf.Map, path string) error {
	if have.Type() != want.Type || have.KeySize() != want.KeySize || want.Compatible(have) == nil {
		return nil
	}
	value, shaped := make([]byte, have.ValueSize()), make([]byte, want.ValueSize)
	if err := have.Lookup(uint32(0), value); err != nil {
		return err
	}
	layout{}.reshape(shaped, value)
	spec := want.Copy()
	spec.Pinning = ebpf.PinNone
	to, err := ebpf.NewMap(spec)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := to.Put(uint32(0), shaped); err != nil {
		return err
	}
	info, err := have.Info()
	if err != nil {
		return err
	}
	id, ok := info.ID()
	if !ok {
		return errors.New("the kernel names no map by a number")
	}
	dir := formerDir(l.opts.BPFFS)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if _, err := pinAgain(filepath.Join(dir, strconv.Itoa(int(id))), func(path string) error { return pinCopy(have, path) }); err != nil {
		return err
	}
	next := filepath.Join(dir, "next")
	if err := removePin(next); err != nil {
		return err
	}
	if err := to.Pin(next); err != nil {
		return err
	}
	return os.Rename(next, path) // there is no moment without one
}

// pinCopy pins a map that is pinned elsewhere too.
func pinCopy(m *ebpf.Map, path string) error {
	c, err := m.Clone() // one that knows of no pin
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Pin(path)
}

// Former are the settings in the shapes of other versions, which programs of theirs that are attached may go by.
// They begin as this version's do. ForgetFormer closes them.
func (l *Loader) Former() []*ebpf.Map { return l.former }

// ForgetFormer gives them up: no program of another version is attached any more.
func (l *Loader) ForgetFormer() error {
	if len(l.former) == 0 {
		return nil
	}
	if err := os.RemoveAll(formerDir(l.opts.BPFFS)); err != nil {
		return fmt.Errorf("remove the settings of other versions: %w", err)
	}
	l.closeFormer()
	return nil
}

func (l *Loader) closeFormer() {
	for _, m := range l.former {
		m.Close()
	}
	l.former = nil
}
