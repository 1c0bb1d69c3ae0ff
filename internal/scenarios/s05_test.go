// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s05: the server sees the remote's address; two networks cannot reach each other, until the
// operator allows it.
func s05(t *testing.T, w *world) {
	w.Serve(t, "-p 3306:3306 -p 3306:3306/udp --name db", "--tcp 3306,80 --udp 3306,80")
	for _, c := range []struct {
		from         *lab.NS
		client, host netip.Addr
	}{
		{w.Client, lab.Client4, lab.Host4},
		{w.Client, lab.Client6, lab.Host6},
		{w.Client, lab.Client4, lab.HostB4}, // by the host's address on the far side
		{w.Client2, lab.Client24, lab.HostB4},
		{w.Client2, lab.Client26, lab.HostB6},
	} {
		for _, network := range []string{"tcp", "udp"} {
			r := c.from.MustGet(t, "--network", network, addrPort(c.host, "3306"))
			assert.Equal(t, c.client, remote(t, r), "%s to %v: who the server saw", network, c.host)
		}
	}

	w.MustRun(t, "network", "create", "--ipv6", "--subnet", "fd00:b1::/64", "bri1")
	w.Serve(t, "--name one --network bri1", "--tcp 80 --udp 80")
	w.ready(t, "one", "bri1")
	db, one := w.NS(t, "db"), w.NS(t, "one")
	dbAddrs, oneAddrs := w.both(t, "db", w.Default()), w.both(t, "one", "bri1")

	w.closed(t, db, isolated, oneAddrs...)
	w.closed(t, one, isolated, dbAddrs...)

	w.allow(t, w.Default(), "bri1")
	open(t, db, dbAddrs, oneAddrs...)
	open(t, one, oneAddrs, dbAddrs...)

	w.disallow(t, w.Default(), "bri1")
	w.closed(t, db, isolated, oneAddrs...)
	w.closed(t, one, isolated, dbAddrs...)

	// What is under way ends, too.
	w.allow(t, w.Default(), "bri1")
	one.Stream(t, addrPort(dbAddrs[0], "80"))
	w.disallow(t, w.Default(), "bri1")
	before := w.drops(t)[isolated]
	lab.Eventually(t, 5*time.Second, "the stream is dropped", func() bool { return w.drops(t)[isolated] > before })
	// The published port is for everybody.
	r := one.MustGet(t, addrPort(lab.Host4, "3306"))
	assert.Equal(t, oneAddrs[0], remote(t, r), "who the server saw")
}

// allow lets two networks talk, for as long as the scenario lasts.
func (w *world) allow(t *testing.T, a, b string) {
	t.Helper()
	w.bpfnet.MustCLI(t, "network", "allow", a, b)
	t.Cleanup(func() { w.bpfnet.MustCLI(t, "network", "disallow", a, b) })
}

func (w *world) disallow(t *testing.T, a, b string) {
	t.Helper()
	w.bpfnet.MustCLI(t, "network", "disallow", a, b)
}
