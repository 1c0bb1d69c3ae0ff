// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/policy"
)

// The devices of a host with about everything: two Docker bridges, another runtime's bridge
// and pairs, a bond, a VRF, a tunnel.
var hostDevices = []device{
	{index: 1, name: "lo", kind: "device", loopback: true},
	{index: 2, name: "eth0", kind: "device", ethernet: true, up: true, mtu: 1500, mac: policy.MAC{2, 0, 0, 0, 0, 2}},
	{index: 3, name: "docker0", kind: "bridge", ethernet: true, up: true, mtu: 1500, mac: policy.MAC{2, 0, 0, 0, 0, 3}},
	{index: 4, name: "br-web", kind: "bridge", ethernet: true},
	{index: 5, name: "veth5", kind: "veth", ethernet: true, master: 3, peer: 2, peerNS: 7},
	{index: 6, name: "veth6", kind: "veth", ethernet: true, master: 4, peer: 7, peerNS: -1},
	{index: 7, name: "veth7", kind: "veth", ethernet: true, peer: 6, peerNS: -1, mac: policy.MAC{2, 0, 0, 0, 0, 7}},
	{index: 8, name: "cni0", kind: "bridge", ethernet: true},
	{index: 9, name: "veth9", kind: "veth", ethernet: true, master: 8, peer: 2, peerNS: 8},
	{index: 10, name: "cali10", kind: "veth", ethernet: true, peer: 2, peerNS: 9},
	{index: 11, name: "bond0", kind: "bond", ethernet: true},
	{index: 12, name: "eth1", kind: "device", ethernet: true, master: 11},
	{index: 13, name: "vrf0", kind: "vrf", ethernet: true},
	{index: 14, name: "eth2", kind: "device", ethernet: true, master: 13},
	{index: 15, name: "wg0", kind: "wireguard", mtu: 1420},
	{index: 16, name: "eth3", kind: "device", ethernet: true},
	{index: 17, name: "lan", kind: "veth", ethernet: true, peer: 2, peerNS: 10},
	{index: 18, name: "eth4", kind: "device", ethernet: true},
	{index: 19, name: "eth0.7", kind: "vlan", ethernet: true, peer: 2, peerNS: -1},
}

var hostAddresses = []address{
	{1, netip.MustParsePrefix("127.0.0.1/8")},
	{1, netip.MustParsePrefix("::1/128")},
	{2, netip.MustParsePrefix("192.0.2.1/24")},
	{2, netip.MustParsePrefix("fe80::2/64")},
	{3, netip.MustParsePrefix("172.17.0.1/16")},
	{5, netip.MustParsePrefix("fe80::5/64")},
	{7, netip.MustParsePrefix("172.18.0.9/16")},
	{8, netip.MustParsePrefix("10.88.0.1/16")},
	{10, netip.MustParsePrefix("fe80::10/64")},
	{11, netip.MustParsePrefix("198.51.100.1/24")},
	{12, netip.MustParsePrefix("198.51.100.9/24")},
	{14, netip.MustParsePrefix("203.0.113.1/24")},
	{15, netip.MustParsePrefix("10.6.0.1/32")},
	{17, netip.MustParsePrefix("2001:db8::1/64")},
	{18, netip.MustParsePrefix("fe80::18/64")},
}

func names(d policy.Devices) (bridges, links, uplinks []string) {
	for _, b := range d.Bridges {
		bridges = append(bridges, b.Name)
	}
	for _, l := range d.Links {
		links = append(links, l.Name)
	}
	for _, u := range d.Uplinks {
		uplinks = append(uplinks, u.Name)
	}
	return
}

func TestAssemble(t *testing.T) {
	served := map[string]bool{"docker0": true, "br-web": true, "br-gone": true}
	asked := 0
	got := assemble(hostDevices, hostAddresses, served, nil, func(near *device) policy.MAC {
		require.Equal(t, [2]int{7, 2}, [2]int{near.peerNS, near.peer}, "only served links are asked for")
		asked++
		return policy.MAC{2, 0, 0, 0, 7, 2}
	})
	require.Equal(t, 1, asked)

	bridges, _, uplinks := names(got)
	require.Equal(t, []string{"docker0", "br-web", "cni0"}, bridges)
	require.Equal(t, []policy.Link{
		{Ifindex: 5, Name: "veth5", Bridge: "docker0", PeerMAC: policy.MAC{2, 0, 0, 0, 7, 2}, PeerNS: 7},
		{Ifindex: 6, Name: "veth6", Bridge: "br-web", PeerMAC: policy.MAC{2, 0, 0, 0, 0, 7}, PeerNS: -1},
	}, got.Links)
	// Another runtime's bridge is a way out like any other; its ports are not.
	require.Equal(t, []string{"eth0", "cni0", "bond0", "eth2", "wg0", "lan", "eth4"}, uplinks)
	require.Equal(t, policy.Uplink{
		Ifindex: 2, Name: "eth0", Ethernet: true, MAC: policy.MAC{2, 0, 0, 0, 0, 2}, Tagged: true, MTU: 1500,
		Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("fe80::2/64")},
	}, got.Uplinks[0])
	require.False(t, got.Uplinks[4].Ethernet, "wg0")
	for _, u := range got.Uplinks[1:] {
		require.False(t, u.Tagged, u.Name)
	}
	require.Equal(t, policy.Bridge{
		Ifindex: 3, Name: "docker0", MAC: policy.MAC{2, 0, 0, 0, 0, 3}, MTU: 1500, Up: true,
		Addrs: []netip.Prefix{netip.MustParsePrefix("172.17.0.1/16")},
	}, got.Bridges[0])
	require.Len(t, got.HostAddrs, len(hostAddresses))
	require.Equal(t, policy.HostAddr{Addr: netip.MustParseAddr("127.0.0.1"), Ifindex: 1}, got.HostAddrs[0])
}

func TestAssembleOverride(t *testing.T) {
	noPeers := func(*device) policy.MAC { return policy.MAC{} }
	// A device named by the user needs no address; one that has gone is left out.
	got := assemble(hostDevices, hostAddresses, map[string]bool{"docker0": true}, []string{"eth3", "wg0", "gone"}, noPeers)
	_, links, uplinks := names(got)
	require.Equal(t, []string{"veth5"}, links)
	require.Equal(t, []string{"wg0", "eth3"}, uplinks)
}

func TestCheckUplinks(t *testing.T) {
	for name, text := range map[string]string{
		"eth0": "",
		"eth2": "",
		"lan":  "",
		"eht0": `uplink "eht0": no such device; nearest: eth0, cni0, eth2`,
		"lo":   `uplink "lo": the loopback device leads nowhere; leave it out`,
		"eth1": `uplink "eth1": it is a port of bond0; name that instead`,
	} {
		err := checkUplinks([]string{name}, hostDevices)
		if text == "" {
			require.NoError(t, err)
			continue
		}
		require.EqualError(t, err, text)
	}
	require.ErrorContains(t, checkUplinks([]string{"x"}, hostDevices[:1]), "no such device")
}

func TestNearest(t *testing.T) {
	have := []string{"eth0", "eth1", "wlan0", "docker0", "eth0"}
	require.Equal(t, []string{"eth0", "eth1", "wlan0"}, Nearest("eth", have))
	require.Equal(t, []string{"docker0", "eth0", "wlan0"}, Nearest("doker0", have))
	require.Equal(t, []string{"eth0"}, Nearest("", []string{"eth0"}))
	require.Empty(t, Nearest("eth0", nil))
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"", "abc", 3}, {"kitten", "sitting", 3}, {"eht0", "eth0", 2}, {"ä", "a", 1}} {
		require.Equal(t, c.want, distance(c.a, c.b), "%q %q", c.a, c.b)
		require.Equal(t, c.want, distance(c.b, c.a), "%q %q", c.b, c.a)
	}
}
