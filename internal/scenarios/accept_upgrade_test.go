// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// flowTable is what is pinned as flows4: the size of a value and the number of entries.
func (w *site) flowTable(t *testing.T) (value, entries uint32) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(w.BPFFS, "maps", "flows4"), nil)
	require.NoError(t, err)
	defer m.Close()
	return m.ValueSize(), m.MaxEntries()
}

// generation is that of the policy, which only ever grows.
func (w *site) generation(t *testing.T) uint32 {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(w.BPFFS, "maps", "config"), nil)
	require.NoError(t, err)
	defer m.Close()
	value := make([]byte, m.ValueSize())
	require.NoError(t, m.Lookup(uint32(0), value))
	return binary.NativeEndian.Uint32(value[unsafe.Offsetof(bpf.DatapathConfig{}.Generation):])
}

// Needs root and clang 14. Under traffic of every kind, the daemon is replaced by one whose flow entries are
// eight bytes longer, and by one whose are not; the flow tables become larger, and smaller. Nobody notices.
func TestAcceptUpgrade(t *testing.T) {
	later := lab.Later(t)
	ways := []string{"tcx"}
	if count(10) == 10 {
		ways = append(ways, "clsact")
	}
	for _, attach := range ways {
		t.Run(attach, func(t *testing.T) {
			w := newOwnSite(t, "--attach", attach, "--flows", "8192")
			w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
			w.sandbox(t, "peer", "blue")
			w.sandbox(t, "far", "red")
			w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
			w.works(t)
			now := w.b.Binary()
			tr := begin(t, w)
			fine := w.Client.Stream(t, "--interval", "1ms", "--duration", "5m", at(lab.Host4, 8080))
			steps := []struct {
				name, binary string
				flows        string
				kill         bool
				value, size  uint32
			}{
				{"upgrade", later, "8192", false, 72, 16384},
				{"downgrade after SIGKILL", now, "8192", true, 64, 16384},
				{"larger table", now, "16384", true, 64, 32768},
				{"upgrade with a smaller table", later, "4096", true, 72, 8192},
				{"same again", later, "4096", true, 72, 8192},
				{"downgrade", now, "4096", false, 64, 8192},
			}
			for _, s := range steps {
				before := w.generation(t)
				if s.kill {
					w.b.Kill()
				} else {
					w.b.Stop(t)
				}
				w.b.Use(s.binary, "--flows", s.flows)
				w.b.Start(t)
				tr.flow(t)
				value, size := w.flowTable(t)
				require.Equal(t, []uint32{s.value, s.size}, []uint32{value, size}, s.name)
				carried := regexp.MustCompile(`flow tables carried over to another shape or size.*`).FindString(w.b.Log())
				t.Logf("%s: %s", s.name, carried)
				require.Equal(t, s.name != "same again", carried != "", s.name)
				_, err := os.Stat(filepath.Join(w.BPFFS, "next"))
				require.ErrorIs(t, err, os.ErrNotExist, "the old tables are dropped")
				require.GreaterOrEqual(t, w.generation(t), before, "settings go on where they were")
				lab.Eventually(t, 20*time.Second, "the old settings are dropped", func() bool {
					_, err := os.Stat(filepath.Join(w.BPFFS, "former"))
					return errors.Is(err, os.ErrNotExist)
				})
				w.works(t)
			}
			tr.streams["fine, published tcp"] = fine
			tr.end(t, true)
			promise.Kept(t, promise.Lifecycle,
				"Upgrading and downgrading between versions whose flow entries differ, and changing the size of the flow tables, ends no connection and loses no packet.",
				"%d changes, %d streams and %d pings through each", len(steps)-1, len(tr.streams), len(tr.pings))
		})
	}
}
