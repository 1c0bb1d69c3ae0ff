// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s09: a network of the user's own, and the operator who lets it talk to the default one.
func s09(t *testing.T, w *world) {
	w.MustRun(t, "network", "create", "-d", "bridge", "--subnet", "172.19.0.0/16", "--gateway", "172.19.0.1", "mynetwork")
	w.Serve(t, "--name a1 --network mynetwork", "--tcp 80 --udp 80")
	w.Serve(t, "--name b1 --network mynetwork", "--tcp 80 --udp 80")
	w.Serve(t, "--name c1", "--tcp 80 --udp 80")
	a4, b4, c4 := w.v4(t, "a1", "mynetwork"), w.v4(t, "b1", "mynetwork"), w.v4(t, "c1", w.Default())

	pings := func(from, to string) []int {
		t.Helper()
		out, err := w.Run("exec", from, "ping", "-c", "1", "-W", "2", to)
		require.NoError(t, err, out)
		return ttlsIn(out)
	}
	for _, to := range []string{lab.Host4.String(), lab.HostB4.String(), "172.19.0.1", b4.String(), "b1", "a1"} {
		assert.Equal(t, []int{64}, pings("a1", to), to)
	}

	a, c := w.NS(t, "a1"), w.NS(t, "c1")
	w.closed(t, a, isolated, c4)
	w.closed(t, c, isolated, a4)

	w.allow(t, "mynetwork", w.Default())
	assert.Equal(t, []int{63}, pings("a1", c4.String()), "a routed hop")
	assert.Equal(t, []int{63}, pings("c1", a4.String()), "a routed hop")
	open(t, a, []netip.Addr{a4}, c4)
	open(t, c, []netip.Addr{c4}, a4)

	w.disallow(t, w.Default(), "mynetwork") // the order says nothing
	w.closed(t, a, isolated, c4)
	w.closed(t, c, isolated, a4)
}
