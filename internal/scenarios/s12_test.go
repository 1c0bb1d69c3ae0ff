// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s12: a container of the default network gets a second interface with a fixed address.
func s12(t *testing.T, w *world) {
	w.MustRun(t, "network", "create", "--gateway", "192.168.0.1", "--subnet", "192.168.0.0/24", "network1")
	w.Serve(t, "--name busybox1 --network network1 --ip 192.168.0.101", "--tcp 80 --udp 80")
	w.Serve(t, "--name busybox2", "--tcp 80 --udp 80")
	one, two := w.NS(t, "busybox1"), w.NS(t, "busybox2")
	fixed, second := netip.MustParseAddr("192.168.0.101"), netip.MustParseAddr("192.168.0.102")
	assert.Equal(t, fixed, w.v4(t, "busybox1", "network1"))
	assert.NotContains(t, w.MustRun(t, "exec", "busybox2", "ip", "-o", "addr"), "eth1")

	w.closed(t, two, isolated, fixed)
	w.closed(t, one, isolated, w.v4(t, "busybox2", w.Default()))

	w.MustRun(t, "network", "connect", "--ip", "192.168.0.102", "network1", "busybox2")
	w.ready(t, "busybox2", "network1")
	assert.Contains(t, w.MustRun(t, "exec", "busybox2", "ip", "-o", "addr", "show", "dev", "eth1"), "192.168.0.102/24")
	open(t, two, []netip.Addr{second}, fixed)
	open(t, one, []netip.Addr{fixed}, second)
	assert.Equal(t, []int{64}, ttls(two, fixed, 1), "the same network")
	// The first interface is as it was, until it is allowed: what comes in by it is answered by the
	// second, which is nearer.
	first := w.v4(t, "busybox2", w.Default())
	w.closed(t, one, isolated, first)
	w.allow(t, "network1", w.Default())
	open(t, one, []netip.Addr{fixed}, first)
	w.disallow(t, "network1", w.Default())
	w.closed(t, one, isolated, first)
	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	open(t, two, []netip.Addr{lab.HostB4}, lab.Internet4)
}
