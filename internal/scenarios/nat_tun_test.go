// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root and /dev/net/tun. An uplink without Ethernet header: from_uplink_l3 and to_uplink_l3. A
// machine behind it reaches published ports, containers reach it, pings and ICMP errors come through,
// and netfilter sees none of it.
func TestNATTun(t *testing.T) {
	for _, attach := range []string{"tcx", "clsact"} {
		t.Run(attach, func(t *testing.T) {
			l := lab.New(t, lab.Opts{})
			// The device carries less than the bridge: segments must be cut to it.
			remote := l.Tun(t, 1400)
			w := ownSite(t, l, "--attach", attach)
			w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
			w.sandbox(t, "peer", "blue")
			remote.Serve(t, "--tcp", "7000", "--udp", "7000")
			testTun(t, w, remote)
		})
	}
}

func testTun(t *testing.T, w *site, remote *lab.NS) {
	m := w.maps(t)
	peer := w.b.NS(t, "peer")
	nft, before := w.NFTCounters(t), readCounters(t, m)
	exchanges := uint64(0)
	for _, network := range []string{"tcp", "udp"} {
		for _, c := range []struct {
			name     string
			from     *lab.NS
			to       string
			seen     netip.Addr
			host     string
			datagram int // bytes; the answer says it again, and more
		}{
			{"published v4", remote, at(lab.Tun4, 8080), lab.Remote4, "web", 1100},
			{"published v6", remote, at(lab.Tun6, 8080), lab.Remote6, "web", 1100},
			{"published at another address", remote, at(lab.Host4, 8080), lab.Remote4, "web", 1100},
			{"egress v4", peer, at(lab.Remote4, 7000), lab.Tun4, "", 1100},
			{"egress v6", peer, at(lab.Remote6, 7000), lab.Tun6, "", 1100},
		} {
			size := c.datagram
			if network == "tcp" {
				size = 20000 // many segments, with offloads larger than the device's MTU
			}
			r, err := c.from.Get("--network", network, "--send", strings.Repeat("x", size), c.to)
			require.NoError(t, err, "%s %s: %+v", network, c.name, r)
			require.Equal(t, c.seen, clientSeen(t, r), "%s %s", network, c.name)
			if c.host != "" {
				require.Equal(t, c.host, r.View.Host)
			}
			exchanges++
		}
	}
	for _, a := range []netip.Addr{lab.Remote4, lab.Remote6} {
		// One hop down from 64 on the way back.
		require.Equal(t, []int{63}, ttls(peer, a, 1), "ping %v", a)
		exchanges++
	}
	got := since(t, m, before)
	require.Empty(t, got.drops())
	require.GreaterOrEqual(t, got.fast(), 2*exchanges)
	require.Empty(t, w.NFTDelta(t, nft), "packets strayed into netfilter")

	t.Run("errors", func(t *testing.T) {
		for _, c := range []struct {
			name string
			from *lab.NS
			to   netip.Addr
			port int
		}{
			{"egress v4", peer, lab.Remote4, 7999},
			{"egress v6", peer, lab.Remote6, 7999},
		} {
			// The far machine answers that nobody listens; the socket must learn of it.
			r, err := c.from.Get("--network", "udp", at(c.to, c.port))
			require.Error(t, err, c.name)
			require.Equal(t, "ECONNREFUSED", r.Errno, "%s: %+v", c.name, r)
		}
		w.b.Serve(t, "--name", "shut", "--network", "blue", "-p", "8099:99/udp", "--", "--tcp", "80")
		for _, a := range []netip.Addr{lab.Tun4, lab.Tun6} {
			// Here it is the container that answers so.
			r, err := remote.Get("--network", "udp", at(a, 8099))
			require.Error(t, err)
			require.Equal(t, "ECONNREFUSED", r.Errno, "published %v: %+v", a, r)
		}
	})
	t.Run("traceroute", func(t *testing.T) {
		for _, n := range []*lab.NS{w.Host, remote, peer} {
			n.Sysctl(t, "net.ipv4.icmp_ratemask", "0")
			n.Sysctl(t, "net.ipv6.icmp.ratelimit", "0")
		}
		// What the stack says about translated packets passes to_uplink_l3.
		for _, a := range []netip.Addr{lab.Tun4, lab.Tun6} {
			require.Equal(t, icmpError{timeExceeded[a.Is6()], 0, a}, hop(t, remote, netip.AddrPortFrom(a, 8080), 1), "published")
		}
		for _, a := range []netip.Addr{lab.Remote4, lab.Remote6} {
			v6 := a.Is6()
			require.Equal(t, icmpError{unreachable[v6], portUnreach[v6], a}, hop(t, peer, netip.AddrPortFrom(a, 7999), 2), "egress")
		}
	})
	t.Run("mtu", func(t *testing.T) {
		echoUDP(t, remote, echoPort, unix.IP_PMTUDISC_DONT)
		for _, a := range []netip.Addr{lab.Remote4, lab.Remote6} {
			limited(t, peer, netip.AddrPortFrom(a, echoPort), 1400)
		}
	})
	t.Run("closed", func(t *testing.T) {
		web4, web6 := w.b.Addrs(t, "web", "blue")
		before := readCounters(t, m)
		for _, a := range []netip.Addr{web4, web6} {
			r, err := remote.Get("--timeout", noAnswer.String(), at(a, 80))
			require.Error(t, err)
			require.Equal(t, "ETIMEDOUT", r.Errno, "%+v", r)
		}
		require.Equal(t, counters{"direct_access/uplink": 2}, since(t, m, before).drops())
	})
}
