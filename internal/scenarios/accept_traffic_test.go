// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. What flows between containers, clients and the internet: netfilter never sees it, servers
// see who calls, the host and containers reach published ports by every address.
func TestAcceptTraffic(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	w.serve(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.serve(t, "local", "blue", "-p", "127.0.0.1:8081:80", "-p", "127.0.0.1:8081:80/udp", "-p", "192.0.2.1:8082:80", "-p", "192.0.2.1:8082:80/udp")
	w.idle(t, "peer", "blue")
	w.idle(t, "far", "red")
	w.d.MustRun(t, "run", "-d", "--name", "hostnet", "--net=host", lab.Image, "sleep", "100000")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")

	t.Run("netfilter", func(t *testing.T) { testNetfilter(t, w) })
	t.Run("client address", func(t *testing.T) { testClientAddress(t, w) })
	t.Run("host", func(t *testing.T) { testHostAccess(t, w) })
	t.Run("containers", func(t *testing.T) { testContainerAccess(t, w) })
	t.Run("one address", func(t *testing.T) { testOneAddress(t, w) })
	t.Run("udp ports", func(t *testing.T) { testSourcePort(t, w) })
}

// Needs root and br_netfilter. The same where bridged packets are to pass iptables.
func TestAcceptBridgeNetfilter(t *testing.T) {
	w := newSite(t, lab.Opts{BridgeNetfilter: true}, lab.DockerOpts{})
	w.serve(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.idle(t, "peer", "blue")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	testNetfilter(t, w)
}

func testNetfilter(t *testing.T, w *site) {
	m := w.maps(t)
	web4, web6 := w.d.Addrs(t, "web", "blue")
	peer := w.d.NS(t, "peer")
	total := count(10000)
	for _, c := range []struct {
		name string
		from *lab.NS
		to   string
	}{
		{"same network v4", peer, at(web4, 80)},
		{"same network v6", peer, at(web6, 80)},
		{"published v4", w.Client, at(lab.Host4, 8080)},
		{"published v6", w.Client, at(lab.Host6, 8080)},
		{"egress v4", peer, at(lab.Client24, 7000)},
		{"egress v6", peer, at(lab.Client26, 7000)},
	} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(c.name+" "+network, func(t *testing.T) {
				nft, before := w.NFTCounters(t), readCounters(t, m)
				// An exchange is at least a packet each way.
				c.from.MustGet(t, "--network", network, "--repeat", strconv.Itoa(total/2), "--send", strings.Repeat("x", 900), c.to)
				require.Empty(t, w.NFTDelta(t, nft), "packets strayed into netfilter")
				got := since(t, m, before)
				require.Empty(t, got.drops())
				require.GreaterOrEqual(t, got.fast(), uint64(total-2))
				require.Zero(t, got["fate stack/container"]+got["fate stack/uplink"])
			})
		}
	}
	for _, entry := range w.Conntrack(t) {
		// The bridges' own IGMP reports are the host's.
		require.Contains(t, entry, "dst=224.0.0.22 ", "tracked")
	}
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		out := w.Host.MustRun(t, save)
		for line := range strings.Lines(out) {
			require.False(t, strings.HasPrefix(line, "-A") || strings.HasPrefix(line, ":DOCKER"), line)
		}
	}
	for line := range strings.Lines(w.Host.MustRun(t, "nft", "list", "tables")) {
		require.NotContains(t, strings.ToLower(line), "docker")
		require.NotContains(t, strings.ToLower(line), "bpfnet")
	}
	require.Empty(t, w.processesOf("docker-proxy"))
	require.NotEmpty(t, w.processesOf("dockerd"), "the look at processes is blind")
}

func testClientAddress(t *testing.T, w *site) {
	for _, c := range []struct {
		from *lab.NS
		to   netip.Addr
		want netip.Addr
	}{
		{w.Client, lab.Host4, lab.Client4},
		{w.Client, lab.Host6, lab.Client6},
		{w.Client, lab.HostB4, lab.Client4},
		{w.Client, lab.HostB6, lab.Client6},
		{w.Client2, lab.HostB4, lab.Client24},
		{w.Client2, lab.HostB6, lab.Client26},
		{w.Client2, lab.Host4, lab.Client24},
	} {
		for _, network := range []string{"tcp", "udp"} {
			r := c.from.MustGet(t, "--network", network, at(c.to, 8080))
			require.Equal(t, c.want, clientSeen(t, r), "%s %s", network, c.to)
			require.Equal(t, "web", r.View.Host)
		}
	}
}

// hostAddrs are all addresses of the host, with those of the bridges.
func hostAddrs(t *testing.T, w *site) []netip.Addr {
	blueGW4, blueGW6 := w.gateways(t, "blue")
	redGW4, redGW6 := w.gateways(t, "red")
	docker0, _ := w.gateways(t, "bridge")
	v := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	return []netip.Addr{
		v("127.0.0.1"), v("::1"), v("127.5.6.7"), lab.Host4, lab.Host6, lab.HostB4, lab.HostB6,
		blueGW4, blueGW6, redGW4, redGW6, docker0,
	}
}

func testHostAccess(t *testing.T, w *site) {
	addrs := hostAddrs(t, w)
	get := map[string]func(...string) (lab.Reply, error){
		"inside":  w.Host.Get,
		"outside": w.getOutside,
	}
	check := func(t *testing.T, get func(...string) (lab.Reply, error), to netip.Addr, args ...string) lab.Reply {
		t.Helper()
		r, err := get(append(args, at(to, 8080))...)
		require.NoError(t, err, "%v %v: %+v", args, to, r)
		require.Equal(t, "web", r.View.Host, "%v %v", args, to)
		return r
	}
	dialled := func(t *testing.T, got string, to netip.Addr) {
		t.Helper()
		a := parseAddrPort(t, got)
		require.Equal(t, netip.AddrPortFrom(to, 8080), netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
	}
	for where, get := range get {
		t.Run(where, func(t *testing.T) {
			for _, to := range addrs {
				for _, network := range []string{"tcp", "udp"} {
					r := check(t, get, to, "--network", network)
					dialled(t, r.Peer, to)
					if to.Is4() {
						r = check(t, get, to, "--network", network, "--mapped")
						dialled(t, r.Peer, to)
					}
					bind := "127.0.0.1:0"
					if to.Is6() {
						bind = "[::1]:0"
					}
					if to.IsLoopback() {
						check(t, get, to, "--network", network, "--bind", bind)
					}
				}
				r := check(t, get, to, "--network", "udp", "--unconnected")
				dialled(t, r.From, to)
				if to.Is4() {
					r = check(t, get, to, "--network", "udp", "--unconnected", "--mapped")
					dialled(t, r.From, to)
				}
			}
		})
	}
	t.Run("net=host container", func(t *testing.T) {
		for _, to := range []netip.Addr{addrs[0], addrs[1], lab.Host4, lab.Host6} {
			for _, network := range []string{"tcp", "udp"} {
				check(t, func(args ...string) (lab.Reply, error) { return w.d.Get("hostnet", args...) }, to, "--network", network)
			}
		}
	})
}

func testContainerAccess(t *testing.T, w *site) {
	blueGW4, blueGW6 := w.gateways(t, "blue")
	redGW4, redGW6 := w.gateways(t, "red")
	for _, c := range []struct {
		name, network string
		own           []netip.Addr
	}{
		{"peer", "blue", []netip.Addr{blueGW4, blueGW6}},
		{"far", "red", []netip.Addr{redGW4, redGW6}},
		{"web", "blue", []netip.Addr{blueGW4, blueGW6}},
	} {
		from := w.d.NS(t, c.name)
		a4, a6 := w.d.Addrs(t, c.name, c.network)
		for _, to := range append([]netip.Addr{lab.Host4, lab.Host6, lab.HostB4, lab.HostB6}, c.own...) {
			for _, network := range []string{"tcp", "udp"} {
				t.Run(fmt.Sprintf("%s %s %s", c.name, network, to), func(t *testing.T) {
					r, err := from.Get("--network", network, at(to, 8080))
					require.NoError(t, err, "%+v", r)
					require.Equal(t, "web", r.View.Host)
					want := a4
					if to.Is6() {
						want = a6
					}
					if c.name == "web" { // it would not answer itself
						want = map[bool]netip.Addr{true: blueGW4, false: blueGW6}[to.Is4()]
					}
					require.Equal(t, want, clientSeen(t, r))
				})
			}
		}
	}
}

func testOneAddress(t *testing.T, w *site) {
	loopback := netip.MustParseAddr("127.0.0.1")
	for _, network := range []string{"tcp", "udp"} {
		ok := func(r lab.Reply, err error) {
			t.Helper()
			require.NoError(t, err, "%s %+v", network, r)
			require.Equal(t, "local", r.View.Host)
		}
		not := func(r lab.Reply, err error) {
			t.Helper()
			require.Error(t, err, "%s %+v", network, r)
			require.True(t, isRefusedOrSilent(r), "%s %+v", network, r)
		}
		args := func(to netip.Addr, port int) []string {
			return []string{"--network", network, "--timeout", "300ms", at(to, port)}
		}
		ok(w.Host.Get(args(loopback, 8081)...))
		ok(w.getOutside(args(loopback, 8081)...))
		ok(w.d.Get("hostnet", args(loopback, 8081)...))
		not(w.Host.Get(args(lab.Host4, 8081)...))
		not(w.Client.Get(args(lab.Host4, 8081)...))
		not(w.d.NS(t, "far").Get(args(lab.Host4, 8081)...))

		ok(w.Client.Get(args(lab.Host4, 8082)...))
		ok(w.Client2.Get(args(lab.Host4, 8082)...))
		ok(w.Host.Get(args(lab.Host4, 8082)...))
		ok(w.d.NS(t, "far").Get(args(lab.Host4, 8082)...))
		not(w.Client.Get(args(lab.HostB4, 8082)...))
		not(w.Client2.Get(args(lab.HostB4, 8082)...))
		not(w.Host.Get(args(loopback, 8082)...))
		not(w.Client.Get(args(lab.Host6, 8082)...))
	}
}

// RFC 4787 REQ-1: one socket has one outer port, whoever it talks to.
func testSourcePort(t *testing.T, w *site) {
	w.Client2.Stun(t, "--listen", strings.Join([]string{
		at(lab.Client24, 3478), at(lab.Internet4, 3478), at(lab.Client26, 3478), at(lab.Internet6, 3478),
	}, ","))
	peer := w.d.NS(t, "peer")
	for i, c := range []struct{ one, two, outer netip.Addr }{
		{lab.Client24, lab.Internet4, lab.HostB4},
		{lab.Client26, lab.Internet6, lab.HostB6},
	} {
		local := fmt.Sprintf(":%d", 40000+i)
		var seen []string
		for _, to := range []netip.Addr{c.one, c.two} {
			r := peer.MustGet(t, "--network", "udp", "--bind", map[bool]string{true: "0.0.0.0", false: "[::]"}[to.Is4()]+local, at(to, 3478))
			seen = append(seen, r.Text)
		}
		require.Equal(t, seen[0], seen[1])
		require.Equal(t, c.outer, parseAddrPort(t, seen[0]).Addr())
	}
}

// Needs root. Docker's proxies run, and see nothing.
func TestAcceptProxy(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{Proxy: true})
	w.serve(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.serve(t, "four", "bridge", "-p", "8090:80", "-p", "8090:80/udp")
	require.NotEmpty(t, w.processesOf("docker-proxy"))
	testClientAddress(t, w)
	nft := w.NFTCounters(t)
	for _, network := range []string{"tcp", "udp"} {
		r := w.Client.MustGet(t, "--network", network, at(lab.Host4, 8090))
		require.Equal(t, lab.Client4, clientSeen(t, r))
	}
	require.Empty(t, w.NFTDelta(t, nft))
	for _, c := range []struct {
		to   string
		host string
	}{
		{"127.0.0.1:8080", "web"},
		{"[::1]:8080", "web"},
		{"127.0.0.1:8090", "four"},
		{"[::1]:8090", "four"}, // IPv6 to a container that has none
	} {
		for _, network := range []string{"tcp", "udp"} {
			r := w.Host.MustGet(t, "--network", network, c.to)
			require.Equal(t, c.host, r.View.Host)
		}
	}
	far := w.d.NS(t, "four")
	r := far.MustGet(t, at(lab.Host4, 8080))
	require.Equal(t, "web", r.View.Host)
	four, _ := w.d.Addrs(t, "four", "bridge")
	require.Equal(t, four, clientSeen(t, r))
}
