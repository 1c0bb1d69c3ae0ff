// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s02: a running container is connected to a network and disconnected from it.
func s02(t *testing.T, w *world) {
	w.MustRun(t, "network", "create", "my-net")
	w.Create(t, "--name my-nginx --network my-net --publish 8080:80", "labtool", "serve", "--tcp", "80", "--udp", "80")
	w.MustRun(t, "start", "my-nginx")
	w.WaitLog(t, "my-nginx", "ready")
	noSuchName(t, w.Client2, lab.Internet4)
	w.Serve(t, "--name app --publish 8081:80 --dns 203.0.113.1", "--tcp 80 --udp 80")
	nginx, x := w.NS(t, "my-nginx"), w.NS(t, "app")
	nginx4, x4 := w.v4(t, "my-nginx", "my-net"), w.v4(t, "app", w.Default())

	w.closed(t, x, isolated, nginx4)
	w.closed(t, nginx, isolated, x4)

	w.MustRun(t, "network", "connect", "my-net", "app")
	w.ready(t, "app", "my-net")
	own4 := w.v4(t, "app", "my-net")
	open(t, x, []netip.Addr{own4}, nginx4)
	open(t, nginx, []netip.Addr{nginx4}, own4)
	w.MustGet(t, "app", "my-nginx:80")
	w.MustGet(t, "my-nginx", "app:80")
	// The default network's name comes first, so app keeps its gateway there, and its port.
	published(t, w, "8081", x4)

	w.MustRun(t, "network", "disconnect", "my-net", "app")
	w.closed(t, x, isolated, nginx4)
	require.NoError(t, unanswered(nginx, "tcp", own4)) // nobody's address: it ends with ARP
	r, err := w.Get("app", "my-nginx:80")
	require.Error(t, err)
	assert.Equal(t, "resolve", r.Stage, "the name is gone, too: %+v", r)

	// On no other network than my-net, its gateway is there, and the published port follows.
	w.MustRun(t, "network", "connect", "my-net", "app")
	w.MustRun(t, "network", "disconnect", w.Default(), "app")
	published(t, w, "8081", w.v4(t, "app", "my-net"))
	// And to a network whose name comes first.
	w.MustRun(t, "network", "create", "a-net")
	w.MustRun(t, "network", "connect", "a-net", "app")
	published(t, w, "8081", w.v4(t, "app", "a-net"))
	w.MustRun(t, "network", "disconnect", "a-net", "app")
	published(t, w, "8081", w.v4(t, "app", "my-net"))
	published(t, w, "8080", nginx4)
}

// published requires that a remote client reaches that address by the host's port, with one
// connect, and is seen by its own address.
func published(t *testing.T, w *world, hostPort string, target netip.Addr) {
	t.Helper()
	r := w.Client.MustGet(t, addrPort(lab.Host4, hostPort))
	assert.Equal(t, lab.Client4, remote(t, r), "who the server saw")
	assert.Equal(t, addrPort(target, "80"), r.View.Local, "what the client reached")
}

// ready waits until an endpoint takes packets.
func (w *world) ready(t *testing.T, container, network string) {
	t.Helper()
	lab.Eventually(t, 5*time.Second, container+" is ready on "+network, func() bool {
		for _, e := range w.snapshot(t).Endpoints {
			if e.Name == container && e.Network == network {
				return e.Ready
			}
		}
		return false
	})
}
