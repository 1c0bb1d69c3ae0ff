// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s17: containers of a macvlan network are hosts of the outer network. Ipvlan would be alike.
func s17(t *testing.T, w *world) {
	w.MustRun(t, "network", "create", "-d", "macvlan", "--subnet", "192.0.2.0/24", "--gateway", lab.Client4.String(),
		"--ip-range", "192.0.2.64/28", "--aux-address", "host="+lab.Host4.String(), "-o", "parent="+lab.HostIf, "outer")
	w.Serve(t, "--name one --network outer --ip 192.0.2.65", "--tcp 80 --udp 80")
	w.Serve(t, "--name two --network outer --ip 192.0.2.66", "--tcp 80 --udp 80")
	one, two := w.NS(t, "one"), w.NS(t, "two")
	v4 := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	w.Client.Serve(t, "--tcp", usualPort, "--udp", usualPort)

	before, flows := w.touched(t), w.left(t)
	open(t, w.Client, []netip.Addr{lab.Client4}, v4("192.0.2.65"), v4("192.0.2.66"))
	open(t, one, []netip.Addr{v4("192.0.2.65")}, lab.Client4, v4("192.0.2.66"))
	open(t, two, []netip.Addr{v4("192.0.2.66")}, v4("192.0.2.65"))
	assert.Equal(t, []int{64}, ttls(w.Client, v4("192.0.2.65"), 1), "no hop in between")
	assert.Equal(t, before, w.touched(t), "bpfnet counted some of it")
	now := w.left(t)
	assert.Equal(t, flows.Flows4, now.Flows4, "bpfnet keeps flows of it")
	assert.Empty(t, now.Endpoints)
	assert.Equal(t, w.empty.Attachments, now.Attachments, "programs are where they were")
	// What is published there is published nowhere: the driver does not.
	w.Serve(t, "--name three --network outer -p 8091:80", "--tcp 80")
	assert.Empty(t, w.snapshot(t).Ports)
	r, err := w.Client.Get(addrPort(lab.Host4, "8091"))
	require.Error(t, err)
	assert.Equal(t, "ECONNREFUSED", r.Errno)
}

// touched are all counters of packets.
func (w *world) touched(t *testing.T) counters {
	t.Helper()
	return readCounters(t, w.maps)
}
