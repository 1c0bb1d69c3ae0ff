// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bytes"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/maps"
)

// portsSite is a site of published ports.
type portsSite struct {
	*site
	m        *maps.Maps
	proxied  bool // docker-proxy runs
	host     []netip.Addr
	web      []netip.Addr // on blue
	blue     []netip.Addr // gateways
	red      []netip.Addr
	peerAddr []netip.Addr
	farAddr  []netip.Addr
}

// Needs root. moby's integration/networking/port_mapping_linux_test.go, without proxies, with bpfnet in
// docker-proxy's place, and beside the Engine's own docker-proxies.
func TestMobyPorts(t *testing.T) {
	for _, c := range []struct {
		name string
		site func(t *testing.T) *site
	}{
		{"no proxy", func(t *testing.T) *site { return newSite(t, lab.Opts{}, lab.DockerOpts{}) }},
		{"hook", func(t *testing.T) *site { return newHookedSite(t, lab.Opts{BridgeNetfilter: true}) }},
		{"docker-proxy", func(t *testing.T) *site { return newSite(t, lab.Opts{}, lab.DockerOpts{Proxy: true}) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := portsSite{site: c.site(t), proxied: c.name == "docker-proxy"}
			w.m = w.maps(t)
			w.serve(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
			w.idle(t, "peer", "blue")
			w.idle(t, "far", "red")
			w.web, w.peerAddr, w.farAddr = w.pair(t, "web", "blue"), w.pair(t, "peer", "blue"), w.pair(t, "far", "red")
			blue4, blue6 := w.gateways(t, "blue")
			red4, red6 := w.gateways(t, "red")
			w.blue, w.red = []netip.Addr{blue4, blue6}, []netip.Addr{red4, red6}
			w.host = []netip.Addr{lab.Host4, lab.Host6, lab.HostB4, lab.HostB6}
			for _, test := range []struct {
				name string
				run  func(t *testing.T, w portsSite)
			}{
				{"TestPortMappedHairpinTCP", func(t *testing.T, w portsSite) { mobyHairpin(t, w, "tcp") }},
				{"TestPortMappedHairpinUDP", func(t *testing.T, w portsSite) { mobyHairpin(t, w, "udp") }},
				{"TestAccessPublishedPortFromHost", mobyFromHost},
				{"TestAccessPublishedPortFromRemoteHost", mobyFromRemoteHost},
				{"TestAccessPublishedPortFromCtr", mobyFromContainer},
				{"TestAccessPublishedPortFromAnotherNetwork", mobyFromAnotherNetwork},
				{"TestAccessPortPublishedOnLoopbackAddress", mobyOnLoopback},
				{"TestAccessToPublishedPort", mobyAccessToPublishedPort},
			} {
				t.Run(test.name, func(t *testing.T) { test.run(t, w) })
			}
		})
	}
}

// A container of another network reaches the port by the host's address; the server sees the container.
func mobyHairpin(t *testing.T, w portsSite, network string) {
	var all []probe
	for _, p := range each(probe{from: w.d.NS(t, "far"), host: "web"}, 8080, w.farAddr[0], w.farAddr[1], w.host...) {
		if p.network == network {
			all = append(all, p)
		}
	}
	answered(t, w.m, all...)
}

// The host reaches the port by each of its addresses, loopback ones among them.
func mobyFromHost(t *testing.T, w portsSite) {
	v := netip.MustParseAddr
	loopback := []netip.Addr{v("127.0.0.1"), v("127.1.2.3"), v("::1")}
	bridges := slices.Concat(w.blue, w.red)
	var all []probe
	for _, a := range slices.Concat(loopback, w.host, bridges) {
		// The server sees the gateway of its own network, whichever address was dialled.
		all = append(all, each(probe{from: w.Host, host: "web"}, 8080, w.blue[0], w.blue[1], a)...)
	}
	answered(t, w.m, all...)

	// So does it by link-local ones.
	to := netip.AddrPortFrom(linkLocal(t, w.Host, lab.HostIf).WithZone(lab.HostIf), 8080).String()
	answered(t, w.m, probe{from: w.Host, network: "tcp", to: to, host: "web", seen: w.blue[1]})

	// An address that the host gains later is served.
	late := at(v("192.0.2.77"), 8080)
	w.Host.AddAddr(t, lab.HostIf, netip.PrefixFrom(v("192.0.2.77"), 32))
	defer w.Host.MustRun(t, "ip", "addr", "del", "192.0.2.77/32", "dev", lab.HostIf)
	for _, network := range []string{"tcp", "udp"} {
		lab.Eventually(t, 5*time.Second, "the new address is served by "+network, func() bool {
			r, err := w.Host.Get("--network", network, "--timeout", noAnswer.String(), late)
			return err == nil && r.View.Host == "web" && clientSeen(t, r) == w.blue[0]
		})
	}
}

// A neighbour of the host reaches the port, and is seen by its own address.
func mobyFromRemoteHost(t *testing.T, w portsSite) {
	all := slices.Concat(
		each(probe{from: w.Client, host: "web"}, 8080, lab.Client4, lab.Client6, w.host...),
		each(probe{from: w.Client2, host: "web"}, 8080, lab.Client24, lab.Client26, w.host...),
	)
	nft := w.NFTCounters(t)
	answered(t, w.m, all...)
	require.Empty(t, w.NFTDelta(t, nft), "packets strayed into netfilter")

	// A link-local client has no address that a container could answer: docker-proxy serves it, and
	// nothing does without.
	to := netip.AddrPortFrom(linkLocal(t, w.Host, lab.HostIf).WithZone(lab.ClientIf), 8080).String()
	if w.proxied {
		answered(t, w.m, probe{from: w.Client, network: "tcp", to: to, host: "web", seen: w.blue[1]})
	} else {
		r, err := w.Client.Get("--timeout", noAnswer.String(), to)
		require.Error(t, err, "%+v", r)
	}
}

// A neighbour in the network reaches the port by addresses of the host and by the gateway's, and is seen
// by its own address; so does the container itself, seen as the gateway.
func mobyFromContainer(t *testing.T, w portsSite) {
	to := slices.Concat(w.host, w.blue)
	answered(t, w.m, slices.Concat(
		each(probe{from: w.d.NS(t, "peer"), host: "web"}, 8080, w.peerAddr[0], w.peerAddr[1], to...),
		each(probe{from: w.d.NS(t, "web"), host: "web"}, 8080, w.blue[0], w.blue[1], to...),
	)...)
	for _, family := range []string{"iptables", "ip6tables"} {
		require.Equal(t, "0", w.Host.GetSysctl(t, "net.bridge.bridge-nf-call-"+family))
	}
}

// A container of another network reaches the port by its own gateway's address and by the host's.
func mobyFromAnotherNetwork(t *testing.T, w portsSite) {
	answered(t, w.m, each(probe{from: w.d.NS(t, "far"), host: "web"}, 8080, w.farAddr[0], w.farAddr[1],
		slices.Concat(w.host, w.red, w.blue)...)...)
}

// What is published on a loopback address is the host's alone: a packet that a neighbour makes up does
// not get there.
func mobyOnLoopback(t *testing.T, w portsSite) {
	w.serve(t, "lo", "blue", "-p", "127.0.0.2:8000:80", "-p", "127.0.0.2:8000:80/udp")
	w.ready(t, "lo")
	defer w.remove(t, "lo", "")
	v := netip.MustParseAddr
	answered(t, w.m, each(probe{from: w.Host, host: "lo"}, 8000, w.blue[0], w.blue[1], v("127.0.0.2"))...)

	inside := w.d.NS(t, "lo").Capture(t, "eth0", func(p gopacket.Packet) bool { return bytes.Contains(p.Data(), malice) })
	before := readCounters(t, w.m)
	mac := packet.MAC(w.Client.MAC(t, lab.ClientIf), w.Host.MAC(t, lab.HostIf))
	from, to := netip.AddrPortFrom(lab.Client4, 999), netip.AddrPortFrom(v("127.0.0.2"), 8000)
	w.Client.SendFrames(t, lab.ClientIf, [][]byte{
		packet.UDP(from, to, mac, packet.Payload(malice)),
		packet.TCP(from, to, mac, packet.Payload(malice)),
	})
	lab.Eventually(t, waitCounted, "both are counted", func() bool {
		return since(t, w.m, before)["loopback_address/uplink"] == 2
	})
	require.Equal(t, counters{"loopback_address/uplink": 2}, since(t, w.m, before).drops())
	require.Empty(t, inside.Frames())
	// Neither is it reached by other addresses of the host, from anywhere.
	var wait sync.WaitGroup
	for _, p := range slices.Concat(
		each(probe{from: w.Host}, 8000, nobody, nobody, v("127.0.0.1"), lab.Host4),
		each(probe{from: w.Client}, 8000, nobody, nobody, lab.Host4),
	) {
		wait.Go(func() {
			r, err := p.from.Get("--network", p.network, "--timeout", noAnswer.String(), p.to)
			assert.Error(t, err, "%v: %+v", p, r)
			assert.True(t, isRefusedOrSilent(r), "%v: %+v", p, r)
		})
	}
	wait.Wait()
}

// A published port is reached from another network by the name host-gateway stands for.
func mobyAccessToPublishedPort(t *testing.T, w portsSite) {
	w.idle(t, "client", "red", "--add-host", "host.docker.internal:host-gateway")
	defer w.remove(t, "client", "")
	own, _ := w.d.Addrs(t, "client", "red")
	for _, network := range []string{"tcp", "udp"} {
		r := w.d.MustGet(t, "client", "--network", network, "host.docker.internal:8080")
		require.Equal(t, "web", r.View.Host)
		require.Equal(t, own, clientSeen(t, r))
	}
}
