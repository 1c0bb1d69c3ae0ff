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

// Needs root. S8: two hosts with a subnet each, joined by a link, and a static route each to the other's
// containers: closed, until the operator opens it.
func TestS08(t *testing.T) {
	v := netip.MustParseAddr
	wire := []netip.Addr{v("203.0.113.65"), v("203.0.113.66")}
	var hosts [2]*world
	for i, bip := range []string{"172.17.0.1/16", "172.18.0.1/16"} {
		l := lab.New(t, lab.Opts{})
		d := l.StartDocker(t, lab.DockerOpts{ExtraArgs: []string{"--bip", bip}})
		hosts[i] = &world{Lab: l, engine: dockerEngine{d}}
	}
	lab.Join(t,
		lab.End{NS: hosts[0].Host, If: "wire", Addrs: []netip.Prefix{netip.PrefixFrom(wire[0], 26)}},
		lab.End{NS: hosts[1].Host, If: "wire", Addrs: []netip.Prefix{netip.PrefixFrom(wire[1], 26)}})
	const option = "com.docker.network.bridge."
	for i, w := range hosts {
		for _, other := range [][]string{{"172.18.0.0/16", "172.21.0.0/16", "172.23.0.0/16"}, {"172.17.0.0/16", "172.20.0.0/16", "172.22.0.0/16"}}[i] {
			w.Host.AddRoute(t, netip.MustParsePrefix(other), wire[1-i])
		}
		w.MustRun(t, "network", "create", "--subnet", []string{"172.20.0.0/16", "172.21.0.0/16"}[i], "-o", option+"gateway_mode_ipv4=routed", "routed")
		w.MustRun(t, "network", "create", "--subnet", []string{"172.22.0.0/16", "172.23.0.0/16"}[i], "-o", option+"trusted_host_interfaces=wire", "trusting")
		d := w.engine.(dockerEngine)
		*w = *newWorld(t, w.Lab, d, w.StartBpfnet(t, d.Docker))
		w.Serve(t, "--name plain", "--tcp 80 --udp 80")
		w.Serve(t, "--name routed --network routed -p 80 -p 80/udp", "--tcp 80,81 --udp 80,81")
		w.Serve(t, "--name trusting --network trusting -p 80 -p 80/udp", "--tcp 80,81 --udp 80,81")
		w.ready(t, "trusting", "trusting")
	}
	for i, w := range hosts {
		far := hosts[1-i]
		direct := drop{"direct_access", "uplink"}
		// As the engine leaves it: closed, for the other host and for its containers.
		to := far.v4(t, "plain", far.Default())
		for _, from := range []*lab.NS{w.NS(t, "plain"), w.Host} {
			far.closed(t, from, direct, to)
		}
		// Trusted: what is published is dialled by the container's own address. The server sees the
		// sending host.
		to = far.v4(t, "trusting", "trusting")
		for _, network := range []string{"tcp", "udp"} {
			r := w.NS(t, "plain").MustGet(t, "--network", network, addrPort(to, "80"))
			assert.Equal(t, wire[i], remote(t, r), "who the server saw")
			_, err := w.NS(t, "plain").Get("--network", network, "--timeout", noAnswer.String(), addrPort(to, "81"))
			require.Error(t, err, "not published")
		}
		// Routed: so is the ping, and a routed sender's own address is seen.
		to = far.v4(t, "routed", "routed")
		for _, c := range []struct {
			from string
			seen netip.Addr
		}{{"plain", wire[i]}, {"routed", w.v4(t, "routed", "routed")}} {
			from := w.NS(t, c.from)
			open(t, from, []netip.Addr{c.seen}, to)
			assert.Equal(t, []int{62}, ttls(from, to, 1), "two hosts on the way")
			for _, network := range []string{"tcp", "udp"} {
				_, err := from.Get("--network", network, "--timeout", noAnswer.String(), addrPort(to, "81"))
				require.Error(t, err, "not published")
			}
		}
		// A stream over it survives a restart of both daemons.
		stream := w.NS(t, "routed").Stream(t, "--duration", time.Minute.String(), addrPort(to, "80"))
		w.bpfnet.Restart(t)
		far.bpfnet.Restart(t)
		sum := stream.Finish(t)
		assert.Zero(t, sum.Lost+sum.Resets, "%+v", sum)
	}
}
