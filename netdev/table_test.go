// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

func mustAddr(s string) *netlink.Addr {
	a, err := netlink.ParseAddr(s)
	if err != nil {
		panic(err)
	}
	a.Flags = unix.IFA_F_NODAD
	return a
}

// listAddrs are the addresses as the netlink package reads them.
func listAddrs(t *testing.T) []address {
	t.Helper()
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	require.NoError(t, err)
	var out []address
	for _, a := range list {
		ip, _ := netip.AddrFromSlice(a.IP)
		ones, _ := a.Mask.Size()
		out = append(out, address{index: a.LinkIndex, prefix: netip.PrefixFrom(ip.Unmap(), ones)})
	}
	return out
}

func putAddr(l netlink.Link, s string) error { return netlink.AddrAdd(l, mustAddr(s)) }

// Needs root. After every change the links and addresses that were followed by news are those that a dump has.
func TestTableIsTheDump(t *testing.T) {
	own, other := enterNS(t)
	d := open(t, Options{})
	there, err := netlink.NewHandleAt(other)
	require.NoError(t, err)
	defer there.Close()
	same := func(when string) {
		t.Helper()
		require.NoError(t, err)
		lab.Eventually(t, 5*time.Second, "the same, "+when, func() bool { // the kernel gives a link that comes up its address later
			have, addrs, err := d.current()
			require.NoError(t, err)
			want, err := d.links()
			require.NoError(t, err)
			require.Equal(t, want, have, when)
			listed := listAddrs(t)
			return len(listed) == len(addrs) && !slices.ContainsFunc(listed, func(a address) bool { return !slices.Contains(addrs, a) })
		})
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
		{"address", func() error { return putAddr(veth, "192.0.2.1/24") }},
		{"more addresses", func() error {
			return errors.Join(putAddr(veth, "192.0.2.2/24"), putAddr(veth, "2001:db8::1/64"), putAddr(br, "198.51.100.1/32"))
		}},
		{"address with a peer", func() error {
			a, err := netlink.ParseAddr("203.0.113.1/32")
			if err != nil {
				return err
			}
			a.Peer = &net.IPNet{IP: net.IPv4(203, 0, 113, 9), Mask: net.CIDRMask(24, 32)}
			return netlink.AddrAdd(veth, a)
		}},
		{"one address fewer", func() error { return netlink.AddrDel(veth, mustAddr("192.0.2.1/24")) }},
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
