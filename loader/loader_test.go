// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
)

func TestMain(m *testing.M) { lab.Main(m) }

func load(t *testing.T, o loader.Options) *loader.Loader {
	t.Helper()
	o.Classifier = netdev.Clsact{}
	if o.Flows == 0 {
		o.Flows = 1024
	}
	l, err := loader.Load(o)
	require.NoError(t, err)
	return l
}

// Needs root. A link outlives its daemon and is taken over without a moment without a program.
func TestLinksOutliveTheLoader(t *testing.T) {
	for _, attach := range []string{"tcx", "clsact"} {
		t.Run(attach, func(t *testing.T) {
			lb := lab.New(t, lab.Opts{})
			ifindex := lb.Host.Ifindex(t, lab.HostIf)
			paths := loader.Paths{BPFFS: lb.BPFFS, Cgroup: lb.Cgroup}
			require.NoError(t, lb.Host.Do(func() error {
				l := load(t, loader.Options{Paths: paths, Attach: attach})
				require.Equal(t, attach, l.AttachName())
				require.NoError(t, l.Attach(loader.FromUplink, ifindex))
				require.NoError(t, l.Attach(loader.FromUplink, ifindex), "idempotent")
				require.NoError(t, l.Attach(loader.ToUplink, ifindex))
				require.NoError(t, l.AttachCgroup())
				l.Close()
				require.Equal(t, 1, programs(t, lb, attach, ifindex), "it goes on without its loader")

				again := load(t, loader.Options{Paths: paths, Attach: attach})
				require.NoError(t, again.Attach(loader.FromUplink, ifindex))
				require.NoError(t, again.AttachCgroup())
				require.Equal(t, 1, programs(t, lb, attach, ifindex), "one, not two")
				require.NoError(t, again.Detach(loader.ToUplink, ifindex))
				require.NoError(t, again.Detach(loader.ToUplink, ifindex), "idempotent")
				again.Close()

				require.NoError(t, loader.Cleanup(paths, netdev.Clsact{}))
				require.Zero(t, programs(t, lb, attach, ifindex))
				require.NoDirExists(t, filepath.Join(lb.BPFFS, "links"))
				require.NoError(t, loader.Cleanup(paths, netdev.Clsact{}), "idempotent")
				return nil
			}))
			require.NoError(t, os.MkdirAll(lb.BPFFS, 0o700)) // the lab's own, which it removes
		})
	}
}

// programs counts ours at the ingress of a device.
func programs(t *testing.T, lb *lab.Lab, attach string, ifindex int) int {
	t.Helper()
	if attach == "clsact" {
		out := lb.Host.MustRun(t, "tc", "filter", "show", "dev", lab.HostIf, "ingress")
		n := 0
		for i := 0; i+len("bpfnet_from_uplink") <= len(out); i++ {
			if out[i:i+len("bpfnet_from_uplink")] == "bpfnet_from_uplink" {
				n++
			}
		}
		return n
	}
	res, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
	require.NoError(t, err)
	return len(res.Programs)
}

// Needs root. The way of attaching may change between two runs.
func TestAttachChangesHands(t *testing.T) {
	lb := lab.New(t, lab.Opts{})
	ifindex := lb.Host.Ifindex(t, lab.HostIf)
	paths := loader.Paths{BPFFS: lb.BPFFS}
	require.NoError(t, lb.Host.Do(func() error {
		for i, attach := range []string{"tcx", "clsact", "tcx"} {
			l := load(t, loader.Options{Paths: paths, Attach: attach})
			require.NoError(t, l.Attach(loader.FromUplink, ifindex))
			l.Close()
			require.Equal(t, (i+1)%2, programs(t, lb, "tcx", ifindex))
			require.Equal(t, i%2, programs(t, lb, "clsact", ifindex))
		}
		require.NoError(t, loader.Cleanup(paths, netdev.Clsact{}))
		return nil
	}))
	require.NoError(t, os.MkdirAll(lb.BPFFS, 0o700))
}

// Needs root. Flow tables: the running size is kept unless another is asked for.
func TestFlowTableSize(t *testing.T) {
	paths := loader.Paths{BPFFS: lab.BPFFS(t)}
	size := func(flows int) (uint32, uint32) {
		l, err := loader.Load(loader.Options{Paths: paths, Flows: flows, Classifier: netdev.Clsact{}})
		require.NoError(t, err)
		defer l.Close()
		m := l.Maps()
		return m.Map("flows4").MaxEntries(), m.Map("flows6").MaxEntries()
	}
	v4, v6 := size(1000)
	require.EqualValues(t, 2048, v4, "two entries a flow, a power of two")
	require.EqualValues(t, 1024, v6)
	v4, _ = size(0)
	require.EqualValues(t, 2048, v4, "kept")
	v4, _ = size(4096)
	require.EqualValues(t, 8192, v4, "asked for")
	require.NoError(t, loader.Cleanup(paths, nil))
	require.NoError(t, os.MkdirAll(paths.BPFFS, 0o700))
}

// Needs root. Strict mode looks into the tables that the data path has, and leaves their pins as they are.
func TestStrictSharesTables(t *testing.T) {
	lb := lab.New(t, lab.Opts{})
	paths := loader.Paths{BPFFS: lb.BPFFS, Cgroup: lb.Cgroup}
	assert.NoError(t, lb.Host.Do(func() error {
		l, err := loader.Load(loader.Options{Paths: paths, Flows: 4096, Classifier: netdev.Clsact{}})
		if err != nil {
			return err
		}
		defer l.Close()
		if _, err := l.LoadStrict(filepath.Join(lb.Cgroup, "containers")); err != nil {
			return err
		}
		for _, name := range []string{"flows4", "flows6"} {
			pinned, err := ebpf.LoadPinnedMap(filepath.Join(maps.Dir(lb.BPFFS), name), nil)
			if err != nil {
				return err
			}
			defer pinned.Close()
			assert.Equal(t, mapID(t, l.Maps().Map(name)), mapID(t, pinned), name)
		}
		return nil
	}))
}

func mapID(t *testing.T, m *ebpf.Map) ebpf.MapID {
	t.Helper()
	info, err := m.Info()
	if !assert.NoError(t, err) {
		return 0
	}
	id, _ := info.ID()
	return id
}

// Needs root. A map of another shape is of another version; the rest survives.
func TestForeignMapIsReplaced(t *testing.T) {
	paths := loader.Paths{BPFFS: lab.BPFFS(t)}
	l := load(t, loader.Options{Paths: paths})
	l.Close()
	pin := filepath.Join(maps.Dir(paths.BPFFS), "pairs")
	require.NoError(t, os.Remove(pin))
	odd, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 3})
	require.NoError(t, err)
	require.NoError(t, odd.Pin(pin))
	odd.Close()
	l = load(t, loader.Options{Paths: paths})
	require.Equal(t, ebpf.Hash, l.Maps().Map("pairs").Type())
	l.Close()
	require.NoError(t, loader.Cleanup(paths, nil))
	require.NoError(t, os.MkdirAll(paths.BPFFS, 0o700))
}

// Needs root.
func TestLoadRefuses(t *testing.T) {
	_, err := loader.Load(loader.Options{Paths: loader.Paths{BPFFS: t.TempDir()}})
	require.ErrorContains(t, err, "not below a bpffs mount; mount one there")
	dir := lab.BPFFS(t)
	_, err = loader.Load(loader.Options{Paths: loader.Paths{BPFFS: dir}, Attach: "xdp"})
	require.ErrorContains(t, err, `attach "xdp": unknown; use tcx or clsact`)
}

// Needs root. Two instances on the same pins would write each other's maps.
func TestPinsHaveOneOwner(t *testing.T) {
	paths := loader.Paths{BPFFS: lab.BPFFS(t)}
	first := load(t, loader.Options{Paths: paths})
	_, err := loader.Load(loader.Options{Paths: paths, Classifier: netdev.Clsact{}})
	require.ErrorIs(t, err, loader.ErrLocked)
	require.ErrorContains(t, err, "--bpffs")
	first.Close()
	load(t, loader.Options{Paths: paths}).Close()
	require.NoError(t, loader.Cleanup(paths, nil))
	require.NoError(t, os.MkdirAll(paths.BPFFS, 0o700))
}

// Needs root. Nothing is left of an expiry and a purge of empty tables, and both say so.
func TestSweep(t *testing.T) {
	paths := loader.Paths{BPFFS: lab.BPFFS(t)}
	l := load(t, loader.Options{Paths: paths})
	defer l.Close()
	for _, f := range []func() (loader.Swept, error){l.Expire, l.Purge} {
		s, err := f()
		require.NoError(t, err)
		require.Zero(t, s)
	}
	require.NoError(t, loader.Cleanup(paths, nil))
	require.NoError(t, os.MkdirAll(paths.BPFFS, 0o700))
}

// Needs root. A second start of the same build takes up the programs that the first one loaded; one
// whose map is another is loaded anew, and one of another build goes.
func TestProgramsAreKept(t *testing.T) {
	lb := lab.New(t, lab.Opts{})
	paths := loader.Paths{BPFFS: lb.BPFFS, Cgroup: lb.Cgroup}
	ids := func() map[string]ebpf.ProgramID {
		entries, err := os.ReadDir(filepath.Join(lb.BPFFS, "programs"))
		require.NoError(t, err)
		out := make(map[string]ebpf.ProgramID)
		for _, e := range entries {
			p, err := ebpf.LoadPinnedProgram(filepath.Join(lb.BPFFS, "programs", e.Name()), nil)
			require.NoError(t, err)
			info, err := p.Info()
			p.Close()
			require.NoError(t, err)
			id, _ := info.ID()
			name, _, _ := strings.Cut(e.Name(), "-")
			out[name] = id
		}
		return out
	}
	require.NoError(t, lb.Host.Do(func() error {
		l := load(t, loader.Options{Paths: paths})
		_, err := l.Expire()
		require.NoError(t, err)
		l.Close()
		first := ids()
		require.Contains(t, first, loader.FromContainer)
		require.Contains(t, first, "sock_connect4")
		require.Contains(t, first, "expire")

		stray := filepath.Join(lb.BPFFS, "programs", "from_bridge-of-another-build")
		require.NoError(t, os.Rename(filepath.Join(lb.BPFFS, "programs", glob(t, lb, "from_bridge")), stray))
		l = load(t, loader.Options{Paths: paths})
		_, err = l.Expire()
		require.NoError(t, err)
		l.Close()
		second := ids()
		require.NotEqual(t, first[loader.FromBridge], second[loader.FromBridge])
		require.NoFileExists(t, stray)
		delete(first, loader.FromBridge)
		for name, id := range first {
			require.Equal(t, id, second[name], name)
		}

		// A daemon that died before all were loaded: those that come later have the locks of the earlier ones.
		locks := func(program string) (out []ebpf.MapID) {
			p, err := ebpf.LoadPinnedProgram(filepath.Join(lb.BPFFS, "programs", glob(t, lb, program)), nil)
			require.NoError(t, err)
			defer p.Close()
			info, err := p.Info()
			require.NoError(t, err)
			ids, _ := info.MapIDs()
			for _, id := range ids {
				m, err := ebpf.NewMapFromID(id)
				require.NoError(t, err)
				info, err := m.Info()
				require.NoError(t, err)
				m.Close()
				if info.Name == "takeovers" {
					out = append(out, id)
				}
			}
			return out
		}
		require.NoError(t, os.Remove(filepath.Join(lb.BPFFS, "programs", glob(t, lb, "expire"))))
		l = load(t, loader.Options{Paths: paths})
		_, err = l.Expire()
		require.NoError(t, err)
		l.Close()
		require.Equal(t, first[loader.FromContainer], ids()[loader.FromContainer])
		require.NotEqual(t, first["expire"], ids()["expire"])
		require.Len(t, locks("expire"), 1)
		require.Equal(t, locks(loader.FromContainer), locks("expire"))

		// The map that remembers what sockets dialled is of the sock programs alone.
		require.NoError(t, os.Remove(filepath.Join(maps.Dir(lb.BPFFS), "sock_peers")))
		l = load(t, loader.Options{Paths: paths})
		l.Close()
		third := ids()
		require.NotEqual(t, second["sock_connect4"], third["sock_connect4"], "it has another map")
		require.Equal(t, second[loader.FromHost], third[loader.FromHost])
		return nil
	}))
}

// waiting is a classifier that is asked, and answers when it is told to.
type waiting struct {
	netdev.Clsact
	once   sync.Once
	asked  chan struct{}
	answer chan struct{}
}

func (c *waiting) HasFilter(ifindex int, egress bool) (bool, error) {
	c.once.Do(func() { close(c.asked) })
	<-c.answer
	return c.Clsact.HasFilter(ifindex, egress)
}

// Needs root. While the kernel is asked what is in place, a new port is guarded.
func TestVerifyHoldsNobodyUp(t *testing.T) {
	lb := lab.New(t, lab.Opts{})
	ifindex := lb.Host.Ifindex(t, lab.HostIf)
	paths := loader.Paths{BPFFS: lb.BPFFS}
	slow := &waiting{asked: make(chan struct{}), answer: make(chan struct{})}
	var l *loader.Loader
	require.NoError(t, lb.Host.Do(func() (err error) {
		if l, err = loader.Load(loader.Options{Paths: paths, Attach: "clsact", Flows: 1024, Classifier: slow}); err != nil {
			return err
		}
		return l.Attach(loader.FromUplink, ifindex)
	}))
	defer l.Close()
	verified, attached := make(chan error, 1), make(chan error, 1)
	go func() {
		verified <- lb.Host.Do(func() error {
			v, err := l.Verify()
			assert.Empty(t, v)
			return err
		})
	}()
	<-slow.asked
	go func() { attached <- lb.Host.Do(func() error { return l.Attach(loader.ToUplink, ifindex) }) }()
	select {
	case err := <-attached:
		assert.NoError(t, err)
	case <-time.After(20 * time.Second):
		t.Error("it waits for the answer")
	}
	close(slow.answer)
	require.NoError(t, <-verified)
}

// glob is the name of the program's pin.
func glob(t *testing.T, lb *lab.Lab, program string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(lb.BPFFS, "programs", program+"-*"))
	require.NoError(t, err)
	require.Len(t, found, 1)
	return filepath.Base(found[0])
}
