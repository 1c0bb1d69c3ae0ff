// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// crowdTargets gives the client more addresses, and returns ten, of both families.
func (w *site) crowdTargets(t *testing.T) (all []netip.AddrPort) {
	t.Helper()
	for i := range 5 {
		v4, v6 := lab.Client4, lab.Client6
		if i > 0 {
			v4, v6 = netip.AddrFrom4([4]byte{192, 0, 2, byte(100 + i)}), netip.MustParseAddr(fmt.Sprintf("2001:db8:1::10%d", i))
			w.Client.AddAddr(t, lab.ClientIf, netip.PrefixFrom(v4, 24))
			w.Client.AddAddr(t, lab.ClientIf, netip.PrefixFrom(v6, 64))
		}
		all = append(all, netip.AddrPortFrom(v4, crowdPort), netip.AddrPortFrom(v6, crowdPort))
	}
	return all
}

// Needs root. Ten thousand flows (without BPFNET_FULL a tenth) of two containers stand towards each of ten
// destinations, over TCP and UDP, while processes of the host open and close connections to the same: from ports
// that the kernel chooses, from others that are not for masquerading, and from those that are; bound to an address
// and to a device or not. Every message says whose it is.
func TestMasqueradeCrowd(t *testing.T) {
	// The kernel lets a socket that is bound to a device connect from where another connects to the same: they are kept apart.
	const inside, insideDevice, outsideDevice = "1024-16383,61000-62999", "16384-32767,63000-65535", "33000-45000"
	limit := time.Minute
	if os.Getenv("BPFNET_FULL") != "" {
		limit = 10 * time.Minute
	}
	w := ownSite(t, lab.New(t, lab.Opts{Sysctls: map[string]string{"net.ipv4.ip_local_reserved_ports": outsideDevice}}), "--flows", "262144")
	m := w.maps(t)
	var to []string
	for _, a := range w.crowdTargets(t) {
		to = append(to, a.String())
	}
	// A process may have some ten thousand sockets.
	pairs := slices.Collect(slices.Chunk(to, 2))
	var servers []*lab.CrowdServer
	for _, at := range pairs {
		servers = append(servers, w.Client.CrowdServe(t, at...))
	}
	for _, name := range []string{"one", "two"} {
		w.sandbox(t, name, "blue")
		w.b.NS(t, name).Sysctl(t, "net.ipv4.ip_local_port_range", "1024 65535") // of one container, as many as that
	}
	begun := readCounters(t, m)
	had4, had6, err := m.Flows()
	require.NoError(t, err)

	hosts := map[string]*lab.Crowd{}
	for _, c := range []struct {
		name  string
		flags []string
	}{
		{"the kernel's choice", []string{"--unconnected"}},
		{"outside of the range", []string{"--ports", outsideDevice, "--device", lab.HostIf}},
		{"in the range", []string{"--ports", inside, "--unconnected", "--local", fmt.Sprintf("0.0.0.0,::,%s,%s", lab.Host4, lab.Host6)}},
		{"in the range, with a device", []string{"--ports", insideDevice, "--unconnected", "--device", lab.HostIf}},
	} {
		args := append([]string{"--churn", "--who", strings.ReplaceAll("host "+c.name, " ", "-"), "--flows", "200", "--workers", "4"}, c.flags...)
		hosts[c.name] = w.Host.Crowd(t, append(args, to...)...)
	}
	for _, c := range hosts {
		c.Standing(t, limit)
	}
	per := count(10_000) / 4 // of a container, by each of the networks
	var crowds []*lab.Crowd
	for _, name := range []string{"one", "two"} {
		for _, to := range pairs {
			args := append([]string{"--who", name, "--flows", fmt.Sprint(per), "--workers", "4"}, to...)
			crowds = append(crowds, w.b.NS(t, name).Crowd(t, args...))
		}
	}
	some := crowds[0].Standing(t, limit).Some[:0]
	for _, c := range crowds {
		sum := c.Standing(t, limit)
		require.Equal(t, 2*per*2, sum.Opened, "%+v", sum)
		some = append(some, sum.Some...)
	}
	v4, v6, err := m.Flows()
	require.NoError(t, err)
	require.GreaterOrEqual(t, v4-had4, 2*4*per*len(to)/2, "two entries a flow")
	require.GreaterOrEqual(t, v6-had6, 2*4*per*len(to)/2)

	own, refused := 0, 0
	for name, c := range hosts {
		sum := c.Finish(t, limit)
		sum.Some = nil
		t.Logf("host, %s: %+v", name, sum)
		require.Zero(t, sum.Crossed+sum.Moved+sum.Lost+sum.Resets, "%s: %+v\n%s", name, sum, c.Stderr())
		require.NotZero(t, sum.Opened, "%s: %+v", name, sum)
		require.Equal(t, sum.Opened, sum.Own, "%s: nobody translates for the host: %+v", name, sum)
		own += sum.Opened
		for what, n := range sum.Refused {
			// Two sockets of the host may have asked for one port.
			if strings.HasPrefix(name, "in the range") {
				require.Contains(t, []string{"bind EADDRINUSE", "connect EADDRNOTAVAIL", "sendto EADDRNOTAVAIL"}, what, "%s: %+v", name, sum)
			} else {
				require.Contains(t, []string{"bind EADDRINUSE", "connect EADDRNOTAVAIL"}, what, "%s: %+v", name, sum)
			}
			refused += n
		}
	}
	// When no other socket of the host has a port in the range any more.
	held := 0
	t.Run("a tuple that is held", func(t *testing.T) {
		for i, s := range some {
			seen := parseAddrPort(t, s.Seen)
			for _, device := range []string{"", lab.HostIf} {
				bind := seen
				if i%4 < 2 {
					bind = netip.AddrPortFrom(map[bool]netip.Addr{true: netip.IPv4Unspecified(), false: netip.IPv6Unspecified()}[seen.Addr().Is4()], seen.Port())
				}
				calls := map[string][]string{"connect": {"--network", s.Network}}
				if s.Network == "udp" {
					calls["send"] = []string{"--network", "udp", "--unconnected"}
				}
				for stage, args := range calls {
					r, err := w.Host.Get(append(args, "--device", device, "--bind", bind.String(), s.To)...)
					require.Error(t, err, "%s from %v", s.Network, bind)
					require.Equal(t, "EADDRNOTAVAIL", r.Errno, "%s from %v: %+v", s.Network, bind, r)
					require.Equal(t, stage, r.Stage, "%s from %v: %+v", s.Network, bind, r)
					held++
				}
			}
		}
	})
	require.NotZero(t, held)

	messages := 0
	for i, c := range crowds {
		sum := c.Finish(t, limit)
		sum.Some = nil
		t.Logf("container %d: %+v", i, sum)
		require.Zero(t, sum.Crossed+sum.Moved+sum.Lost+sum.Resets, "%+v\n%s", sum, c.Stderr())
		require.Empty(t, sum.Refused)
		require.Zero(t, sum.Own, "all were translated")
		each := per * 2 // by both networks
		require.Equal(t, map[string]int{lab.Host4.String(): each, lab.Host6.String(): each}, sum.Seen)
		require.GreaterOrEqual(t, sum.Messages, 2*sum.Opened)
		messages += sum.Messages
	}
	for _, s := range servers {
		served := s.Finish(t, limit)
		require.Zero(t, served.Crossed+served.Resets, "%+v\n%s", served, s.Stderr())
	}
	require.Empty(t, since(t, m, begun).drops())
	require.GreaterOrEqual(t, since(t, m, begun)["fate container/uplink"], uint64(messages))
	flows := 4 * per * len(to)
	promise.Kept(t, promise.Masquerade, "While processes of the host connect to the destinations of containers' flows, from ports inside and outside of the masquerade range, bound to a device or not, no message of one reaches another and none is reset; who asks for addresses and ports that a flow holds gets an error.",
		"%d flows of containers to ten destinations, %d messages; %d flows of the host beside them and %d refused, %d of those for what was known to be held", flows, messages, own, refused+held, held)
}
