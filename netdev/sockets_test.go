// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/policy"
)

// Needs root. Of all sockets those with a peer in the list are found and ended, mapped addresses and
// connected UDP among them; those to others, and listeners, live on.
func TestSockets(t *testing.T) {
	enterNS(t)
	lo := linkNamed(t, "lo")
	require.NoError(t, netlink.LinkSetUp(lo))
	for _, a := range []string{"fd01::2/128", "fd01::3/128", "fd01::4/128"} {
		parsed, err := netlink.ParseAddr(a)
		require.NoError(t, err)
		parsed.Flags = unix.IFA_F_NODAD // usable at once
		require.NoError(t, netlink.AddrAdd(lo, parsed))
	}
	require.NoError(t, CanDestroySockets())

	serve := func(addr string) {
		l, err := net.Listen("tcp", addr)
		require.NoError(t, err)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
			}
		}()
		t.Cleanup(func() {
			l.Close()
			<-done
		})
	}
	for _, a := range []string{"127.0.0.2:80", "127.0.0.3:80", "[fd01::2]:80", "[fd01::3]:80"} {
		serve(a)
	}
	type opened struct {
		net.Conn
		to   string
		dies bool
	}
	var all []opened
	for _, c := range []struct {
		network, to string
		dies        bool
	}{
		{"tcp4", "127.0.0.2:80", true},
		{"tcp4", "127.0.0.3:80", false},
		{"tcp6", "[fd01::2]:80", true},
		{"tcp6", "[fd01::3]:80", false},
		{"udp4", "127.0.0.2:80", true},
		{"udp4", "127.0.0.3:80", false},
		{"udp6", "[fd01::2]:80", true},
		{"udp6", "[fd01::3]:80", false},
	} {
		var from net.Dialer // not the servers' addresses: their sockets are to live on
		switch c.network {
		case "tcp6":
			from.LocalAddr = &net.TCPAddr{IP: net.ParseIP("fd01::4")}
		case "udp6":
			from.LocalAddr = &net.UDPAddr{IP: net.ParseIP("fd01::4")}
		}
		var conn net.Conn
		var err error
		// The kernel notices once a second that lo is up, and IPv6 has no routes before.
		lab.Eventually(t, 5*time.Second, "the address has a route", func() bool {
			conn, err = from.Dial(c.network, c.to)
			return !errors.Is(err, unix.ENETUNREACH)
		})
		require.NoError(t, err)
		t.Cleanup(func() { conn.Close() })
		all = append(all, opened{conn, c.network + " " + c.to, c.dies})
	}
	mapped, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	defer unix.Close(mapped)
	require.NoError(t, unix.Connect(mapped, &unix.SockaddrInet6{Port: 80, Addr: netip.MustParseAddr("::ffff:127.0.0.2").As16()}))

	// More peers than one dump asks for, and one that nobody has at the end of each.
	var peers []netip.Addr
	for a := netip.MustParseAddr("192.0.2.1"); len(peers) < 2*chunk-1; a = a.Next() {
		peers = append(peers, a)
	}
	peers[7] = netip.MustParseAddr("127.0.0.2")
	peers = append(peers, netip.MustParseAddr("fd01::2"))
	found, err := SocketsTo(peers)
	require.NoError(t, err)
	require.Len(t, found, 5, "%v", found)
	for _, s := range found {
		require.Contains(t, []netip.AddrPort{netip.MustParseAddrPort("127.0.0.2:80"), netip.MustParseAddrPort("[fd01::2]:80")}, s.Peer)
		require.NotZero(t, s.Cookie)
		require.NoError(t, s.Destroy())
		require.NoError(t, s.Destroy(), "once more is no error")
	}
	for _, c := range all {
		require.NoError(t, c.SetDeadline(time.Now().Add(200*time.Millisecond)))
		_, err := c.Read(make([]byte, 1))
		if c.dies {
			require.ErrorIs(t, err, unix.ECONNABORTED, c.to)
		} else {
			require.ErrorContains(t, err, "timeout", c.to)
		}
	}
	_, err = unix.Read(mapped, make([]byte, 1))
	require.ErrorIs(t, err, unix.ECONNABORTED)
	none, err := SocketsTo(peers)
	require.NoError(t, err)
	require.Empty(t, none)
	require.Equal(t, policy.TCP, found[0].Proto)
}
