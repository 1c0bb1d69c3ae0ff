// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// bridgeSite is a site with two internal networks beside blue and red.
type bridgeSite struct {
	*site
	m *maps.Maps
}

const (
	indoors6 = "fd00:1a1::/64"
	cellar6  = "fd00:1a2::/64"
)

// Needs root. moby's integration/networking/bridge_linux_test.go and its like: one network, two
// networks, internal ones.
func TestMobyBridge(t *testing.T) {
	w := bridgeSite{site: newSite(t, lab.Opts{}, lab.DockerOpts{})}
	w.m = w.maps(t)
	w.d.MustRun(t, "network", "create", "--internal", "--ipv6", "--subnet", indoors6, "indoors")
	w.d.MustRun(t, "network", "create", "--internal", "--ipv6", "--subnet", cellar6, "cellar")
	for name, network := range map[string]string{
		"web": "blue", "peer": "blue", "far": "red", "inner": "indoors", "inner2": "indoors", "deep": "cellar",
	} {
		var args []string
		if name == "web" {
			args = []string{"-p", "8080:80", "-p", "8080:80/udp"}
		}
		w.serve(t, name, network, args...)
		w.ready(t, name)
	}
	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	for _, test := range []struct {
		name string
		run  func(t *testing.T, w bridgeSite)
	}{
		{"TestBridgeICC", mobyICC},
		{"TestBridgeINC", mobyINC},
		{"TestInternalNwConnectivity", mobyInternal},
		{"TestInternalNetworkDNS", mobyInternalDNS},
		{"TestDockerNetworkInternalMode", mobyInternalMode},
		{"TestGatewaySelection", mobyGatewaySelection},
		{"TestAdvertiseAddresses", mobyAdvertise},
		{"TestDropInForwardChain", mobyForeignDrop},
		{"TestFirewalldReloadNoZombies", mobyFlush}, // the last: it takes the lab's counters away
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, w) })
	}
}

// Containers of one network reach each other: by name, by either family's address and by link-local
// ones, whether the network is internal or not.
func mobyICC(t *testing.T, w bridgeSite) {
	for _, c := range []struct{ network, from, to string }{{"blue", "peer", "web"}, {"indoors", "inner", "inner2"}} {
		from := w.d.NS(t, c.from)
		own, to := w.pair(t, c.from, c.network), w.pair(t, c.to, c.network)
		local := linkLocal(t, w.d.NS(t, c.to), "eth0").WithZone("eth0")
		linkLocal(t, from, "eth0")
		nft := w.NFTCounters(t)
		answered(t, w.m, slices.Concat(
			each(probe{from: from, host: c.to}, 80, own[0], own[1], to...),
			pings(probe{from: from}, to...),
			pings(probe{from: from}, local),
		)...)
		delta := w.NFTDelta(t, nft)
		for _, hook := range []string{"forward", "output", "input"} {
			assert.Zero(t, delta[hook], "%s: packets strayed into netfilter: %v", c.network, delta)
		}
		for _, ping := range []string{"ping", "ping6"} {
			out, err := w.d.Run("exec", c.from, ping, "-c", "1", "-W", "2", c.to)
			require.NoError(t, err, out)
			assert.Equal(t, []int{64}, ttlsIn(out), out)
		}
	}
}

// Containers of different networks do not, in any direction, internal or not. Engine 20.10 gives those of
// internal networks a default route, so that it is the data path that holds them.
func mobyINC(t *testing.T, w bridgeSite) {
	at := map[string][]netip.Addr{}
	for name, network := range map[string]string{"peer": "blue", "far": "red", "inner": "indoors", "deep": "cellar"} {
		at[name] = w.pair(t, name, network)
	}
	indoors := map[string]bool{"inner": true, "deep": true}
	var all []probe
	for from := range at {
		for to := range at {
			if from == to {
				continue
			}
			p := probe{from: w.d.NS(t, from), why: "isolated/container"}
			if indoors[from] || indoors[to] {
				p.why = "internal/container"
			}
			all = append(all, slices.Concat(each(p, 80, nobody, nobody, at[to]...), pings(p, at[to]...))...)
		}
	}
	unanswerable(t, w.m, all...)
}

// The host and the containers of an internal network reach each other on its subnet; nothing else does.
func mobyInternal(t *testing.T, w bridgeSite) {
	gw4, gw6 := w.gateways(t, "indoors")
	own := w.pair(t, "inner", "indoors")
	inner := w.d.NS(t, "inner")
	w.Host.Serve(t, "--tcp", "7300", "--udp", "7300")
	answered(t, w.m, slices.Concat(
		each(probe{from: w.Host, host: "inner"}, 80, gw4, gw6, own...),
		pings(probe{from: w.Host}, own...),
		each(probe{from: inner}, 7300, own[0], own[1], gw4, gw6),
		pings(probe{from: inner}, gw4, gw6),
	)...)
	// By its default route, which newer Engines do not give it, it reaches the host, and nothing else:
	// neither the world nor published ports; and nobody outside reaches it.
	blue4, blue6 := w.gateways(t, "blue")
	answered(t, w.m, each(probe{from: inner}, 7300, own[0], own[1], blue4, blue6)...)
	unanswerable(t, w.m, slices.Concat(
		each(probe{from: inner, why: "internal/container"}, 80, nobody, nobody, lab.Client24, lab.Client26, lab.Internet4),
		each(probe{from: inner, why: "internal/container"}, 8080, nobody, nobody, lab.Host4, lab.Host6),
		each(probe{from: w.Client, why: "direct_access/uplink"}, 80, nobody, nobody, own...),
	)...)
}

// A name server outside is not asked for containers that are on internal networks alone.
func mobyInternalDNS(t *testing.T, w bridgeSite) {
	noSuchName(t, w.Client2, lab.Internet4)
	w.serve(t, "asker", "indoors", "--dns", lab.Internet4.String(), "--dns-opt", "timeout:1", "--dns-opt", "attempts:1")
	defer w.remove(t, "asker", "")
	w.ready(t, "asker")
	asked := w.Client2.Capture(t, lab.ClientIf, nil)
	name := func(name string) (lab.Reply, error) { return w.d.Get("asker", name+":80") }
	r, err := name("inner")
	require.NoError(t, err, "names of the network resolve: %+v", r)
	r, err = name("outside.example")
	require.Error(t, err)
	require.Equal(t, "resolve", r.Stage, "%+v", r)
	require.Empty(t, asked.Frames(), "what an internal network asks gets out")
	// On a network that leads out, too, it is asked.
	w.d.MustRun(t, "network", "connect", "red", "asker")
	w.settled(t, "asker", "red", true)
	r, err = name("outside.example")
	require.Error(t, err)
	require.Contains(t, r.Error, "no such host")
	asked.Wait(t, 2, 5*time.Second)
}

// Containers of an internal network reach each other by name and nothing outside; nothing that they
// publish is open.
func mobyInternalMode(t *testing.T, w bridgeSite) {
	w.serve(t, "hidden", "indoors", "-p", "8091:80", "-p", "8091:80/udp")
	defer w.remove(t, "hidden", "")
	w.ready(t, "hidden")
	r := w.d.MustGet(t, "inner", "hidden:80")
	require.Equal(t, "hidden", r.View.Host)
	unanswerable(t, w.m, pings(probe{from: w.d.NS(t, "inner"), why: "internal/container"}, lab.Internet4, lab.Internet6)...)
	for _, s := range w.snapshot(t).Ports {
		require.NotContains(t, s.Host, ":8091")
	}
	for _, from := range []*lab.NS{w.Client, w.Host, w.d.NS(t, "far")} {
		for _, network := range []string{"tcp", "udp"} {
			r, err := from.Get("--network", network, "--timeout", noAnswer.String(), at(lab.Host4, 8091))
			require.Error(t, err, "%+v", r)
			require.True(t, isRefusedOrSilent(r), "%+v", r)
		}
	}
}

// Published ports are those of the endpoint that leads out, for each family, and move with it.
func mobyGatewaySelection(t *testing.T, w bridgeSite) {
	w.d.MustRun(t, "network", "create", "g-four")
	w.d.MustRun(t, "network", "create", "--ipv6", "--subnet", "fd00:6a7e::/64", "g-six")
	w.d.MustRun(t, "network", "create", "--internal", "g-internal")
	w.serve(t, "mover", "g-four", "-p", "8092:80", "-p", "8092:80/udp")
	defer w.remove(t, "mover", "g-four g-six g-internal")
	w.settled(t, "mover", "g-four", true)

	serves := func(network string, six bool) {
		t.Helper()
		own := w.pair(t, "mover", network)
		to := []netip.Addr{lab.Host4}
		if six {
			to = append(to, lab.Host6)
		}
		for i, host := range to {
			for _, proto := range []string{"tcp", "udp"} {
				lab.Eventually(t, 10*time.Second, "the port leads to "+network, func() bool {
					r, err := w.Client.Get("--network", proto, "--timeout", noAnswer.String(), at(host, 8092))
					return err == nil && r.View.Local == at(own[i], 80) && slices.Contains([]netip.Addr{lab.Client4, lab.Client6}, clientSeen(t, r))
				})
			}
		}
		if !six {
			r, err := w.Client.Get("--timeout", noAnswer.String(), at(lab.Host6, 8092))
			require.Error(t, err, "%+v", r)
			require.True(t, isRefusedOrSilent(r), "%+v", r)
		}
	}
	serves("g-four", false)
	w.d.MustRun(t, "network", "connect", "g-internal", "mover")
	w.settled(t, "mover", "g-internal", true)
	serves("g-four", false)
	w.d.MustRun(t, "network", "connect", "g-six", "mover")
	w.settled(t, "mover", "g-six", true)
	serves("g-six", true)
	w.d.MustRun(t, "network", "disconnect", "g-six", "mover")
	w.settled(t, "mover", "g-six", false)
	serves("g-four", false)
	w.d.MustRun(t, "network", "disconnect", "g-four", "mover")
	w.settled(t, "mover", "g-four", false)
	for _, from := range []*lab.NS{w.Client, w.d.NS(t, "far")} {
		r, err := from.Get("--timeout", noAnswer.String(), at(lab.Host4, 8092))
		require.Error(t, err, "only an internal network is left: %+v", r)
	}
}

// An address that comes back with another MAC is reached at once, by those who have the old one in their
// neighbour tables.
func mobyAdvertise(t *testing.T, w bridgeSite) {
	const v4, v6 = "172.31.77.5", "fd00:ad5e::5"
	w.d.MustRun(t, "network", "create", "--subnet", "172.31.77.0/24", "--ipv6", "--subnet", "fd00:ad5e::/64", "advertised")
	w.serve(t, "asker", "advertised")
	defer w.remove(t, "asker moved", "advertised")
	own := w.pair(t, "asker", "advertised")
	gw4, gw6 := w.gateways(t, "advertised")
	to := []netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
	for i, mac := range []string{"02:00:00:00:77:01", "02:00:00:00:77:02", "02:00:00:00:77:03"} {
		if i > 0 {
			w.remove(t, "moved", "")
		}
		w.serve(t, "moved", "advertised", "--ip", v4, "--ip6", v6, "--mac-address", mac, "-p", "8093:80", "-p", "8093:80/udp")
		w.settled(t, "moved", "advertised", true)
		for _, p := range slices.Concat(
			each(probe{from: w.d.NS(t, "asker"), host: "moved"}, 80, own[0], own[1], to...),
			each(probe{from: w.Host, host: "moved"}, 80, gw4, gw6, to...),
			each(probe{from: w.Client, host: "moved"}, 8093, lab.Client4, lab.Client6, lab.Host4, lab.Host6),
			pings(probe{from: w.d.NS(t, "asker")}, to...),
		) {
			// One after another: the first packet of each finds what the last one has learned.
			answered(t, w.m, p)
		}
	}
}

// A foreign rule at the end of FORWARD that drops all does not meet container traffic.
func mobyForeignDrop(t *testing.T, w bridgeSite) {
	for _, tool := range []string{"iptables", "ip6tables"} {
		w.Host.MustRun(t, tool, "-A", "FORWARD", "-j", "DROP")
		defer w.Host.MustRun(t, tool, "-D", "FORWARD", "-j", "DROP")
	}
	w.traffic(t)
	for _, tool := range []string{"iptables", "ip6tables"} {
		line := strings.Fields(strings.Split(w.Host.MustRun(t, tool, "-nvxL", "FORWARD"), "\n")[2])
		require.Equal(t, []string{"0", "0", "DROP"}, line[:3], "packets met the rule")
	}
}

// traffic is one exchange of each kind that must get through, and of each that must not.
func (w bridgeSite) traffic(t *testing.T) {
	t.Helper()
	web, peer, far := w.pair(t, "web", "blue"), w.pair(t, "peer", "blue"), w.pair(t, "far", "red")
	hostOut := []netip.Addr{lab.HostB4, lab.HostB6}
	answered(t, w.m, slices.Concat(
		each(probe{from: w.d.NS(t, "peer"), host: "web"}, 80, peer[0], peer[1], web...),
		each(probe{from: w.d.NS(t, "peer")}, 80, hostOut[0], hostOut[1], lab.Client24, lab.Client26, lab.Internet4, lab.Internet6),
		pings(probe{from: w.d.NS(t, "peer")}, slices.Concat(web, []netip.Addr{lab.Client24, lab.Client26})...),
		each(probe{from: w.Client, host: "web"}, 8080, lab.Client4, lab.Client6, lab.Host4, lab.Host6),
		each(probe{from: w.d.NS(t, "far"), host: "web"}, 8080, far[0], far[1], lab.Host4, lab.Host6),
	)...)
	unanswerable(t, w.m, slices.Concat(
		each(probe{from: w.d.NS(t, "far"), why: "isolated/container"}, 80, nobody, nobody, web...),
		each(probe{from: w.Client, why: "direct_access/uplink"}, 80, nobody, nobody, web...),
		pings(probe{from: w.Client, why: "direct_access/uplink"}, web...),
	)...)
}

// Whoever flushes all rules of the host opens nothing and closes nothing, and rules of containers that
// are gone do not come back: there are none. This stands for moby's reload of firewalld.
func mobyFlush(t *testing.T, w bridgeSite) {
	w.serve(t, "short", "blue", "-p", "8094:80")
	w.ready(t, "short")
	w.Client.MustGet(t, at(lab.Host4, 8094))
	w.remove(t, "short", "")
	w.Host.MustRun(t, "nft", "flush", "ruleset")
	require.Empty(t, w.Host.MustRun(t, "nft", "list", "ruleset"))
	w.traffic(t)
	w.serve(t, "later", "blue", "-p", "8095:80")
	w.ready(t, "later")
	r := w.Client.MustGet(t, at(lab.Host4, 8095))
	require.Equal(t, lab.Client4, clientSeen(t, r))
	unanswerable(t, w.m, probe{from: w.Client, network: "tcp", to: at(lab.Host4, 8094), refused: true})
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		for line := range strings.Lines(w.Host.MustRun(t, save)) {
			require.False(t, strings.HasPrefix(line, "-A") || strings.HasPrefix(line, ":DOCKER"), line)
		}
	}
	w.remove(t, "later", "")
	w.traffic(t)
}
