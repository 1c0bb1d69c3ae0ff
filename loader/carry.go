// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/maps"
)

// Tables that hold what only packets know are carried over where this build wants them in another shape or
// size than they are pinned in: copied when the programs are loaded, and once more when the programs change
// (TakeOver). In all others the daemon writes what it knows anyway, or they count.

// nextDir has the pins of tables that are to take the place of others. Once swapDir is there too, programs
// may use either: a daemon that dies then leaves both to the next.
func nextDir(bpffs string) string { return filepath.Join(bpffs, "next") }

func swapDir(bpffs string) string { return filepath.Join(nextDir(bpffs), "swap") }

// layout is what there is to know of a table's values.
type layout struct {
	flow bool // they begin as a struct flow does
	tail int  // bytes at the end that stay there, behind what may grow
}

// carried are those tables.
var carried = map[string]layout{
	"flows4": {flow: true}, "flows6": {flow: true},
	"syns4": {tail: 8}, "syns6": {tail: 8},
	"sock_peers": {},
}

// moving is a table that changes hands.
type moving struct {
	name string
	layout
	from []*ebpf.Map // that programs of before still write, the latest first
	to   *ebpf.Map
	// The table that is wanted is in its place: an earlier daemon had begun to leave it.
	inPlace bool
	// This instance's programs write the new one.
	swapped bool
	// Entries that the last merge found no room for.
	lost int
}

func (m *moving) close() {
	for _, f := range m.from {
		f.Close()
	}
	m.to.Close()
}

// openPin is nil where nothing is pinned.
func openPin(path string) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open pinned map %s: %w", path, err)
	}
	return m, nil
}

// carry finds the tables that are pinned otherwise than spec wants them and copies what they hold. They
// are in l.moving then, and the programs are to be loaded with those.
func (l *Loader) carry(spec *ebpf.CollectionSpec) error {
	swapping, err := l.swapping()
	if err != nil {
		return err
	}
	if !swapping {
		// Copied for nothing: no program knows these tables. Or all of them are in their places.
		if err := os.RemoveAll(nextDir(l.opts.BPFFS)); err != nil {
			return fmt.Errorf("remove what an earlier start left: %w", err)
		}
	}
	for name, layout := range carried {
		if spec.Maps[name] == nil {
			continue
		}
		if err := l.carryTable(spec.Maps[name], name, layout); err != nil {
			return fmt.Errorf("carry %s over: %w", name, err)
		}
	}
	return nil
}

// swapping reports whether an earlier daemon has begun to swap programs, and left tables that are not in
// their places.
func (l *Loader) swapping() (bool, error) {
	if _, err := os.Stat(swapDir(l.opts.BPFFS)); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	entries, err := os.ReadDir(nextDir(l.opts.BPFFS))
	if err != nil {
		return false, fmt.Errorf("list the tables of an upgrade: %w", err)
	}
	return len(entries) > 1, nil
}

func (l *Loader) carryTable(want *ebpf.MapSpec, name string, layout layout) error {
	current := filepath.Join(maps.Dir(l.opts.BPFFS), name)
	next := filepath.Join(nextDir(l.opts.BPFFS), name)
	have, err := openPin(current)
	if err != nil {
		return err
	}
	begun, err := openPin(next)
	if err != nil {
		return err
	}
	m := &moving{name: name, layout: layout}
	for _, pinned := range []*ebpf.Map{begun, have} {
		if pinned == nil {
			continue
		}
		if m.to == nil && want.Compatible(pinned) == nil {
			m.to = pinned
		} else if pinned.KeySize() == want.KeySize && pinned.Type() == want.Type {
			m.from = append(m.from, pinned)
		} else {
			pinned.Close() // another table under the same name
		}
	}
	if len(m.from) == 0 && m.to == have {
		if have != nil {
			have.Close()
		}
		return nil
	}
	m.inPlace = m.to != nil && m.to == have
	l.moving = append(l.moving, m)
	if m.to != nil {
		m.swapped = true
		return m.merge()
	}
	spec := want.Copy()
	spec.Pinning = ebpf.PinNone
	if m.to, err = ebpf.NewMap(spec); err != nil {
		return err
	}
	for i, from := range m.from {
		if i == 0 {
			err = m.fill(from)
		} else {
			err = m.mergeFrom(from)
		}
		if err != nil {
			return err
		}
	}
	if err := os.MkdirAll(nextDir(l.opts.BPFFS), 0o700); err != nil {
		return err
	}
	// Another build's, of which all is copied now.
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return m.to.Pin(next)
}

// replacements are the tables of spec that its programs are to use in place of the pinned ones.
func (l *Loader) replacements(spec *ebpf.CollectionSpec) map[string]*ebpf.Map {
	out := make(map[string]*ebpf.Map)
	for _, m := range l.moving {
		if spec.Maps[m.name] != nil {
			out[m.name] = m.to
		}
	}
	return out
}

// carryBatch is how many entries are read and written by one system call.
const carryBatch = 4096

// rows are elements of one size, as the batch calls want them and as bytes.
type rows struct {
	slice reflect.Value
	raw   []byte
	size  int
}

func makeRows(size uint32) rows {
	v := reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(size), reflect.TypeFor[byte]())), carryBatch, carryBatch)
	return rows{v, unsafe.Slice((*byte)(v.UnsafePointer()), carryBatch*int(size)), int(size)}
}

func (r rows) first(n int) any { return r.slice.Slice(0, n).Interface() }
func (r rows) at(i int) []byte { return r.raw[i*r.size : (i+1)*r.size] }

// each calls f with up to carryBatch entries at a time. What comes and goes meanwhile may be missed.
func each(m *ebpf.Map, f func(n int, keys, values rows) error) error {
	keys, values := makeRows(m.KeySize()), makeRows(m.ValueSize())
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys.first(carryBatch), values.first(carryBatch), nil)
		last := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			return fmt.Errorf("read %s: %w", m, err)
		}
		if err := f(n, keys, values); err != nil || last {
			return err
		}
	}
}

// reshape makes a value one of another version: fields are only ever added at the end, and begin as zero.
func (l layout) reshape(to, value []byte) {
	end, valueEnd := len(to)-l.tail, len(value)-l.tail
	clear(to[copy(to[:end], value[:valueEnd]):])
	copy(to[end:], value[valueEnd:])
}

// fill copies into a table that nobody else uses yet.
func (m *moving) fill(from *ebpf.Map) error {
	shaped := makeRows(m.to.ValueSize())
	return each(from, func(n int, keys, values rows) error {
		if n == 0 {
			return nil
		}
		for i := range n {
			m.reshape(shaped.at(i), values.at(i))
		}
		_, err := m.to.BatchUpdate(keys.first(n), shaped.first(n), nil)
		if errors.Is(err, unix.E2BIG) {
			return nil // merge tries each of them again
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", m.to, err)
		}
		return nil
	})
}

// merge copies what the old tables have and the new one has not, or has as it was before. Old and new
// programs may be writing both.
func (m *moving) merge() error {
	m.lost = 0
	for _, from := range m.from {
		if err := m.mergeFrom(from); err != nil {
			return err
		}
	}
	return nil
}

func (m *moving) mergeFrom(from *ebpf.Map) error {
	have, value := make([]byte, m.to.ValueSize()), make([]byte, m.to.ValueSize())
	return each(from, func(n int, keys, values rows) error {
		for i := range n {
			key := keys.at(i)
			m.reshape(value, values.at(i))
			err := m.to.Lookup(key, have)
			switch {
			case errors.Is(err, ebpf.ErrKeyNotExist):
				err = m.to.Update(key, value, ebpf.UpdateNoExist)
				switch {
				case errors.Is(err, ebpf.ErrKeyExist):
					err = nil // a packet was faster
				case errors.Is(err, unix.E2BIG):
					m.lost, err = m.lost+1, nil
				}
			case err != nil:
			case m.flow && later(value, have), !m.flow && !m.swapped && !bytes.Equal(value, have):
				if m.flow {
					keepFlags(value, have)
				}
				if err = m.to.Update(key, value, ebpf.UpdateExist); errors.Is(err, ebpf.ErrKeyNotExist) {
					err = nil
				}
			}
			if err != nil {
				return fmt.Errorf("write %s: %w", m.to, err)
			}
		}
		return nil
	})
}

const (
	packetsAt  = unsafe.Offsetof(bpf.DatapathFlow4{}.F.Packets)
	lastSeenAt = unsafe.Offsetof(bpf.DatapathFlow4{}.F.LastSeen)
	tcpFlagsAt = unsafe.Offsetof(bpf.DatapathFlow4{}.F.TcpFlags)
	flagsAt    = unsafe.Offsetof(bpf.DatapathFlow4{}.F.Flags)
)

// later reports whether a was written after b, as far as the two tell.
func later(a, b []byte) bool {
	seenA, seenB := binary.LittleEndian.Uint32(a[lastSeenAt:]), binary.LittleEndian.Uint32(b[lastSeenAt:])
	if seenA != seenB {
		return int32(seenA-seenB) > 0
	}
	return binary.LittleEndian.Uint64(a[packetsAt:]) > binary.LittleEndian.Uint64(b[packetsAt:])
}

// keepFlags adds what from knows of how the connection ends.
func keepFlags(to, from []byte) {
	to[tcpFlagsAt] |= from[tcpFlagsAt]
	to[flagsAt] |= from[flagsAt] & byte(bpf.DatapathFlowFlagsFLOW_CLOSED_FIRST)
}

// Taken says what a TakeOver did.
type Taken struct {
	Tables []string // that changed hands; none: all were as they are wanted
	Flows  int      // entries that flows4 and flows6 hold now, two a flow
	Lost   int      // entries of all tables that there was no room for
}

// TakeOver puts this instance's programs in the place of an earlier one's, where tables changed their shape
// or size: the old ones and the new ones use different tables, so that no packet may open a flow in between.
// hold is called with true before and, whatever comes of it, with false behind it: until then the data path
// is to open none, for two seconds at least. Where no table changes, it does nothing. After an error, it can
// be called again; what was changed by then stays, and both tables are kept.
func (l *Loader) TakeOver(hold func(bool) error) (taken Taken, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.moving) == 0 {
		return taken, nil
	}
	merge := func() error {
		for _, m := range l.moving {
			if err := m.merge(); err != nil {
				return err
			}
		}
		return nil
	}
	// As much as possible beforehand: the next one has less to write.
	if err := merge(); err != nil {
		return taken, err
	}
	defer func() { err = errors.Join(err, hold(false)) }()
	if err := hold(true); err != nil {
		return taken, err
	}
	if err := merge(); err != nil {
		return taken, err
	}
	if err := hold(true); err != nil { // anew: a large table takes its time
		return taken, err
	}
	if err := os.MkdirAll(swapDir(l.opts.BPFFS), 0o700); err != nil {
		return taken, err
	}
	for _, m := range l.moving {
		m.swapped = true
	}
	if err := l.swap(); err != nil {
		return taken, err
	}
	// What the old programs counted, and what they were about to write when they were told to hold.
	if err := merge(); err != nil {
		return taken, err
	}
	for _, m := range l.moving {
		if !m.inPlace {
			next := filepath.Join(nextDir(l.opts.BPFFS), m.name)
			err := os.Rename(next, filepath.Join(maps.Dir(l.opts.BPFFS), m.name))
			if err != nil {
				return taken, fmt.Errorf("put %s in place: %w", m.name, err)
			}
			m.inPlace = true
		}
		taken.Tables = append(taken.Tables, m.name)
		taken.Lost += m.lost
		if m.flow {
			n, err := maps.Entries(m.to)
			if err != nil {
				return taken, err
			}
			taken.Flows += n
		}
	}
	if err := os.RemoveAll(nextDir(l.opts.BPFFS)); err != nil {
		return taken, err
	}
	for _, m := range l.moving {
		m.close()
	}
	l.moving = nil
	return taken, nil
}

// Moving reports whether tables are still to change hands: this instance's programs use others than those
// that are attached.
func (l *Loader) Moving() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.moving) > 0
}

// swap replaces the programs of every pinned link and filter by this instance's. A device that is gone
// has none. The caller holds l.mu.
func (l *Loader) swap() error {
	pinned, err := l.Pinned()
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range pinned {
		if a.Hook == "cgroup" {
			continue
		}
		var err error
		switch {
		case !isShield(a.Program) && l.tc.Programs[a.Program] == nil:
			// Another build's alone: whoever wants none there takes it off.
		case !isShield(a.Program):
			err = l.attach(a.Program, a.Ifindex)
		case l.shield != nil:
			err = l.shield.swap(a)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, l.attachCgroup())...)
}
