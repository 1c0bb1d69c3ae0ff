// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/policy"
)

// openIn opens a daemon in a lab, with an engine that is not there.
func openIn(t *testing.T, l *lab.Lab) *Daemon {
	t.Helper()
	var d *Daemon
	require.NoError(t, l.Host.Do(func() (err error) {
		d, err = open(Config{Docker: "unix://" + filepath.Join(l.Dir, "none.sock"), Flows: 1024, Paths: Paths{
			State: filepath.Join(l.Dir, "state"), Socket: filepath.Join(l.Dir, "s.sock"), BPFFS: l.BPFFS, Cgroup: l.Cgroup,
		}})
		return err
	}))
	t.Cleanup(d.close)
	return d
}

// Needs root. What the engine tells is shown and stored while the daemon runs, though no round waits for it.
func TestShownAndStored(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := openIn(t, l)
	require.NoError(t, l.Host.Do(d.reconcile))
	ctx, cancel := context.WithCancel(t.Context())
	var group errgroup.Group
	group.Go(func() error { return l.Host.Do(func() error { return d.reconcileLoop(ctx) }) })
	want := policy.State{Networks: []policy.Network{{
		ID: "n1", Name: "blue", Source: policy.SourceDocker, Bridge: "br-000000000001",
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")},
	}}}
	d.update(want)
	lab.Eventually(t, 5*time.Second, "the network is in the snapshot and in the store", func() bool {
		s, err := api.ReadSnapshot(d.cfg.State)
		require.NoError(t, err)
		have, _, err := d.store.State(policy.SourceDocker)
		require.NoError(t, err)
		return len(s.Networks) == 1 && s.Networks[0].Name == "blue" && len(have.Networks) == 1
	})
	// The last word is kept too: the loop ends with it.
	d.update(policy.State{})
	lab.Eventually(t, 5*time.Second, "a round has seen it", func() bool {
		d.round.Lock()
		defer d.round.Unlock()
		return len(d.known.Networks) == 0
	})
	cancel()
	require.NoError(t, group.Wait())
	have, _, err := d.store.State(policy.SourceDocker)
	require.NoError(t, err)
	assert.Empty(t, have.Networks)
}

// Needs root. A round that finds nothing new writes nothing; the one that reads back mends what is missing.
func TestRoundMends(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := openIn(t, l)
	m, err := ebpf.LoadPinnedMap(filepath.Join(maps.Dir(l.BPFFS), "host_addrs"), nil)
	require.NoError(t, err)
	defer m.Close()
	keys := func() (out []bpf.DatapathAddr) {
		var k bpf.DatapathAddr
		var v bpf.DatapathHostAddr
		it := m.Iterate()
		for it.Next(&k, &v) {
			out = append(out, k)
		}
		require.NoError(t, it.Err())
		return out
	}
	for range 2 { // the first gives slots away
		require.NoError(t, l.Host.Do(d.reconcile))
	}
	all := keys()
	require.NotEmpty(t, all)
	for _, k := range all {
		require.NoError(t, m.Delete(k))
	}
	require.NoError(t, l.Host.Do(d.reconcile))
	require.Empty(t, keys())
	d.mu.Lock()
	d.resync = true
	d.mu.Unlock()
	require.NoError(t, l.Host.Do(d.reconcile))
	require.ElementsMatch(t, all, keys())
}
