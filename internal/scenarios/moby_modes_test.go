// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// modesSite is a site with networks of all gateway modes. Each has a container of the network's name that
// serves ports 80, which is published, and 81, which is not.
type modesSite struct {
	*site
	m *maps.Maps
}

// modes are the networks beside blue and red: their options and host ports.
var modes = []struct {
	name, subnet6 string
	hostPort      int
	options       []string
}{
	{"free", "fd00:f::/64", 8081, []string{"gateway_mode_ipv4=nat-unprotected", "gateway_mode_ipv6=nat-unprotected"}},
	{"routed", "fd00:a::/64", 8082, []string{"gateway_mode_ipv4=routed", "gateway_mode_ipv6=routed"}},
	{"split", "fd00:5::/64", 8083, []string{"gateway_mode_ipv4=routed"}},
	{"wary", "fd00:e::/64", 8084, []string{"trusted_host_interfaces=" + lab.HostIf}},
	{"nat", "fd00:c::/64", 8080, []string{"gateway_mode_ipv4=nat", "gateway_mode_ipv6=nat"}},
}

// Needs root. moby's tests of gateway modes, trusted interfaces, direct routing and marks, by the labels that
// Engine 20.10 stores and leaves to bpfnet.
func TestMobyModes(t *testing.T) {
	w := modesSite{site: newSite(t, lab.Opts{}, lab.DockerOpts{})}
	w.m = w.maps(t)
	for _, n := range modes {
		args := []string{"network", "create", "--ipv6", "--subnet", n.subnet6}
		for _, o := range n.options {
			args = append(args, "-o", "com.docker.network.bridge."+o)
		}
		w.d.MustRun(t, append(args, n.name)...)
		port := at(netip.IPv4Unspecified(), n.hostPort)[len("0.0.0.0:"):] + ":80"
		w.d.Serve(t, "--name", n.name, "--hostname", n.name, "--network", n.name, "-p", port, "-p", port+"/udp", "--", "--tcp", "80,81", "--udp", "80,81")
		w.ready(t, n.name)
	}
	w.idle(t, "far", "red")
	for _, test := range []struct {
		name   string
		daemon []string
		run    func(t *testing.T, w modesSite)
	}{
		{"TestDirectRoutingOpenPorts", nil, mobyDirectRouting},
		{"TestDirectRemoteAccessOnExposedPort", nil, mobyDirectAccess},
		{"TestRoutedNonGateway", nil, mobyRoutedNonGateway},
		{"TestBridgeINCRouted", nil, mobyINCRouted},
		{"TestInterNetworkDirectRouting", nil, mobyInterNetwork},
		{"TestIsolated", nil, mobyIsolated},
		{"TestHostIPv4BridgeLabel", nil, mobyHostAddress},
		{"TestAllowDirectRemoteAccessOnExposedPort", []string{"--allow-direct-routing"}, mobyAllowDirect},
		{"TestAcceptFwMark", []string{"--bridge-accept-fwmark", "0x20/0xf0"}, mobyMark},
	} {
		if test.daemon != nil {
			w.b.Stop(t)
			w.b = w.StartBpfnet(t, w.d, test.daemon...)
		}
		t.Run(test.name, func(t *testing.T) { test.run(t, w) })
	}
}

var nobody netip.Addr

const (
	direct = "direct_access/uplink"
	apart  = "isolated/container"
)

// dialled makes the probes of a client that has those addresses: TCP and UDP to ports, and pings.
type dialled struct {
	from         *lab.NS
	seen4, seen6 netip.Addr
}

func (d dialled) reaches(host string, ports []int, ping bool, to ...netip.Addr) (out []probe) {
	p := probe{from: d.from, host: host}
	for _, port := range ports {
		out = append(out, each(p, port, d.seen4, d.seen6, to...)...)
	}
	if ping {
		out = append(out, pings(p, to...)...)
	}
	return out
}

func (d dialled) not(why string, ports []int, ping bool, to ...netip.Addr) (out []probe) {
	p := probe{from: d.from, why: why}
	for _, port := range ports {
		out = append(out, each(p, port, nobody, nobody, to...)...)
	}
	if ping {
		out = append(out, pings(p, to...)...)
	}
	return out
}

var (
	both   = []int{80, 81}
	first  = []int{80}
	second = []int{81}
)

func (w modesSite) client() dialled  { return dialled{w.Client, lab.Client4, lab.Client6} }
func (w modesSite) client2() dialled { return dialled{w.Client2, lab.Client24, lab.Client26} }

// A remote that routes to containers by the host reaches what their network's mode opens, whatever the
// policy of the host's FORWARD chain.
func mobyDirectRouting(t *testing.T, w modesSite) {
	nat, free, routed, split := w.pair(t, "nat", "nat"), w.pair(t, "free", "free"), w.pair(t, "routed", "routed"), w.pair(t, "split", "split")
	for _, policy := range []string{"ACCEPT", "DROP"} {
		t.Run("policy "+policy, func(t *testing.T) {
			w.Host.MustRun(t, "iptables", "-P", "FORWARD", policy)
			w.Host.MustRun(t, "ip6tables", "-P", "FORWARD", policy)
			c := w.client()
			answered(t, w.m, slices.Concat(
				c.reaches("free", both, true, free...),
				c.reaches("routed", first, true, routed...),
				c.reaches("split", first, true, split[0]),
			)...)
			unanswerable(t, w.m, slices.Concat(
				c.not(direct, both, true, nat...),
				c.not(direct, second, false, routed...),
				c.not(direct, second, false, split[0]),
				c.not(direct, both, true, split[1]),
			)...)
		})
	}
}

// By the host's address the published port is reached where the mode translates, by the container's own
// where mode or trusted interface let it be.
func mobyDirectAccess(t *testing.T, w modesSite) {
	wary, split := w.pair(t, "wary", "wary"), w.pair(t, "split", "split")
	c, c2 := w.client(), w.client2()
	var open, shut []probe
	for _, n := range modes {
		p := probe{from: w.Client, host: n.name}
		for _, x := range each(p, n.hostPort, lab.Client4, lab.Client6, lab.Host4, lab.Host6) {
			if n.name == "routed" || n.name == "split" && x.seen.Is4() {
				shut = append(shut, probe{from: x.from, network: x.network, to: x.to, why: "not_published/uplink"})
			} else {
				open = append(open, x)
			}
		}
	}
	answered(t, w.m, slices.Concat(open, c.reaches("wary", first, false, wary...), c.reaches("split", first, false, split[0]))...)
	unanswerable(t, w.m, slices.Concat(shut,
		c.not(direct, second, true, wary...),
		c2.not(direct, both, true, wary...),
	)...)
}

// A container's routed network opens its ports though another network is its way out.
func mobyRoutedNonGateway(t *testing.T, w modesSite) {
	w.d.Serve(t, "--name", "twice", "--hostname", "twice", "--network", "nat", "-p", "8085:80", "-p", "8085:80/udp", "--", "--tcp", "80,81", "--udp", "80,81")
	defer w.remove(t, "twice", "")
	w.d.MustRun(t, "network", "connect", "routed", "twice")
	w.settled(t, "twice", "routed", true)
	c := w.client()
	answered(t, w.m, slices.Concat(
		c.reaches("twice", first, true, w.pair(t, "twice", "routed")...),
		each(probe{from: w.Client, host: "twice"}, 8085, lab.Client4, lab.Client6, lab.Host4, lab.Host6),
	)...)
	unanswerable(t, w.m, slices.Concat(
		c.not(direct, second, false, w.pair(t, "twice", "routed")...),
		c.not(direct, both, true, w.pair(t, "twice", "nat")...),
	)...)
}

func (w modesSite) container(t *testing.T, name, network string) dialled {
	own := w.pair(t, name, network)
	return dialled{w.d.NS(t, name), own[0], own[1]}
}

// From a network behind NAT a routed one is reached at its open ports and by ping; not the other way.
func mobyINCRouted(t *testing.T, w modesSite) {
	routed := w.pair(t, "routed", "routed")
	far, back := w.container(t, "far", "red"), w.container(t, "routed", "routed")
	answered(t, w.m, far.reaches("routed", first, true, routed...)...)
	unanswerable(t, w.m, slices.Concat(
		far.not(apart, second, false, routed...),
		back.not(apart, both, true, w.pair(t, "nat", "nat")...),
		back.not(apart, first, true, w.pair(t, "far", "red")...),
	)...)
	// What is published is reached from it, too, and its own address is seen.
	answered(t, w.m, each(probe{from: back.from, host: "nat"}, 8080, back.seen4, back.seen6, lab.Host4, lab.Host6)...)
}

// What a container reaches of another network's containers by their own addresses.
func mobyInterNetwork(t *testing.T, w modesSite) {
	nat, free, routed, wary := w.pair(t, "nat", "nat"), w.pair(t, "free", "free"), w.pair(t, "routed", "routed"), w.pair(t, "wary", "wary")
	far := w.container(t, "far", "red")
	answered(t, w.m, slices.Concat(
		far.reaches("free", both, true, free...),
		far.reaches("routed", first, true, routed...),
	)...)
	unanswerable(t, w.m, slices.Concat(
		far.not(apart, both, true, nat...),
		far.not(apart, both, true, wary...),
		far.not(apart, second, false, routed...),
	)...)
}

// The host has no part in an isolated network; its containers still talk.
func mobyIsolated(t *testing.T, w modesSite) {
	w.d.MustRun(t, "network", "create", "--internal", "--ipv6", "--subnet", "fd00:150::/64", "-o", "com.docker.network.bridge.gateway_mode_ipv4=isolated",
		"-o", "com.docker.network.bridge.gateway_mode_ipv6=isolated", "alone")
	for _, name := range []string{"alone1", "alone2"} {
		w.serve(t, name, "alone")
		w.ready(t, name)
	}
	defer w.remove(t, "alone1 alone2", "alone")
	one, two := w.container(t, "alone1", "alone"), w.pair(t, "alone2", "alone")
	answered(t, w.m, one.reaches("alone2", first, true, two...)...)
	r := w.d.MustGet(t, "alone1", "alone2:80")
	require.Equal(t, "alone2", r.View.Host)
	gw4, gw6 := w.gateways(t, "alone")
	w.Host.Serve(t, "--tcp", "80", "--udp", "80")
	unanswerable(t, w.m, slices.Concat(
		one.not("internal/container", first, true, gw4, gw6, lab.Host4, lab.Host6, lab.Client24),
		dialled{from: w.Host}.not("internal/to_container", first, true, two...),
		w.client().not(direct, first, true, two...),
	)...)
}

// A network's containers leave with the address that its label names.
func mobyHostAddress(t *testing.T, w modesSite) {
	out4, out6 := netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8:1::77")
	w.Host.AddAddr(t, lab.HostIf, netip.PrefixFrom(out4, 32)) // where no route would choose it
	w.Host.AddAddr(t, lab.HostIf, netip.PrefixFrom(out6, 128))
	w.d.MustRun(t, "network", "create", "--ipv6", "--subnet", "fd00:77::/64", "-o", "com.docker.network.host_ipv4="+out4.String(),
		"-o", "com.docker.network.host_ipv6="+out6.String(), "labelled")
	w.idle(t, "leaver", "labelled")
	defer w.remove(t, "leaver", "labelled")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	to := []netip.Addr{lab.Client24, lab.Internet4, lab.Client26, lab.Internet6}
	answered(t, w.m, slices.Concat(
		each(probe{from: w.d.NS(t, "leaver")}, 7000, out4, out6, to...),
		pings(probe{from: w.d.NS(t, "leaver")}, to...),
		each(probe{from: w.d.NS(t, "far")}, 7000, lab.HostB4, lab.HostB6, to...),
	)...)
}

// With the daemon's --allow-direct-routing, published ports are dialled by containers' own addresses
// from everywhere outside; nothing else is.
func mobyAllowDirect(t *testing.T, w modesSite) {
	nat, wary := w.pair(t, "nat", "nat"), w.pair(t, "wary", "wary")
	c, c2 := w.client(), w.client2()
	answered(t, w.m, slices.Concat(
		c.reaches("nat", first, false, nat...),
		c2.reaches("wary", first, false, wary...),
		each(probe{from: w.Client, host: "nat"}, 8080, lab.Client4, lab.Client6, lab.Host4, lab.Host6),
	)...)
	unanswerable(t, w.m, slices.Concat(c.not(direct, second, true, nat...), c2.not(direct, second, true, wary...))...)
}

// With --bridge-accept-fwmark, what the host's own rules have marked reaches every port; what they have not
// does not.
func mobyMark(t *testing.T, w modesSite) {
	nat := w.pair(t, "nat", "nat")
	c := w.client()
	const inBetween = "direct_access/to_container" // netfilter marks behind the uplink
	for _, tool := range []string{"iptables", "ip6tables"} {
		w.Host.MustRun(t, tool, "-P", "FORWARD", "ACCEPT")
	}
	unanswerable(t, w.m, c.not(inBetween, both, true, nat...)...)
	for _, tool := range []string{"iptables", "ip6tables"} {
		w.Host.MustRun(t, tool, "-t", "mangle", "-A", "PREROUTING", "-i", lab.HostIf, "-j", "MARK", "--set-mark", "0x21")
	}
	answered(t, w.m, c.reaches("nat", both, true, nat...)...)
	unanswerable(t, w.m, w.client2().not(inBetween, both, true, nat...)...)
	for _, tool := range []string{"iptables", "ip6tables"} {
		w.Host.MustRun(t, tool, "-t", "mangle", "-F", "PREROUTING")
		w.Host.MustRun(t, tool, "-t", "mangle", "-A", "PREROUTING", "-i", lab.HostIf, "-j", "MARK", "--set-mark", "0x31")
	}
	unanswerable(t, w.m, c.not(inBetween, both, true, nat...)...)
}
