// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. What routers and ends on a path say about packets comes to the sockets that sent
// them: time exceeded, unreachable, too big; through masquerading and published ports, both families.
func TestNATPath(t *testing.T) {
	w := newNATSite(t)
	t.Run("traceroute", func(t *testing.T) { testTraceroute(t, w) })
	t.Run("unreachable", func(t *testing.T) { testUnreachable(t, w) })
	t.Run("mtu beyond a router", func(t *testing.T) { testRouterMTU(t, w) })
	t.Run("mtu of the uplink", func(t *testing.T) { testUplinkMTU(t, w) })
	t.Run("host knows the path", func(t *testing.T) { testHostPathMTU(t, w) })
}

// ICMP types and codes, RFC 792 and RFC 4443, by "is it IPv6?".
var (
	timeExceeded = map[bool]uint8{false: 11, true: 3}
	unreachable  = map[bool]uint8{false: 3, true: 1}
	portUnreach  = map[bool]uint8{false: 3, true: 4}
)

func testTraceroute(t *testing.T, w *natSite) {
	gateway := map[bool]netip.Addr{}
	for _, c := range w.b.InspectNetwork(t, "blue").IPAM.Config {
		g := netip.MustParseAddr(strings.Split(c.Gateway, "/")[0])
		gateway[g.Is6()] = g
	}
	for _, c := range []struct {
		name string
		from *lab.NS
		to   netip.AddrPort
		hops []netip.Addr // the last one says that nobody listens
	}{
		{"egress v4", w.peer, netip.AddrPortFrom(far4, 7999), []netip.Addr{gateway[false], lab.Client24, far4}},
		{"egress v6", w.peer, netip.AddrPortFrom(far6, 7999), []netip.Addr{gateway[true], lab.Client26, far6}},
		// Port 9001 of web is published, and closed.
		{"published v4", w.far, netip.AddrPortFrom(lab.HostB4, 9001), []netip.Addr{router4, lab.HostB4, lab.HostB4}},
		{"published v6", w.far, netip.AddrPortFrom(lab.HostB6, 9001), []netip.Addr{router6, lab.HostB6, lab.HostB6}},
		{"neighbour's published v4", w.peer, netip.AddrPortFrom(lab.HostB4, 9001), []netip.Addr{gateway[false], lab.HostB4}},
		{"neighbour's published v6", w.peer, netip.AddrPortFrom(lab.HostB6, 9001), []netip.Addr{gateway[true], lab.HostB6}},
		{"neighbour v4", w.peer, netip.AddrPortFrom(w.web4, 9001), []netip.Addr{w.web4}},
		{"neighbour v6", w.peer, netip.AddrPortFrom(w.web6, 9001), []netip.Addr{w.web6}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v6 := c.to.Addr().Is6()
			for i, who := range c.hops {
				want := icmpError{timeExceeded[v6], 0, who}
				if i == len(c.hops)-1 {
					want = icmpError{unreachable[v6], portUnreach[v6], who}
				}
				require.Equal(t, want, hop(t, c.from, c.to, i+1), "hop %d", i+1)
			}
		})
	}
	t.Run("echo", func(t *testing.T) {
		for to, hops := range map[netip.Addr][]netip.Addr{
			far4: {gateway[false], lab.Client24}, far6: {gateway[true], lab.Client26},
		} {
			for i, who := range hops {
				out, err := w.peer.Run(t.Context(), "ping", "-n", "-c", "1", "-W", "2", "-t", fmt.Sprint(i+1), to.String())
				require.Error(t, err, "%v answers", to)
				require.Regexp(t, "(?i)From "+who.String()+`:? icmp_seq=1 Time (to live|exceeded)`, out)
			}
			require.Equal(t, []int{62}, ttls(w.peer, to, 1), "two hops back")
		}
	})
	t.Run("tool", func(t *testing.T) {
		for to, hops := range map[netip.Addr][]netip.Addr{
			far4: {gateway[false], lab.Client24, far4}, far6: {gateway[true], lab.Client26, far6},
		} {
			out := w.peer.MustRun(t, "traceroute", "-n", "-q", "1", "-w", "2", "-m", "5", to.String())
			var seen []netip.Addr
			for line := range strings.Lines(out) {
				if f := strings.Fields(line); len(f) >= 2 {
					if a, err := netip.ParseAddr(f[1]); err == nil {
						seen = append(seen, a)
					}
				}
			}
			require.Equal(t, hops, seen, out)
		}
	})
}

func testUnreachable(t *testing.T, w *natSite) {
	m := w.maps(t)
	for _, c := range []struct {
		name string
		from *lab.NS
		to   netip.AddrPort
		err  error
	}{
		{"egress, nobody listens v4", w.peer, netip.AddrPortFrom(far4, 7999), syscall.ECONNREFUSED},
		{"egress, nobody listens v6", w.peer, netip.AddrPortFrom(far6, 7999), syscall.ECONNREFUSED},
		{"egress, router knows no way v4", w.peer, netip.AddrPortFrom(nowhere4, 7999), syscall.EHOSTUNREACH},
		{"egress, router knows no way v6", w.peer, netip.AddrPortFrom(nowhere6, 7999), syscall.ENETUNREACH},
		{"published, nobody listens v4", w.far, netip.AddrPortFrom(lab.HostB4, 9001), syscall.ECONNREFUSED},
		{"published, nobody listens v6", w.far, netip.AddrPortFrom(lab.HostB6, 9001), syscall.ECONNREFUSED},
		{"published, to itself v4", w.web, netip.AddrPortFrom(lab.HostB4, 9001), syscall.ECONNREFUSED},
		{"published, to a neighbour v6", w.peer, netip.AddrPortFrom(lab.HostB6, 9001), syscall.ECONNREFUSED},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := readCounters(t, m)
			s := openUDP(t, c.from, c.to)
			if c.err != syscall.ECONNREFUSED {
				s.set(t, unix.IP_RECVERR, unix.IPV6_RECVERR, 1) // else no error to Linux: it may pass
			}
			require.NoError(t, s.send([]byte("hello")))
			_, err := s.receive()
			require.ErrorIs(t, err, c.err)
			require.Empty(t, since(t, m, before).drops())
		})
	}
	t.Run("TCP", func(t *testing.T) {
		for to, want := range map[string]error{
			at(far4, 7999): syscall.ECONNREFUSED, at(far6, 7999): syscall.ECONNREFUSED,
			at(nowhere4, 7999): syscall.EHOSTUNREACH, at(nowhere6, 7999): syscall.ENETUNREACH,
		} {
			_, err := dial(w.peer, "tcp", "", to)
			require.ErrorIs(t, err, want, to)
		}
	})
}

// streams are echoed through the host in both directions, with segmentation offloads and without.
func streams(t *testing.T, w *natSite) {
	t.Helper()
	const size = 400_000
	for _, on := range []bool{true, false} {
		offload(t, w.peer, "eth0", on)
		offload(t, w.web, "eth0", on)
		offload(t, w.far, "eth0", on)
		for _, c := range []struct {
			from *lab.NS
			to   netip.Addr
		}{{w.peer, far4}, {w.peer, far6}, {w.far, lab.HostB4}, {w.far, lab.HostB6}} {
			stream(t, c.from, netip.AddrPortFrom(c.to, echoPort), size)
		}
	}
	for _, n := range []*lab.NS{w.peer, w.web, w.far} {
		offload(t, n, "eth0", true)
	}
}

// limited wants a datagram that must not be fragmented to be refused once the path's MTU is known, and
// the largest that fits to come through.
func limited(t *testing.T, from *lab.NS, to netip.AddrPort, mtu int) {
	t.Helper()
	s := openUDP(t, from, to)
	s.set(t, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	header := map[bool]int{false: 28, true: 48}[s.v6]
	require.NoError(t, s.send(numbered(bridgeMTU-header)), "the first one goes")
	lab.Eventually(t, 2*time.Second, "the socket learns the path's MTU", func() bool { return s.pathMTU(t) == mtu })
	_, _ = s.receive() // the error itself
	require.ErrorIs(t, s.send(numbered(mtu-header+1)), syscall.EMSGSIZE)
	require.NoError(t, s.exchange(numbered(mtu-header)))
}

func testRouterMTU(t *testing.T, w *natSite) {
	const mtu = 1300
	setMTU(t, w.Client2, "eth1", mtu)
	limited(t, w.peer, netip.AddrPortFrom(far4, echoPort), mtu)
	limited(t, w.peer, netip.AddrPortFrom(far6, echoPort), mtu)
	// Web's answers to far are too big for the router, as peer's segments are.
	streams(t, w)
	forget(t, w)
}

func testUplinkMTU(t *testing.T, w *natSite) {
	const mtu = 1400
	setMTU(t, w.Host, lab.HostIf2, mtu)
	setMTU(t, w.Client2, lab.ClientIf, mtu)
	m := w.maps(t)
	before := readCounters(t, m)
	limited(t, w.peer, netip.AddrPortFrom(far4, echoPort), mtu)
	limited(t, w.peer, netip.AddrPortFrom(far6, echoPort), mtu)
	forget(t, w)
	streams(t, w)
	require.Empty(t, since(t, m, before).drops())
	forget(t, w)

	t.Run("may be fragmented", func(t *testing.T) {
		s := openUDP(t, w.peer, netip.AddrPortFrom(far4, echoPort))
		s.set(t, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
		require.NoError(t, s.send(numbered(1450)))
		lab.Eventually(t, 2*time.Second, "the sender is told to cut", func() bool { return s.pathMTU(t) == mtu })
		require.NoError(t, s.exchange(numbered(1450)), "the second one comes through")
		require.NoError(t, s.exchange(numbered(5000)))
		require.Empty(t, since(t, m, before).drops())
		forget(t, w)

		// A published port's answers: far's own datagram is small.
		s = openUDP(t, w.far, netip.AddrPortFrom(lab.HostB4, echoPort))
		require.NoError(t, s.exchange(numbered(1000)))
		big := numbered(4000) // in fragments, both ways
		if s.exchange(big) != nil {
			require.NoError(t, s.exchange(big), "the second one comes back")
		}
	})
	forget(t, w)
}

// forget has everybody forget what they have learned of paths.
func forget(t *testing.T, w *natSite) {
	t.Helper()
	for _, n := range []*lab.NS{w.peer, w.web, w.far, w.Host} {
		n.MustRun(t, "ip", "-4", "route", "flush", "cache")
		n.MustRun(t, "ip", "-6", "route", "flush", "cache")
	}
}

// The host has learned of a narrow place by its own traffic. That binds nobody else: a container's
// packets go on, translated, until the router tells it too. The host's stack would forward them, and
// must never see them: it would not translate.
func testHostPathMTU(t *testing.T, w *natSite) {
	const mtu = 1300
	setMTU(t, w.Client2, "eth1", mtu)
	for _, tool := range []string{"iptables", "ip6tables"} {
		w.Host.MustRun(t, tool, "-P", "FORWARD", "ACCEPT")
		t.Cleanup(func() { w.Host.MustRun(t, tool, "-P", "FORWARD", "DROP") })
	}
	untranslated := w.Client2.Capture(t, lab.ClientIf, func(p gopacket.Packet) bool {
		src := netip.Addr{}
		if ip, ok := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok {
			src, _ = netip.AddrFromSlice(ip.SrcIP)
		} else if ip, ok := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6); ok {
			src, _ = netip.AddrFromSlice(ip.SrcIP)
		}
		return src == w.peer4 || src == w.peer6
	})
	for _, to := range []netip.Addr{far4, far6} {
		limited(t, w.Host, netip.AddrPortFrom(to, echoPort), mtu)
		limited(t, w.peer, netip.AddrPortFrom(to, echoPort), mtu)
		stream(t, w.peer, netip.AddrPortFrom(to, echoPort), 100_000)
	}
	require.Empty(t, untranslated.Frames())
	forget(t, w)
}
