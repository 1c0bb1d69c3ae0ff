// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/netdev"
)

// shieldUses reports whether the shield on the host's uplink looks for flows in a table.
func shieldUses(t *testing.T, lb *lab.Lab, table *ebpf.Map) bool {
	t.Helper()
	x := lb.Host.Link(t, lab.HostIf).Attrs().Xdp
	if !assert.True(t, x != nil && x.Attached) {
		return false
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(x.ProgId))
	require.NoError(t, err)
	defer prog.Close()
	p, err := prog.Info()
	require.NoError(t, err)
	m, err := table.Info()
	require.NoError(t, err)
	used, _ := p.MapIDs()
	id, _ := m.ID()
	return slices.Contains(used, id)
}

// Needs root. The shield looks for flows where the other programs write them: it changes tables with them, no sooner
// and no later.
func TestShieldChangesTables(t *testing.T) {
	lb := lab.New(t, lab.Opts{})
	ifindex := lb.Host.Ifindex(t, lab.HostIf)
	paths := loader.Paths{BPFFS: lb.BPFFS}
	require.NoError(t, lb.Host.Do(func() error {
		l := load(t, loader.Options{Paths: paths, Flows: 1024})
		s, err := l.LoadShield(loader.ShieldNative)
		require.NoError(t, err)
		require.NoError(t, s.Attach(ifindex))
		old, err := l.Maps().Map("flows4").Clone()
		require.NoError(t, err)
		defer old.Close()
		assert.True(t, shieldUses(t, lb, old))
		s.Close()
		l.Close()

		l = load(t, loader.Options{Paths: paths, Flows: 2048})
		s, err = l.LoadShield(loader.ShieldNative)
		require.NoError(t, err)
		require.NoError(t, s.Attach(ifindex))
		assert.True(t, shieldUses(t, lb, old), "as the programs of before, which still write it")
		taken, err := l.TakeOver(func(bool) error { return nil })
		require.NoError(t, err)
		assert.Contains(t, taken.Tables, "flows4")
		assert.True(t, shieldUses(t, lb, l.Maps().Map("flows4")))
		assert.False(t, shieldUses(t, lb, old))
		s.Close()
		l.Close()
		return loader.Cleanup(paths, netdev.Clsact{})
	}))
	require.NoError(t, os.MkdirAll(lb.BPFFS, 0o700))
}

// Needs root. What others take from the shield, its program or its pins, is noticed and put back.
func TestShieldPutBack(t *testing.T) {
	lb := lab.New(t, lab.Opts{})
	ifindex := lb.Host.Ifindex(t, lab.HostIf)
	paths := loader.Paths{BPFFS: lb.BPFFS}
	require.NoError(t, lb.Host.Do(func() error {
		l := load(t, loader.Options{Paths: paths})
		s, err := l.LoadShield(loader.ShieldNative)
		require.NoError(t, err)
		require.NoError(t, s.Attach(ifindex))
		v, err := l.Verify()
		require.NoError(t, err)
		assert.Empty(t, v)

		pins, err := filepath.Glob(filepath.Join(lb.BPFFS, "maps", "shield_*"))
		require.NoError(t, err)
		assert.NotEmpty(t, pins)
		pin := filepath.Join(lb.BPFFS, "links", fmt.Sprintf("%s-%d", loader.ShieldProgram, ifindex))
		k, err := link.LoadPinnedLink(pin, nil)
		require.NoError(t, err)
		require.NoError(t, k.Detach())
		require.NoError(t, k.Close())
		for _, path := range pins {
			require.NoError(t, os.Remove(path))
		}
		v, err = l.Verify()
		require.NoError(t, err)
		assert.Equal(t, []loader.Attachment{{Program: loader.ShieldProgram, Ifindex: ifindex, Hook: "xdp"}}, v.Lost)
		assert.Equal(t, len(pins), v.Repinned)
		require.NoError(t, s.Attach(ifindex))
		assert.True(t, shieldUses(t, lb, l.Maps().Map("flows4")))
		s.Close()
		l.Close()
		return loader.Cleanup(paths, netdev.Clsact{})
	}))
	require.NoError(t, os.MkdirAll(lb.BPFFS, 0o700))
}
