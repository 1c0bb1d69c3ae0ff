// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
)

// Needs root. A daemon dies at each moment at which tables change hands, and another goes on that wants the first
// table, the second, or a third: every flow is there afterwards, as it was last seen.
func TestTablesChangeHands(t *testing.T) {
	key := func(i int) bpf.DatapathFlow4Key { return bpf.DatapathFlow4Key{Sport: uint16(i), Proto: 6} }
	put := func(m *ebpf.Map, i int, seen uint32, packets uint64) {
		var v bpf.DatapathFlow4
		v.F.LastSeen, v.F.Packets, v.Saddr = seen, packets, uint32(i)
		require.NoError(t, m.Put(key(i), v))
	}
	const flows = 5000 // more than one batch
	for _, c := range []struct {
		name  string
		died  string // where the daemon that wanted 16384 flows did
		wants int
	}{
		{"nobody died", "", 16384},
		{"copied, then back", "copied", 8192},
		{"swapping, then back", "swapping", 8192},
		{"swapping, then on", "swapping", 16384},
		{"swapping, then a third", "swapping", 32768},
	} {
		t.Run(c.name, func(t *testing.T) {
			paths := loader.Paths{BPFFS: lab.BPFFS(t)}
			l := load(t, loader.Options{Paths: paths, Flows: 8192})
			taken, err := l.TakeOver(func(bool) error { return errors.New("called for nothing") })
			require.NoError(t, err)
			require.Empty(t, taken)
			for i := range flows {
				put(l.Maps().Map("flows4"), i, 10, 1)
			}
			l.Close()

			if c.died != "" {
				l = load(t, loader.Options{Paths: paths, Flows: 16384})
				next := l.Maps().Map("flows4")
				require.EqualValues(t, 32768, next.MaxEntries())
				if c.died == "swapping" {
					_, err := l.TakeOver(func(bool) error { return nil })
					require.NoError(t, err)
					// As it was before the last step: both are pinned, each has what the other has not.
					dir := filepath.Join(paths.BPFFS, "next")
					require.NoError(t, os.MkdirAll(filepath.Join(dir, "swap"), 0o700))
					old, err := ebpf.NewMap(&ebpf.MapSpec{Type: next.Type(), KeySize: next.KeySize(), ValueSize: next.ValueSize(), MaxEntries: 16384})
					require.NoError(t, err)
					for i := range flows {
						put(old, i, 10, 1)
					}
					put(old, flows+1, 11, 1)
					put(old, 1, 12, 3)
					put(next, flows+2, 11, 1)
					put(next, 2, 12, 3)
					current := filepath.Join(maps.Dir(paths.BPFFS), "flows4")
					require.NoError(t, os.Rename(current, filepath.Join(dir, "flows4")))
					require.NoError(t, old.Pin(current))
					old.Close()
				}
				l.Close()
			}

			l = load(t, loader.Options{Paths: paths, Flows: c.wants})
			var held []bool
			_, err = l.TakeOver(func(on bool) error { held = append(held, on); return nil })
			require.NoError(t, err)
			if c.died != "copied" || c.wants != 8192 {
				require.NotEmpty(t, held)
				require.False(t, held[len(held)-1])
				require.True(t, held[0])
			}
			m := l.Maps().Map("flows4")
			require.EqualValues(t, 2*c.wants, m.MaxEntries())
			want := flows
			if c.died == "swapping" {
				want += 2
				for i := 1; i <= 2; i++ {
					var v bpf.DatapathFlow4
					require.NoError(t, m.Lookup(key(i), &v))
					require.EqualValues(t, 3, v.F.Packets, "flow %d as it was last seen", i)
				}
			}
			n, err := maps.Entries(m)
			require.NoError(t, err)
			require.Equal(t, want, n)
			require.NoDirExists(t, filepath.Join(paths.BPFFS, "next"))
			l.Close()
			require.NoError(t, loader.Cleanup(paths, nil))
			require.NoError(t, os.MkdirAll(paths.BPFFS, 0o700))
		})
	}
}

// Needs root. Settings in another version's shape go on where they were, and until that version's programs are replaced,
// theirs say what is said now: also where the daemon dies before that.
func TestSettingsOfAnotherShape(t *testing.T) {
	for _, more := range []int{8, -8} {
		t.Run(fmt.Sprintf("%+d bytes", more), func(t *testing.T) {
			paths := loader.Paths{BPFFS: lab.BPFFS(t)}
			load(t, loader.Options{Paths: paths}).Close()
			pin := filepath.Join(maps.Dir(paths.BPFFS), "config")
			pinned, err := ebpf.LoadPinnedMap(pin, nil)
			require.NoError(t, err)
			size := int(pinned.ValueSize()) + more
			old, err := ebpf.NewMap(&ebpf.MapSpec{Type: pinned.Type(), KeySize: 4, ValueSize: uint32(size), MaxEntries: 1})
			require.NoError(t, err)
			require.NoError(t, pinned.Close())
			t.Cleanup(func() { old.Close() })
			value := bytes.Repeat([]byte{0xee}, size)
			read := func() (c bpf.DatapathConfig) {
				t.Helper()
				require.NoError(t, old.Lookup(uint32(0), value))
				_, err := binary.Decode(append(bytes.Clone(value), make([]byte, 8)...), binary.NativeEndian, &c)
				require.NoError(t, err)
				return c
			}
			head, err := binary.Append(nil, binary.NativeEndian, bpf.DatapathConfig{Generation: 41, HashSeed: 42})
			require.NoError(t, err)
			copy(value, head)
			require.NoError(t, old.Put(uint32(0), value))
			require.NoError(t, os.Remove(pin))
			c, err := old.Clone()
			require.NoError(t, err)
			require.NoError(t, c.Pin(pin))
			require.NoError(t, c.Close())

			take := func() (*loader.Loader, *maps.Writer) {
				t.Helper()
				l := load(t, loader.Options{Paths: paths})
				w, err := maps.NewWriter(l.Maps())
				require.NoError(t, err)
				w.Former = l.Former()
				return l, w
			}
			l, w := take()
			require.EqualValues(t, 42, w.HashSeed())
			require.NoError(t, w.Renew())
			var now bpf.DatapathConfig
			require.NoError(t, l.Maps().Map("config").Lookup(uint32(0), &now))
			require.EqualValues(t, 42, now.Generation, "counted on")
			require.EqualValues(t, 42, read().Generation, "for the programs before, too")
			l.Close() // before anything was attached

			l, w = take()
			require.NoError(t, w.Hold(true))
			if more > 0 {
				require.NotZero(t, read().HoldUntil)
				require.Equal(t, bytes.Repeat([]byte{0xee}, more), value[size-more:], "what only that version knows stays")
			}
			require.NoError(t, w.Hold(false))
			require.NoError(t, w.Renew())
			require.EqualValues(t, 43, read().Generation)
			require.NoError(t, l.ForgetFormer())
			require.Empty(t, l.Former())
			require.NoDirExists(t, filepath.Join(paths.BPFFS, "former"))
			l.Close()
			l = load(t, loader.Options{Paths: paths})
			require.Empty(t, l.Former())
			l.Close()
			require.NoError(t, loader.Cleanup(paths, nil))
			require.NoError(t, os.MkdirAll(paths.BPFFS, 0o700))
		})
	}
}

// Needs root. What a daemon left that died when all tables had changed hands is no upgrade under way.
func TestNothingIsLeftToSwap(t *testing.T) {
	paths := loader.Paths{BPFFS: lab.BPFFS(t)}
	load(t, loader.Options{Paths: paths}).Close()
	next := filepath.Join(paths.BPFFS, "next")
	require.NoError(t, os.MkdirAll(filepath.Join(next, "swap"), 0o700))
	l := load(t, loader.Options{Paths: paths})
	require.False(t, l.Moving())
	l.Close()
	require.NoDirExists(t, next)
	require.NoError(t, loader.Cleanup(paths, nil))
	require.NoError(t, os.MkdirAll(paths.BPFFS, 0o700))
}

// Needs root. A table is not made smaller than its flows allow.
func TestTableTooFull(t *testing.T) {
	paths := loader.Paths{BPFFS: lab.BPFFS(t)}
	l := load(t, loader.Options{Paths: paths, Flows: 1024})
	for i := range 200 {
		require.NoError(t, l.Maps().Map("flows4").Put(bpf.DatapathFlow4Key{Sport: uint16(i)}, bpf.DatapathFlow4{}))
	}
	l.Close()
	l = load(t, loader.Options{Paths: paths, Flows: 128})
	require.Equal(t, 100, l.TooFull())
	require.EqualValues(t, 2048, l.Maps().Map("flows4").MaxEntries())
	l.Close()
	l = load(t, loader.Options{Paths: paths, Flows: 256})
	require.Zero(t, l.TooFull())
	require.EqualValues(t, 512, l.Maps().Map("flows4").MaxEntries())
	l.Close()
	require.NoError(t, loader.Cleanup(paths, nil))
	require.NoError(t, os.MkdirAll(paths.BPFFS, 0o700))
}
