// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
)

// Needs root: networks made at once have different subnets, and of several with one name there is one.
func TestParallelNetworks(t *testing.T) {
	w := newWorld(t)
	var all sync.WaitGroup
	var made atomic.Int32
	for i := range 24 {
		all.Go(func() {
			_, err := w.CreateNetwork(t.Context(), api.NetworkSpec{Name: fmt.Sprintf("n%d", i%8)})
			if err == nil {
				made.Add(1)
			}
		})
		all.Go(func() { assert.NoError(t, w.Default(t.Context())) })
	}
	all.Wait()
	assert.EqualValues(t, 8, made.Load())
	seen := make(map[netip.Prefix]string)
	for _, n := range w.State().Networks {
		assert.Empty(t, seen[n.Subnets[0]], n.Name)
		seen[n.Subnets[0]] = n.Name
	}
	assert.Len(t, seen, 9)
	assert.Len(t, ownLinks(t, w.opts.Devices), 9)
}

// Needs root: a network is removed while sandboxes start in it. Each start succeeds, and then the network
// stays, or is refused and nothing is left of it.
func TestRemoveWhileStarting(t *testing.T) {
	w := newWorld(t)
	for i := range 10 {
		name := fmt.Sprintf("n%d", i)
		w.network(api.NetworkSpec{Name: name})
		spec := w.spec("box-" + name)
		spec.Networks = []api.Attach{{Network: name}}
		w.create(spec)
		var both sync.WaitGroup
		var started *running
		var startErr, removeErr error
		both.Go(func() { started, startErr = w.try(spec.Name) })
		both.Go(func() { _, removeErr = w.RemoveNetwork(t.Context(), api.Named{Name: name}) })
		both.Wait()
		if startErr == nil {
			assert.EqualError(t, removeErr, fmt.Sprintf(`network %q: in use by %s; disconnect or remove them first`, name, spec.Name))
			started.begin()
			started.finish(0)
			_, err := w.RemoveNetwork(t.Context(), api.Named{Name: name})
			assert.NoError(t, err)
		} else {
			assert.ErrorContains(t, startErr, "has been removed")
			assert.NoError(t, removeErr)
		}
		assert.Empty(t, ownLinks(t, w.opts.Devices))
	}
}

// Needs root: a sandbox's own hostname means itself, whatever its neighbours are called.
func TestHostsOwnName(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/24")}})
	spec := w.spec("db")
	spec.Networks = []api.Attach{{Network: "n1", Aliases: []string{"store", "DB"}}}
	db := w.run(spec)
	spec = w.spec("web")
	spec.Networks = []api.Attach{{Network: "n1", Aliases: []string{"store"}}}
	spec.Hostname = "Db"
	web := w.run(spec)
	assert.Contains(t, hosts(t, web), "172.19.0.3\tDb\n172.19.0.2\tstore\n172.19.0.3\tweb store\n")
	assert.Contains(t, hosts(t, db), "172.19.0.2\tdb store\n172.19.0.3\tweb store\n")
	web.finish(0)
	assert.NotContains(t, hosts(t, db), "web")
	db.finish(0)
}

// Needs root: the default network, made for a sandbox that then cannot be made, stays if another one counts
// on it by now.
func TestDefaultNetworkShared(t *testing.T) {
	w := newWorld(t)
	server, err := net.Listen("tcp", "0.0.0.0:7070")
	require.NoError(t, err)
	defer server.Close()
	refused := w.spec("refused")
	refused.Publish = []api.PortSpec{{Proto: "tcp", First: 7070, Target: 80}}

	_, err = w.CreateSandbox(t.Context(), refused)
	require.ErrorContains(t, err, "7070")
	assert.Empty(t, w.State().Networks, "nobody else wants it")

	w.set(func() {
		w.onApply = func() {
			w.set(func() { w.onApply = nil })
			w.create(w.spec("second"))
		}
	})
	_, err = w.CreateSandbox(t.Context(), refused)
	require.ErrorContains(t, err, "7070")
	w.launch("second").finish(0)
}
