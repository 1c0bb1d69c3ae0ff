// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s10: the default network, in all directions.
func s10(t *testing.T, w *world) {
	w.Serve(t, "--name web", "--http 8000 --tcp 80 --udp 80 --text hello-from-web")
	w.Serve(t, "--name other", "--tcp 80 --udp 80")
	web, other := w.both(t, "web", w.Default()), w.both(t, "other", w.Default())
	gateways := []netip.Addr{netip.MustParseAddr("172.17.0.1"), netip.MustParseAddr("fd00:d0c::1")}
	n := w.NS(t, "web")

	// Host to container: by address, every port.
	for i, a := range web {
		assert.Equal(t, "hello-from-web", fetch(t, w.Host, "http://"+addrPort(a, "8000")+"/"))
		assert.Equal(t, []int{64, 64}, ttls(w.Host, a, 2), "%v", a)
		open(t, w.Host, gateways[i:i+1], a)
	}
	// Container to gateway, and to what listens on the host.
	w.Host.Serve(t, "--tcp", "7200", "--udp", "7200")
	for i, a := range gateways {
		assert.Equal(t, []int{64, 64}, ttls(n, a, 2), "%v", a)
		for _, network := range []string{"tcp", "udp"} {
			r := n.MustGet(t, "--network", network, addrPort(a, "7200"))
			assert.Equal(t, web[i], remote(t, r), "who the server saw")
		}
	}
	// Container to container.
	out := w.MustRun(t, "exec", "web", "ping", "-c", "1", "-W", "2", other[0].String())
	assert.Equal(t, []int{64}, ttlsIn(out), out)
	for i, a := range other {
		open(t, n, web[i:i+1], a)
	}
	// Container to outside, which sees the host.
	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	open(t, n, []netip.Addr{lab.HostB4}, lab.Client24, lab.Internet4)
	open(t, n, []netip.Addr{lab.HostB6}, lab.Client26, lab.Internet6)
	w.Client.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	open(t, n, []netip.Addr{lab.Host4}, lab.Client4)
	open(t, n, []netip.Addr{lab.Host6}, lab.Client6)

	// The way there: first the gateway, then the far end.
	for _, flags := range [][]string{{}, {"-I"}} { // UDP and ICMP probes
		for i, to := range []netip.Addr{lab.Internet4, lab.Internet6} {
			applet := []string{"traceroute", "traceroute6"}[i]
			if i == 1 && len(flags) > 0 {
				continue // this traceroute6 has no -I
			}
			args := append([]string{"exec", "web", applet, "-n", "-q", "1", "-w", "3", "-m", "4"}, flags...)
			out, err := w.Run(append(args, to.String())...)
			require.NoError(t, err, out)
			assert.Equal(t, []string{gateways[i].String(), to.String()}, hops(out), "%s %s\n%s", applet, flags, out)
		}
	}

	// Outside to container: not by its own address.
	for _, c := range []*lab.NS{w.Client, w.Client2} {
		w.closed(t, c, drop{"direct_access", "uplink"}, web...)
	}
}

// hops reads the addresses out of what traceroute -n has printed.
func hops(out string) []string {
	var all []string
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && f[0] != "traceroute" {
			all = append(all, f[1])
		}
	}
	return all
}
