// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
)

// Needs root. After every change the links that were followed by news are those that a dump has.
func TestTableIsTheDump(t *testing.T) {
	own, other := enterNS(t)
	d := open(t, Options{})
	there, err := netlink.NewHandleAt(other)
	require.NoError(t, err)
	defer there.Close()
	same := func(when string) {
		t.Helper()
		require.NoError(t, err)
		have, err := d.current()
		require.NoError(t, err)
		want, err := d.links()
		require.NoError(t, err)
		require.Equal(t, want, have, when)
	}
	same("at first")
	br := addBridge(t, "br0", "172.30.0.1/24")
	same("bridge")
	veth := addVeth(t, "v0", "p0")
	peer, err := netlink.LinkByName("p0")
	same("pair")
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"port", func() error { return netlink.LinkSetMaster(veth, br) }},
		{"MAC", func() error { return netlink.LinkSetHardwareAddr(peer, net.HardwareAddr{2, 0x42, 0, 0, 0, 1}) }},
		{"up", func() error { return netlink.LinkSetUp(veth) }},
		{"far end up", func() error { return netlink.LinkSetUp(peer) }},
		{"far end away", func() error { return netlink.LinkSetNsFd(peer, int(other)) }},
		{"far end up there", func() error { return there.LinkSetUp(peer) }},
		{"MTU", func() error { return netlink.LinkSetMTU(veth, 1400) }},
		{"alias", func() error { return netlink.LinkSetAlias(veth, Alias) }},
		{"far end back", func() error { return there.LinkSetNsFd(peer, int(own)) }},
		{"far end away, down", func() error { return netlink.LinkSetNsFd(peer, int(other)) }},
		{"far end back, down", func() error { return there.LinkSetNsFd(peer, int(own)) }},
		{"near end away", func() error { return netlink.LinkSetNsFd(veth, int(other)) }},
		{"near end back", func() error { return there.LinkSetNsFd(veth, int(own)) }},
		{"down", func() error { return netlink.LinkSetDown(veth) }},
		{"new name", func() error { return netlink.LinkSetName(veth, "v1") }},
		{"port again", func() error { return netlink.LinkSetMaster(veth, br) }},
		{"no port", func() error { return netlink.LinkSetNoMaster(veth) }},
		{"port once more", func() error { return netlink.LinkSetMaster(veth, br) }},
		{"no bridge", func() error { return netlink.LinkDel(br) }},
		{"no pair", func() error { return netlink.LinkDel(veth) }},
	} {
		err = step.do()
		same(step.name)
	}

	// More than the socket has room for.
	require.NoError(t, d.table.sock.SetReceiveBufferSize(4096, false))
	var pairs []netlink.Link
	for i := range 40 {
		pairs = append(pairs, addVeth(t, fmt.Sprintf("v%d", i), fmt.Sprintf("p%d", i)))
	}
	same("overflow")
	for _, l := range pairs {
		require.NoError(t, netlink.LinkDel(l))
	}
	same("overflow again")
}
