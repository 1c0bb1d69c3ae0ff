// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// malice marks what nobody may receive.
var malice = []byte("MALICE")

// strike is one frame, and the reason and hook that count its drop; empty where the host's own stack
// refuses it.
type strike struct {
	name   string
	from   *lab.NS
	ifname string
	frame  []byte
	want   string
}

// Needs root. Frames that pretend: none reaches anybody, each is counted under its reason, and the flows
// whose tuples they copy go on.
func TestAcceptAttacks(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	w.serve(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.idle(t, "peer", "blue")
	w.idle(t, "evil", "blue")
	w.idle(t, "far", "red")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")

	var captures []*lab.Capture
	marked := func(p gopacket.Packet) bool { return bytes.Contains(p.Data(), malice) }
	containers := map[string]*lab.NS{}
	for _, name := range []string{"web", "peer", "evil", "far"} {
		containers[name] = w.d.NS(t, name)
		captures = append(captures, containers[name].Capture(t, "eth0", marked))
	}
	captures = append(captures, w.Client.Capture(t, lab.ClientIf, marked), w.Client2.Capture(t, lab.ClientIf, marked))
	arrived := func() (n int) {
		for _, c := range captures {
			for _, f := range c.Frames() {
				if !f.Outgoing {
					n++
				}
			}
		}
		return n
	}

	m := w.maps(t)
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "v4", true: "v6"}[v6], func(t *testing.T) {
			strikes, flows := planAttacks(t, w, containers, v6)
			for _, s := range strikes {
				t.Run(s.name, func(t *testing.T) {
					before := readCounters(t, m)
					s.from.SendFrame(t, s.ifname, s.frame)
					if s.want != "" {
						lab.Eventually(t, 2*time.Second, "drop is counted as "+s.want, func() bool {
							return since(t, m, before)[s.want] > 0
						})
						require.Equal(t, counters{s.want: 1}, since(t, m, before).drops())
					}
					require.Zero(t, arrived())
				})
			}
			for _, f := range flows {
				f.say(t, "goes on")
			}
			require.Zero(t, arrived())
		})
	}
	t.Run("isolation", func(t *testing.T) { testIsolation(t, w, containers) })

	// What is allowed is seen: the captures are not blind.
	web4, _ := w.d.Addrs(t, "web", "blue")
	converse(t, containers["peer"], at(web4, 80)).say(t, string(malice))
	lab.Eventually(t, 2*time.Second, "captures see what is allowed", func() bool { return arrived() >= 2 })
}

// planAttacks opens flows and copies their tuples, among other things.
func planAttacks(t *testing.T, w *site, containers map[string]*lab.NS, v6 bool) ([]strike, []*conversation) {
	pick := func(v4, six netip.Addr) netip.Addr {
		if v6 {
			return six
		}
		return v4
	}
	address := func(name, network string) netip.Addr { return pick(w.d.Addrs(t, name, network)) }
	web, peer, evil, far := address("web", "blue"), address("peer", "blue"), address("evil", "blue"), address("far", "red")
	host, hostB := pick(lab.Host4, lab.Host6), pick(lab.HostB4, lab.HostB6)
	client, client2 := pick(lab.Client4, lab.Client6), pick(lab.Client24, lab.Client26)
	v := netip.MustParseAddr
	loopback, outsider := pick(v("127.0.0.1"), v("::1")), pick(v("10.9.9.9"), v("2001:db8:bad::1"))
	unspecified := pick(v("0.1.2.3"), v("::"))

	inside := converse(t, containers["peer"], at(web, 80))
	egress := converse(t, containers["peer"], at(client2, 7000))
	published := converse(t, w.Client, at(host, 8080))
	flows := []*conversation{inside, egress, published}
	insideFrom := netip.AddrPortFrom(peer, portOf(inside.LocalAddr()))
	egressFrom := netip.AddrPortFrom(peer, portOf(egress.LocalAddr()))
	outer := netip.MustParseAddrPort(egress.view.Remote)
	require.Equal(t, hostB, outer.Addr(), "it is not masqueraded")
	publishedFrom := netip.MustParseAddrPort(published.view.Remote)
	require.Equal(t, client, publishedFrom.Addr())
	for _, f := range flows {
		f.say(t, "begins")
	}
	webPort, internet := netip.AddrPortFrom(web, 80), netip.AddrPortFrom(client2, 7000)

	up, bridge := w.Host.MAC(t, lab.HostIf), w.Host.MAC(t, "blue0")
	clientMAC := w.Client.MAC(t, lab.ClientIf)
	mac := func(name string) net.HardwareAddr { return containers[name].MAC(t, "eth0") }

	data := func(src, dst netip.AddrPort, smac, dmac net.HardwareAddr) []byte {
		return packet.TCP(src, dst, packet.MAC(smac, dmac), packet.Flags("PA"), packet.Seq(1000, 1000), packet.Payload(malice))
	}
	udp := func(src, dst netip.AddrPort, smac, dmac net.HardwareAddr) []byte {
		return packet.UDP(src, dst, packet.MAC(smac, dmac), packet.Payload(malice))
	}
	var all []strike
	outside := func(name, want string, frame []byte) {
		all = append(all, strike{"uplink/" + name, w.Client, lab.ClientIf, frame, want})
	}
	neighbour := func(name, want string, frame []byte) {
		all = append(all, strike{"neighbour/" + name, containers["evil"], "eth0", frame, want})
	}
	ap := netip.AddrPortFrom

	const direct, loop, martian = "direct_access/uplink", "loopback_address/uplink", "martian/uplink"
	outside("container flow", direct, data(insideFrom, webPort, clientMAC, up))
	outside("container flow, its answer", direct, data(webPort, insideFrom, clientMAC, up))
	outside("masqueraded flow inside", "", data(egressFrom, internet, clientMAC, up))
	outside("masqueraded flow inside, its answer", direct, data(internet, egressFrom, clientMAC, up))
	outside("masqueraded flow outside, from the host's address", "", data(outer, internet, clientMAC, up))
	outside("published flow inside", direct, data(publishedFrom, webPort, clientMAC, up))
	outside("published flow inside, its answer", "", data(webPort, publishedFrom, clientMAC, up))
	outside("container's address", direct, udp(ap(client, 999), ap(web, 81), clientMAC, up))
	outside("ping of a container", direct, packet.ICMPEcho(client, web, 1, 1, packet.MAC(clientMAC, up), packet.Payload(malice)))
	outside("published port on loopback", loop, data(ap(client, 999), ap(loopback, 8080), clientMAC, up))
	outside("published port from loopback", loop, data(ap(loopback, 999), ap(host, 8080), clientMAC, up))
	outside("published port from the host's own address", martian, data(ap(hostB, 999), ap(host, 8080), clientMAC, up))
	outside("published port from a container's address", martian, data(ap(peer, 999), ap(host, 8080), clientMAC, up))

	const address2, hardware, loops = "spoofed_address/container", "spoofed_mac/container", "loopback_address/container"
	neighbour("flow, with its MAC", hardware, data(insideFrom, webPort, mac("peer"), mac("web")))
	neighbour("flow, with the own MAC", address2, data(insideFrom, webPort, mac("evil"), mac("web")))
	neighbour("flow's answer, with its MAC", hardware, data(webPort, insideFrom, mac("web"), mac("peer")))
	neighbour("flow's answer, with the own MAC", address2, data(webPort, insideFrom, mac("evil"), mac("peer")))
	neighbour("masqueraded flow, with its MAC", hardware, data(egressFrom, internet, mac("peer"), bridge))
	neighbour("masqueraded flow, with the own MAC", address2, data(egressFrom, internet, mac("evil"), bridge))
	neighbour("masqueraded flow's answer", address2, data(internet, egressFrom, mac("evil"), mac("peer")))
	neighbour("masqueraded flow's answer, by the bridge", address2, data(internet, outer, mac("evil"), bridge))
	neighbour("published flow's answer", address2, data(webPort, publishedFrom, mac("evil"), bridge))
	neighbour("foreign address", address2, udp(ap(outsider, 999), webPort, mac("evil"), mac("web")))
	neighbour("address of another network", address2, udp(ap(far, 999), webPort, mac("evil"), mac("web")))
	neighbour("address of the host", address2, udp(ap(host, 999), webPort, mac("evil"), mac("web")))
	neighbour("foreign MAC", hardware, udp(ap(evil, 999), webPort, packet.SrcMAC, mac("web")))
	neighbour("from loopback", loops, udp(ap(loopback, 999), webPort, mac("evil"), mac("web")))
	neighbour("to loopback", loops, udp(ap(evil, 999), ap(loopback, 8080), mac("evil"), bridge))
	neighbour("to a neighbour's loopback", loops, udp(ap(evil, 999), ap(loopback, 80), mac("evil"), mac("web")))
	neighbour("from this network", loops, udp(ap(unspecified, 999), webPort, mac("evil"), mac("web")))
	neighbour("to this network", loops, udp(ap(evil, 999), ap(unspecified, 80), mac("evil"), bridge))
	neighbour("other network", "isolated/container", udp(ap(evil, 999), ap(far, 80), mac("evil"), bridge))
	if !v6 {
		for _, reply := range []bool{false, true} {
			name := map[bool]string{false: "ARP request", true: "ARP reply"}[reply]
			neighbour(name+" for another", address2, pad(packet.ARP(peer, web, reply, packet.MAC(mac("evil"), mac("web")))))
			neighbour(name+" for another with its MAC", hardware, pad(packet.ARP(peer, web, reply, packet.MAC(mac("peer"), mac("web")))))
		}
	} else {
		neighbour("solicitation for another", address2, packet.NeighborSolicit(peer, web, packet.MAC(mac("evil"), mac("web"))))
		neighbour("advertisement of another's address", address2, advertisement(evil, web, peer, mac("evil"), mac("web")))
	}
	return all, flows
}

// pad marks a frame behind its end.
func pad(frame []byte) []byte { return append(frame, malice...) }

func portOf(a net.Addr) uint16 { return netip.MustParseAddrPort(a.String()).Port() }

// advertisement says that the target's address is at smac.
func advertisement(src, dst, target netip.Addr, smac, dmac net.HardwareAddr) []byte {
	ip := &layers.IPv6{Version: 6, NextHeader: layers.IPProtocolICMPv6, HopLimit: 255, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborAdvertisement, 0)}
	_ = icmp.SetNetworkLayerForChecksum(ip)
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: smac, DstMAC: dmac, EthernetType: layers.EthernetTypeIPv6}, ip, icmp,
		&layers.ICMPv6NeighborAdvertisement{Flags: 0x60, TargetAddress: target.AsSlice(), Options: layers.ICMPv6Options{
			{Type: layers.ICMPv6OptTargetAddress, Data: smac},
		}})
	if err != nil {
		panic(err)
	}
	return buf.Bytes()
}

// testIsolation: what is not published or not allowed is not reached, by real clients, and is reached
// once it is.
func testIsolation(t *testing.T, w *site, containers map[string]*lab.NS) {
	m := w.maps(t)
	web4, web6 := w.d.Addrs(t, "web", "blue")
	w.Client.AddRoute(t, netip.PrefixFrom(web4, 16).Masked(), lab.Host4)
	w.Client.AddRoute(t, netip.PrefixFrom(web6, 64).Masked(), lab.Host6)
	for _, to := range []netip.Addr{web4, web6} {
		for _, c := range []struct {
			from *lab.NS
			want string
		}{
			{w.Client, "direct_access/uplink"},
			{containers["far"], "isolated/container"},
		} {
			for _, network := range []string{"tcp", "udp"} {
				before := readCounters(t, m)
				_, err := c.from.Get("--network", network, "--timeout", "200ms", at(to, 80))
				require.Error(t, err)
				require.NotZero(t, since(t, m, before)[c.want], "%s", to)
			}
		}
	}
	for _, to := range []netip.Addr{lab.Host4, lab.Host6} {
		r, err := w.Client.Get(at(to, 80)) // not the published port
		require.Error(t, err)
		require.Equal(t, "ECONNREFUSED", r.Errno)
	}
	w.b.MustCLI(t, "network", "allow", "blue", "red")
	for _, to := range []netip.Addr{web4, web6} {
		containers["far"].MustGet(t, at(to, 80))
		containers["far"].MustGet(t, "--network", "udp", at(to, 80))
	}
	w.b.MustCLI(t, "network", "disallow", "blue", "red")
	for _, to := range []netip.Addr{web4, web6} {
		_, err := containers["far"].Get("--timeout", "200ms", at(to, 80))
		require.Error(t, err)
	}
}
